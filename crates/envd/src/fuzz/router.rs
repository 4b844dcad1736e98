//! Whole requests, through the routes as a service call: envelopes and messages of every protocol
//! and codec, and form bodies. No method here starts, removes or writes anything but a temporary
//! file: the inputs are wild, and the tests may run as root.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;

use super::{outcome, run};
use crate::accounts::Accounts;
use crate::http_api::{self, Services};
use crate::state::{Settings, State};

/// Longest time one request may take.
const LIMIT: Duration = Duration::from_secs(10);

struct Daemon {
    runtime: tokio::runtime::Runtime,
    router: TowerToHyperService<axum::Router>,
}

impl Daemon {
    fn start() -> Daemon {
        let uid = rustix::process::geteuid().as_raw();
        let user = Accounts::load().user_by_id(uid).expect("the tests run as someone").name;
        let state = Arc::new(State::new(Settings::on_host(user)));
        let router = http_api::router(&Services::new(state));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        Daemon { runtime, router: TowerToHyperService::new(router) }
    }

    fn ask(&self, path: &str, kind: &str, body: &[u8]) -> (StatusCode, Vec<u8>) {
        let request = Request::builder().method(Method::POST).uri(path);
        let request = request.header("content-type", kind).header("connect-protocol-version", "1");
        let request = request.header("te", "trailers").body(Body::from(body.to_vec()));
        let Ok(request) = request else { return (StatusCode::IM_A_TEAPOT, Vec::new()) };
        self.runtime.block_on(async {
            let answer = async {
                let answer = self.router.call(request).await.expect("routes always answer");
                let status = answer.status();
                let body = answer.into_body().collect().await.expect("a whole body").to_bytes();
                (status, body.to_vec())
            };
            tokio::time::timeout(LIMIT, answer).await.expect("an answer in time")
        })
    }
}

const METHODS: [&str; 10] = [
    "process.Process/List",
    "process.Process/SendSignal",
    "process.Process/SendInput",
    "process.Process/Update",
    "filesystem.Filesystem/GetWatcherEvents",
    "filesystem.Filesystem/Stat",
    "process.Process/CloseStdin",
    "filesystem.Filesystem/RemoveWatcher",
    "process.Process/StreamInput",
    "process.Process/Connect",
];

const KINDS: [&str; 8] = [
    "application/json",
    "application/connect+json",
    "application/proto",
    "application/connect+proto",
    "application/grpc",
    "application/grpc+proto",
    "application/grpc-web+proto",
    "application/x-unknown",
];

/// The first byte of an input picks the method, the second the protocol and codec.
#[test]
fn rpc_bodies() {
    let daemon = Daemon::start();
    let words = ["{\"process\":", "{\"pid\":1}", "\"tag\":\"\"", "\0\0\0\0\x02{}", "\x02\0\0\0\0"];
    run("rpc", &words, |input| {
        let Some(([method, kind], body)) = input.split_first_chunk() else { return 0 };
        let method = METHODS[usize::from(*method) % METHODS.len()];
        let kind = KINDS[usize::from(*kind) % KINDS.len()];
        let (status, answer) = daemon.ask(&format!("/{method}"), kind, body);
        let text = String::from_utf8_lossy(&answer);
        assert!(!text.contains("panic"), "{text}");
        if method.ends_with("List") && status == StatusCode::OK && kind == KINDS[0] {
            assert_eq!(text, "{}", "no process was started");
        }
        outcome((method, kind, status.as_u16(), text.get(..40).map(str::to_owned)))
    });
}

/// The first line of an input is the boundary.
#[test]
fn form_bodies() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("f");
    let url = format!("/files?path={}", path.display());
    let words =
        ["--XX\r\n", "\r\n--XX--\r\n", "\r\n\r\n", "name=\"file\"", "Content-Disposition: "];
    run("form_body", &words, |input| {
        let line = input.iter().position(|byte| *byte == b'\n').unwrap_or(0);
        let (boundary, body) = input.split_at(line);
        let boundary = String::from_utf8_lossy(boundary);
        let kind = format!("multipart/form-data; boundary={boundary}");
        let (status, answer) = daemon.ask(&url, &kind, body.get(1..).unwrap_or_default());
        let written = std::fs::read(&path).ok();
        if status == StatusCode::OK {
            let listed: Vec<serde_json::Value> = serde_json::from_slice(&answer).expect("a list");
            assert_eq!(listed.len(), usize::from(written.is_some()));
            if let Some(written) = &written {
                let inside = body.windows(written.len().max(1)).any(|part| part == written);
                assert!(inside || written.is_empty(), "what was sent is what is written");
            }
        } else {
            assert!(matches!(status.as_u16(), 400 | 418), "{status}");
            // One path may be written once: a second file of the form is refused after the first.
            let second = String::from_utf8_lossy(&answer).contains("more than one file");
            let other = String::from_utf8_lossy(&answer).contains("failed to read the form");
            assert!(written.is_none() || second || other, "half a file is not kept");
        }
        // It is made anew by each input that holds a file.
        let _ = std::fs::remove_file(&path);
        outcome((status.as_u16(), answer.get(..60).map(<[u8]>::to_vec), written.map(|w| w.len())))
    });
}

/// A start request reads back as itself, in both codecs.
#[test]
fn start_messages() {
    use belljar_wire::rpc::process::StartRequest;
    use buffa::Message as _;
    let words = [
        "\"envs\":{",
        "\"cwd\":null",
        "\"pty\":{\"size\":",
        "\x1a\x04\x0a\x00\x12\x00",
        "\x0a\x02",
    ];
    run("start_message", &words, |input| {
        let message = match input.first() {
            Some(b'{') => serde_json::from_slice::<StartRequest>(input).ok(),
            _ => StartRequest::decode_from_slice(input).ok(),
        };
        let Some(message) = message else { return 0 };
        let json = serde_json::to_vec(&message).expect("encodes");
        let again: StartRequest = serde_json::from_slice(&json).expect("own JSON is read");
        assert_eq!(serde_json::to_vec(&again).expect("encodes"), json);
        let binary = message.encode_to_vec();
        let again = StartRequest::decode_from_slice(&binary).expect("own bytes are read");
        // Unknown fields are kept by one codec only, so the other one is compared.
        assert_eq!(serde_json::to_vec(&again).expect("encodes"), json);
        let shape = (message.pty.is_set(), message.stdin, message.tag.is_some());
        outcome((shape, json.len().ilog2()))
    });
}

/// A control line reads back as itself.
#[test]
fn control_lines() {
    use belljar_wire::guest::{ToGuest, decode, encode};
    let words = ["\"env_vars\":{}", "\"nonce\":", "\"type\":\"init\",", "\"entropy_hex\":\"00\""];
    run("control_line", &words, |input| {
        let Ok(message) = decode::<ToGuest>(input) else { return 0 };
        assert_eq!(decode::<ToGuest>(&encode(&message)).expect("own lines are read"), message);
        outcome(format!("{message:?}").len())
    });
}
