//! A way to servers on the guest's loopback: the guest daemon connects there and joins the two.
//!
//! Many development servers listen on 127.0.0.1 only. `CONNECT localhost:PORT` asks the daemon
//! for a connection to one of them; after its 200 the bytes are the server's.
//! Source: `docs/decisions/2026-11-22-loopback-tunnel.md`.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Longest head of the daemon's answer, bytes.
const HEAD_MAX_BYTES: usize = 4096;
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    #[error("ask the guest daemon for a tunnel")]
    Io(#[from] io::Error),
    #[error("tunnel to the guest's loopback: nobody listens there, status {0}")]
    Refused(u16),
    #[error("tunnel to the guest's loopback: there are as many as there may be")]
    Full,
    #[error("tunnel to the guest's loopback: the answer is no HTTP")]
    Malformed,
}

/// A connection to `port` on the loopback of the guest whose daemon is at `daemon`. The caller
/// bounds the time. Cancel-safe: dropping it closes the connection.
pub(crate) async fn open(daemon: SocketAddr, port: u16) -> Result<TcpStream, TunnelError> {
    let mut stream = TcpStream::connect(daemon).await?;
    let request = format!("CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    match status(&read_head(&mut stream).await?) {
        Some(200) => Ok(stream),
        Some(429) => Err(TunnelError::Full),
        Some(status) => Err(TunnelError::Refused(status)),
        None => Err(TunnelError::Malformed),
    }
}

/// Reads to the end of the head and no byte further: HTTP/2 servers may speak first.
async fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>, TunnelError> {
    let mut head = Vec::new();
    let mut ahead = [0; HEAD_MAX_BYTES];
    loop {
        let seen = stream.peek(&mut ahead).await?;
        if seen == 0 {
            return Err(TunnelError::Malformed);
        }
        let before = head.len();
        head.extend_from_slice(&ahead[..seen]);
        let end = head.windows(HEAD_END.len()).position(|window| window == HEAD_END);
        let length = end.map_or(head.len(), |at| at + HEAD_END.len());
        stream.read_exact(&mut ahead[..length - before]).await?;
        head.truncate(length);
        if end.is_some() {
            return Ok(head);
        }
        if head.len() >= HEAD_MAX_BYTES {
            return Err(TunnelError::Malformed);
        }
    }
}

fn status(head: &[u8]) -> Option<u16> {
    let code = head.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    std::str::from_utf8(code).ok()?.parse().ok()
}
