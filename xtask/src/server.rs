//! A `belljar up` of our own: started on free ports, awaited, and stopped without a trace.

use std::fs::File;
use std::io::{BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use serde::Deserialize;

use crate::command;
use crate::leftovers::Traces;
use crate::places::Places;
use crate::setup::{Goal, belljar_program};

/// From start to the readiness line. A template may have to be read from a slow disk.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// From SIGTERM to the end: every sandbox is killed and every slot given back in that time.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// What clients expect by default; others are taken if these are in use.
const API_PORT: u16 = 3000;
const PROXY_PORT: u16 = 3002;
/// The fake runtime's sandboxes cost little; the suites keep a few hundred at a time.
const FAKE_SANDBOXES_MAX: u32 = 1000;
/// Building a template for the fake runtime writes a few files.
const FAKE_TEMPLATE_LIMIT: Duration = Duration::from_secs(60);
/// The fake runtime boots neither kernel nor disk; it only copies them, holes as holes. Its guest
/// says that 256 MiB of the disk are in use.
const FAKE_KERNEL_BYTES: u64 = 4096;
const FAKE_DISK_BYTES: u64 = 1024 * 1024 * 1024;
/// Below the data folder: a certificate that the server on the fake runtime trusts, with its key.
const TLS_FOLDER: &str = "trusted-tls";
/// Log lines shown when the server does not come up.
const TAIL_LINES: usize = 20;

/// What the server says of itself in its readiness line.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Ready {
    pub(crate) api_url: String,
    pub(crate) sandbox_url: String,
    pub(crate) api_key: String,
    /// The isolation tier sandboxes run on.
    pub(crate) tier: String,
    /// Why that one.
    #[serde(default)]
    pub(crate) tier_reason: String,
    /// Part of the name of everything this server makes on the host; empty if it does not say.
    #[serde(default)]
    host_tag: String,
}

/// One line of `belljar up --json`.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Ready(Ready),
    #[serde(other)]
    Other,
}

/// A running server. Dropped without [`Server::stop`], it is killed.
pub(crate) struct Server {
    pub(crate) ready: Ready,
    /// From exec to the readiness line.
    pub(crate) ready_after: Duration,
    process: Process,
    before: Traces,
    data: PathBuf,
}

/// How a server ended.
pub(crate) struct Stopped {
    pub(crate) took: Duration,
    /// Everything that is wrong about the end, in words. Empty: it ended well and left nothing.
    pub(crate) faults: Vec<String>,
}

impl Server {
    /// Starts `belljar up` on the data folder and waits until it says that it is ready.
    ///
    /// The calling thread must live as long as the server: the kernel ends the server with it.
    pub(crate) fn start(places: &Places, goal: &Goal) -> Result<Server> {
        let command = command::as_root(belljar_program(places, goal.build));
        Server::start_with(command, goal.data.clone(), &places.logs().join("server.log"))
    }

    /// The same on the fake runtime: its sandboxes are names without a machine, and a thousand of
    /// them cost nothing. Its data folder is made anew, with a template `base` of nothing.
    ///
    /// The calling thread must live as long as the server: the kernel ends the server with it.
    pub(crate) fn start_fake(places: &Places, goal: &Goal) -> Result<Server> {
        let data = places.cache.join("test-data-fake");
        if data.exists() {
            std::fs::remove_dir_all(&data)
                .with_context(|| format!("cannot remove {}", data.display()))?;
        }
        std::fs::create_dir_all(&data)
            .with_context(|| format!("cannot create {}", data.display()))?;
        let program = belljar_program(places, goal.build);
        fake_template(&program, &data)?;
        let mut command = command::tied(&program);
        command.env("BELLJAR_RUNTIME", "fake");
        command.env("BELLJAR_SANDBOXES_MAX", FAKE_SANDBOXES_MAX.to_string());
        // The suite that receives webhooks does so on this machine, and the server trusts it there.
        command.env("BELLJAR_WEBHOOK_ALLOW_PRIVATE", "true");
        let tls = data.join(TLS_FOLDER);
        command.env("SSL_CERT_FILE", make_certificate(&tls)?);
        Server::start_with(command, data, &places.logs().join("server-fake.log"))
    }

    /// Starts `belljar up` by a command that names the program, and its options by environment.
    pub(crate) fn start_with(
        mut command: Command,
        data: PathBuf,
        log_path: &Path,
    ) -> Result<Server> {
        let (api_port, proxy_port) = (free_port(API_PORT)?, free_port(PROXY_PORT)?);
        let before = Traces::find(&data, "");
        let log = File::create(log_path)
            .with_context(|| format!("cannot write {}", log_path.display()))?;
        command.args(["up", "--json", "--data-dir"]).arg(&data);
        command.args(["--api-port", &api_port.to_string()]);
        command.args(["--proxy-port", &proxy_port.to_string()]);
        let started = Instant::now();
        let (process, stdout) = Process::start(command, &log)?;
        match wait_until_ready(stdout, log) {
            Ok(ready) => {
                Ok(Server { ready, ready_after: started.elapsed(), process, before, data })
            }
            Err(error) => {
                drop(process);
                let tail = command::tail(log_path, TAIL_LINES).join("\n    ");
                Err(error.context(format!(
                    "the server did not come up; end of {}:\n    {tail}\n  `belljar doctor` says \
                     what is missing; cause",
                    log_path.display()
                )))
            }
        }
    }

    /// Memory of the server's process that is in RAM, in MiB.
    pub(crate) fn resident_mib(&self) -> Result<f64> {
        let pid = self.process.pid.as_raw_nonzero();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .context("cannot read what the server weighs")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u32>().ok());
        Ok(f64::from(kib.context("the kernel does not say what the server weighs")?) / 1024.0)
    }

    /// Processor time the server has used, in ms.
    pub(crate) fn processor_ms(&self) -> Result<f64> {
        let pid = self.process.pid.as_raw_nonzero();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .context("cannot read what the server has used")?;
        // After the name, which may hold spaces: state is the first, user time the twelfth field.
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ');
        let ticks: u32 =
            fields.skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
        let a_second = rustix::param::clock_ticks_per_second();
        Ok(f64::from(ticks) * 1000.0 / f64::from(u32::try_from(a_second)?))
    }

    /// Adds what an SDK needs to a command's environment, and where the operator's token is. Only
    /// who runs the server can read that file.
    pub(crate) fn describe_to(&self, command: &mut Command) {
        command
            .env("E2B_API_KEY", &self.ready.api_key)
            .env("E2B_API_URL", &self.ready.api_url)
            .env("E2B_SANDBOX_URL", &self.ready.sandbox_url)
            .env("BELLJAR_ADMIN_TOKEN_FILE", self.data.join("admin-token"));
        let tls = self.data.join(TLS_FOLDER);
        if tls.exists() {
            command.env("BELLJAR_TRUSTED_TLS", tls);
        }
    }

    /// Ends the server as a service manager would, and looks at what it left.
    pub(crate) fn stop(mut self) -> Stopped {
        let started = Instant::now();
        let mut faults = Vec::new();
        match self.process.end(STOP_LIMIT) {
            Ended::ByItself(status) if status.success() => {}
            Ended::ByItself(status) => faults.push(format!("the server ended with {status}")),
            Ended::Killed => {
                faults.push(format!("the server ignored SIGTERM for {} s", STOP_LIMIT.as_secs()));
            }
        }
        let left = Traces::find(&self.data, &self.ready.host_tag).since(&self.before);
        faults.extend(left.into_iter().map(|trace| format!("left over: {trace}")));
        Stopped { took: started.elapsed(), faults }
    }
}

/// Makes a certificate for servers on this machine, for a day, and its key; answers its path.
fn make_certificate(folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let (certificate, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
    let mut openssl = command::tied("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]);
    openssl.args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]);
    openssl.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    command::output(openssl)?;
    Ok(certificate)
}

/// Makes a template `base` for the fake runtime, from an empty kernel and an empty disk.
pub(crate) fn fake_template(program: &Path, data: &Path) -> Result<()> {
    let (kernel, rootfs) = (data.join("no-kernel"), data.join("no-rootfs"));
    for (file, bytes) in [(&kernel, FAKE_KERNEL_BYTES), (&rootfs, FAKE_DISK_BYTES)] {
        File::create(file)
            .and_then(|created| created.set_len(bytes))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut build = command::tied(program);
    build.args(["template", "build", "base", "--runtime", "fake"]);
    build.arg("--kernel").arg(&kernel).arg("--rootfs").arg(&rootfs).arg("--data-dir").arg(data);
    let status = command::run_streamed(build, FAKE_TEMPLATE_LIMIT, |line| println!("  {line}"))?;
    if !status.success() {
        bail!("cannot build the fake runtime's template: {status}");
    }
    Ok(())
}

/// Reads standard output up to the readiness line; what follows goes on to the log.
fn wait_until_ready(stdout: std::process::ChildStdout, mut log: File) -> Result<Ready> {
    let (sender, ready) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("server output".to_owned()).spawn(move || {
        // An error is the pipe or the log being gone: nobody is left to be told.
        let _ = command::each_line(BufReader::new(stdout), |line| {
            if let Ok(Event::Ready(found)) = serde_json::from_str(line) {
                // A second one would be a server's fault and may be lost.
                let _ = sender.try_send(found);
                // It holds the key, which stays out of logs.
                return Ok(writeln!(log, "(readiness line)")?);
            }
            Ok(writeln!(log, "{line}")?)
        });
    })?;
    match ready.recv_timeout(READY_LIMIT) {
        Ok(ready) => Ok(ready),
        Err(RecvTimeoutError::Disconnected) => bail!("it ended before it was ready"),
        Err(RecvTimeoutError::Timeout) => {
            bail!("no readiness line within {} s", READY_LIMIT.as_secs())
        }
    }
}

/// The wanted port, or a free one, saying so.
fn free_port(wanted: u16) -> Result<u16> {
    if TcpListener::bind((Ipv4Addr::UNSPECIFIED, wanted)).is_ok() {
        return Ok(wanted);
    }
    let port = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|listener| listener.local_addr())
        .context("found no free port")?
        .port();
    println!("port {wanted} is in use: takes {port}");
    Ok(port)
}

/// A child in a process group of its own, waited for by a thread.
struct Process {
    pid: Pid,
    ended: Receiver<ExitStatus>,
    is_over: bool,
}

enum Ended {
    ByItself(ExitStatus),
    Killed,
}

impl Process {
    fn start(mut command: Command, log: &File) -> Result<(Process, std::process::ChildStdout)> {
        let text = command::describe(&command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.try_clone()?);
        command.process_group(0);
        let mut child = command.spawn().with_context(|| format!("cannot start `{text}`"))?;
        let stdout = child.stdout.take().context("the server has no standard output")?;
        let pid = command::pid_of(&child);
        let (sender, ended) = mpsc::sync_channel(1);
        std::thread::Builder::new().name("server end".to_owned()).spawn(move || {
            if let Ok(status) = child.wait() {
                // The receiver is gone when the server was dropped: it is not interested.
                let _ = sender.send(status);
            }
        })?;
        Ok((Process { pid, ended, is_over: false }, stdout))
    }

    /// SIGTERM to the server alone; SIGKILL to its whole group if that does not help in time.
    fn end(&mut self, limit: Duration) -> Ended {
        signal_process(self.pid, Signal::TERM);
        if let Ok(status) = self.ended.recv_timeout(limit) {
            self.is_over = true;
            return Ended::ByItself(status);
        }
        self.kill();
        Ended::Killed
    }

    fn kill(&mut self) {
        signal_group(self.pid, Signal::KILL);
        // A killed process ends; the bound only keeps a kernel fault from hanging us.
        let _ = self.ended.recv_timeout(STOP_LIMIT);
        self.is_over = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.is_over {
            self.kill();
        }
    }
}

fn signal_process(pid: Pid, signal: Signal) {
    if rustix::process::kill_process(pid, signal).is_err() && !command::is_root() {
        signal_by_sudo(&pid.as_raw_nonzero().to_string(), signal);
    }
}

fn signal_group(pid: Pid, signal: Signal) {
    if rustix::process::kill_process_group(pid, signal).is_err() && !command::is_root() {
        signal_by_sudo(&format!("-{}", pid.as_raw_nonzero()), signal);
    }
}

/// The server belongs to root and we do not. A failure shows as a server that does not end.
fn signal_by_sudo(target: &str, signal: Signal) {
    let number = format!("-{}", signal.as_raw());
    let _ = Command::new("sudo").args(["-n", "kill", &number, "--", target]).status();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (Process, std::process::ChildStdout) {
        let mut command = command::tied("sh");
        command.args(["-c", script]);
        Process::start(command, &File::create("/dev/null").unwrap()).unwrap()
    }

    #[test]
    fn the_readiness_line_is_found_among_others() {
        let line = r#"{"event":"ready","api_url":"http://a","sandbox_url":"http://s","api_key":"e2b_1","tier":"emulated","tier_reason":"x","templates":[]}"#;
        let script = format!(
            "echo starting; echo '{{\"event\":\"listening\"}}'; echo '{line}'; exec sleep 600"
        );
        let (mut process, stdout) = shell(&script);
        let ready = wait_until_ready(stdout, File::create("/dev/null").unwrap()).unwrap();
        assert_eq!((ready.api_url.as_str(), ready.tier.as_str()), ("http://a", "emulated"));
        assert!(matches!(process.end(Duration::from_secs(10)), Ended::ByItself(_)));
    }

    #[test]
    fn a_server_that_ends_early_is_an_error_at_once() {
        let (_process, stdout) = shell("echo no; exit 3");
        let error = wait_until_ready(stdout, File::create("/dev/null").unwrap()).unwrap_err();
        assert!(error.to_string().contains("ended before"), "{error}");
    }

    #[test]
    fn a_server_that_ignores_sigterm_is_killed() {
        let (mut process, mut stdout) =
            shell("trap '' TERM; echo ready; while :; do sleep 1; done");
        // Once this byte is here, the trap is set.
        std::io::Read::read_exact(&mut stdout, &mut [0]).unwrap();
        assert!(matches!(process.end(Duration::from_millis(200)), Ended::Killed));
    }
}
