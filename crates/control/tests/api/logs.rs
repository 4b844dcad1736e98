//! The logs of a sandbox as clients read them.

use belljar_wire::rpc::belljar::node::v1::{LogEntry, SandboxLogsRequest};
use serde_json::{Value, json};

use crate::support::Rig;

const CREATE: &str = r#"{"templateID":"base"}"#;

fn stdout(at_unix_ms: i64, text: &str) -> LogEntry {
    LogEntry {
        at_unix_ms,
        level: "info".to_owned(),
        event: "stdout".to_owned(),
        pid: 12,
        command: "/bin/bash -l -c x".to_owned(),
        text: text.to_owned(),
        ..Default::default()
    }
}

fn entries() -> Vec<LogEntry> {
    let dropped = LogEntry {
        level: "warn".to_owned(),
        event: "dropped".to_owned(),
        pid: 0,
        command: String::new(),
        ..stdout(1_700_000_000_002, "9 lines are not in this log")
    };
    let cut = LogEntry { cut: true, ..stdout(1_700_000_000_001, "said \"h\u{fc}\" \u{1b}[0m") };
    vec![cut, dropped]
}

fn asked(rig: &Rig) -> SandboxLogsRequest {
    rig.node.state.log_requests.lock().expect("no panic holds it").pop().expect("a question")
}

#[tokio::test]
async fn both_versions_tell_the_same_lines() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    *rig.node.state.log.lock().expect("no panic holds it") = entries();
    let client = &rig.control.client;

    let v2 = client.get(&format!("/v2/sandboxes/{id}/logs")).await;
    assert_eq!(v2.status, 200, "{}", v2.text);
    let expected = json!([
        {
            "timestamp": "2023-11-14T22:13:20.001Z",
            "message": "said \"h\u{fc}\" \u{1b}[0m",
            "level": "info",
            "fields": {
                "logger": "process", "event_type": "stdout", "pid": "12",
                "cmd": "/bin/bash -l -c x", "continues": "true",
            },
        },
        {
            "timestamp": "2023-11-14T22:13:20.002Z",
            "message": "9 lines are not in this log",
            "level": "warn",
            "fields": { "logger": "envd", "event_type": "dropped" },
        },
    ]);
    assert_eq!(v2.json(), json!({ "logs": expected }));

    let v1 = client.get(&format!("/sandboxes/{id}/logs")).await.json();
    assert_eq!(v1["logEntries"], expected);
    let lines = v1["logs"].as_array().expect("a list");
    assert_eq!(lines[0]["timestamp"], "2023-11-14T22:13:20.001Z");
    let parse = |line: &Value| -> Value {
        serde_json::from_str(line["line"].as_str().expect("text")).expect("JSON in text")
    };
    let first = parse(&lines[0]);
    assert_eq!(
        first,
        json!({
            "level": "info", "logger": "process", "message": "said \"h\u{fc}\" \u{1b}[0m",
            "event_type": "stdout", "pid": "12", "cmd": "/bin/bash -l -c x", "continues": "true",
        })
    );
    assert_eq!(parse(&lines[1])["logger"], "envd");
    assert_eq!(lines.len(), 2);
    rig.stop().await;
}

#[tokio::test]
async fn what_is_asked_for_reaches_the_node() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    let client = &rig.control.client;
    let plain = SandboxLogsRequest { sandbox_id: id.clone(), limit: 1000, ..Default::default() };
    assert_eq!(client.get(&format!("/sandboxes/{id}/logs")).await.status, 200);
    assert_eq!(asked(&rig), plain);
    assert_eq!(client.get(&format!("/v2/sandboxes/{id}/logs")).await.status, 200);
    assert_eq!(asked(&rig), plain);
    // Old clients send the id with a suffix.
    let path = format!("/sandboxes/{id}-6532622b/logs?start=1700000000001&limit=5000");
    assert_eq!(client.get(&path).await.status, 200);
    let since = SandboxLogsRequest { cursor_unix_ms: Some(1_700_000_000_001), ..plain.clone() };
    assert_eq!(asked(&rig), since);
    let path = format!(
        "/v2/sandboxes/{id}/logs?cursor=7&limit=10&direction=backward&level=warn&search=a%20%C3%BC"
    );
    assert_eq!(client.get(&path).await.status, 200);
    let all = SandboxLogsRequest {
        cursor_unix_ms: Some(7),
        limit: 10,
        backward: true,
        min_level: "warn".to_owned(),
        search: "a \u{fc}".to_owned(),
        ..plain.clone()
    };
    assert_eq!(asked(&rig), all);
    let search = "%C3%BC".repeat(256);
    let path = format!("/v2/sandboxes/{id}/logs?direction=forward&search={search}&limit=0");
    assert_eq!(client.get(&path).await.status, 200);
    assert_eq!(asked(&rig).search.chars().count(), 256);
    rig.stop().await;
}

#[tokio::test]
async fn wrong_questions_and_unknown_sandboxes_are_refused() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    let client = &rig.control.client;
    let long = format!("search={}", "x".repeat(257));
    for (query, named) in [
        ("limit=1001", "'limit' must be a number from 0 to 1000"),
        ("limit=-1", "'limit'"),
        ("limit=many", "'limit'"),
        ("cursor=-1", "'cursor'"),
        ("cursor=2023-11-14", "'cursor'"),
        ("cursor=99999999999999999999", "'cursor'"),
        ("direction=sideways", "'direction' must be forward or backward"),
        ("level=fatal", "'level' must be debug, info, warn or error"),
        (long.as_str(), "'search' may have at most 256 characters"),
    ] {
        client.get(&format!("/v2/sandboxes/{id}/logs?{query}")).await.assert_error(400, named);
    }
    for query in ["start=yesterday", "start=-1", "limit=-1", "limit=x"] {
        let named = format!("'{}'", query.split('=').next().expect("a name"));
        client.get(&format!("/sandboxes/{id}/logs?{query}")).await.assert_error(400, &named);
    }
    rig.node.state.end_silently(&id);
    for path in ["/sandboxes", "/v2/sandboxes"] {
        for unknown in [id.as_str(), "i00000000000000000000", "..%2Fetc"] {
            let answer = client.get(&format!("{path}/{unknown}/logs")).await;
            answer.assert_error(404, "doesn't exist or you don't have access to it");
        }
    }
    assert_eq!(rig.node.state.log_requests.lock().expect("no panic holds it").len(), 0);
    rig.stop().await;
}
