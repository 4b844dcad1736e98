//! Whose rights a file call has: the model that `files::reach` states.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use belljar_envd::accounts::User;
use serde_json::json;

use super::client::{Answer, Daemon, unprivileged};

const OCTETS: &str = "application/octet-stream";

/// A secret and a directory of root's, and a directory in which a user without rights may do what
/// it likes.
struct Ground {
    dir: tempfile::TempDir,
    user: User,
}

impl Ground {
    fn prepare() -> Option<Ground> {
        let user = unprivileged()?;
        let dir = tempfile::tempdir().expect("a directory");
        let open = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set");
        };
        open(dir.path(), 0o755);
        let ground = Ground { dir, user };
        std::fs::write(ground.at("secret"), "secret").expect("written");
        open(&ground.at("secret"), 0o600);
        for made in ["roots", "own"] {
            std::fs::create_dir(ground.at(made)).expect("made");
            open(&ground.at(made), 0o755);
        }
        chown(ground.at("own"), Some(ground.user.uid), Some(ground.user.gid)).expect("given");
        Some(ground)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A link the user made.
    fn link(&self, name: &str, to: &str) {
        symlink(self.at(to), self.at(name)).expect("linked");
        lchown(self.at(name), Some(self.user.uid), Some(self.user.gid)).expect("given");
    }

    fn url(&self, name: &str, user: &str) -> String {
        format!("/files?path={}&username={user}", self.at(name).display())
    }

    fn owner(&self, name: &str) -> u32 {
        std::fs::symlink_metadata(self.at(name)).expect("there").uid()
    }
}

fn status(answer: &Answer) -> u16 {
    answer.status.as_u16()
}

#[tokio::test]
async fn a_plain_path_is_used_with_the_daemons_rights() {
    let Some(ground) = Ground::prepare() else { return };
    let daemon = Daemon::start().await;
    let name = ground.user.name.clone();
    assert_eq!(daemon.get(&ground.url("secret", &name)).await.text(), "secret");
    assert_eq!(status(&daemon.post(&ground.url("roots/new/f", &name), OCTETS, "x").await), 200);
    assert_eq!(ground.owner("roots/new"), ground.user.uid);
    assert_eq!(ground.owner("roots/new/f"), ground.user.uid);
    assert_eq!(ground.owner("roots"), 0);
    // Who writes a file owns it; but not when it has another name somewhere.
    std::fs::write(ground.at("roots/old"), "").expect("written");
    std::fs::write(ground.at("roots/twin"), "").expect("written");
    std::fs::hard_link(ground.at("roots/twin"), ground.at("own/twin")).expect("linked");
    assert_eq!(status(&daemon.post(&ground.url("roots/old", &name), OCTETS, "x").await), 200);
    assert_eq!(ground.owner("roots/old"), ground.user.uid);
    assert_eq!(status(&daemon.post(&ground.url("own/twin", &name), OCTETS, "x").await), 200);
    assert_eq!(ground.owner("roots/twin"), 0);
    daemon.post("/files?path=/dev/null", OCTETS, "x").await;
    assert_eq!(std::fs::metadata("/dev/null").expect("there").uid(), 0);
    daemon.stop().await;
}

#[tokio::test]
async fn a_users_link_is_followed_with_that_users_rights() {
    let Some(ground) = Ground::prepare() else { return };
    let daemon = Daemon::start().await;
    let name = ground.user.name.clone();
    ground.link("own/to-secret", "secret");
    ground.link("own/to-roots", "roots");
    ground.link("own/to-own", "own");
    for answer in [
        daemon.get(&ground.url("own/to-secret", &name)).await,
        daemon.post(&ground.url("own/to-secret", &name), OCTETS, "x").await,
        daemon.post(&ground.url("own/to-roots/f", &name), OCTETS, "x").await,
        daemon.post(&ground.url("own/to-roots/d/f", &name), OCTETS, "x").await,
    ] {
        assert_eq!(status(&answer), 403, "{:?}", answer.body);
        let message = answer.json()["message"].as_str().expect("text").to_owned();
        assert!(message.contains("symbolic link") && message.contains(&name), "{message}");
    }
    std::fs::write(ground.at("roots/kept"), "kept").expect("written");
    let path = |name: &str| json!(ground.at(name).to_string_lossy());
    for (method, body) in [
        ("MakeDir", json!({ "path": path("own/to-roots/d") })),
        ("Remove", json!({ "path": path("own/to-roots/kept") })),
        ("Move", json!({ "source": path("own/to-roots/kept"), "destination": path("own/k") })),
        ("Move", json!({ "source": path("own/to-own"), "destination": path("own/to-roots/k") })),
    ] {
        let method = format!("filesystem.Filesystem/{method}");
        let answer = daemon.call_as(&name, &method, body).await;
        assert_eq!(answer.json()["code"], "permission_denied", "{method}: {:?}", answer.body);
    }
    let body = json!({
        "source_paths": [path("own/to-roots/kept")], "destination": path("own/k"), "username": name,
    });
    let answer = daemon.post("/files/compose", "application/json", body.to_string()).await;
    assert_eq!(status(&answer), 403, "{:?}", answer.body);
    assert_eq!(std::fs::read_to_string(ground.at("secret")).expect("there"), "secret");
    assert_eq!(ground.owner("secret"), 0);
    let left: Vec<_> = std::fs::read_dir(ground.at("roots")).expect("there").flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");

    // What the user may do, it may do through its links too; and root's own links are no matter.
    let own = daemon.post(&ground.url("own/to-own/mine", &name), OCTETS, "x").await;
    assert_eq!(status(&own), 200, "{:?}", own.body);
    assert_eq!(ground.owner("own/mine"), ground.user.uid);
    symlink(ground.at("secret"), ground.at("roots-link")).expect("linked");
    assert_eq!(daemon.get(&ground.url("roots-link", &name)).await.text(), "secret");
    assert_eq!(daemon.get(&ground.url("own/to-secret", "root")).await.text(), "secret");
    // Looking follows every link.
    let stat = json!({ "path": path("own/to-secret") });
    let answer = daemon.call_as(&name, "filesystem.Filesystem/Stat", stat).await;
    assert_eq!(
        answer.json()["entry"]["size"],
        ground.at("secret").to_string_lossy().len().to_string()
    );
    daemon.stop().await;
}

/// The user swaps a file for a link, and a directory for a link, as fast as it can, while a client
/// reads and writes there in its name.
#[tokio::test]
async fn links_that_flip_win_nothing() {
    let Some(ground) = Ground::prepare() else { return };
    let daemon = Daemon::start().await;
    let name = ground.user.name.clone();
    std::fs::write(ground.at("own/file"), "harmless").expect("written");
    std::fs::create_dir(ground.at("own/dir")).expect("made");
    for made in ["own/file", "own/dir"] {
        chown(ground.at(made), Some(ground.user.uid), Some(ground.user.gid)).expect("given");
    }
    ground.link("own/file-link", "secret");
    ground.link("own/dir-link", "roots");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stop = std::sync::Arc::new(stop);
    let flipping = {
        let stop = std::sync::Arc::clone(&stop);
        let pairs = ["file", "dir"]
            .map(|it| (ground.at(&format!("own/{it}")), ground.at(&format!("own/{it}-link"))));
        std::thread::spawn(move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for (one, other) in &pairs {
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    let cwd = rustix::fs::CWD;
                    rustix::fs::renameat_with(cwd, one, cwd, other, flags).expect("swapped");
                }
            }
        })
    };
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..300 {
        let read = daemon.get(&ground.url("own/file", &name)).await;
        assert_ne!(read.text(), "secret", "round {round}");
        let written = daemon.post(&ground.url("own/file", &name), OCTETS, "harmless").await;
        let new = format!("own/dir/{round}");
        let made = daemon.post(&ground.url(&new, &name), OCTETS, "x").await;
        for answer in [read, written, made] {
            assert!(matches!(status(&answer), 200 | 400 | 403), "{:?}", answer.body);
            seen.insert(status(&answer));
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    flipping.join().expect("flipped to the end");
    assert!(seen.contains(&200) && seen.contains(&403), "the race was run: {seen:?}");
    assert_eq!(std::fs::read_to_string(ground.at("secret")).expect("there"), "secret");
    assert_eq!(ground.owner("secret"), 0);
    assert_eq!(std::fs::read_dir(ground.at("roots")).expect("there").count(), 0);
    assert_eq!(status(&daemon.get("/health").await), 204);
    daemon.stop().await;
}
