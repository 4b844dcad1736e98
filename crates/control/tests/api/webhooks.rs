//! Webhooks: what is set up, what arrives, and what becomes of what does not.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use belljar_control::{ApiKey, Config, WebhookConfig};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::support::client::Client;
use crate::support::receiver::{Manner, Received, Receiver};
use crate::support::{Control, Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base"}"#;
const SECRET: &str = "a secret of a team";
const ALL: [&str; 3] =
    ["sandbox.lifecycle.created", "sandbox.lifecycle.killed", "sandbox.lifecycle.updated"];

/// Quick to try again, and allowed to reach this machine.
fn quick() -> Config {
    let webhooks = WebhookConfig {
        allow_private: true,
        retry_wait: Duration::from_millis(50),
        poll_interval: Duration::from_millis(20),
        ..WebhookConfig::default()
    };
    Config { webhooks, ..config() }
}

fn body(url: &str) -> Value {
    json!({"name": "hook", "url": url, "enabled": true, "events": ALL, "signatureSecret": SECRET})
}

/// Makes a webhook and returns its path.
async fn add(client: &Client, url: &str) -> String {
    let answer = client.post("/events/webhooks", &body(url).to_string()).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    format!("/events/webhooks/{}", answer.json()["id"].as_str().expect("an id"))
}

async fn deliveries(client: &Client, webhook: &str, query: &str) -> Vec<Value> {
    let answer = client.get(&format!("{webhook}/deliveries?limit=100&{query}")).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json().as_array().expect("a list").clone()
}

async fn until_dead(client: &Client, webhook: &str) -> Value {
    eventually("a delivery is dead", || async {
        !deliveries(client, webhook, "state=dead").await.is_empty()
    })
    .await;
    deliveries(client, webhook, "state=dead").await.remove(0)
}

async fn until_received(receiver: &Receiver, path: &str, count: usize) -> Vec<Received> {
    eventually("deliveries arrive", || async { receiver.received(path).len() >= count }).await;
    receiver.received(path)
}

#[tokio::test]
async fn events_arrive_signed_in_order_and_as_they_are_listed() {
    let (rig, receiver) = (Rig::start_with(quick()).await, Receiver::start().await);
    let client = &rig.control.client;
    let webhook = add(client, &receiver.url("/hook")).await;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}");
    assert_eq!(client.post(&format!("{path}/timeout"), r#"{"timeout":500}"#).await.status, 204);
    assert_eq!(client.delete(&path).await.status, 204);
    let received = until_received(&receiver, "/hook", 3).await;
    let listed = client.get(&format!("/events/sandboxes/{id}?orderAsc=true")).await.json();
    let arrived: Vec<Value> = received.iter().map(Received::json).collect();
    assert_eq!(Value::Array(arrived), listed);
    let mut ids = Vec::new();
    for request in &received {
        assert_eq!(request.header("content-type"), "application/json");
        assert_eq!(request.header("e2b-signature-version"), "v1");
        assert!(webhook.ends_with(request.header("e2b-webhook-id")));
        let digest = Sha256::new().chain_update(SECRET).chain_update(&request.body).finalize();
        assert_eq!(request.header("e2b-signature"), URL_SAFE_NO_PAD.encode(digest));
        ids.push(request.header("e2b-delivery-id").to_owned());
    }
    eventually("all is noted", || async {
        deliveries(client, &webhook, "state=delivered").await.len() == 3
    })
    .await;
    let noted = deliveries(client, &webhook, "orderAsc=true").await;
    let noted_ids: Vec<&str> = noted.iter().map(|d| d["id"].as_str().expect("an id")).collect();
    assert_eq!(noted_ids, ids);
    assert_eq!((&noted[0]["attempts"], &noted[0]["lastStatus"]), (&json!(1), &json!(200)));
    assert_eq!(noted[0]["sandboxID"], id.as_str());
    assert!(noted[0]["finishedAt"].is_string() && noted[0]["nextAttemptAt"].is_null());
    // Switched off, it hears of nothing.
    let off = client.send(http::Method::PATCH, &webhook, r#"{"enabled":false}"#).await;
    assert_eq!((off.status, &off.json()["enabled"]), (200, &json!(false)));
    let other = add(client, &receiver.url("/other")).await;
    rig.create(CREATE).await;
    until_received(&receiver, "/other", 1).await;
    assert_eq!(deliveries(client, &webhook, "").await.len(), 3);
    assert_eq!(client.delete(&other).await.status, 204);
    client.get(&other).await.assert_error(404, "the webhook doesn't exist");
    rig.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn what_fails_is_tried_four_times_then_dead_then_sent_when_asked_for() {
    let (rig, receiver) = (Rig::start_with(quick()).await, Receiver::start().await);
    let client = &rig.control.client;
    let webhook = add(client, &receiver.url("/hook")).await;
    receiver.behave("/hook", Manner::Status(500));
    let id = rig.create(CREATE).await;
    let dead = until_dead(client, &webhook).await;
    assert_eq!((&dead["attempts"], &dead["lastStatus"]), (&json!(4), &json!(500)));
    assert_eq!(dead["lastError"], "the receiver answered 500");
    let tries = receiver.received("/hook");
    assert_eq!(tries.len(), 4);
    for again in &tries {
        assert_eq!(again.header("e2b-delivery-id"), dead["id"].as_str().expect("an id"));
        assert_eq!(again.body, tries[0].body);
        assert_eq!(again.header("e2b-signature"), tries[0].header("e2b-signature"));
    }
    // The next event of the sandbox is not held up by one that is dead.
    receiver.behave("/hook", Manner::Status(204));
    assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    until_received(&receiver, "/hook", 5).await;
    let retry = format!("{webhook}/deliveries/{}/retry", dead["id"].as_str().expect("an id"));
    let off = client.send(http::Method::PATCH, &webhook, r#"{"enabled":false}"#).await;
    assert_eq!(off.status, 200);
    client.post(&retry, "").await.assert_error(409, "set 'enabled' to true first");
    let on = client.send(http::Method::PATCH, &webhook, r#"{"enabled":true}"#).await;
    assert_eq!(on.status, 200);
    let asked = client.post(&retry, "").await;
    assert_eq!((asked.status, &asked.json()["attempts"]), (202, &json!(0)));
    eventually("it is delivered", || async {
        deliveries(client, &webhook, "state=delivered").await.len() == 2
    })
    .await;
    client.post(&retry, "").await.assert_error(409, "the delivery is delivered");
    for unknown in ["x", "00000000-0000-4000-8000-000000000000"] {
        let path = format!("{webhook}/deliveries/{unknown}/retry");
        client.post(&path, "").await.assert_error(404, "the delivery doesn't exist");
    }
    rig.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn a_receiver_that_hangs_holds_nobody_else_up() {
    let (rig, receiver) = (Rig::start_with(quick()).await, Receiver::start().await);
    let client = &rig.control.client;
    let slow = add(client, &receiver.url("/slow")).await;
    add(client, &receiver.url("/quick")).await;
    receiver.behave("/slow", Manner::Hang);
    for _ in 0..20 {
        rig.create(CREATE).await;
    }
    until_received(&receiver, "/quick", 20).await;
    assert_eq!(deliveries(client, &slow, "state=pending").await.len(), 20);
    assert!(receiver.received("/slow").len() <= 4, "more than its own hands");
    rig.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn silence_redirects_and_floods_end_in_time() {
    let mut config = quick();
    config.webhooks.deadline = Duration::from_millis(300);
    config.webhooks.retries = 1;
    let (rig, receiver) = (Rig::start_with(config).await, Receiver::start().await);
    let client = &rig.control.client;
    let silent = add(client, &receiver.url("/silent")).await;
    let elsewhere = add(client, &receiver.url("/elsewhere")).await;
    let flooding = add(client, &receiver.url("/flooding")).await;
    let closed = add(client, "http://127.0.0.1:1/").await;
    receiver.behave("/silent", Manner::Hang);
    receiver.behave("/elsewhere", Manner::Redirect(receiver.url("/private")));
    receiver.behave("/flooding", Manner::Flood);
    rig.create(CREATE).await;
    let dead = until_dead(client, &silent).await;
    assert_eq!(dead["lastError"], "no whole answer within 300 ms");
    assert_eq!((&dead["attempts"], &dead["lastStatus"]), (&json!(2), &Value::Null));
    let dead = until_dead(client, &elsewhere).await;
    assert_eq!(dead["lastError"], "the receiver answered 302; redirects are not followed");
    let dead = until_dead(client, &closed).await;
    let reason = dead["lastError"].as_str().expect("a reason");
    assert!(reason.starts_with("connect to the receiver: "), "{reason}");
    eventually("the flood is a success", || async {
        deliveries(client, &flooding, "state=delivered").await.len() == 1
    })
    .await;
    assert!(receiver.received("/private").is_empty());
    rig.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn private_addresses_are_out_of_reach_unless_allowed() {
    let mut strict = quick();
    strict.webhooks.allow_private = false;
    strict.webhooks.retries = 0;
    let (rig, receiver) = (Rig::start_with(strict).await, Receiver::start().await);
    let client = &rig.control.client;
    let port = receiver.address.port();
    for url in [
        receiver.url("/hook"),
        format!("http://[::ffff:127.0.0.1]:{port}/hook"),
        format!("http://2130706433:{port}/hook"),
        "http://169.254.169.254/latest/meta-data".to_owned(),
    ] {
        let refused = client.post("/events/webhooks", &body(&url).to_string()).await;
        refused.assert_error(400, "the field 'url' is refused: the address is not public");
    }
    // What a name means shows at the delivery.
    let webhook = add(client, &format!("http://localhost:{port}/hook")).await;
    let moved = json!({"url": receiver.url("/hook")}).to_string();
    let refused = client.send(http::Method::PATCH, &webhook, &moved).await;
    refused.assert_error(400, "the address is not public");
    rig.create(CREATE).await;
    let dead = until_dead(client, &webhook).await;
    let reason = dead["lastError"].as_str().expect("a reason");
    assert!(reason.starts_with("the address is not public"), "{reason}");
    assert!(receiver.received("/hook").is_empty());
    rig.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn a_server_that_stops_in_the_middle_delivers_when_it_is_back() {
    let (rig, receiver) = (Rig::start_with(quick()).await, Receiver::start().await);
    add(&rig.control.client, &receiver.url("/hook")).await;
    receiver.behave("/hook", Manner::Hang);
    let id = rig.create(CREATE).await;
    let first = until_received(&receiver, "/hook", 1).await.remove(0);
    let Rig { dir, node, control } = rig;
    control.stop().await;
    receiver.behave("/hook", Manner::Status(200));
    let control = Control::start(dir.path(), quick()).await;
    assert_eq!(control.client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    let received = until_received(&receiver, "/hook", 3).await;
    // The same one again, since nobody heard that it was taken; then the next.
    assert_eq!(received[1].header("e2b-delivery-id"), first.header("e2b-delivery-id"));
    assert_eq!(received[1].body, first.body);
    assert_eq!(received[2].json()["type"], "sandbox.lifecycle.killed");
    control.stop().await;
    node.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn secrets_are_never_shown_and_others_webhooks_never_seen() {
    let (rig, receiver) = (Rig::start_with(quick()).await, Receiver::start().await);
    let client = &rig.control.client;
    let made = client.post("/events/webhooks", &body(&receiver.url("/hook")).to_string()).await;
    let id = made.json()["id"].as_str().expect("an id").to_owned();
    let webhook = format!("/events/webhooks/{id}");
    let secret = json!({"signatureSecret": "another secret of it", "name": "renamed"}).to_string();
    let changed = client.send(http::Method::PATCH, &webhook, &secret).await;
    assert_eq!((changed.status, &changed.json()["name"]), (200, &json!("renamed")));
    assert_eq!(changed.json()["url"], receiver.url("/hook"));
    let listed = client.get("/events/webhooks").await;
    assert_eq!(listed.json(), json!([changed.json()]));
    for answer in [&made, &changed, &listed, &client.get(&webhook).await] {
        assert!(!answer.text.contains("secret"), "{}", answer.text);
    }
    rig.create(CREATE).await;
    let received = until_received(&receiver, "/hook", 1).await.remove(0);
    let digest =
        Sha256::new().chain_update("another secret of it").chain_update(&received.body).finalize();
    assert_eq!(received.header("e2b-signature"), URL_SAFE_NO_PAD.encode(digest));

    let other = rig.control.store.ensure_team("other").await.expect("a team");
    let key = ApiKey::random();
    rig.control.store.add_key(&other.id, &key).await.expect("a key");
    let stranger = Client::new(rig.control.address, &key.expose());
    let delivery = received.header("e2b-delivery-id");
    let gone = "the webhook doesn't exist or you don't have access to it";
    stranger.get(&webhook).await.assert_error(404, gone);
    stranger.delete(&webhook).await.assert_error(404, gone);
    stranger.get(&format!("{webhook}/deliveries")).await.assert_error(404, gone);
    let retry = format!("{webhook}/deliveries/{delivery}/retry");
    stranger.post(&retry, "").await.assert_error(404, gone);
    let patch = stranger.send(http::Method::PATCH, &webhook, r#"{"enabled":false}"#).await;
    patch.assert_error(404, gone);
    assert_eq!(stranger.get("/events/webhooks").await.json(), json!([]));
    assert_eq!(client.get(&webhook).await.json(), changed.json());
    rig.stop().await;
    receiver.stop().await;
}

#[tokio::test]
async fn wrong_webhooks_are_refused_by_field_and_a_team_has_twenty() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let url = "https://example.com/hook";
    let with = |field: &str, value: Value| {
        let mut body = body(url);
        body[field] = value;
        body.to_string()
    };
    for (body, named) in [
        (with("name", json!("")), "'name' must have 1 to 128 characters"),
        (with("name", json!("x\u{0}")), "'name'"),
        (with("name", json!(7)), "'name'"),
        (with("url", json!("example.com")), "'url' must be a whole http:// or https:// URL"),
        (with("url", json!("ftp://example.com")), "'url'"),
        (with("url", json!("https://ann:pw@example.com")), "'url' must not hold a user name"),
        (with("url", json!(format!("https://e.com/{}", "x".repeat(2048)))), "at most 2048 bytes"),
        (with("events", json!([])), "'events' must name at least one"),
        (
            with("events", json!(["sandbox.lifecycle.exploded"])),
            "'events[0]' is not valid: unknown",
        ),
        (with("events", json!("all")), "'events'"),
        (with("signatureSecret", json!("short")), "'signatureSecret' must have 16 to 256 bytes"),
        (with("signatureSecret", json!("x".repeat(257))), "'signatureSecret'"),
        (with("signatureSecret", Value::Null), "'signatureSecret'"),
        (with("enabled", json!("yes")), "'enabled'"),
        (json!({}).to_string(), "missing field"),
        (String::new(), "the request body is empty"),
    ] {
        client.post("/events/webhooks", &body).await.assert_error(400, named);
    }
    let paths =
        ["sandbox.lifecycle.paused", "sandbox.lifecycle.resumed", "sandbox.lifecycle.checkpointed"];
    let later = client.post("/events/webhooks", &with("events", json!(paths))).await;
    assert_eq!((later.status, &later.json()["events"]), (201, &json!(paths)));
    let webhook = format!("/events/webhooks/{}", later.json()["id"].as_str().expect("an id"));
    for (body, named) in [
        (r#"{"name":""}"#, "'name'"),
        (r#"{"events":[]}"#, "'events'"),
        (r#"{"url":"x"}"#, "'url'"),
        (r#"{"signatureSecret":"x"}"#, "'signatureSecret'"),
    ] {
        client.send(http::Method::PATCH, &webhook, body).await.assert_error(400, named);
    }
    let query = client.get(&format!("{webhook}/deliveries?state=done")).await;
    query.assert_error(400, "'state' must be pending, delivered or dead");
    for _ in 1..20 {
        add(client, url).await;
    }
    let one_more = client.post("/events/webhooks", &body(url).to_string()).await;
    one_more.assert_error(409, "20 webhooks, the most it may have");
    assert_eq!(client.delete(&webhook).await.status, 204);
    client.delete(&webhook).await.assert_error(404, "the webhook doesn't exist");
    client.get("/events/webhooks/%00").await.assert_error(404, "the webhook doesn't exist");
    add(client, url).await;
    rig.stop().await;
}
