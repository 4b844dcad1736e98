//! The server's figures as Prometheus reads them.

use belljar_control::{ApiKey, Config};
use http_body_util::Full;
use serde_json::Value;

use crate::support::client::Client;
use crate::support::{Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base"}"#;

async fn rig() -> Rig {
    Rig::start_with(Config { metrics_public: true, ..config() }).await
}

async fn figures(rig: &Rig) -> String {
    let answer = rig.control.client.get("/metrics").await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let kind = answer.headers["content-type"].to_str().expect("text");
    assert!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "{kind}");
    assert!(answer.text.ends_with("# EOF\n"));
    answer.text
}

#[track_caller]
fn assert_line(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
}

#[tokio::test]
async fn requests_creates_and_sandboxes_are_counted() {
    let rig = rig().await;
    let team = rig.control.store.ensure_team("default").await.expect("the team").id;
    let id = rig.create(CREATE).await;
    rig.create(CREATE).await;
    let client = &rig.control.client;
    assert_eq!(client.get(&format!("/sandboxes/{id}")).await.status, 200);
    assert_eq!(client.post("/v2/sandboxes", "{").await.status, 400);
    assert_eq!(client.post("/v2/sandboxes", r#"{"templateID":"nope"}"#).await.status, 404);
    assert_eq!(Client::new(rig.control.address, "x").get("/sandboxes").await.status, 401);
    assert_eq!(client.get("/no/such/route").await.status, 404);
    let text = figures(&rig).await;
    for line in [
        r#"belljar_http_requests_total{method="POST",route="/v2/sandboxes",status="2xx"} 2"#,
        r#"belljar_http_requests_total{method="GET",route="/sandboxes/{id}",status="2xx"} 1"#,
        r#"belljar_http_requests_total{method="GET",route="none",status="4xx"} 1"#,
        r#"belljar_http_request_duration_seconds_count{method="GET",route="/sandboxes/{id}"} 1"#,
        r#"belljar_sandbox_creates_total{outcome="created"} 2"#,
        r#"belljar_sandbox_creates_total{outcome="invalid"} 1"#,
        r#"belljar_sandbox_creates_total{outcome="not_found"} 1"#,
        r#"belljar_refusals_total{reason="unauthenticated"} 1"#,
        r#"belljar_sandboxes_running{node="0"} 2"#,
        r#"belljar_team_sandboxes_running{team="other"} 0"#,
        "belljar_sandboxes_starting 0",
        "belljar_store_lost_changes 0",
    ] {
        assert_line(&text, line);
    }
    assert_line(&text, &format!(r#"belljar_team_sandboxes_running{{team="{team}"}} 2"#));
    assert!(text.contains("process_resident_memory_bytes "));
    assert!(!text.contains(&id), "no sandbox has series of its own");
    assert!(!text.contains(&client.key), "and no key is in them");
    // Who is gone does not stay at the last figure.
    assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    eventually("one sandbox is left", async || {
        figures(&rig).await.lines().any(|line| line == r#"belljar_sandboxes_running{node="0"} 1"#)
    })
    .await;
    rig.stop().await;
}

#[tokio::test]
async fn nothing_a_caller_makes_up_becomes_a_series() {
    let rig = rig().await;
    let client = &rig.control.client;
    let before = figures(&rig).await.lines().count();
    for n in 0..20 {
        client.get(&format!("/made/up/{n}")).await;
        client.get(&format!("/sandboxes/made-up-{n}?q={n}")).await;
        let request = http::Request::builder()
            .method(http::Method::from_bytes(format!("BREW{n}").as_bytes()).expect("a method"))
            .uri(format!("http://{}/sandboxes", rig.control.address))
            .body(Full::default())
            .expect("a request");
        client.raw(request).await;
    }
    let text = figures(&rig).await;
    assert!(!text.contains("made") && !text.contains("BREW"), "{text}");
    // A few routes with their histograms, and not sixty.
    assert!(text.lines().count() < before + 120, "{text}");
    rig.stop().await;
}

#[tokio::test]
async fn the_figures_are_the_operators() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    client.get("/metrics").await.assert_error(401, "X-Admin-Token");
    let stranger = Client::new(rig.control.address, &ApiKey::random().expose());
    stranger.get("/metrics").await.assert_error(401, "X-Admin-Token");
    let shown = rig.admin("GET", "/metrics", Value::Null).await;
    assert_eq!(shown.status, 200, "{}", shown.text);
    assert_line(&shown.text, r#"belljar_refusals_total{reason="unauthenticated"} 2"#);
    rig.stop().await;
}
