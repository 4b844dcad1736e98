//! `CONNECT localhost:PORT`: the way in to servers on the loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use belljar_domain::Secret;
use belljar_envd::state::NewIdentity;
use belljar_envd::{Settings, State, serve};
use belljar_testkit::skip;
use belljar_wire::guest::MAX_TUNNELS;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::client::{Daemon, SOON, settings};

fn address(daemon: &Daemon) -> &str {
    daemon.url.strip_prefix("http://").expect("a URL")
}

async fn soon<T>(what: &str, future: impl Future<Output = io::Result<T>>) -> T {
    let done = tokio::time::timeout(SOON, future).await;
    done.unwrap_or_else(|_| panic!("{what} takes too long"))
        .unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Asks for a tunnel; says the status and the body of the answer.
async fn ask(stream: &mut TcpStream, target: &str) -> (u16, String) {
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    soon("the request", stream.write_all(request.as_bytes())).await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("the head", stream.read_u8()).await);
    }
    let head = String::from_utf8(head).expect("text");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a number"))];
    soon("the body", stream.read_exact(&mut body)).await;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status in {head}"));
    (status, String::from_utf8(body).expect("text"))
}

/// An open tunnel to `port`.
async fn tunnel(address: &str, port: u16) -> TcpStream {
    let mut stream = soon("the connection", TcpStream::connect(address)).await;
    assert_eq!(ask(&mut stream, &format!("localhost:{port}")).await, (200, String::new()));
    stream
}

async fn listen(ip: impl Into<IpAddr>) -> (TcpListener, u16) {
    let listener = TcpListener::bind((ip.into(), 0)).await.expect("bind");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

async fn talks_both_ways_and_closes_one_side_first(ip: IpAddr) {
    // The token guards what the daemon does, not a way to what everybody inside can reach.
    let token = Some(Secret::new("secret".to_owned()));
    let daemon = Daemon::with(Settings { access_token: token, ..settings() }).await;
    let (listener, port) = listen(ip).await;
    let mut client = tunnel(address(&daemon), port).await;
    let (mut server, _) = soon("the tunnel's end", listener.accept()).await;
    // The server speaks first, then the client ends its side, and the server goes on.
    soon("a greeting", server.write_all(b"hello")).await;
    let mut greeting = [0; 5];
    soon("a greeting", client.read_exact(&mut greeting)).await;
    assert_eq!(&greeting, b"hello");
    let sent = vec![b'x'; 4 << 20];
    let send = async {
        client.write_all(&sent).await?;
        client.shutdown().await
    };
    let mut received = Vec::new();
    let receive = server.read_to_end(&mut received);
    soon("the upload", async { tokio::try_join!(send, receive) }).await;
    assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
    soon("the rest", server.write_all(b"bye")).await;
    drop(server);
    let mut rest = String::new();
    soon("the rest", client.read_to_string(&mut rest)).await;
    assert_eq!(rest, "bye");
    daemon.stop().await;
}

#[tokio::test]
async fn servers_on_127_0_0_1_are_reached() {
    talks_both_ways_and_closes_one_side_first(Ipv4Addr::LOCALHOST.into()).await;
}

#[tokio::test]
async fn servers_on_ipv6_loopback_are_reached() {
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.is_err() {
        return skip("no IPv6 loopback here");
    }
    talks_both_ways_and_closes_one_side_first(Ipv6Addr::LOCALHOST.into()).await;
}

#[tokio::test]
async fn where_nobody_listens_the_connection_stays_for_another_try() {
    let daemon = Daemon::start().await;
    let (listener, port) = listen(Ipv4Addr::LOCALHOST).await;
    drop(listener);
    let mut client = soon("the connection", TcpStream::connect(address(&daemon))).await;
    let (status, body) = ask(&mut client, &format!("localhost:{port}")).await;
    assert_eq!(status, 502);
    let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(body["code"], 502);
    let message = body["message"].as_str().expect("a text");
    assert!(message.contains(&format!("port {port} on localhost")), "{message}");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("bind");
    assert_eq!(ask(&mut client, &format!("127.0.0.1:{port}")).await.0, 200);
    let (mut server, _) = soon("the tunnel's end", listener.accept()).await;
    soon("a byte", server.write_u8(7)).await;
    assert_eq!(soon("a byte", client.read_u8()).await, 7);
    daemon.stop().await;
}

#[tokio::test]
async fn only_other_servers_on_the_loopback_are_targets() {
    let daemon = Daemon::start().await;
    let own = address(&daemon).to_owned();
    let own_port = own.split_once(':').expect("a port").1;
    let mut client = soon("the connection", TcpStream::connect(&own)).await;
    for (target, status) in [
        ("example.com:80", 403),
        ("10.0.0.1:80", 403),
        ("169.254.169.254:80", 403),
        (own.as_str(), 403),
        (&format!("localhost:{own_port}"), 403),
        (&format!("[::1]:{own_port}"), 403),
        ("localhost:0", 400),
    ] {
        let (refused, body) = ask(&mut client, target).await;
        assert_eq!(refused, status, "{target}: {body}");
        assert!(body.starts_with(&format!(r#"{{"code":{status},"message":"failed to tunnel"#)));
    }
    assert_eq!(daemon.get("/health").await.status.as_u16(), 204);
    daemon.stop().await;
}

/// Whatever a server said before it broke off is passed on.
#[tokio::test]
async fn the_last_words_of_a_server_that_resets_arrive() {
    let daemon = Daemon::start().await;
    let (listener, port) = listen(Ipv4Addr::LOCALHOST).await;
    let mut client = tunnel(address(&daemon), port).await;
    let (mut server, _) = soon("the tunnel's end", listener.accept()).await;
    soon("a byte", client.write_all(b"unread")).await;
    soon("the byte", server.readable()).await;
    soon("the last words", server.write_all(b"no")).await;
    // Closing with bytes unread resets the connection.
    drop(server);
    let mut words = Vec::new();
    // How it ends is TCP's business.
    drop(tokio::time::timeout(SOON, client.read_to_end(&mut words)).await.expect("in time"));
    assert_eq!(words, b"no");
    daemon.stop().await;
}

#[tokio::test]
async fn tunnels_end_with_the_daemon_and_with_the_sandbox() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let own = listener.local_addr().expect("bound").to_string();
    let state = Arc::new(State::new(settings()));
    let stop = CancellationToken::new();
    let mut serving = JoinSet::new();
    serving.spawn(serve(listener, Arc::clone(&state), stop.clone()));
    let (service, port) = listen(Ipv4Addr::LOCALHOST).await;
    let end: [&dyn Fn(); 2] = [
        &|| {
            let sandbox_id = Some("iother".to_owned());
            let new_run = true;
            state.become_sandbox(NewIdentity { new_run, sandbox_id, ..NewIdentity::default() });
        },
        &|| stop.cancel(),
    ];
    for end in end {
        let mut client = tunnel(&own, port).await;
        let (mut server, _) = soon("the tunnel's end", service.accept()).await;
        soon("a byte", server.write_u8(7)).await;
        assert_eq!(soon("a byte", client.read_u8()).await, 7);
        end();
        for side in [&mut client, &mut server] {
            let ended = tokio::time::timeout(SOON, side.read(&mut [0])).await.expect("in time");
            assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        }
    }
    let ended = tokio::time::timeout(SOON, serving.join_next()).await.expect("in time");
    ended.expect("was running").expect("no panic").expect("no error");
}

#[tokio::test]
async fn there_are_so_many_tunnels_and_no_more() {
    // Both ends of both connections of a tunnel are in this process.
    let needed = 4 * MAX_TUNNELS as u64 + 200;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < needed) {
        let raised = Rlimit { current: limit.maximum, ..limit };
        if limit.maximum.is_some_and(|maximum| maximum < needed)
            || setrlimit(Resource::Nofile, raised).is_err()
        {
            return skip("too few open files are allowed here for as many tunnels as there may be");
        }
    }
    let daemon = Daemon::start().await;
    let (listener, port) = listen(Ipv4Addr::LOCALHOST).await;
    let mut tunnels = Vec::new();
    for _ in 0..MAX_TUNNELS {
        let client = tunnel(address(&daemon), port).await;
        tunnels.push((client, soon("the tunnel's end", listener.accept()).await.0));
    }
    let mut more = soon("the connection", TcpStream::connect(address(&daemon))).await;
    let (status, body) = ask(&mut more, &format!("localhost:{port}")).await;
    assert_eq!(status, 429);
    assert!(body.contains(&format!("{MAX_TUNNELS} tunnels are open")), "{body}");
    assert_eq!(daemon.get("/health").await.status.as_u16(), 204);
    // A place is free once both sides have ended.
    drop(tunnels.pop());
    let freed = async {
        while ask(&mut more, &format!("localhost:{port}")).await.0 != 200 {
            tokio::task::yield_now().await;
        }
        Ok(())
    };
    soon("a free place", freed).await;
    daemon.stop().await;
}
