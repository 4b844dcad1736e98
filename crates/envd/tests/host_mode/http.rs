//! The plain routes: health, metrics, variables, init, CORS.

use http::Method;
use http_body_util::Full;
use serde_json::json;

use super::client::Daemon;

#[tokio::test]
async fn the_daemon_is_healthy_and_measures_itself() {
    let daemon = Daemon::start().await;
    let answer = daemon.get("/health").await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0));
    let metrics = daemon.get("/metrics").await.json();
    for field in [
        "ts",
        "cpu_count",
        "cpu_used_pct",
        "mem_total",
        "mem_used",
        "mem_cache",
        "mem_total_mib",
        "mem_used_mib",
        "disk_used",
        "disk_total",
    ] {
        assert!(metrics[field].is_number(), "{field} in {metrics}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn init_sets_variables_and_token_and_ignores_replays() {
    let daemon = Daemon::start().await;
    let init = async |body: serde_json::Value| {
        daemon.post("/init", "application/json", body.to_string()).await.status.as_u16()
    };
    let newer = "2026-11-22T10:00:00.5Z";
    assert_eq!(init(json!({ "envVars": { "A": "1" }, "timestamp": newer })).await, 204);
    assert_eq!(daemon.get("/envs").await.json(), json!({ "A": "1", "E2B_SANDBOX": "true" }));
    let older = json!({ "envVars": { "A": "old" }, "timestamp": "2026-11-22T10:00:00Z" });
    assert_eq!(init(older).await, 204);
    assert_eq!(daemon.get("/envs").await.json()["A"], "1");
    assert_eq!(init(json!({ "timestamp": "noon" })).await, 400);
    assert_eq!(init(json!({ "volumeMounts": [{}] })).await, 400);
    assert_eq!(init(json!({ "caBundle": "any" })).await, 400, "host mode changes no machine");
    assert_eq!(daemon.post("/init", "application/json", "{").await.status.as_u16(), 400);

    assert_eq!(init(json!({ "accessToken": "one" })).await, 204);
    assert_eq!(daemon.get("/envs").await.status.as_u16(), 401);
    assert_eq!(init(json!({ "accessToken": "two" })).await, 401);
    assert_eq!(init(json!({ "accessToken": "one", "envVars": { "B": "2" } })).await, 204);
    let request = daemon.request(Method::GET, "/envs").header("x-access-token", "one");
    let answer = daemon.fetch(request.body(Full::default()).expect("valid")).await;
    assert_eq!(answer.json(), json!({ "B": "2", "E2B_SANDBOX": "true" }));
    daemon.stop().await;
}

#[tokio::test]
async fn browsers_may_call_from_anywhere() {
    let daemon = Daemon::start().await;
    let request = daemon
        .request(Method::OPTIONS, "/process.Process/Start")
        .header("origin", "https://app.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,x-access-token");
    let answer = daemon.fetch(request.body(Full::default()).expect("valid")).await;
    assert_eq!(answer.status.as_u16(), 204);
    assert_eq!(answer.headers["access-control-allow-origin"], "*");
    assert_eq!(answer.headers["access-control-allow-headers"], "authorization,x-access-token");
    assert_eq!(answer.headers["access-control-max-age"], "7200");
    assert_eq!(daemon.get("/health").await.headers["access-control-allow-origin"], "*");
    daemon.stop().await;
}
