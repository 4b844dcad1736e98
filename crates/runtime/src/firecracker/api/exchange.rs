//! One HTTP exchange over one connection.

use std::path::PathBuf;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// Longest body of an answer, bytes. A whole configuration has some thousand.
pub const ANSWER_MAX_BYTES: usize = 1 << 20;
/// Longest head of an answer, bytes.
const HEAD_MAX_BYTES: usize = 16 << 10;
/// How much of a fault an error carries, bytes.
pub const FAULT_MAX_BYTES: usize = 2048;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An answer.
#[derive(Debug)]
pub(super) struct Exchanged {
    pub(super) status: u16,
    pub(super) body: Bytes,
}

impl Exchanged {
    /// Why Firecracker said no, if it did.
    pub(super) fn fault(&self) -> Option<String> {
        if self.status < 400 {
            return None;
        }
        let named = serde_json::from_slice::<Value>(&self.body).ok();
        let named = named.as_ref().and_then(|body| body["fault_message"].as_str());
        let text = match named {
            Some(fault) => fault.to_owned(),
            None => {
                format!("status {}: {}", self.status, String::from_utf8_lossy(&self.body))
            }
        };
        // Some messages have line feeds, and all of them go into a line of a log.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let end = text.floor_char_boundary(text.len().min(FAULT_MAX_BYTES));
        Some(text[..end].to_owned())
    }
}

/// Connects, asks, and reads the answer. Cancel-safe: the connection goes with it.
pub(super) async fn exchange(
    socket: PathBuf,
    (method, path, body): (Method, String, Option<Value>),
) -> Result<Exchanged, BoxError> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(HEAD_MAX_BYTES).handshake(TokioIo::new(stream)).await?;
    let text = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::ACCEPT, "application/json");
    if !text.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(text))?;
    let asking = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await?.to_bytes();
        Ok(Exchanged { status, body })
    };
    let (mut asking, mut connection) = (std::pin::pin!(asking), std::pin::pin!(connection));
    tokio::select! {
        biased;
        answer = &mut asking => answer,
        // The connection's end wakes whoever waits for an answer of it.
        ended = &mut connection => match ended {
            Ok(()) => asking.await,
            Err(e) => Err(e.into()),
        },
    }
}
