//! The fake guest: control channel and a little HTTP.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;

use belljar_daemon::OnError;
use belljar_wire::ENVD_VERSION;
use belljar_wire::guest::{
    self, FromGuest, Init, LINE_MAX_BYTES, LogEvent, LogLevel, LogLine, ToGuest,
};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tracing::warn;

use super::faults::{Fault, Step};
use super::machine::{Body, Identity};
use crate::lines::Lines;
use crate::machine::ExitCause;

/// The guest daemon's port.
pub const HTTP_PORT: u16 = 49983;
/// Longest request head, and longest body that is read away.
const HEAD_MAX_BYTES: usize = 16 * 1024;
const BODY_MAX_BYTES: usize = 16 * 1024 * 1024;
/// Connections to one guest at the same time; more wait.
pub(super) const CONNECTIONS: usize = 64;

/// The life of a guest: its control channel and, with a listener, HTTP, until the machine ends. Its
/// waits are what a machine costs while nothing happens, so what is rare in them is on the heap.
pub(super) async fn live(
    stream: DuplexStream,
    cold: bool,
    listener: Option<TcpListener>,
    body: Arc<Body>,
) -> io::Result<()> {
    let serving = async {
        if let Some(listener) = listener
            && let Err(e) = serve(&listener, &body).await
        {
            warn!(machine = &*body.name, error = %e, "a fake guest serves no more");
        }
    };
    tokio::join!(speak(Lines::new(stream, LINE_MAX_BYTES), cold, &body), serving).0
}

/// Speaks as the guest until the host closes the channel or the machine ends.
async fn speak(mut host: Lines<DuplexStream>, cold: bool, body: &Body) -> io::Result<()> {
    if cold {
        let booted = FromGuest::Booted { envd_version: ENVD_VERSION.to_owned() };
        if let Some(said) = tried(body, Step::GuestBoot, 0, booted).await {
            host.peer().write_all(&guest::encode(&said)).await?;
        }
    }
    while let Some(line) = host.next().await? {
        Box::pin(obey(&line, host.peer(), body)).await?;
    }
    // The host may close its end and come back by a new machine only; the guest lives on.
    Ok(())
}

/// Does what one line says.
async fn obey(line: &[u8], host: &mut DuplexStream, body: &Body) -> io::Result<()> {
    body.running().await;
    let message = guest::decode(line).map_err(io::Error::other)?;
    let mut log = None;
    let said = match message {
        ToGuest::Init(init) => {
            let Init { nonce, logs, sandbox_id, template_id, access_token, .. } = init;
            log = logs.then(|| greeting(&sandbox_id));
            body.become_guest(Identity { sandbox_id, template_id, access_token });
            let ready = FromGuest::Ready { nonce, envd_version: ENVD_VERSION.to_owned() };
            tried(body, Step::GuestInit, nonce, ready).await
        }
        ToGuest::PrepareSnapshot { nonce } => {
            body.remember();
            tried(body, Step::GuestPrepare, nonce, FromGuest::Prepared { nonce }).await
        }
        ToGuest::Continue { nonce, .. } => {
            tried(body, Step::GuestContinue, nonce, FromGuest::Continued { nonce }).await
        }
        ToGuest::Shutdown => {
            body.end(ExitCause::GuestStopped);
            None
        }
    };
    if let Some(said) = said {
        host.write_all(&guest::encode(&said)).await?;
        if let (FromGuest::Ready { .. }, Some(log)) = (said, log) {
            host.write_all(&guest::encode(&log)).await?;
        }
    }
    Ok(())
}

/// All that the processes of a fake guest ever write.
fn greeting(sandbox_id: &str) -> FromGuest {
    let line = LogLine {
        at_unix_ms: 0,
        level: LogLevel::Info,
        event: LogEvent::Stdout,
        pid: 1,
        command: "fake".to_owned(),
        text: format!("the fake guest is {sandbox_id}"),
        cut: false,
    };
    FromGuest::Log { lines: vec![line] }
}

/// What the guest says at `step`: `message`, a failure, or nothing.
async fn tried(body: &Body, step: Step, nonce: u64, message: FromGuest) -> Option<FromGuest> {
    match body.faults.reach(step).await {
        None => Some(message),
        Some(Fault::Fail) => Some(FromGuest::Failed { nonce, message: "injected".to_owned() }),
        Some(Fault::Hang) => None,
        Some(Fault::Crash) => {
            body.crash();
            None
        }
    }
}

/// Answers HTTP until the machine ends.
async fn serve(listener: &TcpListener, body: &Arc<Body>) -> io::Result<()> {
    loop {
        let place = Place::take(body).await?;
        // Polled by hand: a listener has room for one who waits, which costs nothing more.
        let (stream, _) = poll_fn(|context| listener.poll_accept(context)).await?;
        body.scope.spawn("fake guest connection", OnError::Log, async move {
            // A broken request is the test's own doing and ends its connection only.
            drop(converse(stream, &place.body).await);
            Ok::<(), Infallible>(())
        });
    }
}

/// A place for one connection, given back when it is dropped.
struct Place {
    body: Arc<Body>,
}

impl Place {
    async fn take(body: &Arc<Body>) -> io::Result<Place> {
        body.places.acquire().await.map_err(io::Error::other)?.forget();
        Ok(Place { body: Arc::clone(body) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.body.places.add_permits(1);
    }
}

async fn converse(mut stream: TcpStream, body: &Body) -> io::Result<()> {
    let mut pending = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut pending).await? {
        body.running().await;
        match body.faults.reach(Step::GuestHttp).await {
            None => {}
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Fail) => {
                respond(&mut stream, "500 Internal Server Error", "injected").await?;
                continue;
            }
            Some(Fault::Crash) => {
                body.crash();
                return Ok(());
            }
        }
        answer(&mut stream, body, &request).await?;
    }
    Ok(())
}

async fn answer(stream: &mut TcpStream, body: &Body, request: &Request) -> io::Result<()> {
    if request.method == "GET" && request.path == "/health" {
        return respond(stream, "204 No Content", "").await;
    }
    let identity = body.identity();
    if identity.access_token.is_some() && identity.access_token != request.access_token {
        let refusal = json!({ "code": 401, "message": "unauthorized" }).to_string();
        return respond(stream, "401 Unauthorized", &refusal).await;
    }
    let text = json!({
        "sandboxID": identity.sandbox_id,
        "templateID": identity.template_id,
        "method": request.method,
        "path": request.path,
    });
    respond(stream, "200 OK", &text.to_string()).await
}

async fn respond(stream: &mut TcpStream, status: &str, body: &str) -> io::Result<()> {
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len())
    };
    stream.write_all(format!("HTTP/1.1 {status}\r\n{length}\r\n{body}").as_bytes()).await
}

struct Request {
    method: String,
    path: String,
    access_token: Option<String>,
}

/// Reads one request and its body; `None` at the end of the connection.
async fn read_request(
    stream: &mut TcpStream,
    pending: &mut Vec<u8>,
) -> io::Result<Option<Request>> {
    let head_end = loop {
        if let Some(at) = pending.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break at + 4;
        }
        if pending.len() > HEAD_MAX_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if stream.read_buf(pending).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&pending[..head_end]).into_owned();
    pending.drain(..head_end);
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let header = |wanted: &str| {
        head.lines().skip(1).find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim().to_owned())
        })
    };
    let length = match header("content-length") {
        None if header("transfer-encoding").is_some() => {
            return Err(io::ErrorKind::Unsupported.into());
        }
        None => 0,
        Some(text) => text.parse::<usize>().map_err(io::Error::other)?,
    };
    if length > BODY_MAX_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    while pending.len() < length {
        if stream.read_buf(pending).await? == 0 {
            return Ok(None);
        }
    }
    pending.drain(..length);
    Ok(Some(Request { method, path, access_token: header("x-access-token") }))
}
