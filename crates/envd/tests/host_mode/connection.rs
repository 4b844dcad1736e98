//! What a connection survives.

use std::time::Duration;

use belljar_domain::Secret;
use belljar_envd::Settings;
use belljar_testkit::skip;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::Instant;

use super::client::{Daemon, SOON, settings};

/// More than what the sockets of both sides hold, so that somebody has to read it.
const REFUSED_BYTES: usize = 24 << 20;

/// The status of the next answer; its body is read too.
async fn status(from: &mut OwnedReadHalf) -> std::io::Result<u16> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(from.read_u8().await?);
    }
    let head = String::from_utf8(head).expect("text");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length = length.map_or(0, |length| length.parse().expect("a number"));
    from.read_exact(&mut vec![0; length]).await?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(status.unwrap_or_else(|| panic!("no status in {head}")))
}

#[tokio::test]
async fn a_refused_upload_leaves_the_connection_usable() {
    let token = Some(Secret::new("right".to_owned()));
    let daemon = Daemon::with(Settings { access_token: token, ..settings() }).await;
    let address = daemon.url.strip_prefix("http://").expect("a URL");
    for (target, token, refusal) in [
        ("/files?path=/tmp", "right", 400),
        ("/files?path=/tmp/x", "wrong", 401),
        ("/files?path=/tmp/x&username=nobody-knows", "right", 401),
        ("/process.Process/Start", "wrong", 401),
        ("/nothing", "right", 404),
        ("/envs", "right", 405),
    ] {
        let stream = TcpStream::connect(address).await.expect("connect");
        let (mut from, mut to) = stream.into_split();
        let head = format!(
            "POST {target} HTTP/1.1\r\nHost: x\r\nX-Access-Token: {token}\r\n\
             Content-Type: application/octet-stream\r\nContent-Length: {REFUSED_BYTES}\r\n\r\n"
        );
        let send = async {
            to.write_all(head.as_bytes()).await?;
            to.write_all(&vec![b'x'; REFUSED_BYTES]).await?;
            to.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await
        };
        let receive = async { Ok((status(&mut from).await?, status(&mut from).await?)) };
        let both = tokio::time::timeout(SOON, async { tokio::try_join!(send, receive) }).await;
        let ((), answers) = both.expect("in time").unwrap_or_else(|e| panic!("{target}: {e}"));
        assert_eq!(answers, (refusal, 204), "{target}");
    }
    daemon.stop().await;
}

/// Reads until the daemon closes; says after how long, on the paused clock.
async fn closed_after(stream: &mut TcpStream) -> Duration {
    let start = Instant::now();
    // A reset is an end too.
    drop(stream.read_to_end(&mut Vec::new()).await);
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_cut_but_an_unused_connection_is_kept() {
    let daemon = Daemon::start().await;
    let address = daemon.url.strip_prefix("http://").expect("a URL");
    let ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
    for (before, start, kept) in [
        (&b""[..], &b""[..], 30..32),
        (b"", b"GET /health HTTP/1.1\r\nX: ", 30..32),
        (b"", b"PRI * HTTP/2.0\r\n", 30..32),
        (ask, b"", 640..642),
        (ask, b"GET /heal", 30..32),
        // Its rest is a body, not a head; the connection is busy while it is awaited.
        (b"", b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", 15..17),
    ] {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.write_all(before).await.expect("sent");
        if !before.is_empty() {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.expect("an answer"));
            }
        }
        stream.write_all(start).await.expect("sent");
        let seconds = closed_after(&mut stream).await.as_secs();
        assert!(kept.contains(&seconds), "{:?} {seconds}", String::from_utf8_lossy(start));
    }
    daemon.stop().await;
}

#[tokio::test]
async fn floods_of_headers_are_refused() {
    let daemon = Daemon::start().await;
    let address = daemon.url.strip_prefix("http://").expect("a URL");
    let many = "X: y\r\n".repeat(200);
    let long = format!("X: {}\r\n", "y".repeat(1 << 20));
    let endless = format!("GET /{} HTTP/1.1\r\n", "y".repeat(1 << 20));
    for (start, rest) in
        [("GET /health HTTP/1.1\r\n", &many), ("GET /health HTTP/1.1\r\n", &long), ("", &endless)]
    {
        let stream = TcpStream::connect(address).await.expect("connect");
        let (mut from, mut to) = stream.into_split();
        let send = async {
            // The daemon may hang up before it has read everything.
            for part in [start, rest, "\r\n"] {
                drop(to.write_all(part.as_bytes()).await);
            }
        };
        let mut code = [0; 12];
        let receive = async { from.read_exact(&mut code).await.expect("an answer") };
        let both = async { tokio::join!(send, receive) };
        tokio::time::timeout(SOON, both).await.expect("in time");
        let code = String::from_utf8_lossy(&code);
        assert!(code == "HTTP/1.1 431" || code == "HTTP/1.1 414", "{code}");
    }
    assert_eq!(daemon.get("/health").await.status.as_u16(), 204);
    daemon.stop().await;
}

/// Descriptors of both ends of `connections` are in this process.
fn may_open(connections: u64) -> bool {
    let needed = 2 * connections + 200;
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    limit.current.is_none_or(|current| current >= needed)
        || (limit.maximum.is_none_or(|maximum| maximum >= needed)
            && setrlimit(Resource::Nofile, raised).is_ok())
}

#[tokio::test]
async fn idle_connections_do_not_keep_others_out_and_their_number_is_bounded() {
    const SERVED: usize = 2048;
    if !may_open(SERVED as u64 + 2) {
        return skip("too few open files are allowed here for as many connections as there may be");
    }
    let daemon = Daemon::start().await;
    let address = daemon.url.strip_prefix("http://").expect("a URL");
    let ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut idle = Vec::new();
    let mut codes = Vec::new();
    for _ in 0..=SERVED {
        let (mut from, mut to) = TcpStream::connect(address).await.expect("connect").into_split();
        to.write_all(ask).await.expect("sent");
        let code = tokio::time::timeout(SOON, status(&mut from)).await.expect("in time");
        codes.push(code.expect("an answer"));
        idle.push((from, to));
    }
    assert_eq!(codes.pop(), Some(503));
    assert!(codes.iter().all(|code| *code == 204), "{codes:?}");
    idle.clear();
    let again = async {
        // The daemon learns of the ends one by one.
        while daemon.get("/health").await.status.as_u16() != 204 {}
    };
    tokio::time::timeout(SOON, again).await.expect("in time");
    daemon.stop().await;
}
