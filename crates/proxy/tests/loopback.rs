//! Servers that listen on the guest's loopback only, reached through the guest daemon.

mod support;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use belljar_proxy::Config;
use futures::{SinkExt as _, StreamExt as _};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, Version};
use hyper_util::rt::TokioIo;
use support::{
    Body, Guest, InScope, Rig, all_text, closed_port, empty, full, get, guest_ip, read_head, soon,
    text,
};
use tokio::io::{AsyncWriteExt as _, BufWriter, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

const DAEMON_PORT: u16 = 49983;

/// A sandbox at one address whose loopback is another.
struct Sandbox {
    ip: Ipv4Addr,
    loopback: Ipv4Addr,
    /// Tunnels asked for.
    asked: Arc<AtomicUsize>,
}

impl Sandbox {
    /// With a guest daemon that speaks the wire contract of tunnels.
    async fn start(rig: &Rig) -> Sandbox {
        let sandbox = Sandbox { ip: guest_ip(), loopback: guest_ip(), asked: Arc::default() };
        let (scope, loopback, asked) = (rig.scope.clone(), sandbox.loopback, sandbox.asked.clone());
        Guest::start(rig, sandbox.ip, DAEMON_PORT, move |request| {
            asked.fetch_add(1, Ordering::SeqCst);
            connect(request, scope.clone(), loopback)
        })
        .await;
        sandbox
    }
}

async fn ask_by_grpc(rig: &Rig, host: &str) -> String {
    let request = Request::post(format!("http://{host}/"))
        .header("content-type", "application/grpc")
        .body(empty())
        .expect("a request");
    let response = soon("an answer", rig.http2().await.send_request(request)).await;
    all_text(response.expect("an answer")).await
}

async fn connect(request: Request<Incoming>, scope: Scope, loopback: Ipv4Addr) -> Response<Body> {
    assert_eq!((request.method(), request.version()), (&Method::CONNECT, Version::HTTP_11));
    let authority = request.uri().authority().expect("a target").clone();
    assert_eq!(authority.host(), "localhost");
    assert_eq!(request.headers()["host"], authority.as_str());
    let port = authority.port_u16().expect("a port");
    let Ok(mut server) = TcpStream::connect((loopback, port)).await else {
        return status(502, full("{}"));
    };
    scope.spawn("tunnel", OnError::Log, async move {
        let client = hyper::upgrade::on(request).await.map_err(std::io::Error::other)?;
        // How a tunnel ends is for the tests to look at, not for the log.
        drop(copy_bidirectional(&mut TokioIo::new(client), &mut server).await);
        Ok::<(), std::io::Error>(())
    });
    status(200, empty())
}

fn status(status: u16, body: Body) -> Response<Body> {
    Response::builder().status(status).body(body).expect("a response")
}

async fn version(request: Request<Incoming>) -> Response<Body> {
    text(format!("{} {:?}", request.method(), request.version()))
}

#[tokio::test]
async fn requests_reach_the_loopback_and_connections_are_reused() {
    let rig = Rig::start(Config::default()).await;
    let sandbox = Sandbox::start(&rig).await;
    let server = Guest::start(&rig, sandbox.loopback, 0, version).await;
    let id = rig.publish(sandbox.ip);
    let host = server.host(&id);
    let mut client = rig.http1().await;
    for method in [Method::GET, Method::POST, Method::GET, Method::DELETE] {
        let mut request = get(&host, "/");
        *request.method_mut() = method.clone();
        *request.body_mut() = full("hello");
        let response = soon("an answer", client.send_request(request)).await.expect("an answer");
        assert_eq!(all_text(response).await, format!("{method} HTTP/1.1"));
        soon("the client connection", client.ready()).await.expect("still open");
    }
    let asked = sandbox.asked.load(Ordering::SeqCst);
    assert!((1..=2).contains(&asked), "{asked} tunnels for four requests in a row");
    drop(client);
    // Nothing is left open in the guest when the route ends.
    rig.catalog.withdraw(&id);
    server.all_ended().await;
    rig.stop().await;
}

#[tokio::test]
async fn websockets_and_grpc_reach_the_loopback() {
    let rig = Rig::start(Config::default()).await;
    let sandbox = Sandbox::start(&rig).await;
    let listener = TcpListener::bind((sandbox.loopback, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(sandbox.ip);
    let service = async {
        let (stream, _) = listener.accept().await.expect("accept");
        let mut socket = tokio_tungstenite::accept_async(stream).await.expect("a handshake");
        let message = socket.next().await.expect("a message").expect("a good one");
        socket.send(message).await.expect("send");
    };
    let client = async {
        let stream = TcpStream::connect(rig.address).await.expect("connect");
        let url = format!("ws://{port}-{id}.d/");
        let (mut socket, _) =
            tokio_tungstenite::client_async(url, stream).await.expect("a handshake");
        socket.send(Message::text("ping")).await.expect("send");
        socket.next().await.expect("an echo").expect("a good one")
    };
    let (echo, ()) = soon("the echo", futures::future::join(client, service)).await;
    assert_eq!(echo, Message::text("ping"));

    let grpc = Guest::start(&rig, sandbox.loopback, 0, version).await;
    assert_eq!(ask_by_grpc(&rig, &grpc.host(&id)).await, "POST HTTP/2.0");
    rig.stop().await;
}

/// Servers of HTTP/2 may send their settings before they have read anything.
#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let id = rig.publish(ip);
    let daemon = TcpListener::bind((ip, DAEMON_PORT)).await.expect("bind");
    let scope = rig.scope.clone();
    rig.scope.spawn("daemon", OnError::FailScope, async move {
        let (mut stream, _) = daemon.accept().await?;
        read_head(&mut stream).await?;
        // The 200 waits in the buffer for the settings, so that both arrive at once.
        let mut stream = BufWriter::new(stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        let server = hyper::service::service_fn(async |request| {
            Ok::<_, std::convert::Infallible>(version(request).await)
        });
        let builder = hyper::server::conn::http2::Builder::new(InScope(scope));
        drop(builder.serve_connection(TokioIo::new(stream), server).await);
        Ok::<(), std::io::Error>(())
    });
    assert_eq!(ask_by_grpc(&rig, &format!("8080-{id}.d")).await, "POST HTTP/2.0");
    rig.stop().await;
}

#[tokio::test]
async fn a_port_closed_everywhere_is_known_quickly_and_a_late_server_is_found() {
    let rig = Rig::start(Config::default()).await;
    let sandbox = Sandbox::start(&rig).await;
    let port = closed_port(sandbox.loopback).await;
    let id = rig.publish(sandbox.ip);
    let host = format!("{port}-{id}.d");
    let mut client = rig.http1().await;
    let start = Instant::now();
    let response = client.send_request(get(&host, "/")).await.expect("a response");
    assert_eq!(response.status(), 502);
    let expected = format!(
        r#"{{"sandboxId":"{id}","message":"The sandbox is running but port is not open","port":{port},"code":502}}"#
    );
    assert_eq!(all_text(response).await, expected);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(sandbox.asked.load(Ordering::SeqCst), 5, "each try asks for both addresses");
    let mut request = get(&host, "/");
    request.headers_mut().insert("accept", "text/html".parse().expect("a header"));
    let page = rig.http1().await.send_request(request).await.expect("a response");
    assert_eq!(page.status(), 502);
    assert!(all_text(page).await.contains("The sandbox is running but port is not open</h1>"));

    let mut client = rig.http1().await;
    let asked = client.send_request(get(&host, "/"));
    let late = async {
        // Between the second try and the third: the delay is what is tested.
        tokio::time::sleep(Duration::from_millis(30)).await;
        Guest::start(&rig, sandbox.loopback, port, version).await
    };
    let (response, _server) = futures::future::join(asked, late).await;
    assert_eq!(all_text(response.expect("a response")).await, "GET HTTP/1.1");
    rig.stop().await;
}

#[tokio::test]
async fn a_server_may_move_between_the_addresses() {
    let rig = Rig::start(Config::default()).await;
    let sandbox = Sandbox::start(&rig).await;
    let port = closed_port(sandbox.loopback).await;
    let host = format!("{port}-{}.d", rig.publish(sandbox.ip));
    for ip in [sandbox.loopback, sandbox.ip, sandbox.loopback] {
        let listener = TcpListener::bind((ip, port)).await.expect("bind");
        let serve_once = async {
            let (mut stream, _) = listener.accept().await.expect("accept");
            read_head(&mut stream).await.expect("a request");
            let answer = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{ip}");
            stream.write_all(answer.as_bytes()).await.expect("answer");
        };
        let mut client = rig.http1().await;
        let asked = async {
            let response = client.send_request(get(&host, "/")).await.expect("a response");
            all_text(response).await
        };
        let (seen, ()) = soon("the answer", futures::future::join(asked, serve_once)).await;
        assert_eq!(seen, ip.to_string());
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_guest_full_of_tunnels_says_so() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    Guest::start(&rig, ip, DAEMON_PORT, |_| async { status(429, full("{}")) }).await;
    let id = rig.publish(ip);
    let answer = rig.http1().await.send_request(get(&format!("8080-{id}.d"), "/")).await;
    let answer = answer.expect("an answer");
    assert_eq!(answer.status(), 429);
    let expected = format!(
        r#"{{"sandboxId":"{id}","message":"The sandbox has too many concurrent incoming connections (limit: 512)","connectionLimit":512,"code":429}}"#
    );
    assert_eq!(all_text(answer).await, expected);
    rig.stop().await;
}

/// Templates may hold a daemon that knows no tunnels, and a guest may run anything on that port.
#[tokio::test]
async fn a_daemon_that_does_not_tunnel_is_survived() {
    let config = Config { connect_timeout: Duration::from_secs(2), ..Config::default() };
    let rig = Rig::start(config).await;
    for answer in [
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "HTTP/1.1 \r\n\r\n".to_owned(),
        "nonsense\r\n\r\n".to_owned(),
        format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(100_000)),
        // Half a head, and then nothing.
        "HTTP/1.1 200 OK\r\n".to_owned(),
        String::new(),
    ] {
        let ip = guest_ip();
        let id = rig.publish(ip);
        let listener = TcpListener::bind((ip, DAEMON_PORT)).await.expect("bind");
        let said = answer.clone();
        rig.scope.spawn("daemon", OnError::FailScope, async move {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                // The proxy may hang up in the middle.
                drop(stream.write_all(said.as_bytes()).await);
                kept.push(stream);
            }
            Err("the listener broke")
        });
        let mut client = rig.http1().await;
        let asked = client.send_request(get(&format!("8080-{id}.d"), "/"));
        let response = soon("an answer", asked).await.expect("an answer");
        assert_eq!(response.status(), 502);
        let seen = all_text(response).await;
        assert!(seen.contains("port is not open"), "{answer:.30}: {seen}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn clients_cannot_ask_for_tunnels() {
    let rig = Rig::start(Config::default()).await;
    let sandbox = Sandbox::start(&rig).await;
    let id = rig.publish(sandbox.ip);
    for host in [format!("{DAEMON_PORT}-{id}.d"), "localhost".to_owned()] {
        let answer = rig
            .raw(&format!(
                "CONNECT localhost:8080 HTTP/1.1\r\nHost: {host}\r\nE2b-Sandbox-Id: {id}\r\n\
                 E2b-Sandbox-Port: {DAEMON_PORT}\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }
    let request = Request::connect("localhost:8080")
        .header("host", format!("{DAEMON_PORT}-{id}.d"))
        .body(empty())
        .expect("a request");
    let answer = soon("an answer", rig.http2().await.send_request(request)).await;
    assert_eq!(answer.expect("an answer").status(), 405);
    assert_eq!(sandbox.asked.load(Ordering::SeqCst), 0);
    rig.stop().await;
}
