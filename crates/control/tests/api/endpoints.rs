//! The REST API as clients see it: every endpoint, every error text, over TCP.

use std::time::Duration;

use belljar_control::Config;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::node::{BUILD_ID, TEMPLATE_ID, template};
use crate::support::{Rig, config, eventually};

const UNAUTHORIZED: &str =
    "error in openapi3filter.SecurityRequirementsError: security requirements failed: ";

fn no_sandbox(id: &str) -> String {
    format!("Sandbox \"{id}\" doesn't exist or you don't have access to it")
}

fn ids(list: &Value) -> Vec<String> {
    let list = list.as_array().expect("a list");
    list.iter().map(|item| item["sandboxID"].as_str().expect("an id").to_owned()).collect()
}

fn millis(time: &Value) -> i64 {
    let time = time.as_str().expect("a time");
    chrono::DateTime::parse_from_rfc3339(time).expect("RFC 3339").timestamp_millis()
}

#[tokio::test]
async fn what_is_not_there_answers_in_json() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    for path in ["/", "/nope", "/v3/sandboxes", "/sandboxes/iabc/nope", "/health/x"] {
        client.get(path).await.assert_error(404, "no such route");
    }
    let put = client.send(Method::PUT, "/sandboxes", "{}").await;
    put.assert_error(405, "no such route");
    assert_eq!(put.headers["allow"], "GET,HEAD,POST");
    client.post("/health", "").await.assert_error(405, "no such route");
    rig.stop().await;
}

#[tokio::test]
async fn only_a_key_that_exists_opens_anything() {
    let rig = Rig::start().await;
    let address = rig.control.address;
    let unknown = format!("e2b_{}", "0".repeat(40));
    for key in ["", "nope", "e2b_", "e2b_zz", &unknown, &rig.control.client.key[4..]] {
        let client = Client::new(address, key);
        client.get("/sandboxes").await.assert_error(401, UNAUTHORIZED);
        client.post("/v2/sandboxes", "{}").await.assert_error(401, UNAUTHORIZED);
        client.delete("/sandboxes/iabc").await.assert_error(401, UNAUTHORIZED);
        client.get("/templates/base").await.assert_error(401, UNAUTHORIZED);
        assert_eq!(client.get("/health").await.status, 200);
    }
    let bare = Request::get(format!("http://{address}/v2/sandboxes"));
    let bare = bare.body(Full::<Bytes>::default()).expect("a request");
    rig.control.client.raw(bare).await.assert_error(401, UNAUTHORIZED);
    rig.stop().await;
}

#[tokio::test]
async fn a_sandbox_lives_and_dies() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let body = json!({
        "templateID": "base", "timeout": 60, "metadata": {"user": "alice"},
        "envVars": {"A": "1"}, "allow_internet_access": false,
    });
    let created = client.post("/v2/sandboxes", &body.to_string()).await;
    assert_eq!(created.status, 201, "{}", created.text);
    let created = created.json();
    let id = created["sandboxID"].as_str().expect("an id").to_owned();
    assert_eq!((id.len(), &id[..1]), (21, "i"));
    assert_eq!(created["templateID"], TEMPLATE_ID);
    assert_eq!(created["alias"], "base");
    assert_eq!(created["envdVersion"], "0.6.13");
    assert!(created["clientID"].is_string());
    assert_eq!((&created["domain"], &created["trafficAccessToken"]), (&Value::Null, &Value::Null));
    let token = created["envdAccessToken"].as_str().expect("a token").to_owned();
    assert_eq!(token.len(), 64);

    let asked = rig.node.state.creates.lock().expect("no panic holds it")[0].clone();
    assert_eq!((asked.sandbox_id.as_str(), asked.envd_access_token.as_str()), (&*id, &*token));
    assert_eq!((asked.template_id.as_str(), asked.build_id.as_str()), (TEMPLATE_ID, BUILD_ID));
    assert_eq!(asked.env_vars.get("A").map(String::as_str), Some("1"));
    assert!(!asked.allow_internet_access);
    let route = rig.control.routes.get(&id).expect("a route");
    assert_eq!(route.ip.to_string(), "10.11.0.7");
    assert_eq!(route.envd_access_token.expect("a token").expose(), &token);

    let detail = client.get(&format!("/sandboxes/{id}")).await.json();
    assert_eq!(detail["state"], "running");
    assert_eq!(detail["metadata"], json!({"user": "alice"}));
    assert_eq!(detail["envdAccessToken"], json!(token));
    assert_eq!((&detail["cpuCount"], &detail["memoryMB"]), (&json!(2), &json!(512)));
    assert_eq!(
        (&detail["diskSizeMB"], &detail["allowInternetAccess"]),
        (&json!(1024), &json!(false))
    );
    assert_eq!(detail["lifecycle"], json!({"autoResume": false, "onTimeout": "kill"}));
    let life = millis(&detail["endAt"]) - millis(&detail["startedAt"]);
    assert!((50_000..=60_000).contains(&life), "{life} ms");
    assert_eq!(ids(&client.get("/sandboxes").await.json()), std::slice::from_ref(&id));

    // Old clients send the id with a suffix.
    assert_eq!(client.get(&format!("/sandboxes/{id}-6532622b")).await.status, 200);
    assert_eq!(client.delete(&format!("/sandboxes/{id}")).await.status, 204);
    assert!(!rig.node.state.holds(&id));
    assert!(rig.control.routes.get(&id).is_none());
    let path = format!("/sandboxes/{id}");
    client.get(&path).await.assert_error(404, &no_sandbox(&id));
    client.delete(&path).await.assert_error(404, &no_sandbox(&id));
    client
        .post(&format!("{path}/timeout"), r#"{"timeout":9}"#)
        .await
        .assert_error(404, &no_sandbox(&id));
    client
        .post(&format!("{path}/connect"), r#"{"timeout":9}"#)
        .await
        .assert_error(404, &no_sandbox(&id));
    client.post(&format!("/v2{path}/connect"), "").await.assert_error(404, &no_sandbox(&id));
    client.post(&format!("{path}/refreshes"), "").await.assert_error(404, &no_sandbox(&id));
    assert_eq!(ids(&client.get("/v2/sandboxes").await.json()), Vec::<String>::new());
    rig.stop().await;
}

#[tokio::test]
async fn the_versions_of_create_differ_in_their_defaults() {
    let rig =
        Rig::start_with(Config { public_domain: Some("e2b.test".to_owned()), ..config() }).await;
    let client = &rig.control.client;
    for (path, seconds) in [("/sandboxes", 15), ("/v2/sandboxes", 300)] {
        let created = client.post(path, r#"{"templateID":"base"}"#).await.json();
        assert_eq!(created["domain"], "e2b.test");
        assert!(created["envdAccessToken"].is_string());
        let id = created["sandboxID"].as_str().expect("an id");
        let detail = client.get(&format!("/sandboxes/{id}")).await.json();
        let life = millis(&detail["endAt"]) - millis(&detail["startedAt"]);
        assert!((seconds * 1000 - 10_000..=seconds * 1000).contains(&life), "{path}: {life} ms");
    }
    let open = client.post("/sandboxes", r#"{"templateID":"base","secure":false}"#).await.json();
    assert_eq!(open.get("envdAccessToken"), None);
    let id = open["sandboxID"].as_str().expect("an id");
    assert_eq!(rig.control.routes.get(id).expect("a route").envd_access_token, None);
    rig.stop().await;
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let too_long = format!(r#"{{"templateID":"{}"}}"#, "a".repeat(129));
    for (body, status, message) in [
        ("", 400, "the request body is empty"),
        ("   ", 400, "the request body is empty"),
        ("{", 400, "not valid JSON"),
        ("nope", 400, "not valid JSON"),
        (r#"{"templateID":"base"} x"#, 400, "not valid JSON"),
        ("[]", 400, "the request body is not valid"),
        ("{}", 400, "missing field `templateID`"),
        (r#"{"templateID":7}"#, 400, "the field 'templateID'"),
        (r#"{"templateID":""}"#, 400, "Invalid template reference: "),
        (r#"{"templateID":"a b"}"#, 400, "Invalid template reference: "),
        (&too_long, 400, "Invalid template reference: "),
        (r#"{"templateID":"nope"}"#, 404, "template 'nope' not found"),
        (r#"{"templateID":"base:v9"}"#, 404, "tag 'v9' does not exist for template 'base'"),
        (r#"{"templateID":"other/base"}"#, 403, "you don't have access to template 'other/base'"),
        (r#"{"templateID":"base","timeout":0}"#, 400, "Timeout must be greater than 0"),
        (r#"{"templateID":"base","timeout":-5}"#, 400, "Timeout must be greater than 0"),
        (
            r#"{"templateID":"base","timeout":86401}"#,
            400,
            "Timeout cannot be greater than 24 hours",
        ),
        (r#"{"templateID":"base","timeout":1.5}"#, 400, "the field 'timeout'"),
        (r#"{"templateID":"base","timeout":1e99}"#, 400, "the field 'timeout'"),
        (r#"{"templateID":"base","timeout":99999999999999999999}"#, 400, "the field 'timeout'"),
        (r#"{"templateID":"base","timeout":"5"}"#, 400, "the field 'timeout'"),
        (r#"{"templateID":"base","metadata":{"a":1}}"#, 400, "the field 'metadata.a'"),
        (r#"{"templateID":"base","envVars":{"A=":""}}"#, 400, "the field 'envVars'"),
        (r#"{"templateID":"base","autoPauseMemory":false}"#, 400, "the field 'autoPauseMemory'"),
        (
            r#"{"templateID":"base","network":{"allowPublicTraffic":false}}"#,
            400,
            "the field 'network.allowPublicTraffic'",
        ),
    ] {
        for path in ["/sandboxes", "/v2/sandboxes"] {
            client.post(path, body).await.assert_error(status, message);
        }
    }
    assert!(rig.node.state.creates.lock().expect("no panic holds it").is_empty());
    for id in ["I1", "..", "i%00", "i%ff", "%20", &"a".repeat(65)] {
        client.get(&format!("/sandboxes/{id}")).await.assert_error(404, "");
    }
    client.get("/sandboxes/NOPE").await.assert_error(404, &no_sandbox("NOPE"));

    // A body that does not say what it is is believed to be JSON.
    let request = Request::post(format!("http://{}/sandboxes", rig.control.address))
        .header("x-api-key", &client.key)
        .body(Full::new(Bytes::from_static(br#"{"templateID":"BASE"}"#)))
        .expect("a request");
    assert_eq!(client.raw(request).await.status, 201);
    rig.stop().await;
}

#[tokio::test]
async fn ends_move_as_the_endpoints_say() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(r#"{"templateID":"base","timeout":100}"#).await;
    let path = format!("/sandboxes/{id}");
    let begin = rig.node.state.end_of(&id);

    let connected = client.post(&format!("{path}/connect"), r#"{"timeout":10}"#).await;
    assert_eq!((connected.status, rig.node.state.end_of(&id)), (200, begin));
    assert_eq!(connected.json()["sandboxID"], id);
    assert!(connected.json()["envdAccessToken"].is_string());
    assert_eq!(client.post(&format!("/v2{path}/connect"), "").await.status, 200);
    let extended = rig.node.state.end_of(&id);
    assert!((190_000..=210_000).contains(&(extended - begin)), "{extended} after {begin}");

    assert_eq!(client.post(&format!("{path}/timeout"), r#"{"timeout":50}"#).await.status, 204);
    let shortened = rig.node.state.end_of(&id);
    assert!(shortened < begin);
    let detail = client.get(&path).await.json();
    assert_eq!(millis(&detail["endAt"]), shortened);

    assert_eq!(client.post(&format!("{path}/refreshes"), "").await.status, 204);
    assert_eq!(client.post(&format!("{path}/refreshes"), r#"{"duration":0}"#).await.status, 204);
    assert_eq!(rig.node.state.end_of(&id), shortened);
    let hour = client.post(&format!("{path}/refreshes"), r#"{"duration":3600}"#).await;
    assert_eq!(hour.status, 204);
    assert!(rig.node.state.end_of(&id) > extended);

    for (tail, body, message) in [
        ("timeout", "", "the request body is empty"),
        ("timeout", "{}", "missing field `timeout`"),
        ("timeout", r#"{"timeout":0}"#, "Timeout must be greater than 0"),
        ("timeout", r#"{"timeout":90000}"#, "Timeout cannot be greater than 24 hours"),
        ("timeout", r#"{"timeout":1.5}"#, "the field 'timeout'"),
        ("connect", "{}", "missing field `timeout`"),
        ("connect", r#"{"timeout":-1}"#, "Timeout must be greater than 0"),
        ("refreshes", r#"{"duration":3601}"#, "the field 'duration'"),
        ("refreshes", r#"{"duration":-1}"#, "the field 'duration'"),
    ] {
        client.post(&format!("{path}/{tail}"), body).await.assert_error(400, message);
    }

    // The node no longer has it, and control has not heard yet.
    rig.node.state.end_silently(&id);
    let late = client.post(&format!("{path}/timeout"), r#"{"timeout":5}"#).await;
    late.assert_error(404, &no_sandbox(&id));
    client.get(&path).await.assert_error(404, &no_sandbox(&id));
    rig.stop().await;
}

#[tokio::test]
async fn lists_filter_and_page() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let mut made = Vec::new();
    for n in 0..5 {
        let note = if n % 2 == 0 { "a b&c=d/+%" } else { "other" };
        let body = json!({"templateID": "base", "metadata": {"note": note, "n": n.to_string()}});
        made.push(rig.create(&body.to_string()).await);
    }
    let all = client.get("/v2/sandboxes").await;
    assert_eq!(all.headers["x-total-running"], "5");
    assert!(!all.headers.contains_key("x-next-token"));
    let mut sorted = (ids(&all.json()), made.clone());
    sorted.0.sort();
    sorted.1.sort();
    assert_eq!(sorted.0, sorted.1);

    for order in ["", "&order=asc", "&order=desc"] {
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let page = client.get(&format!("/v2/sandboxes?limit=2{order}{token}")).await;
            assert_eq!(page.headers["x-total-running"], "5");
            seen.extend(ids(&page.json()));
            let Some(next) = page.headers.get("x-next-token") else { break };
            token = format!("&nextToken={}", next.to_str().expect("text"));
        }
        assert_eq!(seen.len(), 5, "{order}");
        let newest_first = ids(&all.json());
        let expected: Vec<_> = match order {
            "&order=asc" => newest_first.into_iter().rev().collect(),
            _ => newest_first,
        };
        assert_eq!(seen, expected, "{order}");
    }

    // As the Python SDK writes {"note": "a b&c=d/+%"}.
    let note = "metadata=note%3Da%252520b%252526c%25253Dd%2F%25252B%252525";
    for path in ["/sandboxes", "/v2/sandboxes"] {
        assert_eq!(ids(&client.get(&format!("{path}?{note}")).await.json()).len(), 3, "{path}");
        let none = client.get(&format!("{path}?metadata=note%3Dnope")).await;
        assert_eq!(none.text, "[]");
        let one = client.get(&format!("{path}?metadata=note%3Dother%26n%3D3")).await;
        assert_eq!(ids(&one.json()), [made[3].clone()]);
    }
    for (query, count) in [
        ("state=running", 5),
        ("state=paused", 0),
        ("state=running,paused", 5),
        ("template=base", 5),
        ("template=BASE", 5),
        (&format!("template={TEMPLATE_ID}"), 5),
        ("template=nope", 0),
        ("startedAfter=2020-01-01T00:00:00%2B00:00", 5),
        ("startedAfter=2020-01-01T00:00:00+00:00", 5),
        ("startedAfter=2999-01-01T00:00:00Z", 0),
        ("limit=100&unknown=1", 5),
    ] {
        let list = client.get(&format!("/v2/sandboxes?{query}")).await;
        assert_eq!(list.json().as_array().map(Vec::len), Some(count), "{query}: {}", list.text);
    }
    for query in [
        "limit=0",
        "limit=101",
        "limit=x",
        "state=dead",
        "order=up",
        "startedAfter=x",
        "nextToken=x",
    ] {
        client.get(&format!("/v2/sandboxes?{query}")).await.assert_error(400, "the parameter");
    }
    rig.stop().await;
}

#[tokio::test]
async fn another_team_sees_nothing() {
    let rig = Rig::start().await;
    let store = &rig.control.store;
    let other = store.ensure_team("other").await.expect("a team");
    let key = belljar_control::ApiKey::random();
    store.add_key(&other.id, &key).await.expect("a key");
    let stranger = Client::new(rig.control.address, &key.expose());
    let id = rig.create(r#"{"templateID":"base"}"#).await;
    stranger.get(&format!("/sandboxes/{id}")).await.assert_error(404, &no_sandbox(&id));
    stranger.delete(&format!("/sandboxes/{id}")).await.assert_error(404, &no_sandbox(&id));
    assert_eq!(stranger.get("/v2/sandboxes").await.text, "[]");
    assert_eq!(rig.control.client.get(&format!("/sandboxes/{id}")).await.status, 200);
    rig.stop().await;
}

#[tokio::test]
async fn templates_are_listed_and_found() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    rig.create(r#"{"templateID":"debian"}"#).await;
    eventually("the spawn is counted", || async {
        client.get("/templates").await.json()[0]["spawnCount"] == 1
    })
    .await;
    for path in ["/templates", "/v2/templates", "/templates?teamID=x"] {
        let list = client.get(path).await;
        let one = &list.json()[0];
        assert_eq!((&one["templateID"], &one["buildID"]), (&json!(TEMPLATE_ID), &json!(BUILD_ID)));
        assert_eq!(one["aliases"], json!(["base", "debian"]));
        assert_eq!((&one["buildStatus"], &one["public"]), (&json!("ready"), &json!(true)));
        assert_eq!(one["createdBy"], Value::Null);
        assert_eq!(millis(&one["createdAt"]), 1_000);
        assert!(one["lastSpawnedAt"].is_string());
    }
    for name in ["base", "debian", TEMPLATE_ID, "default%2Fbase", "base:default"] {
        let found = client.get(&format!("/templates/aliases/{name}")).await;
        assert_eq!(found.json(), json!({"templateID": TEMPLATE_ID, "public": true}), "{name}");
        let detail = client.get(&format!("/templates/{name}")).await.json();
        assert_eq!(detail["builds"][0]["buildID"], BUILD_ID);
        assert_eq!((&detail["templateID"], &detail["cpuCount"]), (&json!(TEMPLATE_ID), &json!(2)));
    }
    client.get("/templates/aliases/nope").await.assert_error(404, "template 'nope' not found");
    client.get("/templates/nope").await.assert_error(404, "template 'nope' not found");
    client.get("/templates/aliases/a%20b").await.assert_error(400, "Invalid template reference: ");
    client.get("/templates/aliases/x%2Fbase").await.assert_error(403, "you don't have access");

    // A template that came later is found by the create that needs it.
    let later = template("laterlaterlaterlater", BUILD_ID, &["later"], 2_000);
    rig.node.state.more_templates.lock().expect("no panic holds it").push(later);
    rig.create(r#"{"templateID":"later"}"#).await;
    let page = client.get("/v2/templates?limit=1").await;
    assert_eq!(page.json()[0]["aliases"], json!(["later"]));
    let next = page.headers["x-next-token"].to_str().expect("text").to_owned();
    let page = client.get(&format!("/v2/templates?limit=1&nextToken={next}")).await;
    assert_eq!(page.json()[0]["aliases"], json!(["base", "debian"]));
    assert!(!page.headers.contains_key("x-next-token"));
    rig.stop().await;
}

#[tokio::test]
async fn http2_without_tls_works_too() {
    let rig = Rig::start().await;
    let client = Client::h2c(rig.control.address, &rig.control.client.key);
    assert_eq!(client.post("/v2/sandboxes", r#"{"templateID":"base"}"#).await.status, 201);
    assert_eq!(ids(&client.get("/sandboxes").await.json()).len(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn a_sandbox_is_gone_when_its_time_is_up() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(r#"{"templateID":"base","timeout":1}"#).await;
    let path = format!("/sandboxes/{id}");
    // The node has not ended it, but for clients it is over.
    eventually("it is over", || async { client.get(&path).await.status == 404 }).await;
    assert!(rig.node.state.holds(&id));
    assert_eq!(client.get("/sandboxes").await.text, "[]");
    client.delete(&path).await.assert_error(404, &no_sandbox(&id));
    let back = client.post(&format!("{path}/timeout"), r#"{"timeout":60}"#).await;
    back.assert_error(404, &no_sandbox(&id));
    rig.node.state.end(&id, "expired");
    eventually("its route is gone", || async { rig.control.routes.get(&id).is_none() }).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_stalled_client_is_let_go_at_shutdown() {
    let rig =
        Rig::start_with(Config { shutdown_grace: Duration::from_millis(200), ..config() }).await;
    let stalled = tokio::net::TcpStream::connect(rig.control.address).await.expect("a connection");
    rig.stop().await;
    drop(stalled);
}
