//! What a hostile client, or a hostile body, meets: a bounded, clear refusal, and a daemon that
//! goes on answering.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use belljar_envd::Settings;
use bytes::Bytes;
use http::Method;
use http_body_util::Full;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::client::{Answer, Daemon, SOON, SmallDisk, settings};

const OCTETS: &str = "application/octet-stream";
const FORM: &str = "multipart/form-data; boundary=XX";

async fn healthy(daemon: Daemon) {
    assert_eq!(daemon.get("/health").await.status.as_u16(), 204);
    daemon.stop().await;
}

#[tokio::test]
async fn paths_cannot_climb_out_of_the_root_or_the_text() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("a")).expect("made");
    std::os::unix::fs::symlink("/", dir.path().join("a/root")).expect("linked");
    std::fs::write(dir.path().join("f"), "here").expect("written");
    let base = dir.path().display();
    for path in [
        format!("{base}/a/../f"),
        format!("{base}/a/%2e%2e/f"),
        format!("{base}/a/..%2ff"),
        format!("{base}//a/./.././f"),
        format!("/../../../..{base}/f"),
        // By text: behind a link, `..` is where the link stands.
        format!("{base}/a/root/../../f"),
        format!("{base}/a/root{base}/f"),
    ] {
        assert_eq!(daemon.get(&format!("/files?path={path}")).await.text(), "here", "{path}");
    }
    for path in ["%00", "a%00b", "/%00/../etc/passwd", "~root/x"] {
        let answer = daemon.get(&format!("/files?path={path}")).await;
        assert_eq!(answer.status.as_u16(), 400, "{path}: {:?}", answer.body);
    }
    healthy(daemon).await;
}

/// A gzip body of many members, a gibibyte of zeros in a megabyte.
fn bomb() -> Bytes {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![0; 1 << 20]).expect("encodes");
    let member = encoder.finish().expect("encodes");
    member.repeat(1024).into()
}

async fn post_gzip(daemon: &Daemon, url: &str, kind: &str, body: Bytes) -> Answer {
    let request = daemon.request(Method::POST, url);
    let request = request.header("content-type", kind).header("content-encoding", "gzip");
    daemon.fetch(request.body(Full::new(body)).expect("valid")).await
}

/// Most memory this process ever had, KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

#[tokio::test]
async fn a_decompression_bomb_meets_the_end_of_the_disk_and_little_memory() {
    let Some(disk) = SmallDisk::mount(8 << 20) else { return };
    let daemon = Daemon::start().await;
    let target = format!("/files?path={}", disk.path().join("f").display());
    let before = peak_kib();
    let plain = post_gzip(&daemon, &target, OCTETS, bomb()).await;
    // The same as one file of a form, whose parser must not take it all in.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let head = "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";
    encoder.write_all(head.as_bytes()).expect("encodes");
    let mut body = encoder.finish().expect("encodes");
    body.extend_from_slice(&bomb());
    let form = post_gzip(&daemon, &target, FORM, body.into()).await;
    for answer in [plain, form] {
        assert_eq!(answer.status.as_u16(), 507, "{:?}", answer.body);
        assert_eq!(answer.json()["code"], 507);
    }
    let more = peak_kib() - before;
    assert!(more < 400 << 10, "it took {more} KiB");
    assert_eq!(
        std::fs::read_dir(disk.path()).expect("there").count(),
        0,
        "half a file is not kept"
    );
    healthy(daemon).await;
}

#[tokio::test]
async fn a_compressed_message_is_no_larger_than_a_plain_one_may_be() {
    let daemon = Daemon::start().await;
    let stat = "filesystem.Filesystem/Stat";
    let large = json!({ "path": "a".repeat(16 << 20) }).to_string();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(large.as_bytes()).expect("encodes");
    let small = encoder.finish().expect("encodes");
    let url = format!("/{stat}");
    let kind = "application/json";
    for answer in
        [post_gzip(&daemon, &url, kind, small.into()).await, daemon.post(&url, kind, large).await]
    {
        assert_eq!(answer.json()["code"], "resource_exhausted", "{:?}", answer.body);
    }
    healthy(daemon).await;
}

#[tokio::test]
async fn a_form_cannot_fill_the_memory_with_heads_or_parts() {
    let daemon = Daemon::start().await;
    let refused = |answer: &Answer, text: &str| {
        assert_eq!(answer.status.as_u16(), 400, "{:?}", answer.body);
        let message = answer.json()["message"].as_str().expect("text").to_owned();
        assert!(message.contains(text), "{message}");
    };
    let endless = "x".repeat(20 << 20);
    let head = format!("--XX\r\nContent-Disposition: form-data; name=\"{endless}");
    refused(&daemon.post("/files", FORM, head).await, "65536 bytes");
    refused(&daemon.post("/files", FORM, endless.clone()).await, "65536 bytes");
    let long = format!("--XX\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\n{endless}");
    let body = format!("{long}\r\n--XX--\r\n");
    let skipped = daemon.post("/files", FORM, body).await;
    assert_eq!((skipped.status.as_u16(), skipped.json()), (200, json!([])));
    let part = "--XX\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nx\r\n";
    let parts = format!("{}--XX--\r\n", part.repeat(100_000));
    refused(&daemon.post("/files", FORM, parts).await, "more than 10000 parts");
    let many: String = (0..100).map(|n| format!("X-H{n}: v\r\n")).collect();
    let crowded = format!("--XX\r\n{many}\r\nx\r\n--XX--\r\n");
    assert_eq!(daemon.post("/files", FORM, crowded).await.status.as_u16(), 400);
    healthy(daemon).await;
}

async fn raw(daemon: &Daemon, head: &str) -> TcpStream {
    let address = daemon.url.strip_prefix("http://").expect("http");
    let mut socket = TcpStream::connect(address).await.expect("connects");
    socket.write_all(head.as_bytes()).await.expect("sends");
    socket
}

/// Reads an answer with an error body, or what there is before the connection ends.
async fn answer_of(socket: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = async {
        // A connection that is reset after the answer still gave it. One that stays open waits
        // for the rest of a request that never comes.
        while !text.ends_with(b"\"}") && matches!(socket.read_buf(&mut text).await, Ok(1..)) {}
    };
    tokio::time::timeout(SOON, read).await.expect("in time");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn an_upload_that_stalls_is_cut_and_leaves_nothing() {
    let upload_stall_limit = Duration::from_millis(200);
    let daemon = Daemon::with(Settings { upload_stall_limit, ..settings() }).await;
    let dir = tempfile::tempdir().expect("a directory");
    let old = dir.path().join("old");
    std::fs::write(&old, "old content").expect("written");
    let head = |path: &Path, kind: &str| {
        format!(
            "POST /files?path={} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: {kind}\r\nContent-Length: 1000\r\n\r\n",
            path.display()
        )
    };
    let new = dir.path().join("new");
    let part = "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\nhalf";
    for request in [
        head(&new, OCTETS) + "half",
        head(&new, FORM) + part,
        head(&new, FORM) + "--XX\r\nContent-Disp",
        head(&old, OCTETS) + "half",
    ] {
        let mut socket = raw(&daemon, &request).await;
        let answer = answer_of(&mut socket).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains(r#"{"code":408,"message":"the upload stalled"}"#), "{answer}");
    }
    assert!(!new.exists());
    assert_eq!(std::fs::read(&old).expect("there"), b"old content", "never half of the new");
    healthy(daemon).await;
}

#[tokio::test]
async fn a_client_that_leaves_half_way_leaves_no_half_file() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("half");
    let head = format!(
        "POST /files?path={} HTTP/1.1\r\nHost: x\r\nContent-Type: {OCTETS}\r\n\
         Content-Length: 1000000\r\n\r\n{}",
        path.display(),
        // More than is held back.
        "some".repeat(100_000)
    );
    let socket = raw(&daemon, &head).await;
    let there = async {
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        drop(socket);
        while path.exists() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, there).await.expect("it came and went in time");
    healthy(daemon).await;
}

#[tokio::test]
async fn ten_thousand_watchers_are_refused_beyond_a_bound() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = json!({ "path": dir.path().to_string_lossy() });
    let create = "filesystem.Filesystem/CreateWatcher";
    // All of them down one connection, as fast as it takes them.
    let body = path.to_string();
    let request = format!(
        "POST /{create} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (mut answers, mut requests) = tokio::io::split(raw(&daemon, "").await);
    let all = request.repeat(10_000);
    let send = async { requests.write_all(all.as_bytes()).await.expect("all are taken") };
    let receive = async {
        let (mut text, mut piece) = (String::new(), [0; 65536]);
        let refusal = "\"code\":\"resource_exhausted\"";
        while text.matches(refusal).count() + text.matches("watcherId").count() < 10_000 {
            let read = answers.read(&mut piece).await.expect("answers");
            assert!(read > 0, "the connection stays open");
            text.push_str(std::str::from_utf8(&piece[..read]).expect("text"));
        }
        text
    };
    let ((), text) = tokio::time::timeout(SOON * 12, async { tokio::join!(send, receive) })
        .await
        .expect("all are answered in time");
    assert!(text.contains("end one first"));
    let opened: Vec<_> = text
        .split("{\"watcherId\":\"")
        .skip(1)
        .map(|rest| json!({ "watcherId": rest.split('"').next().expect("a first part") }))
        .collect();
    assert!((1..=100).contains(&opened.len()), "{}", opened.len());
    for id in &opened {
        let removed = daemon.call("filesystem.Filesystem/RemoveWatcher", id.clone()).await;
        assert_eq!(removed.json(), json!({}));
    }
    let again = async {
        while daemon.call(create, path.clone()).await.json().get("watcherId").is_none() {}
    };
    tokio::time::timeout(SOON, again).await.expect("there is room again");
    healthy(daemon).await;
}

#[tokio::test]
async fn floods_of_headers_are_refused() {
    let daemon = Daemon::start().await;
    let many: String = (0..10_000).map(|n| format!("X-H{n}: v\r\n")).collect();
    let long = format!("X-Long: {}\r\n", "v".repeat(4 << 20));
    let metadata = format!("X-Metadata-K: {}\r\n", "v".repeat(5000));
    for (flood, status) in [(many, "431"), (long, "431"), (metadata, "400")] {
        let head = format!(
            "POST /files?path=/dev/null HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: {OCTETS}\r\nContent-Length: 0\r\n{flood}\r\n"
        );
        let address = daemon.url.strip_prefix("http://").expect("http");
        let mut socket = TcpStream::connect(address).await.expect("connects");
        // It may be refused before all of it is sent.
        let _ = socket.write_all(head.as_bytes()).await;
        let answer = answer_of(&mut socket).await;
        assert!(
            answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    healthy(daemon).await;
}
