//! `filesystem.Filesystem`.

use serde_json::{Value, json};

use super::client::{Daemon, SOON, own_user};

const STAT: &str = "filesystem.Filesystem/Stat";
const MAKE_DIR: &str = "filesystem.Filesystem/MakeDir";
const MOVE: &str = "filesystem.Filesystem/Move";
const LIST: &str = "filesystem.Filesystem/ListDir";
const REMOVE: &str = "filesystem.Filesystem/Remove";

#[tokio::test]
async fn entries_are_described_as_the_contract_says() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("f.txt");
    std::fs::write(&file, "12345").expect("written");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    std::fs::set_permissions(&file, mode).expect("set");
    let answer = daemon.call(STAT, json!({ "path": file.to_string_lossy() })).await;
    let entry = answer.json()["entry"].clone();
    assert_eq!(entry["name"], "f.txt");
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert_eq!(entry["path"], json!(file.to_string_lossy()));
    assert_eq!(entry["size"], "5", "64-bit numbers are text in this JSON");
    assert_eq!(entry["mode"], 0o640);
    assert_eq!(entry["permissions"], "-rw-r-----");
    assert_eq!(entry["owner"], json!(own_user()));
    assert!(entry["modifiedTime"].as_str().is_some_and(|time| time.ends_with('Z')));
    assert_eq!(entry.get("symlinkTarget"), None);

    std::os::unix::fs::symlink(&file, dir.path().join("l")).expect("linked");
    let path = dir.path().join("l");
    let entry = daemon.call(STAT, json!({ "path": path.to_string_lossy() })).await.json();
    assert_eq!(entry["entry"]["type"], "FILE_TYPE_FILE");
    assert_eq!(entry["entry"]["permissions"], "Lrwxrwxrwx");
    assert_eq!(entry["entry"]["isSymlink"], true);
    daemon.stop().await;
}

#[tokio::test]
async fn the_tree_changes_as_asked_with_the_codes_of_the_contract() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let path = |name: &str| json!({ "path": at(name) });
    let code = async |method: &str, body: Value| {
        let answer = daemon.call(method, body).await;
        answer.json()["code"].as_str().map(str::to_owned)
    };
    let made = daemon.call(MAKE_DIR, path("a/b/c")).await.json();
    assert_eq!(made["entry"]["type"], "FILE_TYPE_DIRECTORY");
    assert_eq!(code(MAKE_DIR, path("a/b")).await.as_deref(), Some("already_exists"));
    std::fs::write(at("a/file"), "").expect("written");
    assert_eq!(code(MAKE_DIR, path("a/file")).await.as_deref(), Some("invalid_argument"));
    assert_eq!(code(LIST, path("a/file")).await.as_deref(), Some("invalid_argument"));
    assert_eq!(code(LIST, path("zz")).await.as_deref(), Some("not_found"));
    assert_eq!(code(STAT, path("zz")).await.as_deref(), Some("not_found"));

    let names = async |depth: u32| -> Vec<String> {
        let answer = daemon.call(LIST, json!({ "path": at("a"), "depth": depth })).await.json();
        let entries = answer["entries"].as_array().cloned().unwrap_or_default();
        entries.iter().map(|entry| entry["name"].as_str().expect("named").to_owned()).collect()
    };
    assert_eq!(names(0).await, ["b", "file"]);
    assert_eq!(names(2).await, ["b", "c", "file"]);

    let moved = json!({ "source": at("a/file"), "destination": at("new/place") });
    let answer = daemon.call(MOVE, moved.clone()).await.json();
    assert_eq!(answer["entry"]["path"], json!(at("new/place")));
    assert_eq!(code(MOVE, moved).await.as_deref(), Some("not_found"));
    assert_eq!(daemon.call(REMOVE, path("a")).await.json(), json!({}));
    assert_eq!(daemon.call(REMOVE, path("a")).await.json(), json!({}), "removing nothing is fine");
    assert_eq!(code(STAT, path("a")).await.as_deref(), Some("not_found"));
    daemon.stop().await;
}

#[tokio::test]
async fn changes_stream_from_a_watched_tree() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("sub")).expect("made");
    let request = json!({
        "path": dir.path().to_string_lossy(), "recursive": true, "includeEntry": true,
    });
    let mut events = daemon.open("filesystem.Filesystem/WatchDir", request).await;
    assert_eq!(events.next().await, Some(json!({ "start": {} })));
    let file = dir.path().join("sub/f");
    std::fs::write(&file, "x").expect("written");
    let created = events.next().await.expect("an event");
    assert_eq!(created["filesystem"]["name"], "sub/f");
    assert_eq!(created["filesystem"]["type"], "EVENT_TYPE_CREATE");
    assert_eq!(created["filesystem"]["entry"]["type"], "FILE_TYPE_FILE");
    let written = events.next().await.expect("an event");
    assert_eq!(written["filesystem"]["type"], "EVENT_TYPE_WRITE");

    std::fs::rename(&file, dir.path().join("g")).expect("moved");
    let gone = events.next().await.expect("an event");
    assert_eq!(
        (&gone["filesystem"]["name"], &gone["filesystem"]["type"]),
        (&json!("sub/f"), &json!("EVENT_TYPE_RENAME"))
    );
    let come = events.next().await.expect("an event");
    assert_eq!(
        (&come["filesystem"]["name"], &come["filesystem"]["type"]),
        (&json!("g"), &json!("EVENT_TYPE_CREATE"))
    );

    // A new directory is watched as well, and what was put in before that is told.
    std::fs::create_dir_all(dir.path().join("new/deep")).expect("made");
    std::fs::write(dir.path().join("new/deep/h"), "").expect("written");
    loop {
        let event = events.next().await.expect("an event");
        if event["filesystem"]["name"] == "new/deep/h" {
            break;
        }
    }
    std::fs::remove_file(dir.path().join("g")).expect("removed");
    loop {
        let event = events.next().await.expect("an event");
        if event["filesystem"]["name"] == "g" {
            assert_eq!(event["filesystem"]["type"], "EVENT_TYPE_REMOVE");
            break;
        }
    }
    daemon.stop().await;
}

#[tokio::test]
async fn changes_can_be_polled() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = json!({ "path": dir.path().to_string_lossy() });
    let answer = daemon.call("filesystem.Filesystem/CreateWatcher", path).await.json();
    let id = json!({ "watcherId": answer["watcherId"].as_str().expect("an id") });
    std::fs::write(dir.path().join("f"), "x").expect("written");
    let seen = async {
        let mut names = Vec::new();
        while names.len() < 2 {
            let method = "filesystem.Filesystem/GetWatcherEvents";
            let answer = daemon.call(method, id.clone()).await.json();
            for event in answer["events"].as_array().into_iter().flatten() {
                names.push((event["name"].clone(), event["type"].clone()));
            }
        }
        names
    };
    let seen = tokio::time::timeout(SOON, seen).await.expect("events in time");
    assert_eq!(seen[0], (json!("f"), json!("EVENT_TYPE_CREATE")));
    assert_eq!(seen[1], (json!("f"), json!("EVENT_TYPE_WRITE")));

    let removed = daemon.call("filesystem.Filesystem/RemoveWatcher", id.clone()).await;
    assert_eq!(removed.json(), json!({}));
    for method in ["GetWatcherEvents", "RemoveWatcher"] {
        let method = format!("filesystem.Filesystem/{method}");
        let answer = daemon.call(&method, id.clone()).await;
        assert_eq!(answer.json()["code"], "not_found");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn only_directories_can_be_watched() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("f");
    std::fs::write(&file, "").expect("written");
    let code = async |path: &std::path::Path| {
        let body = json!({ "path": path.to_string_lossy() });
        let answer = daemon.call("filesystem.Filesystem/CreateWatcher", body).await;
        answer.json()["code"].clone()
    };
    assert_eq!(code(&file).await, "invalid_argument");
    assert_eq!(code(&dir.path().join("missing")).await, "not_found");
    daemon.stop().await;
}
