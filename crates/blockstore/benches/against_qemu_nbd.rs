//! How the server compares with `qemu-nbd` on the same raw file: `cargo bench -p belljar-blockstore`.
//!
//! Prints the median of five runs of each, taken in turns, and the ratio of speeds. Needs
//! `qemu-nbd`, `qemu-img` and `nbdcopy`.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_blockstore::{NbdServer, RawImage};

const DISK_BYTES: usize = 256 << 20;
const RUNS: usize = 5;

/// A running `qemu-nbd`, killed when dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(disk: &Path, socket: &Path) -> io::Result<QemuNbd> {
        let child = Command::new("qemu-nbd")
            .args(["--format=raw", "--persistent", "--shared=8", "--cache=writeback"])
            .arg(format!("--socket={}", socket.display()))
            .arg(disk)
            .spawn()?;
        let server = QemuNbd(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        // The only sign of readiness qemu-nbd gives in the foreground is that it accepts.
        while UnixStream::connect(socket).is_err() {
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "qemu-nbd does not listen"));
            }
            std::thread::yield_now();
        }
        Ok(server)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

fn seconds(program: &str, args: &[&str], uri: &str, rest: &[&str]) -> io::Result<f64> {
    let mut command = Command::new(program);
    command.args(args).arg(uri).args(rest).stdout(Stdio::null());
    let started = Instant::now();
    let status = command.status()?;
    if !status.success() {
        return Err(io::Error::other(format!("{program} {args:?} ended with {status}")));
    }
    Ok(started.elapsed().as_secs_f64())
}

fn main() -> io::Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let content: Vec<u8> = (0..DISK_BYTES).map(|i| (i % 251).to_le_bytes()[0]).collect();
    std::fs::write(&disk, content)?;
    let raw = Arc::new(RawImage::open(&disk).map_err(io::Error::other)?);
    let server = NbdServer::bind(&dir.path().join("ours"), raw, None).map_err(io::Error::other)?;
    let theirs_socket = dir.path().join("theirs");
    let theirs = QemuNbd::start(&disk, &theirs_socket)?;
    let uri = |socket: &Path| format!("nbd+unix:///?socket={}", socket.display());
    let (ours_uri, theirs_uri) = (uri(server.path()), uri(&theirs_socket));

    let bench = ["bench", "-f", "raw"];
    for (name, program, args, rest) in [
        ("copy out 256 MiB", "nbdcopy", &["--no-extents"][..], &["null:"][..]),
        ("4 KiB reads, depth 1", "qemu-img", &["-c", "10000", "-d", "1", "-s", "4k"], &[]),
        ("4 KiB reads, depth 16", "qemu-img", &["-c", "20000", "-d", "16", "-s", "4k"], &[]),
        ("64 KiB reads, depth 16", "qemu-img", &["-c", "5000", "-d", "16", "-s", "64k"], &[]),
        ("4 KiB writes, depth 1", "qemu-img", &["-w", "-c", "10000", "-d", "1", "-s", "4k"], &[]),
        (
            "64 KiB writes, depth 16",
            "qemu-img",
            &["-w", "-c", "5000", "-d", "16", "-s", "64k"],
            &[],
        ),
    ] {
        let args: Vec<&str> =
            if program == "qemu-img" { [&bench, args].concat() } else { args.to_vec() };
        let (mut own, mut other) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            own.push(seconds(program, &args, &ours_uri, rest)?);
            other.push(seconds(program, &args, &theirs_uri, rest)?);
        }
        own.sort_by(f64::total_cmp);
        other.sort_by(f64::total_cmp);
        let (own, other) = (own[RUNS / 2], other[RUNS / 2]);
        println!("{name}: ours {own:.3} s, qemu-nbd {other:.3} s, ratio {:.2}", other / own);
    }
    drop(theirs);
    server.close().map_err(io::Error::other)
}
