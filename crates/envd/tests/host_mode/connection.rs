//! What a connection survives.

use belljar_domain::Secret;
use belljar_envd::Settings;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;

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
