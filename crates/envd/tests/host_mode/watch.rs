//! Watching trees that change fast, outgrow what is watched, or go away.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use super::client::{Daemon, Events, SOON};

const WATCH: &str = "filesystem.Filesystem/WatchDir";
const CREATE: &str = "filesystem.Filesystem/CreateWatcher";
const GET: &str = "filesystem.Filesystem/GetWatcherEvents";

async fn open(daemon: &Daemon, path: &Path) -> Events {
    let request = json!({ "path": path.to_string_lossy(), "recursive": true });
    let mut events = daemon.open(WATCH, request).await;
    assert_eq!(events.next().await, Some(json!({ "start": {} })));
    events
}

async fn poller(daemon: &Daemon, path: &Path) -> Value {
    let request = json!({ "path": path.to_string_lossy() });
    let answer = daemon.call(CREATE, request).await.json();
    json!({ "watcherId": answer["watcherId"].as_str().expect("an id") })
}

/// Reads until `name` has met with `kind`, and returns all names before.
async fn until(events: &mut Events, name: &str, kind: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    loop {
        let event = events.next().await.expect("an event")["filesystem"].clone();
        if event["name"] == name && event["type"] == kind {
            return seen;
        }
        seen.insert(event["name"].as_str().expect("named").to_owned());
    }
}

#[tokio::test]
async fn a_watch_ends_well_when_its_tree_is_deleted() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    for number in 0..50 {
        let sub = top.join(format!("a{number}/b"));
        std::fs::create_dir_all(&sub).expect("made");
        std::fs::write(sub.join("f"), "x").expect("written");
    }
    let mut events = open(&daemon, &top).await;
    let id = poller(&daemon, &top).await;
    std::fs::remove_dir_all(&top).expect("removed");
    let mut removed = BTreeSet::new();
    while let Some(event) = events.next().await {
        if event["filesystem"]["type"] == "EVENT_TYPE_REMOVE" {
            removed.insert(event["filesystem"]["name"].as_str().expect("named").to_owned());
        }
    }
    assert_eq!(*events.error(), Value::Null, "the end is no error");
    for number in 0..50 {
        for name in [format!("a{number}"), format!("a{number}/b"), format!("a{number}/b/f")] {
            assert!(removed.contains(&name), "{name}");
        }
    }
    assert!(removed.contains("."));
    // The polled one says the same and stays, with nothing more to say.
    let all = async {
        loop {
            let answer = daemon.call(GET, id.clone()).await.json();
            let events = answer["events"].as_array().cloned().unwrap_or_default();
            if events.iter().any(|event| event["name"] == ".") {
                return;
            }
        }
    };
    tokio::time::timeout(SOON, all).await.expect("in time");
    assert_eq!(daemon.call(GET, id).await.json(), json!({}));
    daemon.stop().await;
}

#[tokio::test]
async fn whatever_is_made_at_once_in_a_watched_tree_is_told() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let mut events = open(&daemon, dir.path()).await;
    for number in 0..100 {
        let sub = dir.path().join(format!("a{number}/b/c"));
        std::fs::create_dir_all(&sub).expect("made");
        std::fs::write(sub.join("f"), "x").expect("written");
    }
    std::fs::write(dir.path().join("last"), "").expect("written");
    let mut wanted: BTreeSet<String> =
        (0..100).map(|number| format!("a{number}/b/c/f")).chain(["last".to_owned()]).collect();
    while !wanted.is_empty() {
        let event = events.next().await.expect("an event");
        wanted.remove(event["filesystem"]["name"].as_str().expect("named"));
    }
    daemon.stop().await;
}

#[tokio::test]
async fn directories_that_move_are_followed_in_and_forgotten_out() {
    let daemon = Daemon::start().await;
    let outside = tempfile::tempdir().expect("a directory");
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir_all(outside.path().join("d/deep")).expect("made");
    std::fs::write(outside.path().join("d/deep/f"), "x").expect("written");
    let mut events = open(&daemon, dir.path()).await;
    let create = "EVENT_TYPE_CREATE";
    std::fs::rename(outside.path().join("d"), dir.path().join("in")).expect("moved");
    until(&mut events, "in/deep/f", create).await;
    std::fs::rename(dir.path().join("in"), dir.path().join("again")).expect("moved");
    until(&mut events, "in", "EVENT_TYPE_RENAME").await;
    until(&mut events, "again/deep/f", create).await;
    std::fs::write(dir.path().join("again/deep/g"), "x").expect("written");
    until(&mut events, "again/deep/g", "EVENT_TYPE_WRITE").await;
    std::fs::rename(dir.path().join("again"), outside.path().join("out")).expect("moved");
    until(&mut events, "again", "EVENT_TYPE_RENAME").await;
    std::fs::write(outside.path().join("out/deep/h"), "x").expect("written");
    std::fs::write(dir.path().join("end"), "x").expect("written");
    let seen = until(&mut events, "end", create).await;
    assert!(!seen.iter().any(|name| name.ends_with('h')), "{seen:?}");
    daemon.stop().await;
}

#[tokio::test]
async fn a_watch_that_misses_changes_says_so() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let id = poller(&daemon, dir.path()).await;
    // More than the daemon and the kernel keep together; the same two changes in turn, as the
    // kernel leaves out one that equals the one before it.
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("Linux");
    let limit: usize = limit.trim().parse().expect("a number");
    let path = dir.path().join("f");
    for _ in 0..(limit + 20_000) / 2 {
        std::fs::File::create(&path).expect("made");
        std::fs::remove_file(&path).expect("removed");
    }
    let mut told = 0;
    let lost = async {
        loop {
            let answer = daemon.call(GET, id.clone()).await.json();
            if answer.get("code").is_some() {
                return answer;
            }
            told += answer["events"].as_array().map_or(0, Vec::len);
        }
    };
    let lost = tokio::time::timeout(SOON, lost).await.expect("in time");
    assert_eq!(lost["code"], "data_loss", "{lost}");
    assert!(told >= 16_384, "{told}");
    assert_eq!(daemon.call(GET, id.clone()).await.json()["code"], "data_loss", "again");
    let removed = daemon.call("filesystem.Filesystem/RemoveWatcher", id).await;
    assert_eq!(removed.json(), json!({}));
    daemon.stop().await;
}

#[tokio::test]
async fn watches_of_clients_that_left_make_room() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    // More than there may be at a time.
    for _ in 0..150 {
        let opened = async {
            loop {
                let request = json!({ "path": dir.path().to_string_lossy() });
                let mut events = daemon.open(WATCH, request).await;
                match events.next().await {
                    Some(start) => return assert_eq!(start, json!({ "start": {} })),
                    // The connection of one that left may not have been noticed yet.
                    None => assert_eq!(events.error()["code"], "resource_exhausted"),
                }
            }
        };
        tokio::time::timeout(SOON, opened).await.expect("in time");
    }
    daemon.stop().await;
}
