//! Another team's things are never visible: every operation of the OpenAPI document, asked with no
//! key, with none that counts, and with the key of a stranger who knows all the ids.

use belljar_control::ApiKey;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::support::Rig;
use crate::support::client::{Answer, Client};
use crate::support::node::TEMPLATE_ID;

/// Open to everybody.
const EXEMPT: &[&str] = &["/health", "/openapi.json"];
/// Shows what belongs to the server, and so to every team.
const SHARED: &[&str] = &["/templates/{id}", "/templates/aliases/{alias}"];

/// What the first team has.
struct Owned {
    sandbox: String,
}

impl Owned {
    /// `path` with the first team's own ids in it.
    fn filled(&self, path: &str) -> String {
        let id = match path.trim_start_matches("/v2").split('/').nth(1) {
            Some("sandboxes") => &self.sandbox,
            Some("templates") => TEMPLATE_ID,
            // A test that guessed would pass without looking.
            _ if path.contains('{') => panic!("which id of the first team belongs into {path}?"),
            _ => "",
        };
        let segments = path.split('/').map(|s| if s.starts_with('{') { id } else { s });
        segments.collect::<Vec<_>>().join("/")
    }

    /// Everything of it that can be told apart, for the comparison before and after.
    async fn state(&self, rig: &Rig) -> Value {
        let client = &rig.control.client;
        json!({
            "sandbox": client.get(&format!("/sandboxes/{}", self.sandbox)).await.json(),
            "list": client.get("/v2/sandboxes").await.json(),
            "creates": rig.node.state.creates.lock().expect("no panic holds it").len(),
            "end": rig.node.state.end_of(&self.sandbox),
        })
    }
}

struct Operation {
    method: Method,
    path: String,
    body: String,
    takes_key: bool,
}

async fn operations(rig: &Rig) -> Vec<Operation> {
    let document = rig.control.client.get("/openapi.json").await.json();
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, described) in item.as_object().expect("operations") {
            let schema = &described["requestBody"]["content"]["application/json"]["schema"];
            let security = described["security"].as_array();
            all.push(Operation {
                method: method.to_ascii_uppercase().parse().expect("a method"),
                path: path.clone(),
                body: example(&document, schema).to_string(),
                takes_key: security.into_iter().flatten().any(|s| s["ApiKeyAuth"].is_array()),
            });
        }
    }
    all
}

/// The least a schema lets through, so that no answer is about the body.
fn example(document: &Value, schema: &Value) -> Value {
    if let Some(target) = schema["$ref"].as_str() {
        let pointer = target.strip_prefix('#').expect("within the document");
        return example(document, document.pointer(pointer).expect("it is there"));
    }
    if let Some(first) = schema["enum"].as_array().and_then(|values| values.first()) {
        return first.clone();
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        return example(document, choices.last().expect("a choice"));
    }
    let kind = schema["type"].as_array().map_or(&schema["type"], |kinds| &kinds[0]);
    match kind.as_str() {
        Some("string") => json!("example"),
        Some("integer" | "number") => json!(60),
        Some("boolean") => json!(true),
        Some("array") => json!([]),
        _ => {
            let required = schema["required"].as_array().into_iter().flatten();
            let fields = required.map(|name| {
                let name = name.as_str().expect("a name").to_owned();
                let value = example(document, &schema["properties"][&name]);
                (name, value)
            });
            fields.collect::<serde_json::Map<_, _>>().into()
        }
    }
}

async fn ask(rig: &Rig, operation: &Operation, target: &str, headers: HeaderMap) -> Answer {
    let mut request = Request::builder()
        .method(operation.method.clone())
        .uri(format!("http://{}{target}", rig.control.address))
        .body(Full::new(Bytes::from(operation.body.clone())))
        .expect("a request");
    *request.headers_mut() = headers;
    request.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    rig.control.client.raw(request).await
}

fn header(name: &'static str, value: &str) -> HeaderMap {
    HeaderMap::from_iter([(
        http::HeaderName::from_static(name),
        HeaderValue::try_from(value).expect("a header value"),
    )])
}

async fn owned(rig: &Rig) -> Owned {
    let body = r#"{"templateID":"base","timeout":3600,"metadata":{"secret":"first team's"}}"#;
    Owned { sandbox: rig.create(body).await }
}

async fn stranger(rig: &Rig) -> String {
    let team = rig.control.store.ensure_team("stranger").await.expect("a team");
    let key = ApiKey::random();
    rig.control.store.add_key(&team.id, &key).await.expect("a key");
    key.expose()
}

#[tokio::test]
async fn without_a_key_that_counts_every_door_is_closed() {
    let rig = Rig::start().await;
    let owned = owned(&rig).await;
    let before = owned.state(&rig).await;
    let key = rig.control.client.key.clone();
    let hex = &key["e2b_".len()..];
    let unknown = format!("e2b_{}", "0".repeat(40));
    let mut asked = 0;
    for operation in operations(&rig).await {
        let target = owned.filled(&operation.path);
        let what = format!("{} {target}", operation.method);
        let bare = ask(&rig, &operation, &target, HeaderMap::new()).await;
        if EXEMPT.contains(&operation.path.as_str()) {
            assert_eq!(bare.status, 200, "{what}");
            continue;
        }
        asked += 1;
        bare.assert_error(401, "");
        for headers in [
            header("x-api-key", &unknown),
            header("x-api-key", ""),
            header("x-api-key", hex),
            header("x-api-key", &format!("{key}0")),
            header("x-api-key", &key.to_uppercase()),
            // The right key in the wrong place.
            header("authorization", &format!("Bearer {key}")),
            header("authorization", &format!("Bearer sk_e2b_{hex}")),
            header("authorization", &key),
            header("x-admin-token", &key),
            header("x-team-id", "00000000-0000-0000-0000-000000000000"),
            header("cookie", &format!("X-API-Key={key}")),
        ] {
            let shown = format!("{what} with {headers:?}");
            let answer = ask(&rig, &operation, &target, headers).await;
            assert_eq!(answer.status, 401, "{shown}: {}", answer.text);
        }
        let in_query = format!("{target}?X-API-Key={key}");
        let in_query = ask(&rig, &operation, &in_query, HeaderMap::new()).await;
        in_query.assert_error(401, "");
    }
    assert!(asked >= 13, "only {asked} operations were asked");
    assert_eq!(owned.state(&rig).await, before);
    rig.stop().await;
}

#[tokio::test]
async fn a_stranger_who_knows_every_id_sees_and_changes_nothing() {
    let rig = Rig::start().await;
    let owned = owned(&rig).await;
    let before = owned.state(&rig).await;
    let stranger = stranger(&rig).await;
    let mut refused = 0;
    for operation in operations(&rig).await {
        let path = operation.path.as_str();
        if EXEMPT.contains(&path) {
            continue;
        }
        let target = owned.filled(path);
        let what = format!("{} {target}", operation.method);
        let answer = ask(&rig, &operation, &target, header("x-api-key", &stranger)).await;
        let is_refusal = matches!(answer.status, 401 | 403 | 404);
        if !operation.takes_key {
            assert!(
                matches!(answer.status, 401 | 403),
                "{what}: {} {}",
                answer.status,
                answer.text
            );
        } else if path.contains('{') && !SHARED.contains(&path) {
            assert!(is_refusal, "{what}: {} {}", answer.status, answer.text);
            refused += 1;
        } else {
            assert!(answer.status < 500, "{what}: {} {}", answer.status, answer.text);
        }
        let shown = if is_refusal { "" } else { answer.text.as_str() };
        for secret in [owned.sandbox.as_str(), "first team's"] {
            assert!(!shown.contains(secret), "{what} shows {secret}: {shown}");
        }
    }
    assert!(refused >= 8, "only {refused} operations were refused");
    assert_eq!(owned.state(&rig).await, before);

    // The same ids with the right key work, so the refusals were about the key.
    let detail = format!("/sandboxes/{}", owned.sandbox);
    assert_eq!(rig.control.client.get(&detail).await.status, 200);
    assert_eq!(Client::new(rig.control.address, &stranger).get(&detail).await.status, 404);
    rig.stop().await;
}
