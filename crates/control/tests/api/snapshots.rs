//! Snapshots that sandboxes are started from, and forks.

use connectrpc::ConnectError;
use serde_json::{Value, json};

use belljar_control::Config;

use crate::pauses::paused;
use crate::support::client::Client;
use crate::support::{Rig, config, eventually};

const CREATE: &str =
    r#"{"templateID":"base","timeout":600,"metadata":{"k":"v"},"envVars":{"A":"1"}}"#;

async fn take(client: &Client, id: &str, body: &str) -> Value {
    let answer = client.post(&format!("/sandboxes/{id}/snapshots"), body).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.json()
}

fn ids(list: &Value) -> Vec<Value> {
    list.as_array().expect("a list").iter().map(|item| item["snapshotID"].clone()).collect()
}

#[tokio::test]
async fn a_snapshot_is_a_template_until_it_is_removed() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let plain = take(client, &id, "").await;
    assert_eq!(plain["names"], json!([]));
    let named = take(client, &id, r#"{"name":"Work:v1","memory":false}"#).await;
    assert_eq!(named["names"], json!(["default/work:v1"]));
    assert_eq!(client.get(&format!("/sandboxes/{id}")).await.json()["state"], "running");
    let text = |value: &Value| value["snapshotID"].as_str().expect("an id").to_owned();
    for name in [text(&plain), text(&named), "work:v1".to_owned(), "default/work:v1".to_owned()] {
        let body = json!({"templateID": name}).to_string();
        let made = client.post("/v2/sandboxes", &body).await;
        assert_eq!(made.status, 201, "{name}: {}", made.text);
    }
    let creates = rig.node.state.creates.lock().expect("no panic holds it").clone();
    assert_eq!(
        creates.iter().map(|c| c.cold_boot).collect::<Vec<_>>(),
        [false, false, true, true, true]
    );
    assert!(creates[1..].iter().all(|c| c.env_vars.is_empty()), "they have their own environment");
    for name in ["work", "work:v2", "others/work:v1"] {
        let body = json!({"templateID": name}).to_string();
        let answer = client.post("/v2/sandboxes", &body).await;
        assert!([403, 404].contains(&answer.status), "{name}: {}", answer.text);
    }
    let path = format!("/templates/{}", text(&plain).replace(':', "%3A"));
    assert_eq!(client.delete(&path).await.status, 204);
    client.delete(&path).await.assert_error(404, "not found");
    assert_eq!(client.delete("/templates/default%2Fwork%3Av1").await.status, 204);
    eventually("their node has none", || async { rig.node.state.kept().is_empty() }).await;
    assert_eq!(client.get("/snapshots").await.text, "[]");
    client.delete("/templates/base").await.assert_error(501, "is not supported by this server yet");
    client.delete("/templates/nope").await.assert_error(404, "template 'nope' not found");
    rig.stop().await;
}

#[tokio::test]
async fn snapshots_are_listed_in_pages_and_by_sandbox_and_name() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let (first, second) = (rig.create(CREATE).await, rig.create(CREATE).await);
    let mut made = vec![
        take(client, &first, r#"{"name":"work"}"#).await,
        take(client, &second, r#"{"name":"work"}"#).await,
        take(client, &second, "{}").await,
    ];
    // The newer one has taken the name; the older one is there under its id.
    made[0]["names"] = json!([]);
    let all = client.get("/snapshots").await.json();
    assert_eq!(all.as_array().expect("a list").len(), 3);
    for snapshot in &made {
        assert!(all.as_array().expect("a list").contains(snapshot), "{snapshot}");
    }
    let (mut seen, mut query) = (Vec::new(), "limit=2".to_owned());
    loop {
        let page = client.get(&format!("/snapshots?{query}")).await;
        seen.extend(ids(&page.json()));
        let Some(token) = page.headers.get("x-next-token") else { break };
        query = format!("limit=2&nextToken={}", token.to_str().expect("text"));
    }
    assert_eq!(seen, ids(&all));
    for (query, count) in [
        (format!("sandboxID={first}"), 1),
        (format!("sandboxID={second}"), 2),
        ("sandboxID=inone".to_owned(), 0),
        ("sandboxID=../x".to_owned(), 0),
        ("name=work".to_owned(), 1),
        ("name=default/work:default".to_owned(), 1),
        ("name=work:v9".to_owned(), 0),
        ("name=others/work".to_owned(), 0),
    ] {
        let found = client.get(&format!("/snapshots?{query}")).await;
        assert_eq!(ids(&found.json()).len(), count, "{query}: {}", found.text);
    }
    client.get("/snapshots?limit=0").await.assert_error(400, "'limit'");
    client.get("/snapshots?name=a%20b").await.assert_error(400, "Invalid template reference");
    let labels = client.get(&format!("/events/sandboxes/{first}?orderAsc=true")).await.json();
    assert_eq!(labels[1]["type"], "sandbox.lifecycle.checkpointed");
    rig.stop().await;
}

#[tokio::test]
async fn what_cannot_be_a_snapshot_is_refused() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}/snapshots");
    for (name, status, text) in [
        ("base", 400, "is that of a template"),
        ("a b", 400, "Invalid template reference"),
        ("a:00000000-0000-4000-8000-000000000000", 400, "Invalid template reference"),
        ("others/a", 403, "you don't have access"),
    ] {
        let answer = client.post(&path, &json!({"name": name}).to_string()).await;
        answer.assert_error(status, text);
    }
    *rig.node.state.guests_answer.lock().expect("no panic holds it") = false;
    client.post(&path, "").await.assert_error(503, "guest does not answer");
    *rig.node.state.guests_answer.lock().expect("no panic holds it") = true;
    let full = ConnectError::resource_exhausted("full");
    *rig.node.state.next_save.lock().expect("no panic holds it") = Some(full);
    client.post(&path, "").await.assert_error(503, "no room on the node");
    client.post("/sandboxes/inone/snapshots", "").await.assert_error(404, "doesn't exist");
    client.post("/sandboxes/inone/fork", "").await.assert_error(404, "doesn't exist");
    for count in ["0", "101", "-1"] {
        let answer =
            client.post(&format!("/sandboxes/{id}/fork"), &format!(r#"{{"count":{count}}}"#)).await;
        answer.assert_error(400, "'count' must be from 1 to 100");
    }
    let asleep = paused(&rig, CREATE).await;
    let forked = client.post(&format!("/sandboxes/{asleep}/fork"), "").await;
    forked.assert_error(
        409,
        &format!("Sandbox '{asleep}' is paused and cannot be forked; resume it first"),
    );
    client.post(&format!("/sandboxes/{asleep}/snapshots"), "").await.assert_error(409, "is paused");
    assert_eq!(client.get("/snapshots").await.text, "[]");
    assert_eq!(rig.node.state.kept().len(), 1, "that of the paused one");
    rig.stop().await;
}

#[tokio::test]
async fn forks_run_on_their_sources_terms_as_far_as_there_are_places() {
    let rig = Rig::start_with(Config { max_concurrent_sandboxes: 4, ..config() }).await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let answer =
        client.post(&format!("/sandboxes/{id}/fork"), r#"{"count":5,"timeout":120}"#).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    let results = answer.json();
    let results = results.as_array().expect("a list");
    assert_eq!(results.len(), 5);
    let forks: Vec<_> = results.iter().filter_map(|r| r["sandbox"]["sandboxID"].as_str()).collect();
    assert_eq!(forks.len(), 3);
    for refused in results.iter().filter(|result| result.get("sandbox").is_none()) {
        assert_eq!(refused["error"]["code"], 429);
        let message = refused["error"]["message"].as_str().expect("text");
        assert!(
            message.starts_with("you have reached the maximum number of concurrent"),
            "{message}"
        );
    }
    let creates = rig.node.state.creates.lock().expect("no panic holds it").clone();
    for fork in forks {
        let shown = client.get(&format!("/sandboxes/{fork}")).await.json();
        assert_eq!(
            (&shown["metadata"], &shown["templateID"]),
            (&json!({"k": "v"}), &json!(creates[0].template_id))
        );
        let asked = creates.iter().find(|create| create.sandbox_id == fork).expect("it");
        assert_eq!((asked.env_vars["A"].as_str(), asked.cold_boot), ("1", false));
        assert_ne!(asked.envd_access_token, creates[0].envd_access_token);
    }
    assert_eq!(client.get(&format!("/sandboxes/{id}")).await.json()["state"], "running");
    eventually("the copy is gone", || async { rig.node.state.kept().is_empty() }).await;
    rig.stop().await;
}

#[tokio::test]
async fn another_teams_snapshot_is_not_there() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let made = take(client, &id, r#"{"name":"work"}"#).await;
    let (_, stranger) = rig.team(json!({"name": "strangers", "tier": "local"})).await;
    let name = made["snapshotID"].as_str().expect("an id");
    for name in [name, "work"] {
        let body = json!({"templateID": name}).to_string();
        stranger.post("/v2/sandboxes", &body).await.assert_error(404, "not found");
        let path = format!("/templates/{}", name.replace(':', "%3A"));
        stranger.delete(&path).await.assert_error(404, "not found");
    }
    let named = json!({"templateID": "default/work"}).to_string();
    stranger.post("/v2/sandboxes", &named).await.assert_error(403, "you don't have access");
    assert_eq!(stranger.get("/snapshots").await.text, "[]");
    let asleep = paused(&rig, CREATE).await;
    for path in ["pause", "resume", "fork", "snapshots"] {
        let answer = stranger.post(&format!("/sandboxes/{asleep}/{path}"), "").await;
        answer.assert_error(404, "doesn't exist");
    }
    stranger.delete(&format!("/sandboxes/{asleep}")).await.assert_error(404, "doesn't exist");
    assert_eq!(client.get("/snapshots").await.json(), json!([made]));
    rig.stop().await;
}
