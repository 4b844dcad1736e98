//! Pausing, and what a paused sandbox is: its rules, its texts, and that none is lost.

use std::path::Path;
use std::time::Duration;

use belljar_control::Config;
use belljar_wire::rpc::belljar::node::v1::{ReclaimedSandbox, SandboxInfo};
use connectrpc::ConnectError;
use serde_json::{Value, json};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use crate::support::node::{BUILD_ID, TEMPLATE_ID};
use crate::support::{Control, Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base","timeout":600}"#;
const AUTO: &str = r#"{"templateID":"base","timeout":600,"autoPause":true}"#;

pub(crate) fn often() -> Config {
    Config { reconcile_interval: Duration::from_millis(50), ..config() }
}

/// Creates a sandbox and pauses it.
pub(crate) async fn paused(rig: &Rig, create: &str) -> String {
    let id = rig.create(create).await;
    let answer = rig.control.client.post(&format!("/sandboxes/{id}/pause"), "").await;
    assert_eq!((answer.status, answer.text.as_str()), (204, ""));
    id
}

async fn detail(rig: &Rig, id: &str) -> Value {
    let answer = rig.control.client.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

#[tokio::test]
async fn a_paused_sandbox_is_shown_and_takes_no_place_and_no_traffic() {
    let rig = Rig::start_with(Config { max_concurrent_sandboxes: 1, ..config() }).await;
    let client = &rig.control.client;
    let id = rig.create(r#"{"templateID":"base","timeout":600,"metadata":{"a":"b"}}"#).await;
    let running = detail(&rig, &id).await;
    assert_eq!((running["state"].as_str(), running.get("pauseMode")), (Some("running"), None));
    assert!(rig.control.routes.get(&id).is_some());
    let pause = format!("/sandboxes/{id}/pause");
    assert_eq!(client.post(&pause, r#"{"memory":true}"#).await.status, 204);
    let paused = detail(&rig, &id).await;
    assert_eq!(
        (paused["state"].as_str(), paused["pauseMode"].as_str()),
        (Some("paused"), Some("full"))
    );
    assert!(paused.get("envdUnresponsiveAtPause").is_none());
    let ended = |value: &Value| value["endAt"].as_str().expect("a time").to_owned();
    assert!(ended(&paused) < ended(&running), "its end is when it was paused");
    for field in ["startedAt", "metadata", "templateID", "envdAccessToken", "lifecycle"] {
        assert_eq!(paused[field], running[field], "{field}");
    }
    assert!(rig.control.routes.get(&id).is_none());
    client.post(&pause, "").await.assert_error(409, "is already paused");
    for (path, body) in [("timeout", r#"{"timeout":60}"#), ("refreshes", "")] {
        let answer = client.post(&format!("/sandboxes/{id}/{path}"), body).await;
        answer.assert_error(404, "doesn't exist or you don't have access to it");
    }
    // Its place is free.
    let other = rig.create(CREATE).await;
    let refused = client.post(&format!("/v2/sandboxes/{id}/connect"), "").await;
    refused
        .assert_error(429, "you have reached the maximum number of concurrent E2B sandboxes (1)");
    assert_eq!(detail(&rig, &id).await["state"], "paused");
    assert_eq!(client.delete(&format!("/sandboxes/{other}")).await.status, 204);
    assert_eq!(client.post(&format!("/v2/sandboxes/{id}/connect"), "").await.status, 201);
    rig.stop().await;
}

#[tokio::test]
async fn lists_tell_the_states_apart_and_count_only_the_running() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let running = rig.create(CREATE).await;
    let asleep = paused(&rig, CREATE).await;
    for (query, expected) in [
        ("", vec![&asleep, &running]),
        ("?state=running,paused&order=asc", vec![&running, &asleep]),
        ("?state=paused", vec![&asleep]),
        ("?state=running", vec![&running]),
        ("?state=paused&template=base", vec![&asleep]),
    ] {
        let answer = client.get(&format!("/v2/sandboxes{query}")).await;
        let ids: Vec<_> = answer
            .json()
            .as_array()
            .expect("a list")
            .iter()
            .map(|s| s["sandboxID"].clone())
            .collect();
        assert_eq!(Value::from(ids), json!(expected), "{query}");
        assert_eq!(answer.headers["x-total-running"], "1", "{query}");
    }
    let first = client.get("/v2/sandboxes?limit=1").await;
    let token = first.headers["x-next-token"].to_str().expect("text");
    let second = client.get(&format!("/v2/sandboxes?limit=1&nextToken={token}")).await;
    assert_eq!(second.json()[0]["sandboxID"], running);
    assert_eq!(client.get("/sandboxes").await.json().as_array().expect("a list").len(), 1);
    assert_eq!(
        client.get(&format!("/v2/sandboxes/{asleep}/logs")).await.json(),
        json!({"logs": []})
    );
    client.get(&format!("/sandboxes/{asleep}/metrics")).await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn a_disk_alone_needs_a_guest_that_answers() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let pause = format!("/sandboxes/{id}/pause");
    *rig.node.state.guests_answer.lock().expect("no panic holds it") = false;
    for body in [r#"{"memory":false}"#, r#"{"requireHealthyGuest":true}"#] {
        client.post(&pause, body).await.assert_error(503, "guest does not answer");
        assert_eq!(detail(&rig, &id).await["state"], "running");
        assert!(rig.control.routes.get(&id).is_some());
    }
    assert_eq!(client.post(&pause, "{}").await.status, 204);
    let shown = detail(&rig, &id).await;
    assert_eq!(
        (&shown["envdUnresponsiveAtPause"], &shown["pauseMode"]),
        (&json!(true), &json!("full"))
    );
    // Its memory holds a guest that hangs.
    for (path, body) in [("connect", r#"{"timeout":60}"#), ("resume", "")] {
        let refused = client.post(&format!("/sandboxes/{id}/{path}"), body).await;
        refused.assert_refused(409, "sandbox_snapshot_guest_agent_unresponsive", ("false", None));
    }
    let booted = client.post(&format!("/sandboxes/{id}/resume"), r#"{"memory":false}"#).await;
    assert_eq!(booted.status, 201, "{}", booted.text);
    *rig.node.state.guests_answer.lock().expect("no panic holds it") = true;
    assert_eq!(client.post(&pause, r#"{"memory":false}"#).await.status, 204);
    assert_eq!(detail(&rig, &id).await["pauseMode"], "filesystem");
    assert_eq!(client.post(&format!("/sandboxes/{id}/resume"), "").await.status, 201);
    let creates = rig.node.state.creates.lock().expect("no panic holds it").clone();
    assert_eq!(creates.iter().map(|c| c.cold_boot).collect::<Vec<_>>(), [false, true, true]);
    rig.stop().await;
}

#[tokio::test]
async fn a_pause_that_fails_leaves_it_running() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    for (error, status, text) in [
        (ConnectError::resource_exhausted("full"), 503, "no room on the node"),
        (ConnectError::internal("broken"), 500, "internal server error"),
        (ConnectError::unavailable("away"), 503, "did not do it"),
    ] {
        *rig.node.state.next_save.lock().expect("no panic holds it") = Some(error);
        client.post(&format!("/sandboxes/{id}/pause"), "").await.assert_error(status, text);
        assert_eq!(detail(&rig, &id).await["state"], "running", "after {status}");
        assert!(rig.control.routes.get(&id).is_some());
    }
    client.post("/sandboxes/inone/pause", "").await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn a_kill_removes_a_paused_sandbox_and_its_snapshot() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = paused(&rig, CREATE).await;
    assert_eq!(rig.node.state.kept().len(), 1);
    let path = format!("/sandboxes/{id}");
    let (first, second) = tokio::join!(client.delete(&path), client.delete(&path));
    let mut statuses = [first.status, second.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 404]);
    assert!(rig.node.state.kept().is_empty());
    client.get(&path).await.assert_error(404, "doesn't exist");
    // One that was resumed leaves nothing either.
    let id = paused(&rig, CREATE).await;
    assert_eq!(client.post(&format!("/v2/sandboxes/{id}/connect"), "").await.status, 201);
    assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    eventually("its snapshot is gone", || async { rig.node.state.kept().is_empty() }).await;
    let labels = client.get(&format!("/events/sandboxes/{id}?orderAsc=true")).await.json();
    let labels: Vec<_> =
        labels.as_array().expect("a list").iter().map(|e| e["event_label"].clone()).collect();
    assert_eq!(labels, ["create", "pause", "resume", "kill"]);
    rig.stop().await;
}

#[tokio::test]
async fn a_kill_that_comes_while_it_is_pausing_waits_and_kills() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    rig.node.state.hold_saves.send_replace(true);
    let (pause, path) = (format!("/sandboxes/{id}/pause"), format!("/sandboxes/{id}"));
    let (paused, killed) = tokio::join!(client.post(&pause, ""), async {
        eventually("the pause is at the node", || async {
            !rig.node.state.pauses.lock().expect("no panic holds it").is_empty()
        })
        .await;
        let shown = detail(&rig, &id).await;
        assert_eq!((&shown["state"], shown.get("pauseMode")), (&json!("paused"), None));
        client.post(&pause, "").await.assert_error(409, "is already paused");
        let release = async { rig.node.state.hold_saves.send_replace(false) };
        tokio::join!(client.delete(&path), release).0
    });
    assert_eq!((paused.status, killed.status), (204, 204), "{} {}", paused.text, killed.text);
    assert!(rig.node.state.kept().is_empty());
    client.get(&path).await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn at_its_end_it_is_paused_and_told_of() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(AUTO).await;
    let lifecycle = &detail(&rig, &id).await["lifecycle"];
    assert_eq!(lifecycle, &json!({"onTimeout": "pause", "autoResume": false}));
    let snapshot = rig.node.state.pause_at_end(&id, true);
    eventually("it is seen as paused", || async { detail(&rig, &id).await["state"] == "paused" })
        .await;
    assert_eq!(client.post(&format!("/v2/sandboxes/{id}/connect"), "").await.status, 201);
    let created = rig.node.state.creates.lock().expect("no panic holds it").clone();
    assert_eq!(created[1].build_id, snapshot);
    let ids = created.iter().map(|c| c.auto_pause.as_option().expect("one").snapshot_id.clone());
    let ids: std::collections::HashSet<_> = ids.collect();
    assert_eq!(ids.len(), 2, "another one for each run");
    // Nobody is told this time: the next reconcile finds it, and the older one goes.
    let newer = rig.node.state.pause_at_end(&id, false);
    let stop =
        rig.control.client.post(&format!("/sandboxes/{id}/timeout"), r#"{"timeout":60}"#).await;
    stop.assert_error(404, "doesn't exist");
    // Hidden for as long as nobody knows what became of it.
    eventually("the newer one counts", || async {
        let shown = client.get(&format!("/sandboxes/{id}")).await;
        let is_paused = shown.status == 200 && shown.json()["state"] == "paused";
        is_paused && rig.node.state.kept() == [newer.clone()]
    })
    .await;
    rig.stop().await;
}

async fn restart(dir: &Path, control: Control) -> Control {
    control.stop().await;
    Control::start(dir, config()).await
}

#[tokio::test]
async fn what_is_paused_outlives_control_also_where_it_wrote_nothing() {
    let rig = Rig::start().await;
    let stored =
        paused(&rig, r#"{"templateID":"base","envVars":{"A":"1"},"metadata":{"k":"v"}}"#).await;
    let unstored = rig.create(AUTO).await;
    let before = detail(&rig, &stored).await;
    let Rig { dir, node, control } = rig;
    control.stop().await;
    // While nobody follows.
    let kept = node.state.pause_at_end(&unstored, false);
    let control = Control::start(dir.path(), config()).await;
    let rig = Rig { dir, node, control };
    assert_eq!(detail(&rig, &stored).await, before);
    assert_eq!(detail(&rig, &unstored).await["state"], "paused");
    let resumed = rig.control.client.post(&format!("/v2/sandboxes/{stored}/connect"), "").await;
    assert_eq!(resumed.status, 201, "{}", resumed.text);
    let asked = rig.node.state.creates.lock().expect("no panic holds it").last().cloned();
    let asked = asked.expect("a create");
    assert_eq!((asked.sandbox_id.as_str(), asked.env_vars["A"].as_str()), (stored.as_str(), "1"));
    assert!(rig.node.state.kept().contains(&kept));
    // And a second time, with nothing in between.
    let Rig { dir, node, control } = rig;
    let control = restart(dir.path(), control).await;
    let rig = Rig { dir, node, control };
    assert_eq!(detail(&rig, &stored).await["state"], "running");
    assert_eq!(detail(&rig, &unstored).await["state"], "paused");
    rig.stop().await;
}

/// What a node remembers of `was`, which ended with its last life.
fn reclaimed(was: SandboxInfo, reason: &str) -> ReclaimedSandbox {
    ReclaimedSandbox {
        sandbox_id: was.sandbox_id,
        execution_id: was.execution_id,
        template_id: TEMPLATE_ID.to_owned(),
        build_id: BUILD_ID.to_owned(),
        terms: was.terms,
        started_at_unix_ms: was.started_at_unix_ms,
        end_at_unix_ms: was.end_at_unix_ms,
        reclaimed_at_unix_ms: was.started_at_unix_ms + 1,
        reason: reason.to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_resumed_sandbox_that_is_lost_with_its_node_is_paused_as_before() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let [lost, stopped, ended] =
        [paused(&rig, CREATE).await, paused(&rig, CREATE).await, paused(&rig, CREATE).await];
    let mut recalled = Vec::new();
    for (id, reason) in [(&lost, None), (&stopped, Some("shutdown")), (&ended, Some("crashed"))] {
        assert_eq!(client.post(&format!("/v2/sandboxes/{id}/connect"), "").await.status, 201);
        let was = rig.node.state.sandboxes.lock().expect("no panic holds it")[id].clone();
        rig.node.state.end_silently(id);
        recalled.extend(reason.map(|reason| reclaimed(was, reason)));
    }
    *rig.node.state.reclaimed.lock().expect("no panic holds it") = recalled;
    let Rig { dir, node, control } = rig;
    let node = node.reconnect().await;
    let rig = Rig { dir, node, control };
    let client = &rig.control.client;
    for id in [&lost, &stopped] {
        // Until its node has had the time to say why, it is hidden.
        eventually("it is paused again", || async {
            let shown = client.get(&format!("/sandboxes/{id}")).await;
            shown.status == 200 && shown.json()["state"] == "paused"
        })
        .await;
    }
    eventually("that one is gone", || async {
        client.get(&format!("/sandboxes/{ended}")).await.status == 404
    })
    .await;
    assert_eq!(client.post(&format!("/v2/sandboxes/{lost}/connect"), "").await.status, 201);
    eventually("what nobody needs is gone", || async { rig.node.state.kept().len() == 2 }).await;
    let Rig { dir, node, control } = rig;
    let control = restart(dir.path(), control).await;
    let rig = Rig { dir, node, control };
    assert_eq!(detail(&rig, &stopped).await["state"], "paused");
    rig.stop().await;
}

#[tokio::test]
async fn an_end_a_node_remembers_comes_after_the_pause_before_it() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    // The store takes nothing for now: what is known of the sandbox waits in the queue.
    let options = SqliteConnectOptions::new().filename(rig.dir.path().join("control.db"));
    let mut busy = options.connect().await.expect("a connection of its own");
    sqlx::query("BEGIN IMMEDIATE").execute(&mut busy).await.expect("the store is held");
    assert_eq!(client.post(&format!("/sandboxes/{id}/pause"), "").await.status, 204);
    assert_eq!(client.post(&format!("/v2/sandboxes/{id}/connect"), "").await.status, 201);
    let was = rig.node.state.sandboxes.lock().expect("no panic holds it")[&id].clone();
    rig.node.state.end_silently(&id);
    *rig.node.state.reclaimed.lock().expect("no panic holds it") = vec![reclaimed(was, "crashed")];
    let Rig { dir, node, control } = rig;
    let node = node.reconnect().await;
    let rig = Rig { dir, node, control };
    sqlx::query("ROLLBACK").execute(&mut busy).await.expect("the store is free again");
    busy.close().await.expect("closed");
    eventually("its snapshot is gone", || async { rig.node.state.kept().is_empty() }).await;
    let Rig { dir, node, control } = rig;
    let control = restart(dir.path(), control).await;
    let rig = Rig { dir, node, control };
    let path = format!("/sandboxes/{id}");
    rig.control.client.get(&path).await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn a_snapshot_nobody_knows_is_removed_and_a_paused_one_that_vanishes_is_gone() {
    let rig = Rig::start_with(often()).await;
    let client = &rig.control.client;
    let (kept, lost) = (paused(&rig, CREATE).await, paused(&rig, CREATE).await);
    {
        let mut snapshots = rig.node.state.snapshots.lock().expect("no panic holds it");
        let strange = snapshots.values().next().expect("one").clone();
        for (id, terms, pause) in [
            ("00000000-0000-4000-8000-000000000001", "nonsense", true),
            ("00000000-0000-4000-8000-000000000002", strange.terms.as_str(), false),
        ] {
            let mut stranger = strange.clone();
            stranger.snapshot_id = id.to_owned();
            stranger.sandbox_id = "istrange".to_owned();
            stranger.execution_id = id.to_owned();
            stranger.terms = terms.to_owned();
            stranger.paused = pause;
            snapshots.insert(id.to_owned(), stranger);
        }
    }
    eventually("the strangers are gone", || async { rig.node.state.kept().len() == 2 }).await;
    let removed = {
        let mut snapshots = rig.node.state.snapshots.lock().expect("no panic holds it");
        let id = snapshots.values().find(|s| s.sandbox_id == lost).expect("it").snapshot_id.clone();
        snapshots.remove(&id).expect("it")
    };
    assert!(removed.paused);
    eventually("it is gone", || async {
        client.get(&format!("/sandboxes/{lost}")).await.status == 404
    })
    .await;
    assert_eq!(detail(&rig, &kept).await["state"], "paused");
    rig.stop().await;
}

#[tokio::test]
async fn a_team_with_a_paused_sandbox_stays_until_it_is_killed() {
    let rig = Rig::start().await;
    let (team, client) = rig.team(json!({"name": "sleepers", "tier": "local"})).await;
    let id = client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    assert_eq!(client.post(&format!("/sandboxes/{id}/pause"), "").await.status, 204);
    let path = format!("/admin/teams/{team}");
    rig.admin("DELETE", &path, Value::Null).await.assert_error(409, "paused sandboxes");
    let killed = rig.admin("POST", &format!("{path}/sandboxes/kill"), Value::Null).await;
    assert_eq!(killed.json(), json!({"killedCount": 1, "failedCount": 0}));
    assert!(rig.node.state.kept().is_empty());
    assert_eq!(rig.admin("DELETE", &path, Value::Null).await.status, 204);
    rig.stop().await;
}
