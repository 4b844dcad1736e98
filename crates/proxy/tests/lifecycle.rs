//! Connections from birth to end: reuse, retry, limits, withdrawal, disconnects, drain.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use belljar_proxy::Config;
use futures::SinkExt as _;
use hyper::Request;
use hyper::body::Incoming;
use support::{
    Guest, Rig, all_text, channel, closed_port, data, get, guest_ip, next_data, read_head, soon,
    target, text,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// Sends one piece, then nothing, and keeps the body open.
async fn endless(_request: Request<Incoming>) -> hyper::Response<support::Body> {
    let (mut sender, body) = channel();
    sender.try_send(data("first")).expect("room for one");
    std::mem::forget(sender);
    hyper::Response::new(body)
}

async fn never(_request: Request<Incoming>) -> hyper::Response<support::Body> {
    std::future::pending().await
}

async fn hello(_request: Request<Incoming>) -> hyper::Response<support::Body> {
    text("hello")
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn connections_to_a_guest_are_reused() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, hello).await;
    let host = guest.host(&rig.publish(guest.ip));
    let mut client = rig.http1().await;
    for _ in 0..20 {
        let response = client.send_request(get(&host, "/")).await.expect("a response");
        assert_eq!(all_text(response).await, "hello");
        soon("the client connection", client.ready()).await.expect("still open");
    }
    assert!(guest.accepted.load(Ordering::SeqCst) <= 2, "{:?}", guest.accepted);
    rig.stop().await;
}

#[tokio::test]
async fn withdrawal_closes_unused_and_busy_connections() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let daemon = Guest::start(&rig, ip, 49983, hello).await;
    let busy = Guest::start(&rig, ip, 0, endless).await;
    let waiting = Guest::start(&rig, ip, 0, never).await;
    let id = rig.publish(ip);
    let response =
        rig.http1().await.send_request(get(&daemon.host(&id), "/")).await.expect("a response");
    assert_eq!(all_text(response).await, "hello");
    let mut streaming =
        rig.http1().await.send_request(get(&busy.host(&id), "/")).await.expect("a response");
    assert_eq!(next_data(streaming.body_mut()).await.as_deref(), Some("first"));
    let mut client = rig.http1().await;
    let unanswered = client.send_request(get(&waiting.host(&id), "/"));
    let withdraw = async {
        until("the request to arrive", || waiting.accepted.load(Ordering::SeqCst) == 1).await;
        rig.catalog.withdraw(&id);
    };
    let (unanswered, ()) = futures::future::join(unanswered, withdraw).await;
    let unanswered = unanswered.expect("a response");
    assert_eq!(unanswered.status(), 502);
    assert!(all_text(unanswered).await.contains("The sandbox was not found"));
    for guest in [&daemon, &busy, &waiting] {
        guest.all_ended().await;
    }
    let body = streaming.body_mut();
    let broken = soon("the end", http_body_util::BodyExt::frame(body)).await;
    assert!(broken.expect("an error, not a clean end").is_err());
    rig.stop().await;
}

#[tokio::test]
async fn withdrawal_closes_tunnels() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(ip);
    let service = async {
        let (stream, _) = listener.accept().await.expect("accept");
        tokio_tungstenite::accept_async(stream).await.expect("a handshake")
    };
    let client = async {
        let stream = TcpStream::connect(rig.address).await.expect("connect");
        let url = format!("ws://{port}-{id}.d/");
        tokio_tungstenite::client_async(url, stream).await.expect("a handshake").0
    };
    let (mut at_guest, mut at_client) =
        soon("the handshake", futures::future::join(service, client)).await;
    // One message: from here on the tunnel stands on both sides.
    let ping = tokio_tungstenite::tungstenite::Message::text("ping");
    at_client.send(ping.clone()).await.expect("send");
    assert_eq!(futures::StreamExt::next(&mut at_guest).await.expect("one").expect("good"), ping);
    rig.catalog.withdraw(&id);
    for socket in [&mut at_guest, &mut at_client] {
        let end = soon("the end", futures::StreamExt::next(socket)).await;
        assert!(!matches!(end, Some(Ok(_))), "{end:?}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_new_run_gets_new_connections() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 49983, hello).await;
    let id = rig.publish(guest.ip);
    let mut client = rig.http1().await;
    let response = client.send_request(get(&guest.host(&id), "/")).await.expect("a response");
    assert_eq!(all_text(response).await, "hello");
    rig.catalog.publish(&id, target(guest.ip, "secret"));
    guest.all_ended().await;
    let response = client.send_request(get(&guest.host(&id), "/")).await.expect("a response");
    assert_eq!(all_text(response).await, "hello");
    assert_eq!(guest.accepted.load(Ordering::SeqCst), 2);
    rig.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_guest() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let busy = Guest::start(&rig, ip, 0, endless).await;
    let waiting = Guest::start(&rig, ip, 0, never).await;
    let id = rig.publish(ip);
    for guest in [&busy, &waiting] {
        let mut stream = TcpStream::connect(rig.address).await.expect("connect");
        let head = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", guest.host(&id));
        stream.write_all(head.as_bytes()).await.expect("ask");
        until("the request to arrive", || guest.accepted.load(Ordering::SeqCst) > 0).await;
        drop(stream);
        guest.all_ended().await;
    }
    // A stream of HTTP/2 is left alone, its connection stays.
    let mut client = rig.http2().await;
    for guest in [&busy, &waiting] {
        let before = guest.accepted.load(Ordering::SeqCst);
        let uri = format!("http://{}/", guest.host(&id));
        let request = Request::get(uri).body(support::empty()).expect("a request");
        let exchange = async {
            let mut response = client.send_request(request).await.expect("a response");
            assert_eq!(next_data(response.body_mut()).await.as_deref(), Some("first"));
            std::future::pending::<()>().await;
        };
        let arrived = until("arrival", || guest.accepted.load(Ordering::SeqCst) > before);
        tokio::select! {
            () = exchange => panic!("the stream is endless"),
            () = arrived => {}
        }
        guest.all_ended().await;
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_closed_port_is_known_quickly_and_a_late_service_is_found() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let port = closed_port(ip).await;
    let id = rig.publish(ip);
    let host = format!("{port}-{id}.d");
    let mut client = rig.http1().await;
    let start = Instant::now();
    let response = client.send_request(get(&host, "/")).await.expect("a response");
    assert_eq!(response.status(), 502);
    let waited = start.elapsed();
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    assert!(waited >= Duration::from_millis(150), "five tries take longer than {waited:?}");
    // The service opens its port while the request is held.
    let mut client = rig.http1().await;
    let asked = client.send_request(get(&host, "/"));
    let late = async {
        // Between the second try and the third: the delay is what is tested.
        tokio::time::sleep(Duration::from_millis(30)).await;
        Guest::start(&rig, ip, port, hello).await
    };
    let (response, _guest) = futures::future::join(asked, late).await;
    assert_eq!(all_text(response.expect("a response")).await, "hello");
    rig.stop().await;
}

#[tokio::test]
async fn a_service_that_hangs_up_is_not_called_closed() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(ip);
    let mut client = rig.http1().await;
    let asked = client.send_request(get(&format!("{port}-{id}.d"), "/"));
    let service = async { drop(listener.accept().await.expect("accept")) };
    let (response, ()) = futures::future::join(asked, service).await;
    let response = response.expect("a response");
    assert_eq!(response.status(), 502);
    let expected = format!(
        r#"{{"sandboxId":"{id}","message":"The service in the sandbox closed the connection without an answer","port":{port},"code":502}}"#
    );
    assert_eq!(all_text(response).await, expected);
    rig.stop().await;
}

/// A service that promises to keep its connection and closes it while the next request is on
/// its way: a safe request is sent again, any other is not.
#[tokio::test]
async fn only_safe_requests_are_sent_again() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let host = format!("{port}-{}.d", rig.publish(ip));
    let heads = Arc::new(AtomicUsize::new(0));
    let seen = heads.clone();
    rig.scope.spawn("rude service", belljar_daemon::OnError::FailScope, async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            read_head(&mut stream).await?;
            seen.fetch_add(1, Ordering::SeqCst);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await?;
            // The second head is read and then answered by hanging up.
            read_head(&mut stream).await?;
            seen.fetch_add(1, Ordering::SeqCst);
        }
        Err(std::io::Error::other("the listener broke"))
    });
    let mut client = rig.http1().await;
    for expected in [1, 3] {
        let response = client.send_request(get(&host, "/")).await.expect("a response");
        assert_eq!(response.status(), 200);
        assert_eq!(all_text(response).await, "ok");
        soon("the client connection", client.ready()).await.expect("still open");
        assert_eq!(heads.load(Ordering::SeqCst), expected);
    }
    let mut request = get(&host, "/");
    *request.method_mut() = hyper::Method::POST;
    let response = client.send_request(request).await.expect("a response");
    assert_eq!(response.status(), 502);
    assert_eq!(heads.load(Ordering::SeqCst), 4);
    rig.stop().await;
}

#[tokio::test]
async fn a_sandbox_has_a_limit_of_its_own() {
    let config = Config { max_connections_per_sandbox: 1, ..Config::default() };
    let rig = Rig::start(config).await;
    let ip = guest_ip();
    let busy = Guest::start(&rig, ip, 0, endless).await;
    let other = Guest::start(&rig, guest_ip(), 0, hello).await;
    let id = rig.publish(ip);
    let mut first = rig.http1().await;
    let streaming = first.send_request(get(&busy.host(&id), "/")).await.expect("a response");
    let refused = rig.http1().await.send_request(get(&busy.host(&id), "/")).await;
    assert_eq!(refused.expect("a response").status(), 429);
    let host = other.host(&rig.publish(other.ip));
    let served = rig.http1().await.send_request(get(&host, "/")).await.expect("a response");
    assert_eq!(served.status(), 200);
    drop((streaming, first));
    busy.all_ended().await;
    let again = rig.http1().await.send_request(get(&busy.host(&id), "/")).await;
    assert_eq!(again.expect("a response").status(), 200);
    rig.stop().await;
}

/// Far enough apart to tell one from the other on a busy machine.
const HEADER_TIMEOUT: Duration = Duration::from_millis(500);
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
const BETWEEN: Duration = Duration::from_secs(3);

/// Sends `bytes`, reads an answer that ends with `answer`, sends `more`; says how long the proxy
/// keeps the connection open after that.
async fn kept_open(rig: &Rig, bytes: &str, answer: &str, more: &str) -> Duration {
    let mut stream = TcpStream::connect(rig.address).await.expect("connect");
    stream.write_all(bytes.as_bytes()).await.expect("send");
    let mut seen = Vec::new();
    while !seen.ends_with(answer.as_bytes()) {
        seen.push(soon("the answer", stream.read_u8()).await.expect("an answer"));
    }
    stream.write_all(more.as_bytes()).await.expect("send more");
    let start = Instant::now();
    // A reset is an end too.
    drop(soon("the end", stream.read_to_end(&mut seen)).await);
    start.elapsed()
}

#[tokio::test]
async fn a_slow_head_is_cut_but_an_unused_connection_is_kept() {
    let config =
        Config { header_timeout: HEADER_TIMEOUT, idle_timeout: IDLE_TIMEOUT, ..Config::default() };
    let rig = Rig::start(config).await;
    let guest = Guest::start(&rig, guest_ip(), 0, hello).await;
    let host = guest.host(&rig.publish(guest.ip));
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let slow = ["", "G", "GET / HTTP/1.1\r\nHost: x", "PRI * HTTP/2.0\r\n"]
        .map(|start| kept_open(&rig, start, "", ""));
    let (slow, unused, second) = tokio::join!(
        futures::future::join_all(slow),
        kept_open(&rig, &request, "hello", ""),
        kept_open(&rig, &request, "hello", "GET /"),
    );
    for kept in slow {
        assert!(kept >= HEADER_TIMEOUT / 2 && kept < BETWEEN, "{kept:?}");
    }
    assert!(second < BETWEEN, "{second:?}");
    assert!(unused > BETWEEN, "{unused:?}");
    rig.stop().await;
}

#[tokio::test]
async fn a_huge_head_is_refused() {
    let rig = Rig::start(Config::default()).await;
    let id = rig.publish(guest_ip());
    for headers in [format!("X: {}\r\n", "a".repeat(70_000)), "X: a\r\n".repeat(200)] {
        let head = format!("GET / HTTP/1.1\r\nHost: 80-{id}.d\r\n{headers}\r\n");
        let mut stream = TcpStream::connect(rig.address).await.expect("connect");
        // The proxy may hang up before it has read everything.
        drop(stream.write_all(head.as_bytes()).await);
        let mut answer = [0; 12];
        soon("the answer", stream.read_exact(&mut answer)).await.expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 431");
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_stopping_proxy_lets_requests_finish() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(ip);
    let mut client = TcpStream::connect(rig.address).await.expect("connect");
    let head = format!("GET / HTTP/1.1\r\nHost: {port}-{id}.d\r\n\r\n");
    client.write_all(head.as_bytes()).await.expect("ask");
    let (mut service, _) = soon("the request", listener.accept()).await.expect("accept");
    read_head(&mut service).await.expect("a request");
    rig.scope.cancel();
    service.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate").await.expect("answer");
    let mut answer = String::new();
    soon("the answer", client.read_to_string(&mut answer)).await.expect("an answer");
    assert!(answer.ends_with("\r\n\r\nlate"), "{answer}");
    assert!(TcpStream::connect(rig.address).await.is_err(), "the listener is gone");
    rig.stop().await;
}
