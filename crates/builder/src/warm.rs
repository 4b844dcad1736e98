//! Uses a freshly booted guest once, so that what every sandbox needs first is in its page cache
//! when the snapshot is taken: the daemon's own code, a login shell, the Python interpreter.
//!
//! The price is memory in the template, once a host; clones share those pages. Node is not warmed:
//! its one file is 90 MB.
//!
//! Speaks what clients speak (`contract/e2b-wire.md` section 2.3: Connect with JSON), one request a
//! connection, so that no connection is open in the snapshot.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use belljar_wire::ENVD_PORT;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest answer read: the commands below print nothing.
const ANSWER_MAX_BYTES: usize = 1 << 20;
/// Envelope of a message in a Connect stream: flags, then length.
const ENVELOPE_BYTES: usize = 5;
/// Envelope flag of the last message.
const END_OF_STREAM: u8 = 2;
/// `user:` in base64: which account runs the command. No password belongs to it.
const AS_USER: &str = "Basic dXNlcjo=";

/// What is run in the guest, in order. Each is one `Start` of the guest daemon.
pub const COMMANDS: [&[&str]; 3] = [
    &["/bin/bash", "-l", "-c", "true"],
    &["/bin/bash", "-l", "-c", "ls -la / /home/user > /dev/null && id > /dev/null"],
    &["/bin/bash", "-l", "-c", "python3 -c 'import json, os, subprocess, sys'"],
];

/// Why the guest did not do what every sandbox must be able to do.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// It could not be reached, or hung up.
    #[error("talk HTTP to the guest daemon at {address}")]
    Http {
        /// Where it was looked for.
        address: SocketAddr,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It did not answer in time.
    #[error("get an answer from the guest daemon at {address} within {waited_ms} ms")]
    TimedOut {
        /// Where it was asked.
        address: SocketAddr,
        /// How long was waited.
        waited_ms: u64,
    },
    /// It answered something else.
    #[error("get a good answer to {path} from the guest daemon: {status}: {body}")]
    Refused {
        /// The path.
        path: &'static str,
        /// The status.
        status: StatusCode,
        /// The first 300 characters of its body. Hostile text.
        body: String,
    },
    /// A command did not end well.
    #[error("run `{command}` in the guest: {outcome}")]
    Command {
        /// The command.
        command: String,
        /// How it ended. Hostile text.
        outcome: String,
    },
}

/// The guest daemon of one machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guest {
    pub(crate) host_ip: Ipv4Addr,
    /// For each request, connecting included.
    pub(crate) deadline: Duration,
}

impl Guest {
    /// Asks whether it is healthy.
    pub(crate) async fn health(&self) -> Result<(), WarmError> {
        const PATH: &str = "/health";
        let request = Request::builder().method(Method::GET).uri(PATH);
        let (status, body) = self.ask(request, Bytes::new()).await?;
        if status.is_success() { Ok(()) } else { Err(refused(PATH, status, &body)) }
    }

    /// Runs a command to its end and wants exit code 0.
    pub(crate) async fn run(&self, command: &[&str]) -> Result<(), WarmError> {
        const PATH: &str = "/process.Process/Start";
        let request = Request::builder()
            .method(Method::POST)
            .uri(PATH)
            .header(header::CONTENT_TYPE, "application/connect+json")
            .header("Connect-Protocol-Version", "1")
            .header(header::AUTHORIZATION, AS_USER);
        let (status, body) = self.ask(request, start_message(command)).await?;
        if status != StatusCode::OK {
            return Err(refused(PATH, status, &body));
        }
        exit_of(&body).map_err(|outcome| WarmError::Command { command: command.join(" "), outcome })
    }

    async fn ask(
        &self,
        request: hyper::http::request::Builder,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), WarmError> {
        let address = SocketAddr::from((self.host_ip, ENVD_PORT));
        match timeout(self.deadline, exchange(address, request, body)).await {
            Ok(answer) => answer.map_err(|source| WarmError::Http { address, source }),
            Err(_) => Err(WarmError::TimedOut {
                address,
                waited_ms: u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    }
}

/// One request on one connection, closed before this returns.
async fn exchange(
    address: SocketAddr,
    request: hyper::http::request::Builder,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let request = request
        .header(header::HOST, address.to_string())
        .header(header::CONNECTION, "close")
        .body(Full::new(body))?;
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answer = async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES).collect().await?;
        Ok((status, body.to_bytes()))
    };
    // Driving the connection beside the exchange, not in a task, ends it with the exchange.
    tokio::pin!(answer, connection);
    tokio::select! {
        answer = &mut answer => answer,
        ended = &mut connection => {
            ended?;
            // The connection is through, so everything of the answer has arrived.
            answer.await
        }
    }
}

fn refused(path: &'static str, status: StatusCode, body: &[u8]) -> WarmError {
    let body = String::from_utf8_lossy(body).chars().take(300).collect();
    WarmError::Refused { path, status, body }
}

#[derive(Serialize)]
struct StartRequest<'a> {
    process: ProcessConfig<'a>,
    stdin: bool,
}

#[derive(Serialize)]
struct ProcessConfig<'a> {
    cmd: &'a str,
    args: &'a [&'a str],
}

/// Messages of the answer, as far as they matter here; fields that are zero are left out.
#[derive(Deserialize)]
struct StartResponse {
    event: Option<ProcessEvent>,
}

#[derive(Deserialize)]
struct ProcessEvent {
    end: Option<EndEvent>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct EndEvent {
    exit_code: i32,
    exited: bool,
    status: String,
}

fn start_message(command: &[&str]) -> Bytes {
    let (cmd, args) = command.split_first().expect("every command names its program");
    let message = StartRequest { process: ProcessConfig { cmd, args }, stdin: false };
    let json = serde_json::to_vec(&message).expect("the message has only texts and a flag");
    let len = u32::try_from(json.len()).expect("commands are short");
    let mut envelope = vec![0];
    envelope.extend(len.to_be_bytes());
    envelope.extend(json);
    envelope.into()
}

/// Whether the stream says that the process ended with exit code 0; otherwise what it says.
fn exit_of(stream: &[u8]) -> Result<(), String> {
    let mut rest = stream;
    let mut end = None;
    while let Some((envelope, after)) = rest.split_first_chunk::<ENVELOPE_BYTES>() {
        let [flags, len @ ..] = *envelope;
        let len = usize::try_from(u32::from_be_bytes(len)).map_err(|e| e.to_string())?;
        let (message, after) =
            after.split_at_checked(len).ok_or("its answer ends inside a message")?;
        rest = after;
        if flags & END_OF_STREAM != 0 {
            let text = String::from_utf8_lossy(message);
            if text.contains("\"error\"") {
                return Err(text.chars().take(300).collect());
            }
            break;
        }
        let message: StartResponse =
            serde_json::from_slice(message).map_err(|e| format!("its answer is no event: {e}"))?;
        end = message.event.and_then(|event| event.end).or(end);
    }
    match end {
        Some(end) if end.exited && end.exit_code == 0 => Ok(()),
        Some(end) => Err(format!("{} (exit code {})", end.status, end.exit_code)),
        None => Err("its answer has no end".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    fn frame(flags: u8, json: &str) -> Vec<u8> {
        let len = u32::try_from(json.len()).expect("short");
        [&[flags][..], &len.to_be_bytes(), json.as_bytes()].concat()
    }

    #[test]
    fn streams_are_judged_by_their_end_event() {
        let start = frame(0, r#"{"event":{"start":{"pid":7}}}"#);
        let data = frame(0, r#"{"event":{"data":{"stdout":"aGk="}}}"#);
        let good = frame(0, r#"{"event":{"end":{"exited":true,"status":"exit status 0"}}}"#);
        let bad =
            frame(0, r#"{"event":{"end":{"exitCode":3,"exited":true,"status":"exit status 3"}}}"#);
        let last = frame(2, "{}");
        let error = frame(2, r#"{"error":{"code":"not_found"}}"#);
        assert_eq!(exit_of(&[&start[..], &data, &good, &last].concat()), Ok(()));
        let text = |parts: &[&[u8]]| exit_of(&parts.concat()).expect_err("not a good end");
        assert_eq!(text(&[&start, &bad, &last]), "exit status 3 (exit code 3)");
        assert!(text(&[&error]).contains("not_found"));
        assert_eq!(text(&[&start, &last]), "its answer has no end");
        assert_eq!(text(&[&start[..9]]), "its answer ends inside a message");
        assert!(text(&[&frame(0, "[]")]).starts_with("its answer is no event"));
        assert_eq!(text(&[&[0, 255, 255, 255, 255, 1]]), "its answer ends inside a message");
    }

    #[test]
    fn a_start_message_is_one_envelope() {
        let message = start_message(&["/bin/sh", "-c", "true"]);
        let json = r#"{"process":{"cmd":"/bin/sh","args":["-c","true"]},"stdin":false}"#;
        assert_eq!(message, frame(0, json));
    }

    #[tokio::test]
    async fn an_exchange_ends_with_its_connection_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let server = async {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte).await.expect("read");
                request.push(byte[0]);
            }
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("write");
            assert_eq!(stream.read(&mut byte).await.expect("read"), 0, "the client hung up");
            String::from_utf8(request).expect("text")
        };
        let request = Request::builder().uri("/health");
        let (request, answer) = tokio::join!(server, exchange(address, request, Bytes::new()));
        assert!(request.starts_with("GET /health HTTP/1.1\r\n"), "{request}");
        assert_eq!(answer.expect("answer").0, StatusCode::NO_CONTENT);
    }
}
