//! The awkward cases of `filesystem.Filesystem`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use serde_json::{Value, json};

use super::client::{Daemon, SmallDisk, unprivileged};

async fn call(daemon: &Daemon, method: &str, body: Value) -> Value {
    daemon.call(&format!("filesystem.Filesystem/{method}"), body).await.json()
}

fn text(path: &Path) -> Value {
    json!(path.to_string_lossy())
}

#[tokio::test]
async fn names_and_paths_of_any_kind_are_answered() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let odd = "a b\u{e9}\u{1F980}\"'\\\n$(x)*?";
    std::fs::write(dir.path().join(odd), "x").expect("written");
    let entry = call(&daemon, "Stat", json!({ "path": text(&dir.path().join(odd)) })).await;
    assert_eq!(entry["entry"]["name"], odd);
    std::fs::write(dir.path().join(OsStr::from_bytes(b"not \xFF text")), "").expect("written");
    let listed = call(&daemon, "ListDir", json!({ "path": text(dir.path()) })).await;
    let names: Vec<_> =
        listed["entries"].as_array().expect("two").iter().map(|entry| &entry["name"]).collect();
    assert_eq!(names, [odd, "not \u{FFFD} text"]);

    let code =
        async |path: &str| call(&daemon, "Stat", json!({ "path": path })).await["code"].clone();
    assert_eq!(code("a\0b").await, "invalid_argument");
    assert_eq!(code(&"long/".repeat(1000)).await, "invalid_argument");
    assert_eq!(code(&format!("/{}", "n".repeat(256))).await, "invalid_argument");
    assert_eq!(code("~nobody/x").await, "invalid_argument");
    let below_file = dir.path().join(odd).join("below");
    assert_eq!(
        code(&below_file.to_string_lossy()).await,
        "not_found",
        "as a client's exists() asks"
    );
    daemon.stop().await;
}

#[tokio::test]
async fn every_kind_of_entry_has_the_text_go_gives_it() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let (fifo, all) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o644));
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), fifo, all, 0).expect("a pipe");
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
    std::fs::create_dir(at("sticky")).expect("made");
    std::fs::write(at("program"), "").expect("written");
    for (name, mode) in
        [("pipe", 0o640), ("socket", 0o755), ("sticky", 0o1777), ("program", 0o6755)]
    {
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).expect("set");
    }
    symlink("loop", at("loop")).expect("linked");
    symlink("gone", at("broken")).expect("linked");
    symlink("sticky", at("to-dir")).expect("linked");
    for (path, kind, mode, permissions) in [
        (at("pipe"), "", 0o640, "prw-r-----"),
        (at("socket"), "", 0o755, "Srwxr-xr-x"),
        (at("sticky"), "FILE_TYPE_DIRECTORY", 0o777, "dtrwxrwxrwx"),
        (at("program"), "FILE_TYPE_FILE", 0o755, "ugrwxr-xr-x"),
        (at("loop"), "", 0, "Lrwxrwxrwx"),
        (at("broken"), "", 0, "Lrwxrwxrwx"),
        (at("to-dir"), "FILE_TYPE_DIRECTORY", 0o777, "Lrwxrwxrwx"),
        ("/dev/null".into(), "", 0o666, "Dcrw-rw-rw-"),
    ] {
        let entry = call(&daemon, "Stat", json!({ "path": text(&path) })).await["entry"].clone();
        // JSON leaves out what is zero.
        assert_eq!(entry["type"].as_str().unwrap_or_default(), kind, "{entry}");
        assert_eq!(entry["mode"].as_u64().unwrap_or_default(), mode, "{entry}");
        assert_eq!(entry["permissions"], permissions, "{entry}");
    }
    let entry =
        call(&daemon, "Stat", json!({ "path": text(&at("to-dir")) })).await["entry"].clone();
    let target = std::fs::canonicalize(at("sticky")).expect("there");
    assert_eq!((&entry["symlinkTarget"], &entry["isSymlink"]), (&text(&target), &json!(true)));
    daemon.stop().await;
}

#[tokio::test]
async fn listings_are_complete_through_a_link_and_in_depth() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let many = dir.path().join("many");
    std::fs::create_dir(&many).expect("made");
    for number in 0..10_000 {
        std::fs::write(many.join(format!("{number:05}")), "").expect("written");
    }
    symlink(&many, dir.path().join("link")).expect("linked");
    let listed = call(&daemon, "ListDir", json!({ "path": text(&dir.path().join("link")) })).await;
    let entries = listed["entries"].as_array().expect("entries");
    assert_eq!(entries.len(), 10_000);
    assert_eq!(entries[4321]["name"], "04321");
    assert_eq!(entries[4321]["path"], text(&dir.path().join("link/04321")));
    // A listing follows no link below, however deep it goes.
    let deep = json!({ "path": text(dir.path()), "depth": u32::MAX });
    let listed = call(&daemon, "ListDir", deep).await;
    assert_eq!(listed["entries"].as_array().expect("entries").len(), 10_002);
    daemon.stop().await;
}

/// Makes a chain of directories deeper than any path can name.
fn make_deep(top: &Path, levels: usize) {
    std::fs::create_dir(top).expect("made");
    let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let mut dir = rustix::fs::open(top, flags, rustix::fs::Mode::empty()).expect("there");
    for _ in 0..levels {
        rustix::fs::mkdirat(&dir, "d", rustix::fs::Mode::RWXU).expect("made");
        dir = rustix::fs::openat(&dir, "d", flags, rustix::fs::Mode::empty()).expect("there");
    }
}

#[tokio::test]
async fn trees_deeper_than_any_path_are_listed_and_removed() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    make_deep(&top, 2500);
    let deep = json!({ "path": text(&top), "depth": u32::MAX });
    let listed = call(&daemon, "ListDir", deep).await;
    let count = listed["entries"].as_array().expect("entries").len();
    assert!((1000..2500).contains(&count), "{count}");
    assert_eq!(call(&daemon, "Remove", json!({ "path": text(&top) })).await, json!({}));
    assert!(!top.exists());
    daemon.stop().await;
}

#[tokio::test]
async fn a_tree_is_removed_while_it_is_being_filled() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    std::fs::create_dir(&top).expect("made");
    let filling = {
        let top = top.clone();
        // Ends when the tree is gone.
        std::thread::spawn(move || {
            let made = (0..1_000_000).take_while(|number| {
                let sub = top.join(format!("s{}", number % 7));
                // A removal in between is what the test is about.
                let _ = std::fs::create_dir(&sub);
                let _ = std::fs::write(sub.join(number.to_string()), "x");
                top.exists()
            });
            made.count()
        })
    };
    while std::fs::read_dir(&top).map_or(0, Iterator::count) < 7 {
        tokio::task::yield_now().await;
    }
    let answer = call(&daemon, "Remove", json!({ "path": text(&top) })).await;
    assert_eq!(answer, json!({}));
    assert!(filling.join().expect("no panic") < 1_000_000, "it was being filled");
    assert!(!top.exists());
    daemon.stop().await;
}

#[tokio::test]
async fn removing_takes_links_and_leaves_what_they_point_at_and_what_is_mounted() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("kept")).expect("made");
    std::fs::write(at("kept/file"), "x").expect("written");
    symlink(at("kept"), at("link")).expect("linked");
    std::fs::create_dir(at("tree")).expect("made");
    symlink(at("kept"), at("tree/link")).expect("linked");
    for gone in ["link", "tree"] {
        let answer = call(&daemon, "Remove", json!({ "path": text(&at(gone)) })).await;
        assert_eq!(answer, json!({}));
        assert!(std::fs::symlink_metadata(at(gone)).is_err());
    }
    assert!(at("kept/file").exists());
    // Everything below this one refuses by itself: nothing depends on the answer being right.
    let answer = call(&daemon, "Remove", json!({ "path": "/proc" })).await;
    assert_eq!(answer["code"], "invalid_argument", "{answer}");
    let Some(disk) = SmallDisk::mount(1 << 20) else { return daemon.stop().await };
    std::fs::write(disk.path().join("file"), "x").expect("written");
    let answer = call(&daemon, "Remove", json!({ "path": text(disk.path()) })).await;
    assert_eq!(answer["code"], "invalid_argument", "{answer}");
    assert!(disk.path().join("file").exists());
    daemon.stop().await;
}

#[tokio::test]
async fn moves_that_cannot_be_say_why() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    for made in ["a/b", "full/x", "empty"] {
        std::fs::create_dir_all(at(made)).expect("made");
    }
    std::fs::write(at("file"), "1").expect("written");
    std::fs::write(at("other"), "2").expect("written");
    for (from, to, code) in [
        ("a", "a/b/c", "invalid_argument"),
        ("a", "full", "already_exists"),
        ("a", "file", "invalid_argument"),
        ("file", "empty", "invalid_argument"),
        ("a", "file/below", "invalid_argument"),
        ("missing", "x", "not_found"),
        ("file/below", "x", "not_found"),
    ] {
        let body = json!({ "source": text(&at(from)), "destination": text(&at(to)) });
        let answer = call(&daemon, "Move", body).await;
        assert_eq!(answer["code"], code, "{from} to {to}: {answer}");
    }
    assert!(!at("a/b/c").exists());
    for (from, to) in [("file", "other"), ("a", "empty"), ("empty", "empty")] {
        let body = json!({ "source": text(&at(from)), "destination": text(&at(to)) });
        assert_eq!(call(&daemon, "Move", body).await["entry"]["path"], text(&at(to)));
    }
    assert_eq!(std::fs::read_to_string(at("other")).expect("there"), "1");
    assert!(at("empty/b").is_dir());
    // A link is moved, not what it points at.
    symlink("nowhere", at("broken")).expect("linked");
    let body = json!({ "source": text(&at("broken")), "destination": text(&at("new/broken")) });
    assert_eq!(call(&daemon, "Move", body).await["entry"]["isSymlink"], true);
    daemon.stop().await;
}

#[tokio::test]
async fn a_tree_moves_to_another_file_system_with_all_it_has() {
    let Some(disk) = SmallDisk::mount(8 << 20) else { return };
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join("tree").join(name);
    std::fs::create_dir_all(at("sub")).expect("made");
    std::fs::write(at("sub/file"), "content").expect("written");
    std::fs::set_permissions(at("sub/file"), std::fs::Permissions::from_mode(0o4750)).expect("set");
    let tagged = xattr::set(at("sub/file"), "user.e2b.stage", b"draft").is_ok();
    symlink("sub/file", at("link")).expect("linked");
    symlink("nowhere", at("broken")).expect("linked");
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), fifo, mode, 0).expect("a pipe");
    if let Some(user) = unprivileged() {
        std::os::unix::fs::chown(at("sub"), Some(user.uid), Some(user.gid)).expect("given");
    }
    let before = std::fs::metadata(at("sub")).expect("there");

    let target = disk.path().join("deeper/moved");
    let body = json!({ "source": text(&dir.path().join("tree")), "destination": text(&target) });
    let answer = call(&daemon, "Move", body).await;
    assert_eq!(answer["entry"]["path"], text(&target), "{answer}");
    assert!(!dir.path().join("tree").exists());
    let file = std::fs::metadata(target.join("sub/file")).expect("there");
    assert_eq!(file.mode() & 0o7777, 0o4750);
    assert_eq!(std::fs::read_to_string(target.join("sub/file")).expect("there"), "content");
    let after = std::fs::metadata(target.join("sub")).expect("there");
    assert_eq!((after.uid(), after.mtime()), (before.uid(), before.mtime()));
    assert_eq!(std::fs::read_link(target.join("broken")).expect("there"), Path::new("nowhere"));
    assert_eq!(std::fs::read_link(target.join("link")).expect("there"), Path::new("sub/file"));
    let pipe = std::fs::metadata(target.join("pipe")).expect("there");
    assert_eq!(pipe.mode(), 0o010_400);
    let metadata = xattr::get(target.join("sub/file"), "user.e2b.stage").ok().flatten();
    if tagged && metadata.is_none() {
        belljar_testkit::skip("the file system in memory has no user attributes");
    } else {
        assert_eq!(metadata.as_deref(), tagged.then_some(b"draft".as_slice()));
    }

    // What does not fit stays where it is, whole.
    std::fs::write(dir.path().join("large"), vec![1; 10 << 20]).expect("written");
    let body = json!({
        "source": text(&dir.path().join("large")), "destination": text(&disk.path().join("large")),
    });
    assert_eq!(call(&daemon, "Move", body).await["code"], "resource_exhausted");
    assert_eq!(std::fs::metadata(dir.path().join("large")).expect("there").len(), 10 << 20);
    assert_eq!(std::fs::read_dir(disk.path()).expect("there").count(), 1, "no leftovers");
    daemon.stop().await;
}
