//! Paused sandboxes whose node is away or full: resumed on another one that has the snapshot from the blob store.

use std::path::PathBuf;
use std::sync::Arc;

use belljar_wire::refusal::Refusal;
use connectrpc::ConnectError;
use tempfile::TempDir;

use crate::pauses::often;
use crate::support::client::Answer;
use crate::support::node::{FakeNode, State};
use crate::support::{Control, eventually};

const CREATE: &str = r#"{"templateID":"base","timeout":600}"#;

/// Two nodes, and a sandbox that one of them, the home, has paused.
struct Two {
    dir: TempDir,
    /// Home first. `None` while it is away.
    nodes: [Option<FakeNode>; 2],
    states: [Arc<State>; 2],
    sockets: [PathBuf; 2],
    control: Control,
    id: String,
}

impl Two {
    async fn start() -> Two {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut sockets = ["a", "b"].map(|name| dir.path().join(format!("{name}.sock")));
        let mut nodes = [FakeNode::start(&sockets[0]).await, FakeNode::start(&sockets[1]).await];
        let control = Control::start_on(dir.path(), sockets.to_vec(), often()).await;
        let made = control.client.post("/v2/sandboxes", CREATE).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let id = made.sandbox_id();
        if !nodes[0].state.holds(&id) {
            nodes.reverse();
            sockets.reverse();
        }
        let paused = control.client.post(&format!("/sandboxes/{id}/pause"), "").await;
        assert_eq!(paused.status, 204, "{}", paused.text);
        let states = [nodes[0].state.clone(), nodes[1].state.clone()];
        Two { dir, nodes: nodes.map(Some), states, sockets, control, id }
    }

    /// The snapshot is in the store, and its node says so.
    fn upload(&self) -> String {
        let mut snapshots = self.states[0].snapshots.lock().expect("no panic holds it");
        let (id, kept) = snapshots.iter_mut().next().expect("the pause");
        kept.uploaded = true;
        let mut stored = self.states[1].stored.lock().expect("no panic holds it");
        stored.insert(id.clone(), kept.clone());
        id.clone()
    }

    async fn home_goes(&mut self) {
        self.nodes[0].take().expect("it is here").stop().await;
    }

    async fn home_comes_back(&mut self) {
        let node = FakeNode::serve(&self.sockets[0], self.states[0].clone()).await;
        self.nodes[0] = Some(node);
    }

    async fn resume(&self, body: &str) -> Answer {
        self.control.client.post(&format!("/v2/sandboxes/{}/connect", self.id), body).await
    }

    /// Until control knows what became of the home.
    async fn resumed(&self) {
        eventually("it is resumed", || async { self.resume("").await.status == 201 }).await;
    }

    async fn shown(&self) -> String {
        let shown = self.control.client.get(&format!("/sandboxes/{}", self.id)).await.json();
        shown["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until a node was listed twice more: what it says is taken in.
    async fn reconciled(&self, node: usize) {
        let mut lists = self.states[node].lists.subscribe();
        let enough = *lists.borrow_and_update() + 2;
        let heard = lists.wait_for(|lists| *lists >= enough);
        tokio::time::timeout(crate::support::PATIENCE, heard)
            .await
            .expect("in time")
            .expect("it lives");
    }

    async fn stop(self) {
        self.control.stop().await;
        for node in self.nodes.into_iter().flatten() {
            node.stop().await;
        }
        drop(self.dir);
    }
}

#[tokio::test]
async fn it_is_resumed_elsewhere_while_its_node_is_away_and_never_comes_back_twice() {
    let mut two = Two::start().await;
    let snapshot = two.upload();
    two.home_goes().await;
    two.resumed().await;
    assert!(two.states[1].holds(&two.id));
    assert_eq!(two.states[1].kept(), std::slice::from_ref(&snapshot));
    assert_eq!(two.shown().await, "running");

    // The home comes back with the older snapshot, and with a run of a resume nobody heard the end of.
    let mut asked = two.states[0].creates.lock().expect("no panic holds it")[0].clone();
    asked.execution_id = belljar_domain::ExecutionId::random().to_string();
    two.states[0].run(&asked);
    two.home_comes_back().await;
    eventually("the other run is killed", || async { !two.states[0].holds(&two.id) }).await;
    two.reconciled(0).await;
    assert!(two.states[1].holds(&two.id), "the one that was resumed runs on");
    assert_eq!(two.shown().await, "running");
    // What it came from stays until it is paused once more; then it goes from both.
    assert_eq!(two.states[0].kept(), std::slice::from_ref(&snapshot));
    let paused = two.control.client.post(&format!("/sandboxes/{}/pause", two.id), "").await;
    assert_eq!(paused.status, 204, "{}", paused.text);
    eventually("the home lets go of the old one", || async { two.states[0].kept().is_empty() })
        .await;
    eventually("and the other node", || async {
        two.states[1].kept().len() == 1 && two.states[1].kept()[0] != snapshot
    })
    .await;
    assert_eq!(two.shown().await, "paused");
    assert_eq!(two.resume("").await.status, 201);
    assert!(two.states[1].holds(&two.id) && !two.states[0].holds(&two.id));
    two.stop().await;
}

#[tokio::test]
async fn what_was_killed_elsewhere_is_not_adopted_when_its_node_comes_back() {
    let mut two = Two::start().await;
    two.upload();
    two.home_goes().await;
    two.resumed().await;
    let killed = two.control.client.delete(&format!("/sandboxes/{}", two.id)).await;
    assert_eq!(killed.status, 204, "{}", killed.text);
    eventually("nothing is left there", || async { two.states[1].kept().is_empty() }).await;
    two.home_comes_back().await;
    eventually("nor here", || async { two.states[0].kept().is_empty() }).await;
    assert_eq!(two.shown().await, "");
    assert!(two.states.iter().all(|state| !state.holds(&two.id)));
    two.stop().await;
}

#[tokio::test]
async fn what_was_not_uploaded_waits_for_its_node() {
    let mut two = Two::start().await;
    two.home_goes().await;
    eventually("it is refused", || async { two.resume("").await.status == 503 }).await;
    assert_eq!(two.shown().await, "paused");
    two.home_comes_back().await;
    two.resumed().await;
    assert!(two.states[0].holds(&two.id) && !two.states[1].holds(&two.id));
    two.stop().await;
}

#[tokio::test]
async fn a_home_that_has_no_room_is_passed_over_and_one_that_does_not_answer_is_not() {
    let two = Two::start().await;
    two.upload();
    let next = |error| *two.states[0].next_create.lock().expect("no panic holds it") = Some(error);
    // It may run there: nobody starts it elsewhere.
    next(ConnectError::deadline_exceeded("too slow"));
    assert_eq!(two.resume("").await.status, 504);
    assert_eq!(two.states[1].creates.lock().expect("no panic holds it").len(), 0);
    next(Refusal::Memory.mark(ConnectError::resource_exhausted("full")));
    let resumed = two.resume("").await;
    assert_eq!(resumed.status, 201, "{}", resumed.text);
    assert!(two.states[1].holds(&two.id) && !two.states[0].holds(&two.id));
    two.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_is_gone_from_its_node_and_not_from_the_store_is_not_lost() {
    let two = Two::start().await;
    let snapshot = two.upload();
    two.reconciled(0).await;
    two.states[0].snapshots.lock().expect("no panic holds it").clear();
    two.reconciled(0).await;
    assert_eq!(two.shown().await, "paused");
    assert_eq!(two.resume("").await.status, 201);
    assert_eq!(two.states[1].kept(), [snapshot]);
    two.stop().await;
}

#[tokio::test]
async fn what_is_in_the_store_alone_can_be_killed() {
    let two = Two::start().await;
    two.upload();
    two.reconciled(0).await;
    two.states[0].snapshots.lock().expect("no panic holds it").clear();
    two.reconciled(0).await;
    let killed = two.control.client.delete(&format!("/sandboxes/{}", two.id)).await;
    assert_eq!(killed.status, 204, "{}", killed.text);
    assert_eq!(two.shown().await, "");
    two.stop().await;
}
