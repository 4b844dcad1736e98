//! Input no careful client sends, at every operation of the OpenAPI document: a clear 4xx in the
//! one shape, nothing done, and the server as good as before.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::Full;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::Rig;
use crate::support::client::Answer;
use crate::support::walk::{Operation, Owned, operations};

const JSON: &str = "application/json";

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

/// `path` with `value` in place of every parameter.
fn filled(path: &str, value: &str) -> String {
    let segments = path.split('/').map(|s| if s.starts_with('{') { value } else { s });
    segments.collect::<Vec<_>>().join("/")
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

#[tokio::test]
async fn hostile_paths_and_parameters_are_harmless_everywhere() {
    let rig = Rig::start().await;
    let owned = Owned::make(&rig).await;
    let before = owned.state(&rig).await;
    for operation in operations(&rig).await {
        // Without a token of an identity provider, every answer is 401.
        let Some(shown) = owned.credentials(&rig, &operation) else { continue };
        let Operation { method, path, .. } = &operation;
        let send = |target: String| {
            let (rig, method, shown) = (&rig, method, shown.clone());
            async move { send(rig, method, &target, &Bytes::from_static(b"{}"), JSON, shown).await }
        };
        for text in TEXTS.iter().filter(|text| !text.is_empty()) {
            if path.contains('{') {
                let answer = send(filled(path, &encoded(text))).await;
                assert_sane(&answer, &format!("{method} {path} with {text:?}"));
                assert!(answer.status >= 400, "{method} {path} with {text:?}: {}", answer.status);
            }
        }
        for target in [filled(path, "%ff"), filled(path, "%c3%28")] {
            if path.contains('{') {
                let answer = send(target.clone()).await;
                assert_sane(&answer, &format!("{method} {target}"));
                assert!(matches!(answer.status, 400 | 404), "{method} {target}: {}", answer.status);
            }
        }
        if method != Method::GET || path == "/metrics" {
            continue;
        }
        let path = owned.filled(path);
        for parameter in operation.described["parameters"].as_array().into_iter().flatten() {
            if parameter["in"] != "query" {
                continue;
            }
            let name = parameter["name"].as_str().expect("a name");
            for text in TEXTS {
                let target = format!("{path}?{name}={}", encoded(text));
                assert_sane(&send(target.clone()).await, &target);
            }
            for target in [format!("{path}?{name}=%ff"), format!("{path}?{name}=%00")] {
                let answer = send(target.clone()).await;
                assert_sane(&answer, &target);
                assert_eq!(answer.status, 400, "{target}: {}", answer.text);
            }
        }
    }
    assert_eq!(owned.state(&rig).await, before);
    rig.stop().await;
}

#[tokio::test]
async fn hostile_bodies_are_refused_everywhere() {
    let rig = Rig::start().await;
    let owned = Owned::make(&rig).await;
    let before = owned.state(&rig).await;
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
    let mut asked = 0;
    for operation in operations(&rig).await.iter().filter(|operation| operation.has_body()) {
        // Without a token of an identity provider, every answer is 401.
        let Some(shown) = owned.credentials(&rig, operation) else { continue };
        let Operation { method, path, .. } = operation;
        let target = owned.filled(path);
        asked += 1;
        for body in &refused {
            let what = format!("{method} {path} with {:.40}", String::from_utf8_lossy(body));
            let answer = send(&rig, method, &target, body, JSON, shown.clone()).await;
            assert_sane(&answer, &what);
            assert_eq!(answer.status, 400, "{what}: {}", answer.text);
        }
        for media in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
        {
            let what = format!("{method} {path} as {media}");
            let body = Bytes::from_static(b"{}");
            let answer = send(&rig, method, &target, &body, media, shown.clone()).await;
            assert_sane(&answer, &what);
            assert_eq!(answer.status, 415, "{what}: {}", answer.text);
        }
    }
    assert!(asked >= 12, "only {asked} operations were asked");
    assert_eq!(owned.state(&rig).await, before);
    rig.stop().await;
}

async fn send(
    rig: &Rig,
    method: &Method,
    path: &str,
    body: &Bytes,
    media: &str,
    shown: HeaderMap,
) -> Answer {
    let mut request = Request::builder()
        .method(method.clone())
        .uri(format!("http://{}{path}", rig.control.address))
        .body(Full::new(body.clone()))
        .expect("a request");
    *request.headers_mut() = shown;
    let media = HeaderValue::try_from(media).expect("a header value");
    request.headers_mut().insert("content-type", media);
    rig.control.client.raw(request).await
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
