//! `Idempotency-Key`: the same create asked for again. Source: contract sections 1.2 and 10.

use belljar_control::ApiKey;
use belljar_domain::{ExecutionId, SandboxId};
use belljar_wire::rpc::belljar::node::v1::{CreateSandboxRequest, StartingSandbox};
use connectrpc::ConnectError;

use crate::support::client::Client;
use crate::support::node::State;
use crate::support::{Control, Rig, config, eventually};

const V2: &str = "/v2/sandboxes";
const BODY: &str = r#"{"templateID":"base","timeout":60,"metadata":{"a":"1","b":"2"}}"#;

fn creates(state: &State) -> usize {
    state.creates.lock().expect("no panic holds it").len()
}

async fn the_create_at_the_node(state: &State) -> CreateSandboxRequest {
    eventually("the create is at the node", || async { creates(state) == 1 }).await;
    state.creates.lock().expect("no panic holds it")[0].clone()
}

#[tokio::test]
async fn the_same_key_and_body_is_the_same_sandbox() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let first = client.create_keyed(V2, "key-1", BODY).await;
    let id = first.sandbox_id();
    let reordered = r#" {"metadata" : {"b":"2","a":"1"}, "timeout":60, "templateID":"base"}"#;
    for body in [BODY, reordered] {
        let again = client.create_keyed(V2, "key-1", body).await;
        assert_eq!((again.status, &again.text), (201, &first.text));
    }
    assert_eq!(creates(&rig.node.state), 1);
    for (path, body) in [(V2, r#"{"templateID":"base"}"#), ("/sandboxes", BODY)] {
        let other = client.create_keyed(path, "key-1", body).await;
        other.assert_refused(422, "idempotency_request_mismatch", ("false", None));
    }
    assert_ne!(client.create_keyed(V2, "key-2", BODY).await.sandbox_id(), id);
    assert_ne!(client.post(V2, BODY).await.sandbox_id(), id);

    // Another team's key of the same name is another key.
    let other = rig.control.store.ensure_team("other").await.expect("a team");
    let key = ApiKey::random();
    rig.control.store.add_key(&other.id, &key).await.expect("a key");
    let stranger = Client::new(rig.control.address, &key.expose());
    assert_ne!(stranger.create_keyed(V2, "key-1", BODY).await.sandbox_id(), id);

    // It has ended, and the answer is as it was.
    assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    assert_eq!(client.create_keyed(V2, "key-1", BODY).await.text, first.text);
    assert_eq!(creates(&rig.node.state), 4);
    rig.stop().await;
}

#[tokio::test]
async fn what_is_no_key_is_refused_by_name() {
    let rig = Rig::start().await;
    let too_long = "a".repeat(256);
    for key in ["", "A", "a_b", "a b", &too_long] {
        for path in [V2, "/sandboxes"] {
            let answer = rig.control.client.create_keyed(path, key, BODY).await;
            answer.assert_error(400, "the header 'Idempotency-Key'");
        }
    }
    assert_eq!(creates(&rig.node.state), 0);
    rig.stop().await;
}

#[tokio::test]
async fn a_create_that_runs_is_not_begun_again() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    rig.node.state.hold_creates.send_replace(true);
    let (first, ()) = tokio::join!(client.create_keyed(V2, "k", BODY), async {
        the_create_at_the_node(&rig.node.state).await;
        let again = client.create_keyed(V2, "k", BODY).await;
        again.assert_refused(409, "idempotency_in_progress", ("true", Some("1")));
        let other = client.create_keyed(V2, "k", r#"{"templateID":"base"}"#).await;
        other.assert_refused(422, "idempotency_request_mismatch", ("false", None));
        rig.node.state.hold_creates.send_replace(false);
    });
    let again = client.create_keyed(V2, "k", BODY).await;
    assert_eq!(again.sandbox_id(), first.sandbox_id());
    rig.stop().await;
}

#[tokio::test]
async fn a_create_that_failed_frees_its_key() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let error = ConnectError::invalid_argument("bad env");
    *rig.node.state.next_create.lock().expect("no panic holds it") = Some(error);
    client.create_keyed(V2, "k", BODY).await.assert_error(400, "bad env");
    client.create_keyed(V2, "k", r#"{"templateID":"nope"}"#).await.assert_error(404, "not found");
    client.create_keyed(V2, "k", r#"{"templateID":7}"#).await.assert_error(400, "'templateID'");
    client.create_keyed(V2, "k", BODY).await.sandbox_id();
    rig.stop().await;
}

#[tokio::test]
async fn a_create_whose_node_was_lost_is_found_again_or_made_anew() {
    for arrived in [true, false] {
        let Rig { dir, node, control } = Rig::start().await;
        let client = &control.client;
        node.state.hold_creates.send_replace(true);
        let state = node.state.clone();
        let (lost, (node, asked)) = tokio::join!(client.create_keyed(V2, "k", BODY), async {
            let asked = the_create_at_the_node(&state).await;
            if arrived {
                // It runs, and nobody was told.
                state.run(&asked);
            }
            (node.reconnect().await, asked)
        });
        lost.assert_refused(409, "idempotency_outcome_unknown", ("true", Some("1")));
        state.hold_creates.send_replace(false);
        let found = eventually_created(client).await;
        assert_eq!(found == asked.sandbox_id, arrived);
        assert_eq!(state.sandboxes.lock().expect("no panic holds it").len(), 1);
        assert_eq!(client.create_keyed(V2, "k", BODY).await.sandbox_id(), found);
        control.stop().await;
        node.stop().await;
        drop(dir);
    }
}

/// Asks with the key until it is known what became of the first create.
async fn eventually_created(client: &Client) -> String {
    let found = std::sync::Mutex::new(String::new());
    eventually("the outcome is known", || async {
        let again = client.create_keyed(V2, "k", BODY).await;
        if again.status != 201 {
            let code = again.json()["error_code"].as_str().unwrap_or_default().to_owned();
            let passing = ["idempotency_outcome_unknown", "sandbox_capacity_unavailable"];
            assert!(passing.contains(&code.as_str()), "{}", again.text);
            return false;
        }
        *found.lock().expect("no panic holds it") = again.sandbox_id();
        true
    })
    .await;
    found.into_inner().expect("no panic holds it")
}

#[tokio::test]
async fn a_control_plane_that_restarts_knows_the_keys_of_what_runs() {
    let Rig { dir, node, control } = Rig::start().await;
    let id = control.client.create_keyed(V2, "k", BODY).await.sandbox_id();
    control.stop().await;
    let control = Control::start(dir.path(), config()).await;
    assert_eq!(control.client.create_keyed(V2, "k", BODY).await.sandbox_id(), id);
    let other = control.client.create_keyed(V2, "k", r#"{"templateID":"base"}"#).await;
    other.assert_refused(422, "idempotency_request_mismatch", ("false", None));
    control.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn a_control_plane_that_restarts_knows_the_keys_of_what_still_starts() {
    for arrives in [true, false] {
        let Rig { dir, node, control } = Rig::start().await;
        let state = node.state.clone();
        let gone = control.client.create_keyed(V2, "k", BODY).await.sandbox_id();
        let mut asked = the_create_at_the_node(&state).await;
        assert_eq!(control.client.delete(&format!("/sandboxes/{gone}")).await.status, 204);
        control.stop().await;
        // As if it had died in the middle of another one.
        asked.sandbox_id = SandboxId::random().to_string();
        asked.execution_id = ExecutionId::random().to_string();
        let starting = StartingSandbox {
            sandbox_id: asked.sandbox_id.clone(),
            execution_id: asked.execution_id.clone(),
            terms: asked.terms.clone(),
            ..Default::default()
        };
        *state.starting.lock().expect("no panic holds it") = vec![starting];

        let control = Control::start(dir.path(), config()).await;
        let client = &control.client;
        let early = client.create_keyed(V2, "k", BODY).await;
        early.assert_refused(409, "idempotency_outcome_unknown", ("true", Some("1")));
        assert_eq!(creates(&state), 1, "no second one is begun");
        if arrives {
            state.run(&asked);
        }
        state.starting.lock().expect("no panic holds it").clear();
        let found = eventually_created(client).await;
        assert_eq!(found == asked.sandbox_id, arrives);
        assert_eq!(state.sandboxes.lock().expect("no panic holds it").len(), 1);
        control.stop().await;
        node.stop().await;
    }
}
