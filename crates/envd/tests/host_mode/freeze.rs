//! The routes by which a host holds a sandbox still, over control groups of the test's own.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use belljar_envd::Settings;
use belljar_envd::workload::Workload;
use belljar_testkit::skip;
use http::Method;
use http_body_util::Full;
use serde_json::json;

use super::client::{Daemon, SOON, own_user, settings};

/// An empty control group; `None`, said aloud, where none can be made.
fn playground() -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").expect("Linux");
    let mount = table.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(at))
    });
    let Some(mount) = mount else {
        skip("this machine has no cgroup2 file system");
        return None;
    };
    let group = mount.join(format!("belljar-envd-routes-{}", std::process::id()));
    match fs::create_dir(&group) {
        Ok(()) => Some(group),
        Err(error) => {
            skip(&format!("control groups cannot be made here ({error}); run as root"));
            None
        }
    }
}

async fn post(daemon: &Daemon, path: &str) -> (u16, serde_json::Value) {
    let answer = daemon.post(path, "application/json", "").await;
    let body = if answer.body.is_empty() { json!(null) } else { answer.json() };
    (answer.status.as_u16(), body)
}

#[tokio::test]
async fn without_groups_or_a_guest_the_routes_say_what_is_missing() {
    let daemon = Daemon::start().await;
    for path in ["/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade"] {
        let (status, body) = post(&daemon, path).await;
        assert_eq!((status, &body["code"]), (501, &json!(501)), "{path}");
        assert!(body["message"].as_str().is_some_and(|text| text.len() > 40), "{path}: {body}");
        assert_eq!(daemon.get(path).await.status.as_u16(), 405, "{path}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn a_frozen_sandbox_answers_and_starts_wait_for_the_thaw() {
    let Some(group) = playground() else { return };
    let workload = Arc::new(Workload::create(&group).expect("made"));
    let settings = Settings { workload: Some(Arc::clone(&workload)), ..settings() };
    let daemon = Daemon::with(settings).await;
    let mut ticker = daemon.shell("while :; do echo tick; sleep 0.01; done").await;
    let ticking = ticker.pid().await;
    ticker.until("tick").await;

    for (query, status) in [
        ("maxWaitMs=60001", 400),
        ("maxWaitMs=soon", 400),
        ("mode=odd", 400),
        ("maxCgroups=1", 409),
    ] {
        let (answered, body) = post(&daemon, &format!("/freeze?{query}")).await;
        assert_eq!((answered, &body["code"]), (status, &json!(status)), "{query}: {body}");
    }
    let (status, body) = post(&daemon, "/freeze?mode=hierarchy&maxCgroups=3&maxWaitMs=10000").await;
    assert_eq!((status, &body["frozen"], &body["cgroups"]), (200, &json!(true), &json!(3)));
    let stopped = fs::read_to_string(group.join("sandbox/cgroup.events")).expect("there");
    assert!(stopped.contains("frozen 1"), "{stopped}");
    assert_eq!(daemon.get("/health").await.status.as_u16(), 204);

    let mut starting = Box::pin(async { daemon.shell("echo late").await.run().await });
    let waited = tokio::time::timeout(Duration::from_millis(300), &mut starting).await;
    assert!(waited.is_err(), "a start does not run while frozen");
    assert_eq!(post(&daemon, "/unfreeze").await.0, 204);
    assert_eq!(post(&daemon, "/unfreeze").await.0, 204);
    let late = tokio::time::timeout(SOON, &mut starting).await.expect("starts after the thaw");
    assert_eq!(late.stdout(), "late\n");
    drop(starting);

    let selected = json!({ "process": { "pid": ticking }, "signal": "SIGNAL_SIGKILL" });
    assert_eq!(daemon.call("process.Process/SendSignal", selected).await.status.as_u16(), 200);
    ticker.rest(ticking).await;
    daemon.stop().await;
    for name in ["sandbox/user", "sandbox/pty", "sandbox", ""] {
        // The ticker is dead; the sleep it had begun has its few milliseconds left.
        let gone = tokio::time::timeout(SOON, async {
            while fs::remove_dir(group.join(name)).is_err() {
                tokio::task::yield_now().await;
            }
        });
        gone.await.expect("no process is left in it");
    }
}

#[tokio::test]
async fn only_the_token_may_hold_a_sandbox_still() {
    let token = Some(belljar_domain::Secret::new("right".to_owned()));
    let settings = Settings { access_token: token, ..Settings::on_host(own_user()) };
    let daemon = Daemon::with(settings).await;
    for path in ["/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade"] {
        for (token, status) in [("", 401), ("wrong", 401), ("right", 501)] {
            let request = daemon.request(Method::POST, path).header("x-access-token", token);
            let answer = daemon.fetch(request.body(Full::default()).expect("valid")).await;
            assert_eq!(answer.status.as_u16(), status, "{path} with {token:?}");
        }
    }
    daemon.stop().await;
}
