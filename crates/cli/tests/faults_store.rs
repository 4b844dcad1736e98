//! A store that fails under load: PostgreSQL restarted, the disk full. Sandboxes are created and
//! killed meanwhile, and the store has them right once it is back.

#[path = "support/rows.rs"]
mod rows;
#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use belljar_testkit::postgres::{Durability, Postgres, Shutdown};
use belljar_testkit::{is_root, skip};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use rows::{Run, runs, runs_on_postgresql};
use server::{Server, fake_template, up, wait_until};

/// From a store that works again to one that is right: a round of the reconciler, and some.
const CATCH_UP: Duration = Duration::from_secs(90);
/// Callers at the same time.
const CALLERS: usize = 4;

fn create(server: &Server) -> String {
    let sandbox = server.create(json!({ "templateID": "base", "timeout": 3000 }));
    sandbox["sandboxID"].as_str().expect("an id").to_owned()
}

/// What callers were told while the store failed.
#[derive(Debug, Default)]
struct Told {
    alive: BTreeSet<String>,
    killed: BTreeSet<String>,
}

/// Creates sandboxes and kills every third until `over`; each call has to succeed.
fn work(server: &Server, over: &AtomicBool) -> Told {
    let mut told = Told::default();
    for turn in 0.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let id = create(server);
        if turn % 3 == 0 {
            assert_eq!(server.api("DELETE", &format!("/sandboxes/{id}"), None).0, 204);
            told.killed.insert(id);
        } else {
            told.alive.insert(id);
        }
    }
    told
}

/// Runs `meanwhile` under the load of several callers.
fn under_load(server: &Server, meanwhile: impl FnOnce()) -> Told {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(|| work(server, &over))).collect();
        meanwhile();
        over.store(true, Ordering::Relaxed);
        let mut all = Told::default();
        for caller in callers {
            let told = caller.join().expect("a caller that was always served");
            all.alive.extend(told.alive);
            all.killed.extend(told.killed);
        }
        all
    })
}

/// Waits until the store says of each sandbox what the callers were told of it.
fn assert_caught_up(told: &Told, read: impl Fn() -> Vec<Run>) {
    let since = Instant::now();
    loop {
        let rows = read();
        let with = |ended: bool| -> BTreeSet<String> {
            let these = rows.iter().filter(|run| run.ended.is_some() == ended);
            these.map(|run| run.sandbox.clone()).collect()
        };
        // A sandbox that was made and killed while nothing could be written need not have a row.
        let (alive, ended) = (with(false), with(true));
        if alive == told.alive && ended.is_disjoint(&told.alive) {
            return;
        }
        assert!(
            since.elapsed() < CATCH_UP,
            "the store lacks {:?} and has {:?} besides",
            told.alive.difference(&alive).collect::<Vec<_>>(),
            alive.difference(&told.alive).collect::<Vec<_>>()
        );
        std::thread::yield_now();
    }
}

/// Kills all of them, for a server that is to stop soon.
fn kill_all(server: &Server, told: &Told) {
    for id in &told.alive {
        assert_eq!(server.api("DELETE", &format!("/sandboxes/{id}"), None).0, 204);
    }
}

#[test]
fn postgresql_may_restart_in_mid_load() {
    let Some(postgres) = Postgres::start(Durability::Full) else { return };
    let address = postgres.database();
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    let mut command = up(data.path());
    command.args(["--runtime", "fake", "--sandboxes-max", "4000"]);
    let server = Server::run(command.env("BELLJAR_DATABASE", &address));
    for how in [Shutdown::Fast, Shutdown::Immediate] {
        let before = listed(&server);
        let told = under_load(&server, || {
            wait_until("some load", || listed(&server) > before + 5);
            postgres.stop(how);
            let down = listed(&server);
            wait_until("some load without a store", || listed(&server) > down + 20);
            postgres.launch();
            let back = listed(&server);
            wait_until("some load afterwards", || listed(&server) > back + 5);
        });
        assert_caught_up(&told, || runs_on_postgresql(&address));
        kill_all(&server, &told);
    }
    server.stop();
}

fn listed(server: &Server) -> usize {
    let (status, body) = server.api("GET", "/sandboxes", None);
    assert_eq!(status, 200, "{body}");
    body.as_array().map_or(0, Vec::len)
}

/// A thread of its own, because what it mounts is to be seen by it and its children only.
#[test]
fn sandboxes_are_created_while_the_disk_of_the_store_is_full() {
    if !is_root() {
        return skip("a disk that can be filled needs root to mount it");
    }
    std::thread::spawn(with_a_full_disk).join().expect("the test in its own mount namespace");
}

fn with_a_full_disk() {
    let (node_data, data) = (tempfile::tempdir(), tempfile::tempdir());
    let (node_data, data) = (node_data.expect("a folder"), data.expect("a folder"));
    mount_small_disk(data.path());
    fake_template(node_data.path());
    let mut command = server::node(node_data.path());
    let node = Server::run(command.args(["--runtime", "fake", "--sandboxes-max", "4000"]));
    let mut command = up(data.path());
    command.args(["--sandboxes-max", "4000", "--node"]).arg(node.text("socket"));
    let server = Server::run(&mut command);
    let first = create(&server);
    wait_until("its row", || runs(data.path()).iter().any(|run| run.sandbox == first));

    let filler = data.path().join("filler");
    fill(&filler);
    let mut told = under_load(&server, || {
        let before = listed(&server);
        wait_until("load on a full disk", || listed(&server) > before + 150);
    });
    told.alive.insert(first);
    assert!(runs(data.path()).len() < told.alive.len(), "the disk was not full");
    std::fs::remove_file(&filler).expect("room again");
    assert_caught_up(&told, || runs(data.path()));
    kill_all(&server, &told);
    server.stop();
    node.stop();
}

fn mount_small_disk(at: &Path) {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace of this thread's own");
    let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(none, "/", none, private, none).expect("mounts stay in it");
    let size = Some("size=4m");
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), size).expect("a small disk");
}

/// Writes until there is no room for another byte.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("a file");
    for size in [64 << 10, 1] {
        let piece = vec![0; size];
        let error = std::iter::repeat_with(|| file.write_all(&piece)).find_map(Result::err);
        let kind = error.expect("writing goes on until it fails").kind();
        assert_eq!(kind, std::io::ErrorKind::StorageFull);
    }
}
