//! Lifecycle events: what is told, to whom, and that it is told once.

use belljar_control::ApiKey;
use serde_json::Value;

use crate::support::client::Client;
use crate::support::node::{BUILD_ID, TEMPLATE_ID};
use crate::support::{Control, Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base","metadata":{"user":"ann"}}"#;

/// Waits until `path` lists `count` events; never more.
async fn events(client: &Client, path: &str, count: usize) -> Vec<Value> {
    let list = || async {
        let answer = client.get(path).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json().as_array().expect("a list").clone()
    };
    eventually("the events are listed", || async { list().await.len() >= count }).await;
    let events = list().await;
    assert_eq!(events.len(), count, "{events:?}");
    events
}

fn types(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .map(|event| {
            let full = event["type"].as_str().expect("a type");
            full.strip_prefix("sandbox.lifecycle.").expect("the family")
        })
        .collect()
}

#[tokio::test]
async fn every_change_is_told_once_and_to_its_team_only() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}");
    assert_eq!(client.post(&format!("{path}/timeout"), r#"{"timeout":500}"#).await.status, 204);
    // These move nothing, so there is nothing to tell.
    assert_eq!(client.post(&format!("{path}/connect"), r#"{"timeout":20}"#).await.status, 200);
    assert_eq!(client.post(&format!("{path}/refreshes"), "").await.status, 204);
    let far = client.post(&format!("{path}/refreshes"), r#"{"duration":3600}"#).await;
    assert_eq!(far.status, 204);
    let end_at = client.get(&path).await.json()["endAt"].clone();
    assert_eq!(client.delete(&path).await.status, 204);

    let of_sandbox = format!("/events/sandboxes/{id}?orderAsc=true");
    let told = events(client, &of_sandbox, 4).await;
    assert_eq!(types(&told), ["created", "updated", "updated", "killed"]);
    for event in &told {
        assert_eq!(event["version"], "v2");
        assert_eq!(event["event_category"], "lifecycle");
        assert_eq!(event["sandbox_id"], id.as_str());
        assert_eq!(event["sandbox_template_id"], TEMPLATE_ID);
        assert_eq!(event["sandbox_build_id"], BUILD_ID);
        assert_eq!(event["event_data"]["sandbox_metadata"]["user"], "ann");
        assert_eq!(event["sandbox_execution_id"], told[0]["sandbox_execution_id"]);
    }
    assert_eq!(told[2]["event_data"]["set_timeout"], end_at);
    let killed = &told[3]["event_data"];
    assert_eq!(killed["reason"], "request");
    assert_eq!(
        (&killed["execution"]["vcpu_count"], &killed["execution"]["memory_mb"]),
        (&2.into(), &512.into())
    );
    assert_eq!(killed["execution"]["started_at"], told[0]["timestamp"]);
    assert!(killed["execution"]["execution_time"].is_u64());

    let other = rig.control.store.ensure_team("other").await.expect("a team");
    let key = ApiKey::random();
    rig.control.store.add_key(&other.id, &key).await.expect("a key");
    let stranger = Client::new(rig.control.address, &key.expose());
    stranger.get(&of_sandbox).await.assert_error(404, "doesn't exist or you don't have access");
    assert_eq!(stranger.get("/events/sandboxes").await.json(), Value::Array(Vec::new()));
    let nobody = Client::new(rig.control.address, &ApiKey::random().expose());
    nobody.get("/events/sandboxes").await.assert_error(401, "API key");
    rig.stop().await;
}

#[tokio::test]
async fn lists_are_filtered_ordered_and_paged() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    for _ in 0..6 {
        let id = rig.create(CREATE).await;
        assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    }
    let all = events(client, "/events/sandboxes?limit=100", 12).await;
    assert_eq!(events(client, "/events/sandboxes", 10).await, all[..10]);
    assert_eq!(events(client, "/events/sandboxes?offset=10", 2).await, all[10..]);
    assert_eq!(events(client, "/events/sandboxes?offset=99", 0).await, [] as [Value; 0]);
    let mut oldest = events(client, "/events/sandboxes?limit=100&orderAsc=true", 12).await;
    oldest.reverse();
    assert_eq!(oldest, all);
    let created = "types=sandbox.lifecycle.created";
    let found = events(client, &format!("/events/sandboxes?limit=100&{created}"), 6).await;
    assert!(types(&found).iter().all(|word| *word == "created"));
    let both = format!("/events/sandboxes?limit=100&{created}&types=sandbox.lifecycle.killed");
    assert_eq!(events(client, &both, 12).await, all);
    events(client, "/events/sandboxes?types=sandbox.lifecycle.paused", 0).await;
    let id = all[0]["sandbox_id"].as_str().expect("an id");
    events(client, &format!("/events/sandboxes/{id}?{created}"), 1).await;
    events(client, &format!("/events/sandboxes/{id}?offset=2"), 0).await;
    for (query, named) in [
        ("limit=0", "'limit' must be a number from 1 to 100"),
        ("limit=101", "'limit'"),
        ("offset=-1", "'offset'"),
        ("offset=4294967296", "'offset'"),
        ("orderAsc=yes", "'orderAsc' must be true or false"),
        ("types=created", "'types' has the unknown event type 'created'; there are sandbox."),
        ("types=sandbox.lifecycle.created&types=%27--", "unknown event type ''--'"),
    ] {
        client.get(&format!("/events/sandboxes?{query}")).await.assert_error(400, named);
        client.get(&format!("/events/sandboxes/{id}?{query}")).await.assert_error(400, named);
    }
    for unknown in ["i00000000000000000000", "..%2Fetc", "%00"] {
        let answer = client.get(&format!("/events/sandboxes/{unknown}")).await;
        answer.assert_error(404, "doesn't exist or you don't have access to it");
    }
    rig.stop().await;
}

#[tokio::test]
async fn ends_say_why_and_a_restart_tells_nothing_twice() {
    let rig = Rig::start().await;
    let mut expected = Vec::new();
    for (reason, word) in [("expired", "timeout"), ("crashed", "crashed"), ("shutdown", "lost")] {
        let id = rig.create(CREATE).await;
        let path = format!("/events/sandboxes/{id}");
        events(&rig.control.client, &path, 1).await;
        rig.node.state.end(&id, reason);
        let told = events(&rig.control.client, &path, 2).await;
        assert_eq!(types(&told), ["killed", "created"]);
        assert_eq!(told[0]["event_data"]["reason"], word);
        expected.push(path);
    }
    let alive = rig.create(CREATE).await;
    let Rig { dir, node, control } = rig;
    control.stop().await;
    // Ends while nobody follows.
    node.state.end_silently(&alive);
    let control = Control::start(dir.path(), config()).await;
    let told = events(&control.client, &format!("/events/sandboxes/{alive}"), 2).await;
    assert_eq!(told[0]["event_data"]["reason"], "lost");
    for path in expected {
        events(&control.client, &path, 2).await;
    }
    control.stop().await;
    node.stop().await;
}
