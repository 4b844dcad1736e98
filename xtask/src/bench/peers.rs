//! What is timed: the guest daemon in host mode, nginx, and a bare relay of a pipe into a socket.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::http::Connection;
use crate::command;

/// Longest wait for a server to accept.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// From SIGTERM to the end.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A server that was started here; it is stopped when dropped.
pub(super) struct Peer {
    child: Child,
    pub(super) port: u16,
}

impl Peer {
    /// The guest daemon, serving the user who runs this.
    pub(super) fn envd(program: &Path) -> Result<Peer> {
        let port = free_port()?;
        let mut command = command::tied(program);
        command.args(["--host-mode", "--listen", &format!("127.0.0.1:{port}")]);
        Peer::start(command, port)
    }

    /// nginx with one process, as Debian sets it up, that also takes PUT.
    pub(super) fn nginx(folder: &Path) -> Result<Peer> {
        let port = free_port()?;
        let shown = folder.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {shown}/nginx-temporary;\n"))
            .concat();
        let settings = format!(
            "worker_processes 1; daemon off; master_process off;\n\
             pid {shown}/nginx.pid; error_log {shown}/nginx.log;\n\
             events {{ worker_connections 64; }}\n\
             http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n\
             client_max_body_size 0; {temporary}\
             server {{ listen 127.0.0.1:{port}; root {shown};\n\
             location / {{ dav_methods PUT; }} }} }}\n"
        );
        let path = folder.join("nginx.conf");
        std::fs::write(&path, settings)?;
        let mut command = command::tied("/usr/sbin/nginx");
        command.arg("-p").arg(folder).arg("-c").arg(&path).args(["-e", "stderr"]);
        Peer::start(command, port)
    }

    fn start(mut command: Command, port: u16) -> Result<Peer> {
        let text = command::describe(&command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("cannot start `{text}`"))?;
        let mut peer = Peer { child, port };
        let deadline = Instant::now() + READY_LIMIT;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if let Some(status) = peer.child.try_wait()? {
                bail!("`{text}` ended with {status}");
            }
            if Instant::now() > deadline {
                bail!("`{text}` does not listen on port {port}");
            }
            std::thread::yield_now();
        }
        Ok(peer)
    }

    /// A new connection to it.
    pub(super) fn connect(&self) -> Result<Connection> {
        Connection::open(self.port)
    }

    /// Its resident memory now, bytes.
    pub(super) fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmRSS")?;
        Ok(kib.trim().parse::<u64>()? * 1024)
    }

    /// Processor time it has used so far, user and system, seconds.
    pub(super) fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name in parentheses may hold spaces; the fields are counted behind it.
        let (_, fields) = stat.rsplit_once(") ").context("an unexpected /proc/PID/stat")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u32>().ok());
        let (user, system) = ticks(11).zip(ticks(12)).context("an unexpected /proc/PID/stat")?;
        // The kernel shows times in hundredths of a second on every architecture of ours.
        Ok(f64::from(user + system) / 100.0)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself, which is what is wanted.
        let _ = rustix::process::kill_process(
            command::pid_of(&self.child),
            rustix::process::Signal::TERM,
        );
        let deadline = Instant::now() + STOP_LIMIT;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
            }
            std::thread::yield_now();
        }
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Runs a program and relays its output through a loopback connection with plain reads and writes:
/// the least any daemon must do. Gives back the bytes that came out.
pub(super) fn relay(program: &str, args: &[&str]) -> Result<u64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || -> Result<u64> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            let mut buffer = vec![0; 512 * 1024];
            let mut total = 0;
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(total),
                    read => total += read as u64,
                }
            }
        });
        let (mut stream, _) = listener.accept()?;
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let mut output = child.stdout.take().context("the child has no standard output")?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = output.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            stream.write_all(&buffer[..read])?;
        }
        child.wait()?;
        drop(stream);
        reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    })
}
