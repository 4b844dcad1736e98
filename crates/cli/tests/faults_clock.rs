//! A wall clock that jumps under a running server: what is over ends, the rest stays, and nothing is
//! lost or ends before its time. Only the clock of the process is moved, never the host's.

#[path = "support/deaths.rs"]
mod deaths;
#[path = "support/rows.rs"]
mod rows;
#[path = "support/server.rs"]
mod server;

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::json;

use deaths::{Made, agreed, assert_lives, listed, make, on_node};
use rows::runs;
use server::{Server, fake_template, left_in, node, up, wait_until};

/// From a jump to the end of what is over: the wake of a timer, and a teardown.
const AT_ONCE: Duration = Duration::from_secs(5);
const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 60 * MINUTE_MS;

/// The clock of one process.
struct Clock {
    pipe: File,
    path: PathBuf,
}

impl Clock {
    fn new(folder: &Path) -> Clock {
        let path = folder.join("clock");
        mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).expect("a named pipe");
        // Open for reading as well, it waits for nobody.
        let pipe = OpenOptions::new().read(true).write(true).open(&path).expect("it opens");
        Clock { pipe, path }
    }

    fn of(&self, mut command: Command) -> Command {
        command.env("BELLJAR_CLOCK_SHIFT", &self.path);
        command
    }

    /// Has the process's clock be as far off the host's from now on.
    fn shift(&mut self, ms: i64) {
        writeln!(self.pipe, "{ms}").expect("the process reads");
    }
}

/// The store says when it ends, and why it did.
fn row(data: &Path, made: &Made) -> (i64, Option<String>) {
    let all = runs(data);
    let run = all.iter().find(|run| run.sandbox == made.id);
    let run = run.unwrap_or_else(|| panic!("the store has lost {}", made.id));
    (run.end_at_ms, run.ended.clone())
}

fn has_expired(data: &Path, made: &Made) -> bool {
    row(data, made).1.as_deref() == Some("expired")
}

fn ids(made: &[&Made]) -> Vec<String> {
    let mut ids: Vec<_> = made.iter().map(|made| made.id.clone()).collect();
    ids.sort();
    ids
}

/// Waits until it has ended everywhere, which must be soon.
fn ends_at_once(server: &Server, data: &Path, made: &Made) {
    let since = Instant::now();
    wait_until("its row's end", || has_expired(data, made));
    wait_until("its route's end", || server.traffic(&made.id, 49983, "/health", "").0 == 502);
    assert!(since.elapsed() < AT_ONCE, "it took {:?}", since.elapsed());
}

#[test]
fn a_jump_forward_ends_what_is_over_and_only_that() {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    let mut clock = Clock::new(data.path());
    let mut command = clock.of(up(data.path()));
    let server = Server::run(command.args(["--runtime", "fake"]));
    let socket = data.path().join("node.sock");
    let short = [(), ()].map(|()| make(&server, data.path(), 1000));
    let long = make(&server, data.path(), 3600);

    clock.shift(40 * MINUTE_MS);
    short.iter().for_each(|made| ends_at_once(&server, data.path(), made));
    assert_eq!(agreed(&server, data.path(), &socket, "40 minutes"), ids(&[&long]));
    assert_lives(&server, &long, "40 minutes");
    // What is made now lives by the clock there is now, and longer than what was there before.
    let new = make(&server, data.path(), 3000);
    assert!(row(data.path(), &new).0 > row(data.path(), &long).0);

    clock.shift(65 * MINUTE_MS);
    ends_at_once(&server, data.path(), &long);
    assert_eq!(agreed(&server, data.path(), &socket, "65 minutes"), ids(&[&new]));
    clock.shift(2 * HOUR_MS);
    ends_at_once(&server, data.path(), &new);
    assert_eq!(agreed(&server, data.path(), &socket, "2 hours"), ids(&[]));
    stops_clean(server, data.path());
}

#[test]
fn a_jump_back_loses_nothing_and_ends_nothing_early() {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    let mut clock = Clock::new(data.path());
    let mut command = clock.of(up(data.path()));
    let server = Server::run(command.args(["--runtime", "fake"]));
    let socket = data.path().join("node.sock");
    let before = make(&server, data.path(), 3);
    let (end_before, _) = row(data.path(), &before);

    clock.shift(-2 * HOUR_MS);
    let mut after = None;
    // The jump is there once what is made ends long before what was.
    wait_until("the jump", || {
        let since = Instant::now();
        let made = make(&server, data.path(), 4);
        let jumped = row(data.path(), &made).0 < end_before - HOUR_MS;
        after = jumped.then_some((made, since));
        jumped
    });
    let (after, since) = after.expect("it was waited for");
    wait_until("its end", || has_expired(data.path(), &after));
    let lived = since.elapsed();
    // Ends are whole milliseconds.
    assert!(lived > Duration::from_millis(3990), "it was to live 4 s and lived {lived:?}");
    assert!(lived < Duration::from_secs(4) + AT_ONCE, "it was to live 4 s and lived {lived:?}");
    // Four seconds have passed, and on the clock there are two hours to go.
    assert_lives(&server, &before, "back");
    assert!(agreed(&server, data.path(), &socket, "back").contains(&before.id));

    clock.shift(0);
    ends_at_once(&server, data.path(), &before);
    assert_eq!(agreed(&server, data.path(), &socket, "forth"), ids(&[]));
    stops_clean(server, data.path());
}

#[test]
fn a_jump_of_one_host_only_is_made_up_for() {
    let (node_data, data) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir());
    let data = data.expect("a folder");
    fake_template(node_data.path());
    let (mut nodes, mut controls) = (Clock::new(node_data.path()), Clock::new(data.path()));
    let on = Server::run(nodes.of(node(node_data.path())).args(["--runtime", "fake"]));
    let socket = PathBuf::from(on.text("socket"));
    let control = Server::run(controls.of(up(data.path())).arg("--node").arg(&socket));
    let (short, long) = (make(&control, data.path(), 1000), make(&control, data.path(), 3600));

    // Control thinks that both are over. It shows neither and ends neither: that is the node's to do.
    controls.shift(2 * HOUR_MS);
    wait_until("they are hidden", || listed(&control).is_empty());
    assert_eq!(on_node(&socket).len(), 2);
    controls.shift(0);
    wait_until("they are shown", || listed(&control) == ids(&[&short, &long]));
    assert_eq!(agreed(&control, data.path(), &socket, "control").len(), 2);

    // The node ends what is over by its clock, and control follows.
    nodes.shift(40 * MINUTE_MS);
    ends_at_once(&control, data.path(), &short);
    assert_eq!(agreed(&control, data.path(), &socket, "node"), ids(&[&long]));
    nodes.shift(-2 * HOUR_MS);
    assert_lives(&control, &long, "the node's clock back");
    let body = json!({ "timeout": 1200 });
    let path = format!("/sandboxes/{}/timeout", long.id);
    assert_eq!(control.api("POST", &path, Some(body)).0, 204);
    assert_eq!(agreed(&control, data.path(), &socket, "moved"), ids(&[&long]));
    nodes.shift(40 * MINUTE_MS);
    ends_at_once(&control, data.path(), &long);
    control.stop();
    stops_clean(on, node_data.path());
}

fn stops_clean(server: Server, data: &Path) {
    let tag = server.text("host_tag").to_owned();
    server.stop();
    assert_eq!(left_in(data, &tag), Vec::<String>::new());
}
