//! Deaths at fault points, and what has to be true after each.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part of this file")]

use std::path::Path;
use std::time::{Duration, Instant};

use belljar_daemon::fault::Point;
use serde_json::{Value, json};

use crate::rows::{Run, runs};
use crate::server::{Server, fake_template, left_in, node_call, up, wait_until};

/// From a server that is back to a store that knows everything that runs.
pub const AGREEMENT: Duration = Duration::from_secs(10);

/// What is asked for when the process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Create,
    Connect,
    Timeout,
    Kill,
    /// Nothing: its time is up.
    Expire,
}

/// Whose step a point is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Control,
    Node,
    /// Of a node that keeps a sandbox: `faults_keep` walks those.
    Keeper,
}

/// What comes past a point, and whether the sandbox made before it has come past too.
pub fn ways(point: Point) -> (Role, &'static [Op], Before) {
    use Op::{Connect, Create, Expire, Kill, Timeout};
    use Point as P;
    match point {
        P::CreateReserved | P::CreateNodeAnswered | P::CreateInTable | P::CreateBeforeAnswer => {
            (Role::Control, &[Create], Before::Passed)
        }
        P::EndMoveBegun | P::EndMoveNodeAnswered | P::EndMoveInTable | P::EndMoveBeforeAnswer => {
            (Role::Control, &[Connect, Timeout], Before::Missed)
        }
        P::KillBegun | P::KillNodeAnswered | P::KillBeforeAnswer => {
            (Role::Control, &[Kill], Before::Missed)
        }
        P::StoreBeforeWrite | P::StoreWritten => {
            (Role::Control, &[Create, Timeout, Kill], Before::Passed)
        }
        P::BootIdTaken
        | P::BootInLedger
        | P::BootFolderMade
        | P::BootSlotLeased
        | P::BootDiskReady
        | P::BootMachineStarted
        | P::BootGuestReady
        | P::BootBeforeAnswer => (Role::Node, &[Create], Before::Passed),
        P::OwnerEndMoved => (Role::Node, &[Connect, Timeout], Before::Missed),
        P::OwnerEnding | P::OwnerMachineDead | P::OwnerBeforeNotice | P::OwnerNoticeSent => {
            (Role::Node, &[Kill, Expire], Before::Missed)
        }
        P::TeardownStepUndone => (Role::Node, &[Kill, Expire], Before::Missed),
        P::KeepDrafted
        | P::KeepGuestPrepared
        | P::KeepMachineStill
        | P::KeepTaken
        | P::KeepPublished => (Role::Keeper, &[], Before::Missed),
    }
}

/// Whether making a sandbox goes past the point, so that the second time is the one that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    Passed,
    Missed,
}

/// One death: where, during what, and the how-manieth time in a process that made one sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    pub point: Point,
    pub op: Op,
    pub nth: u32,
}

/// Every death of a role.
pub fn deaths(wanted: Role) -> impl Iterator<Item = Death> {
    Point::ALL.iter().flat_map(move |&point| {
        let (role, ops, before) = ways(point);
        // Between the steps of a teardown: the first three of what every sandbox has.
        let times = match (point, before) {
            (Point::TeardownStepUndone, _) => 1..=3,
            (_, Before::Missed) => 1..=1,
            (_, Before::Passed) => 2..=2,
        };
        let ops = if role == wanted { ops } else { &[] };
        ops.iter().flat_map(move |&op| times.clone().map(move |nth| Death { point, op, nth }))
    })
}

impl Death {
    pub fn text(&self) -> String {
        format!("{}:{}", self.point.name(), self.nth)
    }
}

/// A sandbox as the API showed it.
#[derive(Debug, Clone)]
pub struct Made {
    pub id: String,
    pub token: String,
    pub detail: Value,
}

pub fn id_of(sandbox: &Value) -> String {
    sandbox["sandboxID"].as_str().expect("an id").to_owned()
}

/// Makes a sandbox and waits until the store has it.
pub fn make(server: &Server, control_data: &Path, seconds: u32) -> Made {
    let body = json!({ "templateID": "base", "timeout": seconds, "metadata": { "for": "faults" } });
    let mut made = Value::Null;
    // A node that has just come back may not be known yet.
    wait_until("a create", || {
        let (status, answer) = server.api("POST", "/v2/sandboxes", Some(body.clone()));
        made = answer;
        status == 201
    });
    let id = id_of(&made);
    wait_until("its row", || runs(control_data).iter().any(|run| run.sandbox == id));
    let token = made["envdAccessToken"].as_str().expect("a token").to_owned();
    let detail = server.api("GET", &format!("/sandboxes/{id}"), None).1;
    Made { id, token, detail }
}

/// Asks for what the process dies of.
pub fn ask(server: &Server, op: Op, id: &str) -> Option<(u16, Value)> {
    let path = |end: &str| format!("/sandboxes/{id}{end}");
    match op {
        Op::Create => {
            let body = json!({ "templateID": "base", "metadata": { "made": "while dying" } });
            server.try_api("POST", "/v2/sandboxes", Some(body))
        }
        Op::Connect => {
            let path = format!("/v2{}", path("/connect"));
            server.try_api("POST", &path, Some(json!({ "timeout": 3000 })))
        }
        Op::Timeout => server.try_api("POST", &path("/timeout"), Some(json!({ "timeout": 2000 }))),
        Op::Kill => server.try_api("DELETE", &path(""), None),
        Op::Expire => None,
    }
}

/// Whether the caller was told that it is done.
pub fn acknowledged(answer: &Option<(u16, Value)>) -> bool {
    answer.as_ref().is_some_and(|(status, _)| (200..300).contains(status))
}

pub fn listed(server: &Server) -> Vec<String> {
    let (status, listed) = server.api("GET", "/v2/sandboxes?limit=100", None);
    assert_eq!(status, 200, "{listed}");
    let mut ids: Vec<_> = listed.as_array().expect("a list").iter().map(id_of).collect();
    ids.sort();
    ids
}

/// Sandboxes and their ends as a node has them.
pub fn on_node(socket: &Path) -> Vec<(String, i64)> {
    let answer = node_call(socket, "ListSandboxes");
    let none = Vec::new();
    let sandboxes = answer["sandboxes"].as_array().unwrap_or(&none);
    let end = |sandbox: &Value| sandbox["endAtUnixMs"].as_str().and_then(|ms| ms.parse().ok());
    let mut found: Vec<(String, i64)> = sandboxes
        .iter()
        .map(|sandbox| {
            let id = sandbox["sandboxId"].as_str().expect("an id").to_owned();
            (id, end(sandbox).expect("an end"))
        })
        .collect();
    found.sort();
    found
}

pub fn running(data: &Path) -> Vec<(String, i64)> {
    let mut found: Vec<_> = runs(data)
        .into_iter()
        .filter(|run| run.ended.is_none())
        .map(|run| (run.sandbox, run.end_at_ms))
        .collect();
    found.sort();
    found
}

/// Waits until node, store and API say the same, and says what.
pub fn agreed(
    control: &Server,
    data: &Path,
    socket: &Path,
    after: impl std::fmt::Debug,
) -> Vec<String> {
    let since = Instant::now();
    loop {
        let (node, store, api) = (on_node(socket), running(data), listed(control));
        let ids: Vec<_> = node.iter().map(|(id, _)| id.clone()).collect();
        if node == store && ids == api {
            return api;
        }
        assert!(
            since.elapsed() < AGREEMENT,
            "{after:?}: no agreement: node {node:?}, store {store:?}, API {api:?}"
        );
        std::thread::yield_now();
    }
}

/// The sandbox is there as it was, and its guest is the one its token opens.
pub fn assert_lives(control: &Server, made: &Made, death: impl std::fmt::Debug) {
    let (status, detail) = control.api("GET", &format!("/sandboxes/{}", made.id), None);
    assert_eq!(status, 200, "{death:?}: {} is lost: {detail}", made.id);
    for field in ["metadata", "templateID", "startedAt", "alias"] {
        assert_eq!(detail[field], made.detail[field], "{death:?}: {field}");
    }
    let token = format!("X-Access-Token: {}\r\n", made.token);
    let (status, body) = control.traffic(&made.id, 49983, "/metrics", &token);
    assert!(status == 200 && body.contains(&made.id), "{death:?}: {status} {body}");
}

pub fn one_process_dies(role: Role) {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    let socket = data.path().join("node.sock");
    for death in deaths(role) {
        let mut command = up(data.path());
        command.args(["--runtime", "fake"]).env("BELLJAR_FAULT", death.text());
        let armed = Server::run(&mut command);
        let first = make(&armed, data.path(), if death.op == Op::Expire { 1 } else { 1000 });
        let answer = ask(&armed, death.op, &first.id);
        armed.dies(&death.text());

        let again = Server::start(data.path(), "fake");
        let tag = again.text("host_tag").to_owned();
        assert_eq!(left_in(data.path(), &tag), Vec::<String>::new(), "{death:?}");
        assert_eq!(agreed(&again, data.path(), &socket, death), Vec::<String>::new());
        assert_ended(data.path(), &first.id, death);
        if let (Op::Create, Some((201, sandbox))) = (death.op, &answer) {
            assert_ended(data.path(), &id_of(sandbox), death);
        }
        again.stop();
    }
}

/// The store says that the sandbox is over, and why.
pub fn assert_ended(data: &Path, id: &str, death: Death) {
    let all = runs(data);
    let run: Option<&Run> = all.iter().find(|run| run.sandbox == id);
    let reason = run.and_then(|run| run.ended.as_deref());
    let known = ["killed", "expired", "lost"];
    assert!(
        reason.is_some_and(|reason| known.contains(&reason)),
        "{death:?}: the store says of {id}: {run:?}"
    );
}
