//! Where requests go, and every answer the proxy gives by itself.

mod support;

use std::net::Ipv4Addr;

use base64::Engine as _;
use belljar_domain::SandboxId;
use belljar_proxy::Config;
use http_body_util::BodyExt as _;
use hyper::Request;
use hyper::body::Incoming;
use sha2::Digest as _;
use support::{Guest, Rig, all_text, empty, get, guest_ip, soon, target, text};

/// Says what it was asked.
async fn echo(request: Request<Incoming>) -> hyper::Response<support::Body> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.expect("a good body").to_bytes();
    let mut lines = vec![format!("{} {} {:?}", parts.method, parts.uri, parts.version)];
    for (name, value) in &parts.headers {
        lines.push(format!("{name}: {}", value.to_str().expect("text")));
    }
    lines[1..].sort();
    lines.push(String::from_utf8_lossy(&body).into_owned());
    text(lines.join("\n"))
}

/// The status line and the body of an answer.
fn split(answer: &str) -> (u16, &str, &str) {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head[9..12].parse().expect("a status");
    (status, head, body)
}

#[tokio::test]
async fn a_host_names_sandbox_and_port() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, echo).await;
    let id = rig.publish(guest.ip);
    let host = guest.host(&id);
    let request = Request::post("/a/b?c=d&e=%20")
        .header("host", &host)
        .header("connection", "x-hop")
        .header("x-hop", "1")
        .header("x-kept", "1")
        .body(support::full("hello"))
        .expect("a request");
    let response = soon("an answer", rig.http1().await.send_request(request)).await;
    let seen = all_text(response.expect("a response")).await;
    let expected = format!(
        "POST /a/b?c=d&e=%20 HTTP/1.1\ncontent-length: 5\nhost: {host}\n\
         x-forwarded-for: 127.0.0.1\nx-forwarded-host: {host}\nx-forwarded-proto: http\n\
         x-kept: 1\nhello"
    );
    assert_eq!(seen, expected);
    rig.stop().await;
}

#[tokio::test]
async fn headers_name_sandbox_and_port_on_shared_hosts() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, echo).await;
    let id = rig.publish(guest.ip);
    for host in ["localhost:3002", "127.0.0.1", "sandbox.example.com"] {
        let mut request = get(host, "/x");
        let port = guest.port.to_string().parse().expect("a header");
        // The suffix is what very old clients send.
        let named = format!("{id}-6532622b").parse().expect("a header");
        request.headers_mut().insert("E2b-Sandbox-Id", named);
        request.headers_mut().insert("E2b-Sandbox-Port", port);
        let response = soon("an answer", rig.http1().await.send_request(request)).await;
        let seen = all_text(response.expect("a response")).await;
        assert!(seen.contains(&format!("\nhost: {host}\n")), "{seen}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn requests_that_lead_nowhere_are_refused() {
    let rig = Rig::start(Config::default()).await;
    let (id, port) = ("E2b-Sandbox-Id: iabc\r\n", "E2b-Sandbox-Port: 80\r\n");
    let signed = "GET /files?path=a&signature=v1_AAAA HTTP/1.1\r\nHost: localhost\r\n";
    for (head, status, body) in [
        ("GET / HTTP/1.1\r\nHost: example.com\r\n".to_owned(), 400, "Invalid host"),
        ("GET / HTTP/1.1\r\nHost: 80-iabc\r\n".to_owned(), 400, "Invalid host"),
        ("GET / HTTP/1.0\r\n".to_owned(), 400, "Invalid host"),
        ("GET / HTTP/1.1\r\nHost: 80-i_abc.d\r\n".to_owned(), 400, "Invalid sandbox ID"),
        (
            format!("GET / HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: ../etc\r\n{port}"),
            400,
            "Invalid sandbox ID",
        ),
        ("GET / HTTP/1.1\r\nHost: localhost\r\n".to_owned(), 400, "missing header"),
        (format!("GET / HTTP/1.1\r\nHost: localhost\r\n{id}"), 400, "missing header"),
        (format!("GET / HTTP/1.1\r\nHost: localhost\r\n{port}"), 400, "missing header"),
        (signed.to_owned(), 400, "missing header"),
        (
            "GET / HTTP/1.1\r\nHost: http-iabc.d\r\n".to_owned(),
            500,
            "Unexpected error when routing request",
        ),
        (
            "CONNECT iabc.d:80 HTTP/1.1\r\nHost: iabc.d\r\n".to_owned(),
            405,
            "CONNECT is not supported",
        ),
    ] {
        let answer = rig.raw(&format!("{head}Connection: close\r\n\r\n")).await;
        let (got, headers, text) = split(&answer);
        assert_eq!((got, text), (status, body), "{head}");
        assert!(headers.contains("content-type: text/plain"), "{headers}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn answers_about_a_sandbox_are_exact() {
    let config = Config { max_connections_per_sandbox: 0, ..Config::default() };
    let full = Rig::start(config).await;
    let rig = Rig::start(Config::default()).await;
    let gone = SandboxId::random();
    let (id, crowded) = (rig.publish(guest_ip()), full.publish(guest_ip()));
    let ask = |host: String, path: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    };
    for (answer, status, body) in [
        (
            rig.raw(&ask(format!("80-{gone}.d"), "/")).await,
            502,
            format!(r#"{{"sandboxId":"{gone}","message":"The sandbox was not found","code":502}}"#),
        ),
        (
            rig.raw(&ask(format!("8081-{id}.d"), "/")).await,
            502,
            format!(
                r#"{{"sandboxId":"{id}","message":"The sandbox is running but port is not open","port":8081,"code":502}}"#
            ),
        ),
        (
            rig.raw(&ask(format!("80000-{id}.d"), "/")).await,
            502,
            format!(
                r#"{{"sandboxId":"{id}","message":"The sandbox is running but port is not open","port":80000,"code":502}}"#
            ),
        ),
        (
            rig.raw(&ask(format!("49983-{id}.d"), "/%69nit?a=b")).await,
            404,
            format!(
                r#"{{"sandboxId":"{id}","message":"This endpoint is reserved for the E2B control plane and is not reachable through the sandbox URL","code":404}}"#
            ),
        ),
        (
            full.raw(&ask(format!("80-{crowded}.d"), "/")).await,
            429,
            format!(
                r#"{{"sandboxId":"{crowded}","message":"The sandbox has too many concurrent incoming connections (limit: 0)","connectionLimit":0,"code":429}}"#
            ),
        ),
    ] {
        let (got, headers, text) = split(&answer);
        assert_eq!((got, text), (status, body.as_str()));
        assert!(headers.contains("content-type: application/json\r\n"), "{headers}");
    }
    rig.stop().await;
    full.stop().await;
}

#[tokio::test]
async fn a_person_gets_a_page() {
    let rig = Rig::start(Config::default()).await;
    let id = SandboxId::random();
    let host = format!("80-{id}.d");
    let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    let answer = rig.raw(&format!("{head}Accept: text/html,*/*\r\n\r\n")).await;
    let (status, headers, body) = split(&answer);
    assert_eq!(status, 502);
    assert!(headers.contains("content-type: text/html; charset=utf-8"), "{headers}");
    assert!(body.contains("The sandbox was not found") && body.contains(id.as_str()), "{body}");
    let scripted = "Accept: text/html,*/*\r\nSec-Fetch-Mode: cors\r\n\r\n";
    let answer = rig.raw(&format!("{head}{scripted}")).await;
    assert!(split(&answer).2.starts_with('{'), "{answer}");
    rig.stop().await;
}

#[tokio::test]
async fn internal_routes_are_reserved_on_the_daemon_port_only() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let _daemon = Guest::start(&rig, ip, 49983, echo).await;
    let service = Guest::start(&rig, ip, 0, echo).await;
    let id = rig.publish(ip);
    let daemon_host = format!("49983-{id}.d");
    let internal =
        ["/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade"];
    for path in internal {
        let mut client = rig.http1().await;
        let status = |response: hyper::Result<hyper::Response<Incoming>>| {
            response.expect("a response").status().as_u16()
        };
        assert_eq!(status(client.send_request(get(&daemon_host, path)).await), 404, "{path}");
        let mut client = rig.http1().await;
        let request = get(&service.host(&id), path);
        assert_eq!(status(client.send_request(request).await), 200, "{path}");
    }
    let response = rig.http1().await.send_request(get(&daemon_host, "/health")).await;
    assert_eq!(response.expect("a response").status(), 200);
    rig.stop().await;
}

fn signature(text: &str) -> String {
    let digest = sha2::Sha256::digest(text);
    let text = base64::engine::general_purpose::STANDARD_NO_PAD.encode(digest);
    format!("v1_{}", text.replace('+', "%2B").replace('/', "%2F"))
}

#[tokio::test]
async fn a_signed_url_finds_its_sandbox() {
    let rig = Rig::start(Config::default()).await;
    let guests: Vec<(Ipv4Addr, &str)> = vec![(guest_ip(), "one"), (guest_ip(), "two")];
    for (ip, token) in &guests {
        let token = *token;
        Guest::start(&rig, *ip, 49983, move |_| async move { text(token) }).await;
        rig.catalog.publish(&SandboxId::random(), target(*ip, token));
    }
    let read = |path: &str, signature: &str| {
        format!("/files?path={path}&username=user&signature={signature}")
    };
    let mut client = rig.http1().await;
    for (_, token) in &guests {
        let url = read("/a", &signature(&format!("/a:read:user:{token}")));
        let response = client.send_request(get("localhost:3002", &url)).await;
        assert_eq!(all_text(response.expect("a response")).await, *token);
        let signed = signature(&format!("/a:write::{token}:1900000000"));
        let url = format!("/files?path=/a&signature={signed}&signature_expiration=1900000000");
        let request = Request::post(url).header("host", "127.0.0.1").body(empty());
        let response = client.send_request(request.expect("a request")).await;
        assert_eq!(all_text(response.expect("a response")).await, *token);
    }
    for signed in ["/a:read:user:three", "/b:read:user:one", "/a:write:user:one"] {
        let url = read("/a", &signature(signed));
        let response = client.send_request(get("localhost:3002", &url)).await;
        let response = response.expect("a response");
        assert_eq!(response.status(), 400);
        assert_eq!(all_text(response).await, "missing header");
    }
    rig.stop().await;
}
