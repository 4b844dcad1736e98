//! What sandboxes use, as clients read it.

use belljar_control::ApiKey;
use belljar_wire::rpc::belljar::node::v1::MetricsSample;
use serde_json::json;

use crate::support::Rig;
use crate::support::client::Client;

const CREATE: &str = r#"{"templateID":"base"}"#;

fn sample(at_unix_ms: i64, cpu_used_pct: f32) -> MetricsSample {
    MetricsSample {
        at_unix_ms,
        cpu_count: 2,
        cpu_used_pct,
        mem_used_bytes: 100,
        mem_total_bytes: 1 << 30,
        mem_cache_bytes: 7,
        disk_used_bytes: 5,
        disk_total_bytes: u64::MAX,
        ..Default::default()
    }
}

fn sampled(rig: &Rig, id: &str, samples: Vec<MetricsSample>) {
    rig.node.state.samples.lock().expect("no panic holds it").insert(id.to_owned(), samples);
}

#[tokio::test]
async fn a_sandbox_shows_what_it_used() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    let samples = [10_500, 15_500, 20_500].map(|at| sample(at, 12.5)).to_vec();
    sampled(&rig, &id, samples);
    let client = &rig.control.client;
    let all = client.get(&format!("/sandboxes/{id}/metrics")).await;
    assert_eq!(all.status, 200, "{}", all.text);
    assert_eq!(all.json().as_array().map(Vec::len), Some(3));
    let expected = json!({
        "timestamp": "1970-01-01T00:00:10.500Z", "timestampUnix": 10, "cpuCount": 2,
        "cpuUsedPct": 12.5, "memUsed": 100, "memTotal": 1 << 30, "memCache": 7, "diskUsed": 5,
        "diskTotal": i64::MAX,
    });
    assert_eq!(all.json()[0], expected);
    for (query, expected) in [
        ("?start=15", vec![15, 20]),
        ("?end=15", vec![10, 15]),
        ("?start=15&end=15", vec![15]),
        ("?start=21", vec![]),
    ] {
        let answer = client.get(&format!("/sandboxes/{id}/metrics{query}")).await.json();
        let times = answer.as_array().expect("a list").iter().map(|m| m["timestampUnix"].clone());
        assert_eq!(times.collect::<Vec<_>>(), expected, "{query}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn what_a_guest_makes_up_is_still_valid() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    let odd = [f32::NAN, f32::INFINITY, -3.0, 1e30].map(|percent| sample(1_000, percent)).to_vec();
    sampled(&rig, &id, odd);
    let answer = rig.control.client.get(&format!("/sandboxes/{id}/metrics")).await.json();
    let shown = answer.as_array().expect("a list").iter().map(|m| m["cpuUsedPct"].clone());
    assert_eq!(shown.collect::<Vec<_>>(), [0.0, 0.0, 0.0, 100.0]);
    rig.stop().await;
}

#[tokio::test]
async fn bad_times_are_refused_by_name() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    let client = &rig.control.client;
    for (query, name) in [
        ("start=x", "'start'"),
        ("end=", "'end'"),
        ("end=-1", "'end'"),
        ("end=1.5", "'end'"),
        ("start=2&end=1", "'end'"),
    ] {
        let answer = client.get(&format!("/sandboxes/{id}/metrics?{query}")).await;
        answer.assert_error(400, name);
    }
    client.get("/sandboxes/i00000000000000000000/metrics").await.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn many_sandboxes_show_their_newest_sample() {
    let rig = Rig::start().await;
    let (first, second, silent) =
        (rig.create(CREATE).await, rig.create(CREATE).await, rig.create(CREATE).await);
    sampled(&rig, &first, vec![sample(1_000, 1.0), sample(6_000, 2.0)]);
    sampled(&rig, &second, vec![sample(7_000, 3.0)]);
    let client = &rig.control.client;
    let ids = format!("{first},{second},{silent},i00000000000000000000,NOT-AN-ID,");
    let answer = client.get(&format!("/sandboxes/metrics?sandbox_ids={ids}")).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let sandboxes = answer.json()["sandboxes"].as_object().expect("an object").clone();
    assert_eq!(sandboxes.len(), 2);
    assert_eq!(sandboxes[&first]["timestampUnix"], 6);
    assert_eq!(sandboxes[&second]["cpuUsedPct"], 3.0);
    let none = client.get("/sandboxes/metrics?sandbox_ids=i00000000000000000000").await;
    assert_eq!(none.json(), json!({"sandboxes": {}}));
    let many = vec!["i00000000000000000000"; 101].join(",");
    for query in ["", "?sandbox_ids=", "?sandbox_ids=,,", &format!("?sandbox_ids={many}")] {
        client.get(&format!("/sandboxes/metrics{query}")).await.assert_error(400, "'sandbox_ids'");
    }
    rig.stop().await;
}

#[tokio::test]
async fn another_teams_sandboxes_are_not_there() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    sampled(&rig, &id, vec![sample(1_000, 1.0)]);
    let store = &rig.control.store;
    let (team, key) = (store.ensure_team("other").await.expect("a team"), ApiKey::random());
    store.add_key(&team.id, &key).await.expect("a key");
    let other = Client::new(rig.control.address, &key.expose());
    let many = other.get(&format!("/sandboxes/metrics?sandbox_ids={id}")).await;
    assert_eq!(many.json(), json!({"sandboxes": {}}));
    other.get(&format!("/sandboxes/{id}/metrics")).await.assert_error(404, "doesn't exist");
    rig.stop().await;
}
