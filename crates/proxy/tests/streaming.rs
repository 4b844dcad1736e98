//! Bytes in motion: streams both ways, HTTP/2, trailers, upgrades.

mod support;

use belljar_proxy::Config;
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming};
use hyper::{HeaderMap, Request, Response, Version};
use support::{
    Body, Guest, Rig, all_text, channel, data, get, guest_ip, next_data, read_head, soon, text,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;

/// Sends back what it reads, as it reads it.
async fn echo_stream(request: Request<Incoming>) -> Response<Body> {
    let version = format!("{:?}", request.version());
    let frames = request.into_body().map_err(|error| panic!("a good body: {error}"));
    let mut response = Response::new(frames.boxed());
    response.headers_mut().insert("x-version", version.parse().expect("a header"));
    response
}

fn post(uri: &str, host: &str, body: Body) -> Request<Body> {
    Request::post(uri).header("host", host).body(body).expect("a request")
}

/// Each piece comes back before the next one is sent.
async fn converse(mut sender: futures::channel::mpsc::Sender<Frame<Bytes>>, body: &mut Incoming) {
    for piece in ["one", "two", "three"] {
        sender.send(data(piece)).await.expect("the body is being read");
        assert_eq!(next_data(body).await.as_deref(), Some(piece));
    }
    drop(sender);
    assert_eq!(next_data(body).await, None);
}

#[tokio::test]
async fn http1_streams_both_ways_at_once() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, echo_stream).await;
    let host = guest.host(&rig.publish(guest.ip));
    let (sender, body) = channel();
    let mut client = rig.http1().await;
    let response = soon("the head", client.send_request(post("/", &host, body))).await;
    converse(sender, response.expect("a response").body_mut()).await;
    rig.stop().await;
}

#[tokio::test]
async fn http2_clients_reach_http1_services() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, echo_stream).await;
    let host = guest.host(&rig.publish(guest.ip));
    let mut client = rig.http2().await;
    let (sender, body) = channel();
    let request = Request::post(format!("http://{host}/")).body(body).expect("a request");
    let mut response = soon("the head", client.send_request(request)).await.expect("a response");
    assert_eq!(response.version(), Version::HTTP_2);
    assert_eq!(response.headers()["x-version"], "HTTP/1.1");
    converse(sender, response.body_mut()).await;
    // A GET with a body is rare, and its body must not be lost.
    let (mut sender, body) = channel();
    let request = Request::get(format!("http://{host}/")).body(body).expect("a request");
    sender.send(data("kept")).await.expect("the body is being read");
    drop(sender);
    let response = soon("the head", client.send_request(request)).await.expect("a response");
    assert_eq!(all_text(response).await, "kept");
    rig.stop().await;
}

#[tokio::test]
async fn grpc_goes_by_http2_all_the_way_with_trailers() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, |request: Request<Incoming>| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(request.headers()["te"], "trailers");
        let authority = request.uri().authority().expect("an authority").to_string();
        let asked = request.into_body().collect().await.expect("a good body").to_bytes();
        assert_eq!(asked, "ask");
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().expect("a header"));
        let (mut sender, body) = channel();
        sender.try_send(data(&authority)).expect("room for one");
        sender.try_send(Frame::trailers(trailers)).expect("room for one more");
        Response::new(body)
    })
    .await;
    let host = guest.host(&rig.publish(guest.ip));
    let mut client = rig.http2().await;
    for _ in 0..2 {
        let request = Request::post(format!("http://{host}/pkg.Service/Method"))
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers")
            .body(support::full("ask"))
            .expect("a request");
        let response = soon("the head", client.send_request(request)).await.expect("a response");
        let collected = soon("the body", response.into_body().collect()).await.expect("a body");
        let trailers = collected.trailers().expect("trailers").clone();
        assert_eq!(trailers["grpc-status"], "0");
        assert_eq!(collected.to_bytes(), host);
    }
    assert_eq!(guest.accepted.load(std::sync::atomic::Ordering::SeqCst), 1, "one connection");
    rig.stop().await;
}

#[tokio::test]
async fn http1_trailers_pass() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, |request: Request<Incoming>| async move {
        assert_eq!(request.headers()["te"], "trailers");
        let collected = request.into_body().collect().await.expect("a good body");
        let sum = collected.trailers().expect("trailers")["x-sum"].clone();
        let (mut sender, body) = channel();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", sum);
        sender.try_send(data("body")).expect("room for one");
        sender.try_send(Frame::trailers(trailers)).expect("room for one more");
        let mut response = Response::new(body);
        response.headers_mut().insert("trailer", "x-sum".parse().expect("a header"));
        response
    })
    .await;
    let host = guest.host(&rig.publish(guest.ip));
    let answer = rig
        .raw(&format!(
            "POST / HTTP/1.1\r\nHost: {host}\r\nConnection: close, TE\r\nTE: trailers\r\n\
             Trailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 42\r\n\r\n"
        ))
        .await;
    assert!(answer.ends_with("\r\n\r\n4\r\nbody\r\n0\r\nx-sum: 42\r\n\r\n"), "{answer}");
    rig.stop().await;
}

#[tokio::test]
async fn a_service_of_http10_is_understood() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(ip);
    let service = async {
        let (mut stream, _) = listener.accept().await.expect("accept");
        read_head(&mut stream).await.expect("a request");
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nuntil the end").await.expect("answer");
    };
    let mut client = rig.http1().await;
    let request = client.send_request(get(&format!("{port}-{id}.d"), "/"));
    let (response, ()) = soon("an answer", futures::future::join(request, service)).await;
    let response = response.expect("a response");
    assert_eq!(response.version(), Version::HTTP_11);
    assert_eq!(all_text(response).await, "until the end");
    rig.stop().await;
}

#[tokio::test]
async fn websockets_pass() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(ip);
    let service = async {
        let (stream, _) = listener.accept().await.expect("accept");
        let mut socket = tokio_tungstenite::accept_async(stream).await.expect("a handshake");
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() || message.is_binary() {
                socket.send(message).await.expect("send");
            }
        }
    };
    let client = async {
        let stream = TcpStream::connect(rig.address).await.expect("connect");
        let url = format!("ws://{port}-{id}.d/chat?x=1");
        let (mut socket, response) =
            tokio_tungstenite::client_async(url, stream).await.expect("a handshake");
        assert_eq!(response.status(), 101);
        for size in [1, 125, 70_000] {
            let sent = Message::binary(vec![7; size]);
            socket.send(sent.clone()).await.expect("send");
            assert_eq!(socket.next().await.expect("an echo").expect("a message"), sent);
        }
        socket.close(None).await.expect("close");
        while let Some(message) = socket.next().await {
            assert!(message.expect("a message").is_close());
        }
    };
    soon("the conversation", futures::future::join(service, client)).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_refused_upgrade_is_an_ordinary_answer() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, |request: Request<Incoming>| async move {
        let upgrade = request.headers().get("upgrade").map(|v| v.to_str().expect("text"));
        text(format!("upgrade: {upgrade:?}"))
    })
    .await;
    let host = guest.host(&rig.publish(guest.ip));
    let ask = |protocol: &str| {
        let mut request = get(&host, "/");
        request.headers_mut().insert("connection", "upgrade".parse().expect("a header"));
        request.headers_mut().insert("upgrade", protocol.parse().expect("a header"));
        request
    };
    let mut client = rig.http1().await;
    let response = client.send_request(ask("any/1")).await.expect("a response");
    assert_eq!(all_text(response).await, "upgrade: Some(\"any/1\")");
    let response = client.send_request(ask("h2c")).await.expect("a response");
    assert_eq!(all_text(response).await, "upgrade: None");
    rig.stop().await;
}

#[tokio::test]
async fn an_upgraded_connection_may_close_one_side_first() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let id = rig.publish(ip);
    let service = async {
        let (mut stream, _) = listener.accept().await.expect("accept");
        read_head(&mut stream).await.expect("a request");
        let head =
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n";
        stream.write_all(head).await.expect("switch");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("until the client is done");
        stream.write_all(&all).await.expect("answer after that");
    };
    let client = async {
        let mut stream = TcpStream::connect(rig.address).await.expect("connect");
        let head = format!(
            "GET / HTTP/1.1\r\nHost: {port}-{id}.d\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.expect("ask");
        stream.write_all(b"early bytes").await.expect("send before the switch");
        stream.shutdown().await.expect("close one side");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("the other side stays");
        String::from_utf8(answer).expect("text")
    };
    let ((), answer) = soon("the end", futures::future::join(service, client)).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nearly bytes"), "{answer}");
    rig.stop().await;
}

#[tokio::test]
async fn many_streams_share_one_client_connection() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, echo_stream).await;
    let host = guest.host(&rig.publish(guest.ip));
    let client = rig.http2().await;
    let asks = (0..100).map(|n| {
        let (mut client, host) = (client.clone(), host.clone());
        async move {
            let request = Request::post(format!("http://{host}/{n}"))
                .body(support::full(n.to_string()))
                .expect("a request");
            let response = client.send_request(request).await.expect("a response");
            assert_eq!(all_text(response).await, n.to_string());
        }
    });
    soon("all answers", futures::future::join_all(asks)).await;
    rig.stop().await;
}
