//! Making paused sandboxes run again: the two versions of connect, resume, and callers at once.

use belljar_daemon::clock;
use connectrpc::ConnectError;
use serde_json::Value;

use crate::pauses::{often, paused};
use crate::support::{Rig, eventually};

const CREATE: &str = r#"{"templateID":"base","timeout":600,"envVars":{"SECRET":"swordfish"}}"#;

#[tokio::test]
async fn it_comes_back_as_another_run_of_the_same_sandbox() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let made = client.post("/v2/sandboxes", CREATE).await;
    let id = made.sandbox_id();
    let before = rig.control.routes.get(&id).expect("a route");
    for (path, body, seconds) in [
        ("/sandboxes/{id}/connect", r#"{"timeout":1000}"#, 1000),
        ("/v2/sandboxes/{id}/connect", "", 300),
        ("/sandboxes/{id}/resume", "", 15),
        ("/sandboxes/{id}/resume", r#"{"timeout":77,"autoPause":true}"#, 77),
    ] {
        assert_eq!(client.post(&format!("/sandboxes/{id}/pause"), "").await.status, 204);
        let asked_at = clock::now().0;
        let resumed = client.post(&path.replace("{id}", &id), body).await;
        assert_eq!(resumed.status, 201, "{path}: {}", resumed.text);
        assert_eq!(resumed.json(), made.json(), "{path}");
        let end = rig.node.state.end_of(&id);
        assert!((0..5_000).contains(&(end - asked_at - seconds * 1000)), "{path}");
    }
    let after = rig.control.routes.get(&id).expect("a route");
    assert_ne!(after.execution_id, before.execution_id);
    assert_eq!(after.envd_access_token, before.envd_access_token);
    let creates = rig.node.state.creates.lock().expect("no panic holds it").clone();
    assert_eq!(creates.len(), 5);
    for create in &creates {
        assert_eq!(create.env_vars["SECRET"], "swordfish");
        assert_eq!((&create.sandbox_id, &create.template_id), (&id, &creates[0].template_id));
        assert_eq!(create.envd_access_token, creates[0].envd_access_token);
    }
    assert!(creates[3].auto_pause.as_option().is_none());
    assert!(creates[4].auto_pause.as_option().is_some());
    let shown = client.get(&format!("/sandboxes/{id}")).await.json();
    assert_eq!(
        (shown["state"].as_str(), shown["lifecycle"]["onTimeout"].as_str()),
        (Some("running"), Some("pause"))
    );
    eventually("what it came from before is gone", || async { rig.node.state.kept().len() == 1 })
        .await;
    rig.stop().await;
}

#[tokio::test]
async fn a_running_one_is_only_extended_and_never_resumed() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let resume = format!("/sandboxes/{id}/resume");
    client.post(&resume, "").await.assert_error(409, "is already running");
    let connect = format!("/v2/sandboxes/{id}/connect");
    assert_eq!(client.post(&connect, r#"{"timeout":3000,"memory":false}"#).await.status, 200);
    for (body, text) in [
        (r#"{"timeout":0}"#, "Timeout must be greater than 0"),
        (r#"{"timeout":99999999}"#, "Timeout cannot be greater than"),
    ] {
        client.post(&resume, body).await.assert_error(400, text);
        client.post(&connect, body).await.assert_error(400, text);
    }
    client.post("/sandboxes/inone/resume", "").await.assert_error(404, "doesn't exist");
    client.post("/v2/sandboxes/inone/connect", "").await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn any_number_of_connects_at_once_resume_it_once() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    // Some come while it is still pausing.
    rig.node.state.hold_saves.send_replace(true);
    let (pause, connect) =
        (format!("/sandboxes/{id}/pause"), format!("/v2/sandboxes/{id}/connect"));
    let (paused, connected) = tokio::join!(client.post(&pause, ""), async {
        eventually("the pause is at the node", || async {
            !rig.node.state.pauses.lock().expect("no panic holds it").is_empty()
        })
        .await;
        let connects = futures::future::join_all((0..20).map(|_| client.post(&connect, "")));
        let release = async { rig.node.state.hold_saves.send_replace(false) };
        tokio::join!(connects, release).0
    });
    assert_eq!(paused.status, 204);
    let mut statuses: Vec<_> = connected.iter().map(|answer| answer.status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [vec![200; 19], vec![201]].concat());
    assert_eq!(rig.node.state.creates.lock().expect("no panic holds it").len(), 2);
    rig.stop().await;
}

#[tokio::test]
async fn a_kill_that_comes_while_it_is_resuming_waits_and_kills() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = paused(&rig, CREATE).await;
    rig.node.state.hold_creates.send_replace(true);
    let (connect, path) = (format!("/v2/sandboxes/{id}/connect"), format!("/sandboxes/{id}"));
    let (connected, killed) = tokio::join!(client.post(&connect, ""), async {
        eventually("the resume is at the node", || async {
            rig.node.state.creates.lock().expect("no panic holds it").len() == 2
        })
        .await;
        let release = async { rig.node.state.hold_creates.send_replace(false) };
        tokio::join!(client.delete(&path), release).0
    });
    assert_eq!((connected.status, killed.status), (201, 204));
    assert!(!rig.node.state.holds(&id));
    eventually("its snapshot is gone", || async { rig.node.state.kept().is_empty() }).await;
    client.get(&path).await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn a_resume_that_fails_leaves_it_paused() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = paused(&rig, CREATE).await;
    let connect = format!("/v2/sandboxes/{id}/connect");
    for (error, status) in [
        (ConnectError::resource_exhausted("no room"), 503),
        (ConnectError::deadline_exceeded("too slow"), 504),
        (ConnectError::internal("broken"), 500),
    ] {
        *rig.node.state.next_create.lock().expect("no panic holds it") = Some(error);
        let answer = client.post(&connect, "").await;
        assert_eq!(answer.status, status, "{}", answer.text);
        assert_eq!(client.get(&format!("/sandboxes/{id}")).await.json()["state"], "paused");
        assert!(rig.control.routes.get(&id).is_none());
    }
    assert_eq!(client.post(&connect, "").await.status, 201);
    assert_eq!(rig.node.state.kept().len(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn a_resume_whose_answer_was_lost_is_found_to_run() {
    let rig = Rig::start_with(often()).await;
    let client = &rig.control.client;
    let id = paused(&rig, CREATE).await;
    let unknown = ConnectError::deadline_exceeded("too slow");
    *rig.node.state.next_create.lock().expect("no panic holds it") = Some(unknown);
    assert_eq!(client.post(&format!("/v2/sandboxes/{id}/connect"), "").await.status, 504);
    let asked = rig.node.state.creates.lock().expect("no panic holds it").last().cloned();
    rig.node.state.run(&asked.expect("the resume"));
    eventually("it runs", || async {
        let shown: Value = client.get(&format!("/sandboxes/{id}")).await.json();
        shown["state"] == "running" && rig.control.routes.get(&id).is_some()
    })
    .await;
    assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    eventually("nothing is left", || async { rig.node.state.kept().is_empty() }).await;
    rig.stop().await;
}
