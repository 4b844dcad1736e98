//! `GET` and `POST /files`.

use belljar_domain::Secret;
use belljar_envd::Settings;
use belljar_envd::auth::{Operation, Signed, signature};
use bytes::Bytes;
use http::Method;
use http_body_util::Full;
use serde_json::json;
use std::io::Write as _;
use std::path::Path;

use super::client::{Answer, Daemon, settings};

const OCTETS: &str = "application/octet-stream";

fn url(path: &Path) -> String {
    format!("/files?path={}", encode(&path.to_string_lossy()))
}

fn encode(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

async fn get_with(daemon: &Daemon, path: &Path, headers: &[(&str, &str)]) -> Answer {
    let mut request = daemon.request(Method::GET, &url(path));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    daemon.fetch(request.body(Full::default()).expect("valid")).await
}

#[tokio::test]
async fn any_bytes_come_back_as_they_went() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let all: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = (0..5_000_000_u32).map(|i| (i.wrapping_mul(31) >> 3) as u8).collect();
    for (name, content) in [
        ("empty", Vec::new()),
        ("all bytes", all.clone()),
        ("below/a/new/dir.bin", all),
        ("large \u{e9}", large),
    ] {
        let path = dir.path().join(name);
        let answer = daemon.post(&url(&path), OCTETS, content.clone()).await;
        assert_eq!(answer.status.as_u16(), 200, "{name}: {:?}", answer.body);
        let file = path.file_name().expect("named").to_string_lossy();
        assert_eq!(
            answer.json(),
            json!([{ "path": path.to_string_lossy(), "name": file, "type": "file" }])
        );
        assert_eq!(std::fs::read(&path).expect("written"), content, "{name}");
        let answer = daemon.get(&url(&path)).await;
        assert_eq!(answer.status.as_u16(), 200);
        assert_eq!(answer.headers["content-length"], content.len().to_string());
        assert_eq!(answer.body, content, "{name}");
    }
    // A shorter file replaces a longer one whole.
    let path = dir.path().join("large \u{e9}");
    daemon.post(&url(&path), OCTETS, "short").await;
    assert_eq!(daemon.get(&url(&path)).await.body, "short");
    daemon.stop().await;
}

#[tokio::test]
async fn parts_and_conditions() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("digits.txt");
    std::fs::write(&path, "0123456789").expect("written");

    let part = get_with(&daemon, &path, &[("range", "bytes=2-4")]).await;
    assert_eq!((part.status.as_u16(), part.text()), (206, "234".to_owned()));
    assert_eq!(part.headers["content-range"], "bytes 2-4/10");
    let part = get_with(&daemon, &path, &[("range", "bytes=-3")]).await;
    assert_eq!(part.text(), "789");
    let outside = get_with(&daemon, &path, &[("range", "bytes=10-")]).await;
    assert_eq!(outside.status.as_u16(), 416);
    assert_eq!(outside.headers["content-range"], "bytes */10");
    assert_eq!(outside.json()["code"], 416);

    let whole = daemon.get(&url(&path)).await;
    assert_eq!(whole.headers["accept-ranges"], "bytes");
    assert_eq!(whole.headers["content-type"], "text/plain; charset=utf-8");
    let time = whole.headers["last-modified"].to_str().expect("text").to_owned();
    let same = get_with(&daemon, &path, &[("if-modified-since", &time)]).await;
    assert_eq!((same.status.as_u16(), same.body.len()), (304, 0));
    let old = "Thu, 01 Jan 1970 00:00:00 GMT";
    let newer = get_with(&daemon, &path, &[("if-modified-since", old)]).await;
    assert_eq!(newer.text(), "0123456789");
    let changed = get_with(&daemon, &path, &[("if-unmodified-since", old)]).await;
    assert_eq!(changed.status.as_u16(), 412);
    let stale = get_with(&daemon, &path, &[("range", "bytes=0-1"), ("if-range", old)]).await;
    assert_eq!((stale.status.as_u16(), stale.text()), (200, "0123456789".to_owned()));
    let fresh = get_with(&daemon, &path, &[("range", "bytes=0-1"), ("if-range", &time)]).await;
    assert_eq!((fresh.status.as_u16(), fresh.text()), (206, "01".to_owned()));
    daemon.stop().await;
}

#[tokio::test]
async fn gzip_both_ways() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let content = "squeeze me ".repeat(50_000);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content.as_bytes()).expect("encodes");
    let encoded = encoder.finish().expect("encodes");

    let path = dir.path().join("squeezed");
    let post = |body: Vec<u8>| {
        let request = daemon.request(Method::POST, &url(&path));
        let request = request.header("content-type", OCTETS).header("content-encoding", "gzip");
        daemon.fetch(request.body(Full::new(Bytes::from(body))).expect("valid"))
    };
    let answer = post(encoded.clone()).await;
    assert_eq!(answer.status.as_u16(), 200, "{:?}", answer.body);
    assert_eq!(std::fs::read_to_string(&path).expect("written"), content);
    // Half of it is damage; what was there stays, or is empty when it was too long to be held back.
    let cut = encoded[..encoded.len() / 2].to_vec();
    assert_eq!(post(cut).await.status.as_u16(), 400);
    assert_eq!(std::fs::read(&path).expect("there"), b"");
    std::fs::write(&path, "old").expect("written");
    assert_eq!(post(b"plainly no gzip".to_vec()).await.status.as_u16(), 400);
    let short = encoded[..30].to_vec();
    assert_eq!(post(short).await.status.as_u16(), 400);
    assert_eq!(std::fs::read(&path).expect("there"), b"old");
    daemon.post(&url(&path), OCTETS, content.clone()).await;

    let answer = get_with(&daemon, &path, &[("accept-encoding", "gzip")]).await;
    assert_eq!(answer.headers["content-encoding"], "gzip");
    assert!(answer.body.len() < content.len() / 10);
    let mut decoder = flate2::write::GzDecoder::new(Vec::new());
    decoder.write_all(&answer.body).expect("gzip");
    assert_eq!(decoder.finish().expect("whole"), content.as_bytes());
    let answer = get_with(&daemon, &path, &[("accept-encoding", "br, identity;q=0")]).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (406, &json!(406)));
    daemon.stop().await;
}

fn form(files: &[(&str, &str)]) -> (String, String) {
    let mut body = String::new();
    for (name, content) in files {
        body.push_str(&format!(
            "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n{content}\r\n"
        ));
    }
    body.push_str("--XX--\r\n");
    ("multipart/form-data; boundary=XX".to_owned(), body)
}

#[tokio::test]
async fn a_form_writes_each_of_its_files() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let (kind, body) = form(&[(&at("a"), "first"), (&at("b/c"), ""), (&at("d"), "third")]);
    let answer = daemon.post("/files", &kind, body).await;
    assert_eq!(answer.status.as_u16(), 200, "{:?}", answer.body);
    assert_eq!(
        answer.json(),
        json!([
            { "path": at("a"), "name": "a", "type": "file" },
            { "path": at("b/c"), "name": "c", "type": "file" },
            { "path": at("d"), "name": "d", "type": "file" },
        ])
    );
    assert_eq!(std::fs::read_to_string(at("a")).expect("written"), "first");
    assert_eq!(std::fs::read_to_string(at("b/c")).expect("written"), "");

    // The query's path wins over the file's name.
    let (kind, body) = form(&[("ignored", "x")]);
    let path = dir.path().join("named");
    let answer = daemon.post(&url(&path), &kind, body).await;
    assert_eq!(answer.json()[0]["path"], json!(path.to_string_lossy()));

    let (kind, body) = form(&[(&at("twice"), "1"), (&at("twice"), "2")]);
    let answer = daemon.post("/files", &kind, body).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (400, &json!(400)));
    let (kind, body) = form(&[(&at("cut"), "never ends")]);
    let cut = body[..body.len() - 12].to_owned();
    let answer = daemon.post("/files", &kind, cut).await;
    assert_eq!(answer.status.as_u16(), 400);
    assert!(!Path::new(&at("cut")).exists(), "half a new file is not kept");
    daemon.stop().await;
}

#[tokio::test]
async fn metadata_travels_with_the_file() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("tagged");
    std::fs::write(&path, "").expect("written");
    if xattr::set(&path, "user.e2b.probe", b"1").is_err() {
        belljar_testkit::skip("the temporary directory has no extended attributes");
        return daemon.stop().await;
    }
    let post = |headers: &'static [(&'static str, &'static str)]| {
        let mut request = daemon.request(Method::POST, &url(&path)).header("content-type", OCTETS);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        daemon.fetch(request.body(Full::from("content")).expect("valid"))
    };
    let answer = post(&[("X-Metadata-Author", "me"), ("X-Metadata-Stage", "draft 1")]).await;
    assert_eq!(answer.json()[0]["metadata"], json!({ "author": "me", "stage": "draft 1" }));
    let answer = daemon.get(&url(&path)).await;
    assert_eq!(answer.headers["x-metadata-author"], "me");
    assert!(!answer.headers.contains_key("x-metadata-probe"), "an upload replaces it all");
    let stat = json!({ "path": path.to_string_lossy() });
    let entry = daemon.call("filesystem.Filesystem/Stat", stat).await.json();
    assert_eq!(entry["entry"]["metadata"], json!({ "author": "me", "stage": "draft 1" }));
    let answer = post(&[("X-Metadata-Bad", "tab\there")]).await;
    assert_eq!(answer.status.as_u16(), 400);
    daemon.stop().await;
}

#[tokio::test]
async fn refusals_have_a_code_and_a_message() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let missing = dir.path().join("missing");
    for (answer, status) in [
        (daemon.get(&url(&missing)).await, 404),
        (daemon.get(&url(dir.path())).await, 400),
        (daemon.get("/files?path=~other/x").await, 400),
        (daemon.get("/files?path=/dev/null").await, 400),
        (daemon.get("/files?path=/&username=nobody-here").await, 401),
        (daemon.post(&url(dir.path()), OCTETS, "x").await, 400),
        (daemon.post("/files", OCTETS, "x").await, 400),
        (daemon.post(&url(&missing), "text/plain", "x").await, 400),
        (daemon.post("/files", "multipart/form-data", "x").await, 400),
        (daemon.get("/nothing").await, 404),
    ] {
        assert_eq!(answer.status.as_u16(), status, "{:?}", answer.body);
        let body = answer.json();
        assert_eq!(body["code"], json!(status));
        assert!(body["message"].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(answer.headers["content-type"], "application/json");
    }
    let answer = daemon.get(&url(&missing)).await;
    let message = format!("path '{}' does not exist", missing.display());
    assert_eq!(answer.json(), json!({ "code": 404, "message": message }));
    let answer = daemon.get("/files?path=/&username=nobody-here").await;
    assert_eq!(answer.json(), json!({ "code": 401, "message": "invalid username: 'nobody-here'" }));
    daemon.stop().await;
}

#[tokio::test]
async fn names_of_form_files_are_what_the_client_meant() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    // What httpx and browsers make of a backslash, a quote and a line feed.
    let names = [at(r"back\\slash"), at("say %22hi%22"), at("two%0Alines"), at("\u{e9} \u{1F980}")];
    let files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "x")).collect();
    let (kind, body) = form(&files);
    let answer = daemon.post("/files", &kind, body).await;
    assert_eq!(answer.status.as_u16(), 200, "{:?}", answer.body);
    for name in [r"back\slash", "say \"hi\"", "two\nlines", "\u{e9} \u{1F980}"] {
        assert!(dir.path().join(name).exists(), "{name:?}");
    }
    let (kind, body) = form(&[("../../../climbs", "x")]);
    let url = format!("/files?path={}", encode(&at("a/../b")));
    assert_eq!(daemon.post(&url, &kind, body).await.json()[0]["path"], json!(at("b")));
    // Any order of a form's fields; others are passed over; no file at all is no error.
    let field = "--XX\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nhello\r\n";
    let (kind, body) = form(&[(&at("c"), "after")]);
    let answer = daemon.post("/files", &kind, format!("{field}{body}")).await;
    assert_eq!(answer.json().as_array().map(Vec::len), Some(1));
    let unnamed = "--XX\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx\r\n--XX--\r\n";
    let answer = daemon.post("/files", &kind, unnamed).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (400, &json!(400)));
    let (kind, body) = form(&[(&dir.path().to_string_lossy(), "x")]);
    assert_eq!(daemon.post("/files", &kind, body).await.status.as_u16(), 400);
    daemon.stop().await;
}

#[tokio::test]
async fn heads_and_refusals_are_whole_too() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("f");
    std::fs::write(&path, "0123456789").expect("written");
    let request = daemon.request(Method::HEAD, &url(&path));
    let head = daemon.fetch(request.body(Full::default()).expect("valid")).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert_eq!(head.headers["content-length"], "10");
    // Several ranges, and such as make no sense, are left aside, as the standard permits.
    for range in ["bytes=0-1,3-4", "bytes=4-2", "items=0-1", "bytes=x"] {
        let answer = get_with(&daemon, &path, &[("range", range)]).await;
        assert_eq!((answer.status.as_u16(), answer.text()), (200, "0123456789".into()), "{range}");
    }
    let last = get_with(&daemon, &path, &[("range", "bytes=9-")]).await;
    assert_eq!((last.status.as_u16(), last.text()), (206, "9".into()));
    std::fs::write(&path, "").expect("written");
    let empty = get_with(&daemon, &path, &[("range", "bytes=0-")]).await;
    assert_eq!(empty.status.as_u16(), 416);
    // Browsers see refusals of other origins only when these say so.
    for answer in [
        empty,
        daemon.get("/files?path=/nowhere/at/all").await,
        daemon.post("/files", "text/plain", "x").await,
        daemon.call("filesystem.Filesystem/Stat", json!({ "path": "/nowhere" })).await,
        daemon.get("/no-such-route").await,
    ] {
        assert!(answer.status.as_u16() >= 400);
        assert_eq!(answer.headers["access-control-allow-origin"], "*");
        assert_eq!(answer.headers["content-type"], "application/json");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn metadata_has_limits() {
    let daemon = Daemon::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("f");
    let post = async |name: &str, value: &str| {
        let request = daemon.request(Method::POST, &url(&path)).header("content-type", OCTETS);
        let request = request.header(format!("X-Metadata-{name}"), value);
        daemon.fetch(request.body(Full::from("x")).expect("valid")).await.status.as_u16()
    };
    assert_eq!(post(&"k".repeat(247), "v").await, 400);
    assert_eq!(post("k", &"v".repeat(4096)).await, 400);
    assert_eq!(post("k", "\u{e9}").await, 400);
    assert_eq!(post("", "v").await, 400);
    assert!(!path.exists(), "what is refused writes nothing");
    if post("k", "v").await != 200 {
        belljar_testkit::skip("the temporary directory has no extended attributes");
        return daemon.stop().await;
    }
    assert_eq!(post(&"k".repeat(246), "v").await, 200);
    assert_eq!(post("k", "100%25 %41").await, 200);
    let answer = daemon.get(&url(&path)).await;
    assert_eq!(answer.headers["x-metadata-k"], "100%25 %41", "values are taken as they are");
    daemon.stop().await;
}

#[tokio::test]
async fn a_full_disk_is_507() {
    let daemon = Daemon::start().await;
    // A file every system has that never takes a byte.
    let answer = daemon.post("/files?path=/dev/full", OCTETS, "x".repeat(100)).await;
    if answer.status.as_u16() == 403 {
        belljar_testkit::skip("writing /dev/full needs a user who may own devices");
    } else {
        assert_eq!(answer.status.as_u16(), 507, "{:?}", answer.body);
        assert_eq!(answer.json()["code"], 507);
    }
    daemon.stop().await;
}

#[tokio::test]
async fn a_pipe_is_refused_and_not_waited_for() {
    let daemon = Daemon::start().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pipe = folder.path().join("pipe");
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).expect("a pipe");
    let path = format!("/files?path={}", pipe.display());
    let written = daemon.post(&path, OCTETS, "x").await;
    assert_eq!(written.status.as_u16(), 400, "{:?}", written.body);
    assert_eq!(daemon.get(&path).await.status.as_u16(), 400);
    daemon.stop().await;
}

#[tokio::test]
async fn files_of_unknown_size_are_read_to_their_end() {
    let daemon = Daemon::start().await;
    let answer = daemon.get("/files?path=/proc/self/status").await;
    assert!(answer.text().contains("Name:"));
    daemon.stop().await;
}

#[tokio::test]
async fn a_secured_sandbox_wants_a_token_or_a_signature() {
    let token = Some(Secret::new("top".to_owned()));
    let daemon = Daemon::with(Settings { access_token: token, ..settings() }).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("f");
    std::fs::write(&file, "secret").expect("written");
    let shown = file.to_string_lossy().into_owned();
    let refused = |answer: Answer, message: &str| {
        assert_eq!(answer.status.as_u16(), 401);
        assert_eq!(answer.json(), json!({ "code": 401, "message": message }));
    };
    let sign = |operation, expiration| {
        let signed = Signed { path: &shown, username: "", signature: None, expiration };
        let value = encode(&signature(&signed, operation, "top"));
        let expires = expiration.map(|at| format!("&signature_expiration={at}"));
        format!("{}&signature={value}{}", url(&file), expires.unwrap_or_default())
    };

    refused(daemon.get(&url(&file)).await, "missing signature query parameter");
    let garbled = format!("{}&signature=v1_x", url(&file));
    refused(daemon.get(&garbled).await, "invalid signature");
    refused(daemon.get(&sign(Operation::Write, None)).await, "invalid signature");
    let expired = sign(Operation::Read, Some(1_600_000_000));
    refused(daemon.get(&expired).await, "signature is already expired");
    assert_eq!(daemon.get(&sign(Operation::Read, None)).await.text(), "secret");
    let valid = sign(Operation::Read, Some(4_000_000_000));
    assert_eq!(daemon.get(&valid).await.text(), "secret");
    let upload = daemon.post(&sign(Operation::Write, None), OCTETS, "new").await;
    assert_eq!(upload.status.as_u16(), 200);
    let answer = get_with(&daemon, &file, &[("x-access-token", "top")]).await;
    assert_eq!(answer.text(), "new");
    refused(
        get_with(&daemon, &file, &[("x-access-token", "to")]).await,
        "access token present in header but does not match",
    );

    refused(
        daemon.call("process.Process/List", json!({})).await,
        "unauthorized access, please provide a valid access token or method signing if supported",
    );
    assert_eq!(daemon.get("/health").await.status.as_u16(), 204);
    assert_eq!(daemon.get("/envs").await.status.as_u16(), 401);
    daemon.stop().await;
}
