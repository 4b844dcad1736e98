//! The server against `qemu-nbd` on the same raw file with the same clients: `cargo xtask bench nbd`.
//!
//! Each case runs five times on each server, taken in turns, and the figure is the ratio of median
//! speeds, so whatever else the machine does falls on all. Beside the raw file, the case runs on what a
//! sandbox has: an overlay over an image. Ends with an error if the raw file is served at
//! less than 0.9 of `qemu-nbd`'s speed. Needs `qemu-nbd`, `qemu-img` and `nbdcopy`.

#[path = "against_qemu_nbd/client.rs"]
mod client;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_blockstore::{LayerStore, LayeredImage, NbdServer, Overlay, RawImage};
use client::{Access, Client, Order};

const DISK_BYTES: usize = 256 << 20;
const RUNS: usize = 5;
/// Part of `qemu-nbd`'s speed that ours must reach on the same raw file.
const TARGET: f64 = 0.9;

/// A running `qemu-nbd`, killed when dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(disk: &Path, socket: &Path) -> io::Result<QemuNbd> {
        let child = Command::new("qemu-nbd")
            .args(["--format=raw", "--persistent", "--shared=8", "--cache=writeback"])
            .args(["--discard=unmap", "--aio=threads"])
            .arg(format!("--socket={}", socket.display()))
            .arg(disk)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), "start qemu-nbd, of Debian's qemu-utils"))?;
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

/// What is done to a server.
enum Load {
    /// By the client beside this file.
    Own(Access),
    /// By a program that somebody else wrote: arguments before and after the export's address.
    Program {
        program: &'static str,
        before: &'static [&'static str],
        after: &'static [&'static str],
    },
}

const CASES: &[(&str, Load)] = &[
    ("sequential reads, 64 KiB, depth 16", own(Order::Sequential, false, 64 << 10, 16, 6000)),
    ("random reads, 4 KiB, depth 1", own(Order::Random, false, 4 << 10, 1, 4000)),
    ("random reads, 4 KiB, depth 16", own(Order::Random, false, 4 << 10, 16, 16_000)),
    ("sequential writes, 64 KiB, depth 16", own(Order::Sequential, true, 64 << 10, 16, 4000)),
    ("random writes, 4 KiB, depth 1", own(Order::Random, true, 4 << 10, 1, 4000)),
    ("random writes, 4 KiB, depth 16", own(Order::Random, true, 4 << 10, 16, 16_000)),
    (
        "nbdcopy of the whole disk",
        Load::Program { program: "nbdcopy", before: &["--no-extents"], after: &["null:"] },
    ),
    (
        "qemu-img bench, 4 KiB reads, depth 16",
        Load::Program {
            program: "qemu-img",
            before: &["bench", "-f", "raw", "-c", "20000", "-d", "16", "-s", "4k"],
            after: &[],
        },
    ),
    (
        "qemu-img bench, 64 KiB writes, depth 16",
        Load::Program {
            program: "qemu-img",
            before: &["bench", "-f", "raw", "-w", "-c", "4000", "-d", "16", "-s", "64k"],
            after: &[],
        },
    ),
];

const fn own(order: Order, write: bool, len: u32, depth: usize, count: usize) -> Load {
    Load::Own(Access { order, write, len, depth, count })
}

impl Load {
    /// How long it takes on the server at `socket`, in seconds.
    fn seconds(&self, socket: &Path) -> io::Result<f64> {
        match self {
            Load::Own(access) => Client::connect(socket)?.run(access),
            Load::Program { program, before, after } => {
                let mut command = Command::new(program);
                let uri = format!("nbd+unix:///?socket={}", socket.display());
                command.args(*before).arg(uri).args(*after).stdout(Stdio::null());
                let started = Instant::now();
                let status = command.status()?;
                if !status.success() {
                    return Err(io::Error::other(format!("{program} ended with {status}")));
                }
                Ok(started.elapsed().as_secs_f64())
            }
        }
    }

    /// Median times on each of the servers.
    fn medians(&self, sockets: &[&Path; 3]) -> io::Result<[f64; 3]> {
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..RUNS {
            for (socket, times) in sockets.iter().zip(&mut times) {
                times.push(self.seconds(socket)?);
            }
        }
        Ok(times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[RUNS / 2]
        }))
    }
}

/// The three servers; those in this process stop when dropped.
struct Servers {
    raw: NbdServer,
    overlay: NbdServer,
    _theirs: QemuNbd,
    theirs: PathBuf,
}

impl Servers {
    fn start(folder: &Path) -> io::Result<Servers> {
        let disk = folder.join("disk");
        let content: Vec<u8> = (0..DISK_BYTES).map(|i| (i % 251).to_le_bytes()[0]).collect();
        std::fs::write(&disk, &content)?;
        // The overlay's image is a file of its own: the others write theirs.
        let base = folder.join("base");
        std::fs::write(&base, &content)?;
        let store = LayerStore::open(folder).map_err(io::Error::other)?;
        let name = store.name_of(&base).map_err(io::Error::other)?;
        let image = Arc::new(LayeredImage::raw(&store, &name).map_err(io::Error::other)?);
        let overlay = Overlay::create(image, &folder.join("overlay")).map_err(io::Error::other)?;
        let raw = Arc::new(RawImage::open(&disk).map_err(io::Error::other)?);
        let bind = |name, device| {
            NbdServer::bind(&folder.join(name), device, None).map_err(io::Error::other)
        };
        let theirs = folder.join("theirs");
        Ok(Servers {
            raw: bind("raw", raw)?,
            overlay: bind("overlay-socket", Arc::new(overlay))?,
            _theirs: QemuNbd::start(&disk, &theirs)?,
            theirs,
        })
    }
}

fn main() -> io::Result<ExitCode> {
    let folder = tempfile::tempdir()?;
    let servers = Servers::start(folder.path())?;
    let sockets = [servers.raw.path(), servers.overlay.path(), &servers.theirs];
    println!(
        "{:40} {:>9} {:>9} {:>9} {:>6} {:>8}",
        "", "raw", "overlay", "qemu-nbd", "ratio", "overlay"
    );
    let mut missed = 0;
    for (name, load) in CASES {
        let [raw, overlay, theirs] = load.medians(&sockets)?;
        let ratio = theirs / raw;
        let verdict = if ratio < TARGET { "  MISSED" } else { "" };
        missed += usize::from(ratio < TARGET);
        println!(
            "{name:40} {raw:8.3}s {overlay:8.3}s {theirs:8.3}s {ratio:6.2} {:8.2}{verdict}",
            theirs / overlay
        );
    }
    servers.raw.close().map_err(io::Error::other)?;
    servers.overlay.close().map_err(io::Error::other)?;
    println!(
        "{} of {} cases reach {TARGET} of qemu-nbd's speed",
        CASES.len() - missed,
        CASES.len()
    );
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
