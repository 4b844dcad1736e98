//! A real `belljar up` process, driven over its sockets.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part of this file")]

use std::io::{self, BufRead as _, BufReader};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A server process and what it said when it was ready.
pub struct Server {
    child: Child,
    /// The readiness line.
    pub ready: Value,
}

impl Server {
    /// Starts a server on free ports and waits until it is ready.
    pub fn start(data: &Path, runtime: &str) -> Server {
        Server::run(up(data).args(["--runtime", runtime]))
    }

    /// Starts a server whose node serves on `socket` in another process.
    pub fn start_control(data: &Path, socket: &Path) -> Server {
        Server::run(up(data).arg("--node").arg(socket))
    }

    /// Starts a node alone.
    pub fn start_node(data: &Path, runtime: &str) -> Server {
        Server::run(node(data).args(["--runtime", runtime]))
    }

    /// Runs a command made by [`up`] or [`node`] and waits for its readiness line.
    pub fn run(command: &mut Command) -> Server {
        Server::try_run(command).expect("the server becomes ready")
    }

    /// The same for a server that may end before it is ready; `None` when it did.
    pub fn try_run(command: &mut Command) -> Option<Server> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the program starts");
        let stdout = child.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("a readiness line");
        if line.is_empty() {
            let _status = child.wait().expect("the server can be waited for");
            return None;
        }
        let ready = serde_json::from_str(&line).expect("the readiness line is JSON");
        Some(Server { child, ready })
    }

    /// A text field of the readiness line.
    pub fn text(&self, field: &str) -> &str {
        self.ready[field].as_str().expect("a text field")
    }

    /// One REST call with the server's own key.
    pub fn api(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let key = self.text("api_key");
        let headers = format!("X-API-Key: {key}\r\nContent-Type: application/json\r\n");
        let body = body.map_or_else(String::new, |b| b.to_string());
        let (status, text) = exchange(self.text("api_url"), method, path, &headers, &body);
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// The same to a server that may end meanwhile: `None` when there is no answer.
    pub fn try_api(&self, method: &str, path: &str, body: Option<Value>) -> Option<(u16, Value)> {
        let key = self.text("api_key");
        let headers = format!("X-API-Key: {key}\r\nContent-Type: application/json\r\n");
        let body = body.map_or_else(String::new, |b| b.to_string());
        let answer = try_exchange(self.text("api_url"), method, path, &headers, &body);
        let (status, text) = answer.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// One REST call with another key.
    pub fn api_as(&self, key: &str, method: &str, path: &str) -> (u16, Value) {
        let headers = format!("X-API-Key: {key}\r\n");
        let (status, text) = exchange(self.text("api_url"), method, path, &headers, "");
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// One GET through the proxy.
    pub fn traffic(&self, id: &str, port: u16, path: &str, more: &str) -> (u16, String) {
        let headers = format!("E2b-Sandbox-Id: {id}\r\nE2b-Sandbox-Port: {port}\r\n{more}");
        exchange(self.text("sandbox_url"), "GET", path, &headers, "")
    }

    /// Creates a sandbox.
    pub fn create(&self, body: Value) -> Value {
        let (status, sandbox) = self.api("POST", "/v2/sandboxes", Some(body));
        assert_eq!(status, 201, "{sandbox}");
        sandbox
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("the server is alive");
    }

    /// Stops it as an operator does; it must end clean.
    pub fn stop(mut self) {
        self.signal(rustix::process::Signal::TERM);
        let status = self.child.wait().expect("the server can be waited for");
        assert!(status.success(), "the server ended with {status}");
    }

    /// Waits until it has died of SIGKILL by itself.
    pub fn dies(mut self, why: &str) {
        let mut status = None;
        wait_until(&format!("death at {why}"), || {
            status = self.child.try_wait().expect("the server can be waited for");
            status.is_some()
        });
        let signal = status.and_then(|status| status.signal());
        assert_eq!(signal, Some(rustix::process::Signal::KILL.as_raw()), "{why}: {status:?}");
    }

    /// Kills it as the kernel would.
    pub fn crash(mut self) {
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

/// `belljar up` on free ports; the caller says where its sandboxes run.
pub fn up(data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belljar"));
    command.args(["up", "--api-port", "0", "--proxy-port", "0", "--json", "--data-dir"]).arg(data);
    command
}

/// `belljar node` on its usual socket.
pub fn node(data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belljar"));
    command.args(["node", "--json", "--data-dir"]).arg(data);
    command
}

/// One HTTP/1.1 exchange on a connection of its own, with a server that answers.
fn exchange(base: &str, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
    try_exchange(base, method, path, headers, body).expect("the server answers")
}

/// The same with a server that may end meanwhile.
fn try_exchange(
    base: &str,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> io::Result<(u16, String)> {
    let host = base.strip_prefix("http://").expect("a plain URL");
    let stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    converse(stream, host, method, path, headers, body)
}

/// One call of a node's RPC, in its JSON form.
pub fn node_call(socket: &Path, procedure: &str) -> Value {
    let stream = UnixStream::connect(socket).expect("the node listens");
    let path = format!("/belljar.node.v1.NodeService/{procedure}");
    let headers = "Content-Type: application/json\r\n";
    let (status, text) =
        converse(stream, "node", "POST", &path, headers, "{}").expect("the node answers");
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).expect("JSON")
}

fn converse(
    mut stream: impl io::Read + io::Write,
    host: &str,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> io::Result<(u16, String)> {
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\
         Content-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or(io::ErrorKind::UnexpectedEof)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    let chunked = answer.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(&body) } else { body }))
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

/// Waits for `done`, at most 20 s.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen in 20 s");
        std::thread::yield_now();
    }
}

/// Runs `belljar template build base` for a data folder.
pub fn build_base(data: &Path, runtime: &str, kernel: &Path, rootfs: &Path) {
    let built = Command::new(env!("CARGO_BIN_EXE_belljar"))
        .args(["template", "build", "base", "--runtime", runtime, "--json", "--data-dir"])
        .arg(data)
        .arg("--kernel")
        .arg(kernel)
        .arg("--rootfs")
        .arg(rootfs)
        .output()
        .expect("the program runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// Builds `base` for the fake driver, which reads neither kernel nor disk.
pub fn fake_template(data: &Path) {
    let (kernel, rootfs) = (data.join("kernel"), data.join("rootfs"));
    std::fs::write(&kernel, b"the fake driver reads no kernel").expect("a file");
    let disk = std::fs::File::create(&rootfs).expect("a file");
    disk.set_len(64 << 20).expect("a sparse file");
    build_base(data, "fake", &kernel, &rootfs);
}

/// Files of sandboxes of the server with this data folder and tag: in its folders there, and in
/// its run folder, which root has elsewhere.
pub fn left_in(data: &Path, tag: &str) -> Vec<String> {
    let run = Path::new("/run/belljar").join(tag);
    ["ledger", "overlays", "run"]
        .iter()
        .map(|dir| data.join(dir))
        .chain([run])
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flatten()
        .map(|file| file.expect("a readable folder").path().display().to_string())
        .collect()
}
