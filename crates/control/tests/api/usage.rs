//! What a team used, as it is sampled and shown.

use std::time::Duration;

use belljar_control::{ApiKey, Config};
use serde_json::Value;

use crate::support::client::Client;
use crate::support::{Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base"}"#;

async fn rig() -> (Rig, String) {
    let config = Config { usage_interval: Duration::from_millis(50), ..config() };
    let rig = Rig::start_with(config).await;
    let team = rig.control.store.ensure_team("default").await.expect("the team").id.to_string();
    (rig, team)
}

fn points(answer: &Value) -> Vec<(u64, f64)> {
    let point = |point: &Value| {
        assert_eq!(point.as_object().map(serde_json::Map::len), Some(4), "{point}");
        assert!(point["timestamp"].as_str().is_some_and(|at| at.ends_with('Z')), "{point}");
        assert!(point["timestampUnix"].as_i64().is_some(), "{point}");
        let concurrent = point["concurrentSandboxes"].as_u64().expect("a number");
        (concurrent, point["sandboxStartRate"].as_f64().expect("a number"))
    };
    answer.as_array().expect("a list").iter().map(point).collect()
}

#[tokio::test]
async fn what_runs_and_starts_is_counted() {
    let (rig, team) = rig().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(rig.create(CREATE).await);
    }
    let client = &rig.control.client;
    let metrics = format!("/teams/{team}/metrics");
    eventually("three sandboxes are seen, and their starts", async || {
        let answer = client.get(&metrics).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let points = points(&answer.json());
        // The steps of a day are 300 s long.
        let started: f64 = points.iter().map(|(_, rate)| rate * 300.0).sum();
        let most = points.iter().map(|(concurrent, _)| *concurrent).max();
        most == Some(3) && (started - 3.0).abs() < 0.001
    })
    .await;
    let max = client.get(&format!("{metrics}/max?metric=concurrent_sandboxes")).await.json();
    assert_eq!(max["value"], 3.0);
    assert_eq!(max.as_object().map(serde_json::Map::len), Some(3), "{max}");
    let rate = client.get(&format!("{metrics}/max?metric=sandbox_start_rate")).await.json();
    assert!(rate["value"].as_f64().is_some_and(|rate| rate > 0.0), "{rate}");
    for id in ids {
        assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    }
    let end = max["timestampUnix"].as_i64().expect("a time");
    let before =
        client.get(&format!("{metrics}/max?metric=concurrent_sandboxes&start=1&end=2")).await;
    assert_eq!(before.json()["value"], 0.0, "nothing ran long before {end}");
    rig.stop().await;
}

#[tokio::test]
async fn figures_of_other_teams_are_refused() {
    let (rig, team) = rig().await;
    let store = &rig.control.store;
    let (other, key) = (store.ensure_team("other").await.expect("a team"), ApiKey::random());
    store.add_key(&other.id, &key).await.expect("a key");
    let stranger = Client::new(rig.control.address, &key.expose());
    for path in ["metrics", "metrics/max?metric=concurrent_sandboxes"] {
        stranger.get(&format!("/teams/{team}/{path}")).await.assert_error(403, "don't have access");
        assert_eq!(stranger.get(&format!("/teams/{}/{path}", other.id)).await.status, 200);
        rig.control.client.get(&format!("/teams/me/{path}")).await.assert_error(400, "UUID");
    }
    rig.stop().await;
}

#[tokio::test]
async fn bad_ranges_and_metrics_are_refused_by_name() {
    let (rig, team) = rig().await;
    let client = &rig.control.client;
    for (path, name) in [
        ("metrics?start=x", "'start'"),
        ("metrics?end=-5", "'end'"),
        ("metrics?start=9&end=8", "'start'"),
        ("metrics/max", "'metric'"),
        ("metrics/max?metric=cpu", "'metric'"),
        ("metrics/max?metric=concurrent_sandboxes&start=1.0", "'start'"),
    ] {
        client.get(&format!("/teams/{team}/{path}")).await.assert_error(400, name);
    }
    let all = client.get(&format!("/teams/{team}/metrics?start=0&end=253402300799")).await;
    assert!((300..=502).contains(&points(&all.json()).len()), "30 days in steps of 2 hours");
    rig.stop().await;
}
