//! The whole server on the fake driver: no root, no network, seconds.
//!
//! The real `belljar` program is started on free ports with its own data folder and driven over
//! its sockets, so composition, start order and stop order are what users get.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A server process and what it said when it was ready.
struct Server {
    child: Child,
    ready: Value,
}

impl Server {
    fn start(data: &Path) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_belljar"))
            .args(["up", "--runtime", "fake", "--api-port", "0", "--proxy-port", "0", "--json"])
            .arg("--data-dir")
            .arg(data)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the program starts");
        let stdout = child.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("a readiness line");
        let ready = serde_json::from_str(&line).expect("the readiness line is JSON");
        Server { child, ready }
    }

    fn text(&self, field: &str) -> &str {
        self.ready[field].as_str().expect("a text field")
    }

    fn api(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let key = self.text("api_key");
        let headers = format!("X-API-Key: {key}\r\nContent-Type: application/json\r\n");
        let body = body.map_or_else(String::new, |b| b.to_string());
        let (status, text) = exchange(self.text("api_url"), method, path, &headers, &body);
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    fn traffic(&self, id: &str, port: u16, path: &str, more: &str) -> (u16, String) {
        let headers = format!("E2b-Sandbox-Id: {id}\r\nE2b-Sandbox-Port: {port}\r\n{more}");
        exchange(self.text("sandbox_url"), "GET", path, &headers, "")
    }

    fn create(&self, body: Value) -> Value {
        let (status, sandbox) = self.api("POST", "/v2/sandboxes", Some(body));
        assert_eq!(status, 201, "{sandbox}");
        sandbox
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("the server is alive");
    }

    /// Stops it as an operator does; it must end clean.
    fn stop(mut self) {
        self.signal(rustix::process::Signal::TERM);
        let status = self.child.wait().expect("the server can be waited for");
        assert!(status.success(), "the server ended with {status}");
    }

    fn crash(mut self) {
        self.signal(rustix::process::Signal::KILL);
        let _status = self.child.wait().expect("the server can be waited for");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A failed test must not leave its server; a stopped one is already gone.
        let _gone = self.child.kill().is_err();
        let _reaped = self.child.wait().is_ok();
    }
}

/// One HTTP/1.1 exchange on a connection of its own.
fn exchange(base: &str, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
    let host = base.strip_prefix("http://").expect("a plain URL");
    let mut stream = TcpStream::connect(host).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket option");
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\
         Content-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("the request is taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer in UTF-8");
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    let chunked = answer.to_ascii_lowercase().contains("transfer-encoding: chunked");
    (status, if chunked { unchunk(&body) } else { body })
}

fn unchunk(body: &str) -> String {
    let mut rest = body;
    let mut whole = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size");
        if size == 0 {
            break;
        }
        whole.push_str(&after[..size]);
        rest = after[size..].trim_start_matches("\r\n");
    }
    whole
}

fn data_dir() -> tempfile::TempDir {
    let data = tempfile::tempdir().expect("a temporary folder");
    let (kernel, rootfs) = (data.path().join("kernel"), data.path().join("rootfs"));
    std::fs::write(&kernel, b"the fake driver reads no kernel").expect("a file");
    let disk = std::fs::File::create(&rootfs).expect("a file");
    disk.set_len(64 << 20).expect("a sparse file");
    let built = Command::new(env!("CARGO_BIN_EXE_belljar"))
        .args(["template", "build", "base", "--runtime", "fake", "--json", "--data-dir"])
        .arg(data.path())
        .arg("--kernel")
        .arg(&kernel)
        .arg("--rootfs")
        .arg(&rootfs)
        .output()
        .expect("the program runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    data
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen in 20 s");
        std::thread::yield_now();
    }
}

#[test]
fn a_sandbox_lives_from_create_to_kill() {
    let data = data_dir();
    let server = Server::start(data.path());
    let sandbox = server.create(json!({ "templateID": "base", "metadata": { "who": "rig" } }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    let token = sandbox["envdAccessToken"].as_str().expect("a token");

    let (status, _) = server.traffic(&id, 49983, "/health", "");
    assert_eq!(status, 204);
    let (status, _) = server.traffic(&id, 49983, "/metrics", "");
    assert_eq!(status, 401, "the guest asks for its token");
    let (status, body) =
        server.traffic(&id, 49983, "/metrics", &format!("X-Access-Token: {token}\r\n"));
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(&id), "another sandbox answered: {body}");

    let (status, listed) = server.api("GET", "/v2/sandboxes", None);
    assert_eq!((status, listed.as_array().map(Vec::len)), (200, Some(1)));
    let (status, _) = server.api("DELETE", &format!("/sandboxes/{id}"), None);
    assert_eq!(status, 204);
    let (status, _) = server.api("GET", &format!("/sandboxes/{id}"), None);
    assert_eq!(status, 404);
    let (status, body) = server.traffic(&id, 49983, "/health", "");
    assert_eq!(status, 502);
    let expected = json!({ "sandboxId": id, "message": "The sandbox was not found", "code": 502 });
    assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), expected);
    server.stop();
}

#[test]
fn a_sandbox_ends_when_its_time_is_up() {
    let data = data_dir();
    let server = Server::start(data.path());
    let sandbox = server.create(json!({ "templateID": "base", "timeout": 1 }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    wait_until("expiry", || server.api("GET", &format!("/sandboxes/{id}"), None).0 == 404);
    wait_until("the route's end", || server.traffic(&id, 49983, "/health", "").0 == 502);
    server.stop();
}

#[test]
fn a_closed_port_is_named() {
    let data = data_dir();
    let server = Server::start(data.path());
    let sandbox = server.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id");
    let (status, body) = server.traffic(id, 4, "/", "");
    assert_eq!(status, 502);
    let expected = json!({
        "sandboxId": id,
        "message": "The sandbox is running but port is not open",
        "port": 4,
        "code": 502,
    });
    assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), expected);
    server.stop();
}

#[test]
fn a_killed_server_accounts_for_every_sandbox() {
    let data = data_dir();
    let server = Server::start(data.path());
    let ids: Vec<String> = (0..10)
        .map(|_| server.create(json!({ "templateID": "base" })))
        .map(|s| s["sandboxID"].as_str().expect("an id").to_owned())
        .collect();
    server.crash();

    let server = Server::start(data.path());
    assert_eq!(server.ready["reclaimed_sandboxes"], json!(10));
    let (_, listed) = server.api("GET", "/v2/sandboxes", None);
    assert_eq!(listed, json!([]));
    for id in &ids {
        assert_eq!(server.api("GET", &format!("/sandboxes/{id}"), None).0, 404);
    }
    assert_eq!(left_in(data.path()), Vec::<String>::new());
    server.stop();
}

#[test]
fn one_data_folder_has_one_server() {
    let data = data_dir();
    let server = Server::start(data.path());
    let second = Command::new(env!("CARGO_BIN_EXE_belljar"))
        .args(["up", "--runtime", "fake", "--api-port", "0", "--proxy-port", "0", "--data-dir"])
        .arg(data.path())
        .output()
        .expect("the program runs");
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("in use by process"), "{said}");
    server.stop();
}

#[test]
fn stopping_ends_sandboxes_and_leaves_nothing() {
    let data = data_dir();
    let server = Server::start(data.path());
    let _sandbox = server.create(json!({ "templateID": "base" }));
    server.stop();
    assert_eq!(left_in(data.path()), Vec::<String>::new());
    assert!(!data.path().join("server.json").exists());
}

/// Files of sandboxes in a data folder.
fn left_in(data: &Path) -> Vec<String> {
    ["ledger", "overlays", "run"]
        .iter()
        .filter_map(|dir| std::fs::read_dir(data.join(dir)).ok())
        .flatten()
        .map(|file| file.expect("a readable folder").path().display().to_string())
        .collect()
}
