//! Answers that come before the request has been sent: what becomes of the rest of it, and of the
//! two connections.

mod support;

use std::convert::Infallible;

use belljar_daemon::OnError;
use belljar_proxy::Config;
use bytes::Bytes;
use futures::SinkExt as _;
use http_body_util::{BodyExt, StreamBody};
use hyper::Request;
use hyper::body::Frame;
use support::{Body, Guest, Rig, all_text, channel, data, guest_ip, read_head, soon, text};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// More than what the sockets of both sides hold, so that somebody has to read it.
const UPLOAD_PIECES: usize = 384;
const PIECE_BYTES: usize = 64 << 10;

fn post(host: &str, path: &str, body: Body) -> Request<Body> {
    Request::post(path).header("host", host).body(body).expect("a request")
}

fn upload(host: &str, path: &str) -> Request<Body> {
    // In pieces: hyper's client does not notice the end of a large one that was answered early.
    let piece = Bytes::from(vec![b'x'; PIECE_BYTES]);
    let pieces = (0..UPLOAD_PIECES).map(move |_| Ok::<_, Infallible>(Frame::data(piece.clone())));
    post(host, path, BodyExt::boxed(StreamBody::new(futures::stream::iter(pieces))))
}

#[tokio::test]
async fn what_the_proxy_refuses_is_read_to_its_end() {
    let rig = Rig::start(Config { max_connections_per_sandbox: 0, ..Config::default() }).await;
    let id = rig.publish(guest_ip());
    let mut client = rig.http1().await;
    for (host, path, status) in [
        ("80-i0000000000000000000a.d".to_owned(), "/", 502),
        (format!("80-{id}.d"), "/", 429),
        (format!("49983-{id}.d"), "/init", 404),
        ("nonsense".to_owned(), "/", 400),
    ] {
        let answer = soon("an answer", client.send_request(upload(&host, path))).await;
        let answer = answer.unwrap_or_else(|error| panic!("{host}: {error}"));
        assert_eq!(answer.status(), status, "{host}");
        all_text(answer).await;
        let open = soon("the end of the request", client.ready()).await;
        open.unwrap_or_else(|error| panic!("{host}: {error}"));
    }
    drop(client);
    rig.stop().await;
}

/// The connection looks as good as any: all was read, nothing was closed yet.
#[tokio::test]
async fn a_connection_that_was_answered_early_serves_nobody_else() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let host = format!("{}-{}.d", listener.local_addr().expect("bound").port(), rig.publish(ip));
    rig.scope.spawn("hasty service", OnError::FailScope, async move {
        let (mut first, _) = listener.accept().await?;
        read_head(&mut first).await?;
        first.write_all(b"HTTP/1.1 507 Full\r\nContent-Length: 2\r\n\r\nno").await?;
        // To the end of the upload, and then of the connection.
        let ended = async { first.read_to_end(&mut Vec::new()).await };
        let next = async {
            let (mut second, _) = listener.accept().await?;
            read_head(&mut second).await?;
            second.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes").await
        };
        tokio::try_join!(ended, next)?;
        std::future::pending::<std::io::Result<()>>().await
    });
    let mut client = rig.http1().await;
    let (mut sender, body) = channel();
    sender.send(data("some")).await.expect("the body is being read");
    let refused = soon("an answer", client.send_request(post(&host, "/", body))).await;
    let refused = refused.expect("an answer");
    assert_eq!(refused.status(), 507);
    sender.send(data("rest")).await.expect("the body is being read");
    drop(sender);
    assert_eq!(all_text(refused).await, "no");
    soon("the client connection", client.ready()).await.expect("still open");
    let next = soon("an answer", client.send_request(post(&host, "/", support::empty()))).await;
    assert_eq!(all_text(next.expect("an answer")).await, "yes");
    rig.stop().await;
}

#[tokio::test]
async fn a_service_that_answers_early_and_hangs_up_is_heard() {
    let rig = Rig::start(Config::default()).await;
    let ip = guest_ip();
    let listener = TcpListener::bind((ip, 0)).await.expect("bind");
    let id = rig.publish(ip);
    let host = format!("{}-{id}.d", listener.local_addr().expect("bound").port());
    rig.scope.spawn("rude service", OnError::FailScope, async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            read_head(&mut stream).await?;
            stream.write_all(b"HTTP/1.1 413 Much\r\nContent-Length: 2\r\n\r\nno").await?;
            // Closing with bytes unread resets the connection.
        }
        Err(std::io::Error::other("the listener broke"))
    });
    let other = Guest::start(&rig, ip, 0, |_| async { text("hello") }).await;
    let mut client = rig.http1().await;
    for _ in 0..20 {
        let refused = soon("an answer", client.send_request(upload(&host, "/"))).await;
        let refused = refused.expect("an answer");
        assert_eq!(refused.status(), 413);
        assert_eq!(all_text(refused).await, "no");
        soon("the client connection", client.ready()).await.expect("still open");
    }
    let next = client.send_request(post(&other.host(&id), "/", support::empty())).await;
    assert_eq!(all_text(next.expect("an answer")).await, "hello");
    rig.stop().await;
}
