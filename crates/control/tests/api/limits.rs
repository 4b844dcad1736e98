//! What a team may have at most, and what it is told when it asks for more.

use serde_json::json;

use crate::support::Rig;
use crate::support::node::template;

const BASE: &str = r#"{"templateID":"base"}"#;

#[tokio::test]
async fn each_team_has_its_own_number_of_sandboxes() {
    let rig = Rig::start().await;
    let two = json!({"name": "Two", "limitOverrides": {"maxConcurrentSandboxes": 2}});
    let (_, first) = rig.team(two).await;
    let one = json!({"name": "One", "limitOverrides": {"maxConcurrentSandboxes": 1}});
    let (_, second) = rig.team(one).await;
    let none = json!({"name": "None", "limitOverrides": {"maxConcurrentSandboxes": 0}});
    let (_, third) = rig.team(none).await;
    for (client, limit) in [(&first, 2), (&second, 1), (&third, 0)] {
        for _ in 0..limit {
            assert_eq!(client.post("/v2/sandboxes", BASE).await.status, 201);
        }
        let text =
            format!("you have reached the maximum number of concurrent E2B sandboxes ({limit})");
        client.post("/v2/sandboxes", BASE).await.assert_error(429, &text);
    }
    rig.stop().await;
}

#[tokio::test]
async fn sandboxes_live_as_long_as_the_team_s_may() {
    let rig = Rig::start().await;
    let (_, base) = rig.team(json!({"name": "Base"})).await;
    let brief = json!({"name": "Brief", "limitOverrides": {"maxLengthSeconds": 1800}});
    let (_, brief) = rig.team(brief).await;
    for (client, most, text) in [
        (&base, 3600, "Timeout cannot be greater than 1 hours"),
        (&brief, 1800, "Timeout cannot be greater than 0.50 hours"),
    ] {
        let body = |seconds| json!({"templateID": "base", "timeout": seconds}).to_string();
        for path in ["/sandboxes", "/v2/sandboxes"] {
            client.post(path, &body(most + 1)).await.assert_error(400, text);
        }
        let made = client.post("/v2/sandboxes", &body(most)).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let id = made.json()["sandboxID"].as_str().expect("an id").to_owned();
        let body = |seconds| json!({"timeout": seconds}).to_string();
        for path in ["timeout", "connect"] {
            let path = format!("/sandboxes/{id}/{path}");
            client.post(&path, &body(most + 1)).await.assert_error(400, text);
            assert!(client.post(&path, &body(most)).await.status < 300);
        }
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_template_that_is_too_big_is_refused_with_the_limit() {
    let rig = Rig::start().await;
    // The template `base` of the node has 2 processors, 512 MiB of memory and 1024 MiB of disk.
    for (limit, value, text) in [
        ("maxVcpus", 1, "2 virtual processors and this team's sandboxes may have 1"),
        ("maxMemoryMB", 511, "512 MiB of memory and this team's sandboxes may have 511"),
        ("maxDiskSizeMB", 1023, "1024 MiB of disk and this team's sandboxes may have 1023"),
    ] {
        let (_, client) = rig.team(json!({"name": limit, "limitOverrides": {limit: value}})).await;
        client.post("/v2/sandboxes", BASE).await.assert_error(400, text);
    }
    assert_eq!(rig.node.state.creates.lock().expect("no panic holds it").len(), 0);
    let more =
        template("tinytinytinytinytiny", "6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c12", &["tiny"], 1);
    let small = belljar_wire::rpc::belljar::node::v1::TemplateInfo { vcpus: 1, ..more };
    rig.node.state.more_templates.lock().expect("no panic holds it").push(small);
    let (_, client) = rig.team(json!({"name": "Tiny", "limitOverrides": {"maxVcpus": 1}})).await;
    let made = client.post("/v2/sandboxes", r#"{"templateID":"tiny"}"#).await;
    assert_eq!(made.status, 201, "{}", made.text);
    rig.stop().await;
}

#[tokio::test]
async fn sandboxes_begun_too_fast_are_told_when_to_come_again() {
    let rig = Rig::start().await;
    let slow = json!({
        "name": "Slow",
        "limitOverrides": {"maxConcurrentSandboxes": 100},
    });
    let (_, slow) = rig.team(slow).await;
    let (_, other) = rig.team(json!({"name": "Other", "tier": "pro"})).await;
    let mut made = 0;
    let refused = loop {
        let answer = slow.post("/v2/sandboxes", BASE).await;
        if answer.status != 201 {
            break answer;
        }
        made += 1;
        assert!(made < 100, "the base tier begins one a second, ten at once");
    };
    refused.assert_error(429, "this team may begin 1 sandboxes a second");
    assert!(made >= 10, "only {made} at once");
    let wait: u32 =
        refused.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert_eq!(wait, 1);
    assert_eq!(refused.headers["should-retry"], "true");
    assert_eq!(other.post("/v2/sandboxes", BASE).await.status, 201, "another team's is its own");
    // A refusal takes no place and no turn.
    let listed = slow.get("/sandboxes").await.json();
    assert_eq!(listed.as_array().expect("a list").len(), made);
    rig.stop().await;
}
