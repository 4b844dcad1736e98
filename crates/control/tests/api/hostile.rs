//! Input no careful client sends, at every operation of the OpenAPI document: a clear 4xx in the
//! one shape, nothing done, and the server as good as before.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::client::Answer;
use crate::support::{ADMIN_TOKEN, Rig};

/// Texts that have meant something to somebody: paths, quotes, terminals, logs, headers, databases.
const TEXTS: &[&str] = &[
    "",
    "..",
    "../../etc/passwd",
    "' OR 1=1 --",
    "'; DROP TABLE sandboxes; --",
    "\" UNION SELECT * FROM api_keys --",
    "%' OR '1'='1",
    "a\r\nX-Injected: yes\r\n\r\n{}",
    "\u{1b}[2J\u{1b}]0;title\u{7}",
    "nul\0nul",
    "\u{202e}right to left",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "9999999999999999999999999999",
    "-1",
    "1e400",
    "NaN",
    "null",
    "\u{fffd}\u{10ffff}",
];

/// Percent-encodes every byte, so that each text arrives as it is.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// An operation of the document, with what opens it.
struct Operation {
    method: Method,
    path: String,
    described: Value,
    headers: Vec<(&'static str, String)>,
}

impl Operation {
    async fn send(&self, rig: &Rig, path: &str, body: &Bytes, media: &str) -> Answer {
        let uri = format!("http://{}{path}", rig.control.address);
        let request = Request::builder().method(self.method.clone()).uri(uri);
        let request = request.header("content-type", media);
        let request = self.headers.iter().fold(request, |r, (name, value)| r.header(*name, value));
        rig.control.client.raw(request.body(Full::new(body.clone())).expect("a request")).await
    }

    async fn json(&self, rig: &Rig, path: &str, body: &'static str) -> Answer {
        self.send(rig, path, &Bytes::from_static(body.as_bytes()), "application/json").await
    }
}

/// Every operation of the document that can be opened without an identity provider.
async fn operations(rig: &Rig) -> Vec<Operation> {
    let document = rig.control.client.get("/openapi.json").await.json();
    let (_, token) = rig.user("hostile@example.org").await;
    let team = rig.control.store.ensure_team("default").await.expect("a team").id.to_string();
    let opens = |described: &Value| -> Option<Vec<(&'static str, String)>> {
        let Some(ways) = described["security"].as_array() else { return Some(Vec::new()) };
        let takes = |scheme: &str| ways.iter().any(|way| way.get(scheme).is_some());
        let admin = || ("x-admin-token", ADMIN_TOKEN.to_owned());
        if takes("ApiKeyAuth") {
            Some(vec![("x-api-key", rig.control.client.key.clone())])
        } else if takes("AdminTeamAuth") {
            Some(vec![admin(), ("x-team-id", team.clone())])
        } else if takes("AdminApiKeyAuth") {
            Some(vec![admin()])
        } else {
            takes("AccessTokenAuth").then(|| vec![("authorization", format!("Bearer {token}"))])
        }
    };
    let paths = document["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, item)| {
        let operations = item.as_object().expect("operations").iter();
        operations.filter_map(|(method, described)| {
            Some(Operation {
                method: method.to_ascii_uppercase().parse().expect("a method"),
                path: path.clone(),
                described: described.clone(),
                headers: opens(described)?,
            })
        })
    });
    operations.collect()
}

/// `path` with `value` in place of every parameter.
fn filled(path: &str, value: &str) -> String {
    let segments = path.split('/').map(|s| if s.starts_with('{') { value } else { s });
    segments.collect::<Vec<_>>().join("/")
}

/// Things that are there, so that an answer is about the input.
struct There {
    sandbox: String,
    webhook: String,
}

impl There {
    async fn make(rig: &Rig) -> There {
        let sandbox = rig.create(r#"{"templateID":"base"}"#).await;
        let webhook = json!({
            "name": "hook", "url": "https://example.org/hook", "enabled": false,
            "events": ["sandbox.lifecycle.created"], "signatureSecret": "0123456789abcdef",
        });
        let made = rig.control.client.post("/events/webhooks", &webhook.to_string()).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let webhook = made.json()["id"].as_str().expect("an id").to_owned();
        There { sandbox, webhook }
    }

    /// `path` with what is there in place of its parameters.
    fn filled(&self, path: &str) -> String {
        let is_hook = path.starts_with("/events/webhooks");
        filled(path, if is_hook { &self.webhook } else { &self.sandbox })
    }
}

/// An answer is either a success or a refusal in the one shape; never the server's fault.
#[track_caller]
fn assert_sane(answer: &Answer, what: &str) {
    assert!(answer.status < 500, "{what}: {} {}", answer.status, answer.text);
    assert!(!answer.headers.contains_key("x-injected"), "{what}");
    if answer.status >= 400 {
        assert_eq!(answer.headers["content-type"], "application/json", "{what}");
        let body = answer.json();
        assert_eq!(body["code"], answer.status, "{what}");
        let message = body["message"].as_str().expect("a message");
        assert!(!message.is_empty(), "{what}");
    }
}

/// What the node was asked for, to see that nothing was.
fn creates(rig: &Rig) -> usize {
    rig.node.state.creates.lock().expect("no panic holds it").len()
}

#[tokio::test]
async fn hostile_paths_and_parameters_are_harmless_everywhere() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let there = There::make(&rig).await;
    for operation in operations(&rig).await {
        let Operation { method, path, described, .. } = &operation;
        for text in TEXTS.iter().filter(|text| !text.is_empty()) {
            if path.contains('{') {
                let target = filled(path, &encoded(text));
                let answer = operation.json(&rig, &target, "{}").await;
                assert_sane(&answer, &format!("{method} {path} with {text:?}"));
                assert!(answer.status >= 400, "{method} {path} with {text:?}: {}", answer.status);
            }
        }
        for target in [filled(path, "%ff"), filled(path, "%c3%28")] {
            if path.contains('{') {
                let answer = operation.json(&rig, &target, "{}").await;
                assert_sane(&answer, &format!("{method} {target}"));
                assert!(matches!(answer.status, 400 | 404), "{method} {target}: {}", answer.status);
            }
        }
        if *method != Method::GET {
            continue;
        }
        let path = there.filled(path);
        for parameter in described["parameters"].as_array().into_iter().flatten() {
            if parameter["in"] != "query" {
                continue;
            }
            let name = parameter["name"].as_str().expect("a name");
            for text in TEXTS {
                let target = format!("{path}?{name}={}", encoded(text));
                assert_sane(&operation.json(&rig, &target, "").await, &target);
            }
            for target in [format!("{path}?{name}=%ff"), format!("{path}?{name}=%00")] {
                let answer = operation.json(&rig, &target, "").await;
                assert_sane(&answer, &target);
                assert_eq!(answer.status, 400, "{target}");
            }
        }
    }
    assert_eq!(creates(&rig), 1);
    assert_eq!(client.get(&format!("/sandboxes/{}", there.sandbox)).await.status, 200);
    rig.stop().await;
}

#[tokio::test]
async fn hostile_bodies_are_refused_everywhere() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let there = There::make(&rig).await;
    let deep = |open: &str, close: &str| {
        format!(r#"{{"templateID":"base","x":{}1{}}}"#, open.repeat(9999), close.repeat(9999))
    };
    let refused: Vec<Bytes> = [
        Bytes::from_static(b"{"),
        Bytes::from_static(b"[]"),
        Bytes::from_static(b"7"),
        Bytes::from_static(b"\"text\""),
        Bytes::from_static(b"{} {}"),
        Bytes::from_static(b"\xef\xbb\xbf{}"),
        Bytes::from_static(b"\xff\xfe{\0}\0"),
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"{\"name\":\"\xff\"}"),
        Bytes::from_static(b"{'name':1}"),
        Bytes::from_static(b"{\"name\":\"line\nfeed\"}"),
    ]
    .into_iter()
    .chain([deep("[", "]"), deep(r#"{"x":"#, "}")].map(Bytes::from))
    .collect();
    for operation in operations(&rig).await {
        let Operation { method, path, described, .. } = &operation;
        if described.get("requestBody").is_none() {
            continue;
        }
        for body in &refused {
            let what = format!("{method} {path} with {:.40}", String::from_utf8_lossy(body));
            let answer = operation.send(&rig, &there.filled(path), body, "application/json").await;
            assert_sane(&answer, &what);
            assert_eq!(answer.status, 400, "{what}: {}", answer.text);
        }
        for media in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
        {
            let what = format!("{method} {path} as {media}");
            let body = Bytes::from_static(b"{}");
            let answer = operation.send(&rig, &there.filled(path), &body, media).await;
            assert_sane(&answer, &what);
            assert_eq!(answer.status, 415, "{what}: {}", answer.text);
        }
    }
    assert_eq!(creates(&rig), 1);
    assert_eq!(client.get(&format!("/sandboxes/{}", there.sandbox)).await.status, 200);
    rig.stop().await;
}

/// Texts that a create may carry come back as they were, whatever they look like.
#[tokio::test]
async fn odd_labels_are_kept_as_they_are() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    for text in TEXTS {
        let metadata = json!({ "text": text, *text: "key" });
        let body = json!({"templateID": "base", "metadata": metadata, "envVars": {"A": "1"}});
        let answer = client.post("/v2/sandboxes", &body.to_string()).await;
        assert_sane(&answer, text);
        if answer.status == 400 {
            // Where a text cannot be kept it is refused, not changed.
            assert!(answer.text.contains("metadata"), "{text:?}: {}", answer.text);
            continue;
        }
        assert_eq!(answer.status, 201, "{text:?}: {}", answer.text);
        let id = answer.json()["sandboxID"].as_str().expect("an id").to_owned();
        let detail = client.get(&format!("/sandboxes/{id}")).await.json();
        assert_eq!(detail["metadata"], metadata, "{text:?}");
    }
    for body in [
        r#"{"templateID":"\ud800"}"#,
        r#"{"templateID":"base","metadata":{"a":"\udc00"}}"#,
        r#"{"templateID":"base","timeout":1e99999}"#,
        r#"{"templateID":"base","timeout":-0.0}"#,
    ] {
        client.post("/v2/sandboxes", body).await.assert_error(400, "");
    }
    let twice = r#"{"templateID":"base","templateID":"base"}"#;
    client.post("/v2/sandboxes", twice).await.assert_error(400, "duplicate field");
    let last = r#"{"templateID":"base","metadata":{"a":"1","a":"2"}}"#;
    let id = rig.create(last).await;
    let detail = client.get(&format!("/sandboxes/{id}")).await.json();
    assert_eq!(detail["metadata"], json!({"a": "2"}));
    rig.stop().await;
}

#[tokio::test]
async fn heads_have_limits_and_say_so() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let long = format!("/v2/sandboxes?metadata={}", "a".repeat(17 << 10));
    client.get(&long).await.assert_error(414, "longer than 16384 bytes");
    let with = |name: String, value: String| {
        let request = Request::get(format!("http://{}/health", rig.control.address));
        request.header(name, value).body(Full::<Bytes>::default()).expect("a request")
    };
    let large = client.raw(with("x-large".to_owned(), "a".repeat(33 << 10))).await;
    large.assert_error(431, "larger than 32768 bytes");
    let mut many = with("x-0".to_owned(), String::new());
    for n in 1..150 {
        let name = http::HeaderName::try_from(format!("x-{n}")).expect("a name");
        many.headers_mut().insert(name, http::HeaderValue::from_static(""));
    }
    client.raw(many).await.assert_error(431, "more than 100 headers");
    assert_eq!(client.get("/health").await.status, 200);
    rig.stop().await;
}

/// What is no HTTP at all gets a status of its own class and is hung up on.
#[tokio::test]
async fn broken_requests_are_hung_up_on() {
    let rig = Rig::start().await;
    let huge = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(600 << 10));
    let smuggled = "POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\
                    Transfer-Encoding: chunked, identity\r\n\r\n{}";
    for text in [
        "GET\r\n\r\n",
        "GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
        "GET / HTTP/1.1\r\nX: a\x01b\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET /a b HTTP/1.1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        smuggled,
        &huge,
    ] {
        let mut wire = TcpStream::connect(rig.control.address).await.expect("a connection");
        // The server may hang up before it has read everything.
        let _unread = wire.write_all(text.as_bytes()).await;
        let mut answer = Vec::new();
        let _reset = wire.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        let is_refusal = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
        assert!(is_refusal, "{text:.40?} got {answer:.80}");
    }
    assert_eq!(rig.control.client.get("/health").await.status, 200);
    rig.stop().await;
}
