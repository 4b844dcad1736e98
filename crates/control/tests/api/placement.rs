//! Several nodes: which one gets a sandbox, and what one that is away costs.

use std::path::PathBuf;

use belljar_wire::refusal::Refusal;
use belljar_wire::rpc::belljar::node::v1::{Capacity, Load, MetricsSample, NodeStatus};
use connectrpc::ConnectError;
use tempfile::TempDir;

use crate::support::node::{FakeNode, State, template};
use crate::support::{Control, config, eventually};

const CREATE: &str = r#"{"templateID":"base"}"#;

struct Fleet {
    dir: TempDir,
    nodes: Vec<FakeNode>,
    control: Control,
}

fn sockets(dir: &TempDir, count: usize) -> Vec<PathBuf> {
    (0..count).map(|n| dir.path().join(format!("node{n}.sock"))).collect()
}

impl Fleet {
    /// Control and as many nodes, each prepared before control sees it.
    async fn start(count: usize, prepare: impl Fn(usize, &State)) -> Fleet {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut nodes = Vec::new();
        for (n, socket) in sockets(&dir, count).iter().enumerate() {
            let node = FakeNode::start(socket).await;
            prepare(n, &node.state);
            nodes.push(node);
        }
        let control = Control::start_on(dir.path(), sockets(&dir, count), config()).await;
        Fleet { dir, nodes, control }
    }

    async fn stop(self) {
        self.control.stop().await;
        for node in self.nodes {
            node.stop().await;
        }
        drop(self.dir);
    }

    fn asked(&self, n: usize) -> usize {
        self.nodes[n].state.creates.lock().expect("no panic holds it").len()
    }
}

fn refuse_next(state: &State, refusal: Refusal) {
    let error = refusal.mark(ConnectError::resource_exhausted("refused"));
    *state.next_create.lock().expect("no panic holds it") = Some(error);
}

/// A node with 100 processors, of which `taken` are.
fn busy(state: &State, taken: u64) {
    let mut description = state.description.lock().expect("no panic holds it");
    description.load = Load { allocated_vcpus: taken, ..Default::default() }.into();
    let capacity = Capacity {
        vcpus: 100,
        memory_mib: u64::MAX,
        disk_free_mib: u64::MAX,
        sandboxes_max: 10_000,
        ..Default::default()
    };
    description.capacity = capacity.into();
}

#[tokio::test]
async fn the_least_busy_node_gets_the_sandbox() {
    let fleet = Fleet::start(3, |n, state| busy(state, [80, 10, 60][n])).await;
    for _ in 0..5 {
        fleet.control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    }
    assert_eq!([0, 1, 2].map(|n| fleet.asked(n)), [0, 5, 0]);
    fleet.stop().await;
}

#[tokio::test]
async fn what_was_just_placed_counts_before_the_node_says_so() {
    let fleet = Fleet::start(2, |_, state| busy(state, 0)).await;
    for _ in 0..10 {
        fleet.control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    }
    assert_eq!([0, 1].map(|n| fleet.asked(n)), [5, 5]);
    fleet.stop().await;
}

#[tokio::test]
async fn a_node_that_refuses_is_passed_over() {
    let fleet = Fleet::start(3, |n, state| {
        busy(state, [0, 50, 90][n]);
        if n < 2 {
            refuse_next(state, [Refusal::Memory, Refusal::StartingSlots][n]);
        }
    })
    .await;
    let id = fleet.control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    assert_eq!([0, 1, 2].map(|n| fleet.asked(n)), [1, 1, 1]);
    assert!(fleet.nodes[2].state.holds(&id));
    // Every attempt had an id of its own.
    let first = fleet.nodes[0].state.creates.lock().expect("no panic holds it")[0].clone();
    assert_ne!(first.sandbox_id, id);
    assert_eq!(fleet.control.client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    assert!(!fleet.nodes[2].state.holds(&id));
    fleet.stop().await;
}

#[tokio::test]
async fn when_all_refuse_the_reason_says_whether_to_try_again() {
    let fleet = Fleet::start(2, |_, _| {}).await;
    let room = ("sandbox_capacity_unavailable", ("true", Some("1")));
    let never = ("sandbox_no_compatible_node", ("false", None));
    for (refusals, (code, retry)) in [
        ([Refusal::Cpu, Refusal::SandboxesMax], room),
        ([Refusal::NoTemplate, Refusal::Draining], room),
        ([Refusal::Disk, Refusal::Incompatible], room),
        ([Refusal::NoTemplate, Refusal::Incompatible], never),
    ] {
        for (node, refusal) in fleet.nodes.iter().zip(refusals) {
            refuse_next(&node.state, refusal);
        }
        let answer = fleet.control.client.post("/v2/sandboxes", CREATE).await;
        answer.assert_refused(503, code, retry);
    }
    assert_eq!(fleet.control.client.get("/v2/sandboxes").await.text, "[]");
    fleet.control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    fleet.stop().await;
}

#[tokio::test]
async fn nodes_that_drain_and_nodes_without_the_template_are_not_asked() {
    let fleet = Fleet::start(3, |n, state| {
        if n == 0 {
            let draining = NodeStatus::NODE_STATUS_DRAINING;
            *state.status.lock().expect("no panic holds it") = draining;
        }
        if n < 2 {
            let only =
                template("onlyonlyonlyonlyonly", crate::support::node::BUILD_ID, &["only"], 1);
            state.more_templates.lock().expect("no panic holds it").push(only);
        }
    })
    .await;
    let only = r#"{"templateID":"only"}"#;
    for _ in 0..5 {
        fleet.control.client.post("/v2/sandboxes", only).await.sandbox_id();
    }
    assert_eq!([0, 1, 2].map(|n| fleet.asked(n)), [0, 5, 0]);
    fleet.stop().await;
}

#[tokio::test]
async fn a_node_that_is_away_does_not_stop_the_others() {
    let Fleet { dir, mut nodes, control } = Fleet::start(2, |_, _| {}).await;
    let client = &control.client;
    let (mut on_first, mut on_second) = (None, None);
    while on_first.is_none() || on_second.is_none() {
        let id = client.post("/v2/sandboxes", CREATE).await.sandbox_id();
        let place = if nodes[0].state.holds(&id) { &mut on_first } else { &mut on_second };
        *place = Some(id);
    }
    let on_first = format!("/sandboxes/{}", on_first.expect("there is one"));
    let on_second = format!("/sandboxes/{}", on_second.expect("there is one"));
    let sample = MetricsSample { at_unix_ms: 1_000, ..Default::default() };
    let second = on_second.trim_start_matches("/sandboxes/").to_owned();
    let insert = |id: String| {
        nodes[1].state.samples.lock().expect("no panic holds it").insert(id, vec![sample])
    };
    insert(second.clone());
    let first = nodes.remove(0);
    let state = first.state.clone();
    first.stop().await;
    eventually("new sandboxes go to the other node", || async {
        client.post("/v2/sandboxes", CREATE).await.status == 201
    })
    .await;
    assert_eq!(client.get(&on_first).await.status, 200);
    let figures = async |ids: String| {
        let ids = ids.replace("/sandboxes/", "");
        client.get(&format!("/sandboxes/metrics?sandbox_ids={ids}")).await
    };
    let some = figures(format!("{on_first},{on_second}")).await;
    assert_eq!(some.status, 200, "{}", some.text);
    assert!(some.json()["sandboxes"].get(&second).is_some(), "{}", some.text);
    figures(on_first.clone()).await.assert_error(503, "try again");
    client.delete(&on_first).await.assert_error(503, "try again");
    assert_eq!(client.get(&on_first).await.status, 200);
    assert_eq!(client.delete(&on_second).await.status, 204);

    // One that comes back empty has lost what it had.
    let first = FakeNode::start(&sockets(&dir, 1)[0]).await;
    eventually("its sandbox is gone", || async { client.get(&on_first).await.status == 404 }).await;
    drop(state);
    control.stop().await;
    first.stop().await;
    nodes.remove(0).stop().await;
}

#[tokio::test]
async fn a_node_that_is_away_at_the_start_joins_later() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let all = sockets(&dir, 2);
    let second = FakeNode::start(&all[1]).await;
    let control = Control::start_on(dir.path(), all.clone(), config()).await;
    let id = control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    assert!(second.state.holds(&id));
    let first = FakeNode::start(&all[0]).await;
    busy(&second.state, 99);
    eventually("the first one is used", || async {
        let id = control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
        first.state.holds(&id)
    })
    .await;
    control.stop().await;
    first.stop().await;
    second.stop().await;
}
