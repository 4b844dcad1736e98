//! A daemon on a free port and a raw client for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use belljar_envd::accounts::Accounts;
use belljar_envd::{Settings, State, serve};
use bytes::{Buf as _, Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything that must happen.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A running daemon; it ends with [`Daemon::stop`].
pub(crate) struct Daemon {
    pub(crate) url: String,
    stop: CancellationToken,
    serving: JoinSet<std::io::Result<()>>,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// One answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("not JSON: {e}: {:?}", self.body))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).expect("text")
    }
}

/// An account without rights, for tests that may act as one. `None`, said loudly, where they may
/// not.
pub(crate) fn unprivileged() -> Option<belljar_envd::accounts::User> {
    if !belljar_testkit::is_root() {
        belljar_testkit::skip("acting as another user needs root");
        return None;
    }
    let user = Accounts::load().user("nobody");
    if user.is_none() {
        belljar_testkit::skip("the machine has no account 'nobody'");
    }
    user
}

/// A file system in memory, of that many bytes, gone with the value. `None`, said loudly, where
/// none can be mounted.
pub(crate) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    pub(crate) fn mount(size_bytes: u64) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().expect("a directory");
        let options = std::ffi::CString::new(format!("size={size_bytes},mode=755")).expect("text");
        let flags = rustix::mount::MountFlags::empty();
        match rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, Some(options.as_c_str())) {
            Ok(()) => Some(SmallDisk(dir)),
            Err(error) => {
                belljar_testkit::skip(&format!("cannot mount a small file system: {error}"));
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        if let Err(error) = rustix::mount::unmount(self.0.path(), flags) {
            eprintln!("failed to unmount {}: {error}", self.0.path().display());
        }
    }
}

pub(crate) fn own_user() -> String {
    let uid = rustix::process::geteuid().as_raw();
    Accounts::load().user_by_id(uid).expect("the tests run as someone").name
}

pub(crate) fn settings() -> Settings {
    Settings::on_host(own_user())
}

impl Daemon {
    pub(crate) async fn start() -> Daemon {
        Daemon::with(settings()).await
    }

    pub(crate) async fn with(settings: Settings) -> Daemon {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let stop = CancellationToken::new();
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, Arc::new(State::new(settings)), stop.clone()));
        let client = Client::builder(TokioExecutor::new()).build_http();
        Daemon { url, stop, serving, client }
    }

    /// Stops it and checks that it ends well and in time.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(SOON, self.serving.join_next()).await;
        ended.expect("ends in time").expect("was running").expect("no panic").expect("no error");
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(format!("{}{path}", self.url))
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let sent = tokio::time::timeout(SOON, self.client.request(request)).await;
        sent.expect("answers in time").expect("answers")
    }

    pub(crate) async fn fetch(&self, request: Request<Full<Bytes>>) -> Answer {
        let (head, body) = self.send(request).await.into_parts();
        let body = tokio::time::timeout(SOON, body.collect()).await.expect("in time");
        let body = body.expect("a whole body").to_bytes();
        Answer { status: head.status, headers: head.headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.fetch(self.request(Method::GET, path).body(Full::default()).expect("valid")).await
    }

    pub(crate) async fn post(&self, path: &str, kind: &str, body: impl Into<Bytes>) -> Answer {
        let request = self.request(Method::POST, path).header("content-type", kind);
        self.fetch(request.body(Full::new(body.into())).expect("valid")).await
    }

    /// A unary RPC as a user of the machine.
    pub(crate) async fn call_as(&self, user: &str, method: &str, body: Value) -> Answer {
        let user = base64(format!("{user}:").as_bytes());
        let request = self
            .request(Method::POST, &format!("/{method}"))
            .header("content-type", "application/json")
            .header("authorization", format!("Basic {user}"));
        self.fetch(request.body(Full::from(body.to_string())).expect("valid")).await
    }

    /// A unary RPC.
    pub(crate) async fn call(&self, method: &str, body: Value) -> Answer {
        let request = self
            .request(Method::POST, &format!("/{method}"))
            .header("content-type", "application/json")
            .header("connect-protocol-version", "1");
        self.fetch(request.body(Full::from(body.to_string())).expect("valid")).await
    }

    /// A server stream with extra headers.
    pub(crate) async fn open_with(
        &self,
        method: &str,
        body: Value,
        headers: &[(&str, &str)],
    ) -> Events {
        let mut request = self
            .request(Method::POST, &format!("/{method}"))
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = Full::new(envelope(&body));
        let response = self.send(request.body(body).expect("valid")).await;
        assert_eq!(response.status(), StatusCode::OK);
        Events { body: response.into_body(), buffer: BytesMut::new(), end: None }
    }

    pub(crate) async fn open(&self, method: &str, body: Value) -> Events {
        self.open_with(method, body, &[]).await
    }

    /// Starts `/bin/sh -c script` without standard input.
    pub(crate) async fn shell(&self, script: &str) -> Events {
        self.open("process.Process/Start", shell(script)).await
    }
}

/// The start request of `/bin/sh -c script` without standard input.
pub(crate) fn shell(script: &str) -> Value {
    serde_json::json!({
        "process": { "cmd": "/bin/sh", "args": ["-c", script] },
        "stdin": false,
    })
}

/// One message of a stream request.
pub(crate) fn envelope(body: &Value) -> Bytes {
    let body = body.to_string();
    let length = u32::try_from(body.len()).expect("short");
    let mut bytes = vec![0];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body.as_bytes());
    bytes.into()
}

/// A server stream being read.
pub(crate) struct Events {
    body: Incoming,
    buffer: BytesMut,
    end: Option<Value>,
}

/// What a process said until it ended.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) pid: u64,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) pty: Vec<u8>,
    pub(crate) end: Value,
}

impl Run {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Events {
    /// The next message, or `None` behind the last.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        tokio::time::timeout(SOON, self.read()).await.expect("an event in time")
    }

    async fn read(&mut self) -> Option<Value> {
        loop {
            if let Some(header) = self.buffer.get(..5) {
                let flags = header[0];
                let length = u32::from_be_bytes(header[1..].try_into().expect("4 bytes"));
                let length = usize::try_from(length).expect("64 bit");
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    let message = self.buffer.split_to(length);
                    let message: Value = serde_json::from_slice(&message).expect("JSON");
                    if flags & 2 != 0 {
                        self.end = Some(message);
                        return None;
                    }
                    return Some(message);
                }
            }
            let frame = self.body.frame().await?.expect("a whole stream");
            self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }

    /// The error of the end frame, once `next` has said `None`.
    pub(crate) fn error(&self) -> &Value {
        &self.end.as_ref().expect("ended with an end frame")["error"]
    }

    /// The process id of the first message, which must be the start event.
    pub(crate) async fn pid(&mut self) -> u64 {
        let first = self.next().await.expect("a first event");
        first["event"]["start"]["pid"].as_u64().unwrap_or_else(|| panic!("no start: {first}"))
    }

    /// Reads a process's stream, from its first message to the end.
    pub(crate) async fn run(mut self) -> Run {
        let pid = self.pid().await;
        self.rest(pid).await
    }

    /// Reads on behind the start event.
    pub(crate) async fn rest(mut self, pid: u64) -> Run {
        let mut run = Run { pid, ..Run::default() };
        while let Some(message) = self.next().await {
            let event = &message["event"];
            run.take(&event["data"]);
            if event.get("end").is_some() {
                run.end = event["end"].clone();
            }
        }
        assert_eq!(*self.error(), Value::Null);
        run
    }

    /// Reads until the output so far contains `text`.
    pub(crate) async fn until(&mut self, text: &str) -> Run {
        let mut run = Run::default();
        loop {
            let message = self.next().await.expect("the text before the end");
            run.take(&message["event"]["data"]);
            let all = [&run.stdout, &run.stderr, &run.pty];
            if all.iter().any(|bytes| String::from_utf8_lossy(bytes).contains(text)) {
                return run;
            }
        }
    }
}

impl Run {
    fn take(&mut self, data: &Value) {
        for (name, bytes) in
            [("stdout", &mut self.stdout), ("stderr", &mut self.stderr), ("pty", &mut self.pty)]
        {
            if let Some(text) = data.get(name) {
                bytes.extend_from_slice(&from_base64(text));
            }
        }
    }
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn from_base64(text: &Value) -> Vec<u8> {
    use base64::Engine as _;
    let text = text.as_str().expect("bytes are text");
    base64::engine::general_purpose::STANDARD.decode(text).expect("base64")
}

/// A test's messages in order, for comparing.
pub(crate) fn kinds(messages: &VecDeque<Value>) -> Vec<String> {
    let kind = |message: &Value| {
        let event = message["event"].as_object().expect("an event");
        event.keys().next().cloned().unwrap_or_default()
    };
    messages.iter().map(kind).collect()
}
