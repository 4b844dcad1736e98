//! `POST /files/compose`.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use belljar_domain::Secret;
use belljar_envd::Settings;
use serde_json::{Value, json};

use super::client::{Answer, Daemon, SmallDisk, settings, unprivileged};

async fn compose(daemon: &Daemon, body: Value) -> Answer {
    daemon.post("/files/compose", "application/json", body.to_string()).await
}

#[tokio::test]
async fn parts_become_one_file_and_are_gone() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let large = "0123456789".repeat(200_000);
    for (name, content) in [("p 1", "first "), ("p2", ""), ("p3", large.as_str()), ("p4", "end")] {
        std::fs::write(at(name), content).expect("written");
    }
    let sources = [at("p 1"), at("p2"), at("p3"), at("p4")];
    let body = json!({ "source_paths": sources, "destination": at("new/dir/whole") });
    let answer = compose(&daemon, body.clone()).await;
    assert_eq!(answer.status.as_u16(), 200, "{:?}", answer.body);
    let entry = json!({ "path": at("new/dir/whole"), "name": "whole", "type": "file" });
    assert_eq!(answer.json(), entry);
    let whole = std::fs::read_to_string(at("new/dir/whole")).expect("written");
    assert_eq!(whole, format!("first {large}end"));
    assert!(sources.iter().all(|part| !std::path::Path::new(part).exists()));
    let names = std::fs::read_dir(at("new/dir")).expect("made").count();
    assert_eq!(names, 1, "nothing else is left beside it");
    assert_eq!(compose(&daemon, body).await.status.as_u16(), 404, "the parts are gone");

    // The destination may be a part: that appends, and keeps the mode of what it replaces.
    std::fs::write(at("more"), "!").expect("written");
    let mode = std::fs::Permissions::from_mode(0o750);
    std::fs::set_permissions(at("new/dir/whole"), mode).expect("set");
    let sources = [at("new/dir/whole"), at("more")];
    let body = json!({ "source_paths": sources, "destination": at("new/dir/whole") });
    assert_eq!(compose(&daemon, body).await.status.as_u16(), 200);
    let whole = std::fs::read_to_string(at("new/dir/whole")).expect("written");
    assert_eq!(whole, format!("first {large}end!"));
    let mode = std::fs::metadata(at("new/dir/whole")).expect("there").mode();
    assert_eq!(mode & 0o777, 0o750);
    assert!(!std::path::Path::new(&at("more")).exists());
    daemon.stop().await;
}

#[tokio::test]
async fn what_fails_leaves_parts_and_destination_as_they_were() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    std::fs::write(at("part"), "part").expect("written");
    std::fs::write(at("old"), "old").expect("written");
    std::fs::create_dir(at("folder")).expect("made");
    std::os::unix::fs::symlink(at("part"), at("link")).expect("linked");
    let too_many: Vec<String> = (0..10_001).map(|part| at(&part.to_string())).collect();
    for (sources, destination, status) in [
        (json!([at("part"), at("missing")]), at("old"), 404),
        (json!([at("part"), at("part/below")]), at("old"), 404),
        (json!([at("part"), at("folder")]), at("old"), 400),
        (json!([at("part"), at("link")]), at("old"), 400),
        (json!([at("part"), "/dev/null"]), at("old"), 400),
        (json!([at("part"), at("part")]), at("old"), 400),
        (json!([at("part")]), at("folder"), 400),
        (json!([at("part")]), at("part/below"), 400),
        (json!([at("part")]), String::new(), 400),
        (json!([at("part"), ""]), at("old"), 400),
        (json!([]), at("old"), 400),
        (json!(too_many), at("old"), 400),
        (json!([at("part"), "a\0b"]), at("old"), 400),
        (json!("part"), at("old"), 400),
    ] {
        let body = json!({ "source_paths": sources, "destination": destination });
        let answer = compose(&daemon, body).await;
        let shown: String = sources.to_string().chars().take(200).collect();
        assert_eq!(answer.status.as_u16(), status, "{shown}: {:?}", answer.body);
        assert_eq!(answer.json()["code"], json!(status));
        assert_eq!(std::fs::read_to_string(at("part")).expect("there"), "part");
        assert_eq!(std::fs::read_to_string(at("old")).expect("there"), "old");
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 4, "no leftovers");
    let body =
        json!({ "source_paths": [at("part")], "destination": at("x"), "username": "no-one" });
    let answer = compose(&daemon, body).await;
    assert_eq!(answer.json(), json!({ "code": 401, "message": "invalid username: 'no-one'" }));
    let answer = daemon.post("/files/compose", "application/json", vec![b' '; 5 << 20]).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (413, &json!(413)));
    daemon.stop().await;
}

#[tokio::test]
async fn a_full_disk_leaves_the_parts() {
    let Some(disk) = SmallDisk::mount(4 << 20) else { return };
    let daemon = Daemon::start().await;
    let at = |name: &str| disk.path().join(name).to_string_lossy().into_owned();
    std::fs::write(at("a"), vec![1; 1_500_000]).expect("written");
    std::fs::write(at("b"), vec![2; 1_500_000]).expect("written");
    let body = json!({ "source_paths": [at("a"), at("b")], "destination": at("c") });
    let answer = compose(&daemon, body).await;
    assert_eq!(answer.status.as_u16(), 507, "{:?}", answer.body);
    assert_eq!(std::fs::metadata(at("a")).expect("there").len(), 1_500_000);
    assert_eq!(std::fs::read_dir(disk.path()).expect("there").count(), 2, "no leftovers");
    daemon.stop().await;
}

#[tokio::test]
async fn the_file_is_the_users_and_the_call_wants_the_token() {
    let token = Some(Secret::new("top".to_owned()));
    let daemon = Daemon::with(Settings { access_token: token, ..settings() }).await;
    let answer = compose(&daemon, json!({})).await;
    let message =
        "unauthorized access, please provide a valid access token or method signing if supported";
    assert_eq!(answer.json(), json!({ "code": 401, "message": message }));
    daemon.stop().await;

    let Some(user) = unprivileged() else { return };
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    std::fs::write(at("part"), "x").expect("written");
    let body = json!({
        "source_paths": [at("part")], "destination": at("new/whole"), "username": user.name,
    });
    assert_eq!(compose(&daemon, body).await.status.as_u16(), 200);
    for made in ["new", "new/whole"] {
        let there = std::fs::metadata(at(made)).expect("made");
        assert_eq!((there.uid(), there.gid()), (user.uid, user.gid), "{made}");
    }
    daemon.stop().await;
}
