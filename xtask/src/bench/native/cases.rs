//! What is measured, one function each.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::bench::envelopes::{Codec, Counter};
use crate::bench::http::Connection;
use crate::bench::peers::{self, Peer};
use crate::bench::report::{Figure, Target, median, percentile};

/// Commands of each kind.
const COMMAND_ROUNDS: usize = 100;
const STREAM_BYTES: u64 = 256 << 20;
/// Output that must leave nothing behind in memory.
const MUCH_OUTPUT_BYTES: u64 = 1 << 30;
const STREAM_ROUNDS: usize = 5;
const FILE_BYTES: u64 = 256 << 20;
const FILE_ROUNDS: usize = 5;
const SMALL_FILE_BYTES: u64 = 4096;
/// Requests for the small file in a round.
const SMALL_REQUESTS: u32 = 300;
const LIVE_PROCESSES: usize = 100;
/// Where no login script of whoever runs this can take its time.
const HOME: &str = "/nonexistent";
const UPLOAD_TYPE: (&str, &str) = ("content-type", "application/octet-stream");

/// A weight with its limit, both shown in MiB.
fn mebibytes(what: &'static str, bytes: u64, most: f64) -> Figure {
    let ours = bytes as f64 / f64::from(1 << 20);
    let target = Some(Target::AtMost(most));
    Figure { what, unit: "MiB", ours, peer: None, target, cpu_seconds_per_gb: None }
}

/// Resident memory of a daemon: idle, with many processes, and after much output.
pub(super) fn weights(program: &Path) -> Result<Vec<Figure>> {
    let size = std::fs::metadata(program).context("cannot find the daemon")?.len();
    let mut figures = vec![mebibytes("the daemon on disk", size, 5.0)];
    let envd = Peer::envd(program)?;
    let mut connection = envd.connect()?;
    connection.send("GET", "/health", &[], b"")?;
    connection.answer(|_| {})?;
    figures.push(mebibytes("resident, idle", envd.resident_bytes()?, 8.0));

    let mut connections = Vec::new();
    for _ in 0..LIVE_PROCESSES {
        let mut connection = envd.connect()?;
        start(&mut connection, Codec::Json, "/bin/sleep", &["600"])?;
        connection.head()?;
        connections.push(connection);
    }
    figures.push(mebibytes("resident, 100 processes", envd.resident_bytes()?, 20.0));
    drop(connections);
    drop(envd);

    let envd = Peer::envd(program)?;
    let mut connection = envd.connect()?;
    stream(&mut connection, Codec::Json, 64 << 20)?;
    let before = envd.resident_bytes()?;
    stream(&mut connection, Codec::Proto, MUCH_OUTPUT_BYTES)?;
    let grown = envd.resident_bytes()?.saturating_sub(before);
    figures.push(mebibytes("grown by 1 GiB of output", grown, 1.0));

    let mut stalled = envd.connect()?;
    let before = envd.resident_bytes()?;
    writer(&mut stalled, Codec::Json, MUCH_OUTPUT_BYTES)?;
    stalled.head()?;
    settle(&envd)?;
    let grown = envd.resident_bytes()?.saturating_sub(before);
    figures.push(mebibytes("grown by a reader that stalls", grown, 4.0));
    Ok(figures)
}

/// Waits until the daemon uses no processor time any more.
fn settle(envd: &Peer) -> Result<()> {
    loop {
        let before = envd.cpu_seconds()?;
        // Standing still has no event to wait for: this only lets time pass.
        std::thread::park_timeout(std::time::Duration::from_millis(300));
        if envd.cpu_seconds()? <= before {
            return Ok(());
        }
    }
}

/// Start to exit of one command, against a bare fork and exec of the same.
pub(super) fn commands(envd: &Peer) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let login: &[&str] = &["-l", "-c", "true"];
    for (middle, slow, program, args, target) in [
        ("command `true`, p50", "command `true`, p99", "/bin/true", &[][..], 3.0),
        ("command `bash -l -c true`, p50", "the same, p99", "/bin/bash", login, 3.0),
    ] {
        let mut connection = envd.connect()?;
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..COMMAND_ROUNDS {
            let began = Instant::now();
            run(&mut connection, program, args)?;
            ours.push(began.elapsed().as_secs_f64() * 1000.0);
            let began = Instant::now();
            spawn_bare(program, args)?;
            bare.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        for (what, percent, target) in [(middle, 50, Some(Target::Added(target))), (slow, 99, None)]
        {
            let peer = Some(percentile(&mut bare, percent));
            let ours = percentile(&mut ours, percent);
            figures.push(Figure { what, unit: "ms", ours, peer, target, cpu_seconds_per_gb: None });
        }
    }
    Ok(figures)
}

fn spawn_bare(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(args)
        .env_clear()
        .env("HOME", HOME)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    Ok(())
}

/// Output of a process, against a bare relay of the same pipe.
pub(super) fn streams(envd: &Peer) -> Result<Vec<Figure>> {
    let mut connection = envd.connect()?;
    let kinds = [("output, binary", Codec::Proto, 500.0), ("output, JSON", Codec::Json, 300.0)];
    let mut speeds = [Vec::new(), Vec::new()];
    let mut cpu = [0.0, 0.0];
    let mut bare = Vec::new();
    for _ in 0..STREAM_ROUNDS {
        for (at, (_, codec, _)) in kinds.into_iter().enumerate() {
            let (began, used) = (Instant::now(), envd.cpu_seconds()?);
            stream(&mut connection, codec, STREAM_BYTES)?;
            speeds[at].push(megabytes_a_second(STREAM_BYTES, began));
            cpu[at] += envd.cpu_seconds()? - used;
        }
        let began = Instant::now();
        let (program, args) = writing(STREAM_BYTES);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let relayed = peers::relay(program, &args)?;
        if relayed != STREAM_BYTES {
            bail!("the relay carried {relayed} bytes of {STREAM_BYTES}");
        }
        bare.push(megabytes_a_second(STREAM_BYTES, began));
    }
    let gigabytes = (STREAM_BYTES * STREAM_ROUNDS as u64) as f64 / 1e9;
    let figure = |(at, (what, _, least)): (usize, (&'static str, Codec, f64))| Figure {
        what,
        unit: "MB/s",
        ours: median(&mut speeds[at].clone()),
        peer: Some(median(&mut bare.clone())),
        target: Some(Target::AtLeast(least)),
        cpu_seconds_per_gb: Some((cpu[at] / gigabytes, None)),
    };
    Ok(kinds.into_iter().enumerate().map(figure).collect())
}

/// Downloads of a large and a small file, against nginx.
pub(super) fn downloads(envd: &Peer, nginx: &Peer, folder: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (what, unit, name, bytes, requests, target) in [
        ("download 256 MiB", "MB/s", "large", FILE_BYTES, 1, Some(Target::Share(0.8))),
        ("download 4 KiB", "1/s", "small", SMALL_FILE_BYTES, SMALL_REQUESTS, None),
    ] {
        let path = folder.join(name);
        fill(&path, bytes)?;
        let target_of_ours = format!("/files?path={}", path.display());
        let get = |connection: &mut Connection, target: &str| {
            connection.send("GET", target, &[], b"")?;
            connection.answer(|_| {})
        };
        let ours = (envd, target_of_ours.as_str(), &get as &Transfer<'_>);
        let peers = (nginx, &*format!("/{name}"), &get as &Transfer<'_>);
        figures.push(against(what, unit, bytes, requests, target, ours, peers)?);
    }
    Ok(figures)
}

/// Uploads of a large and a small file, against nginx.
pub(super) fn uploads(envd: &Peer, nginx: &Peer, folder: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (what, unit, bytes, requests, target) in [
        ("upload 256 MiB", "MB/s", FILE_BYTES, 1, Some(Target::Share(0.8))),
        ("upload 4 KiB", "1/s", SMALL_FILE_BYTES, SMALL_REQUESTS, None),
    ] {
        let path = folder.join("uploaded");
        let send = |method: &'static str| {
            move |connection: &mut Connection, target: &str| {
                connection.send_filler(method, target, &[UPLOAD_TYPE], bytes)?;
                connection.answer(|_| {})?;
                Ok(bytes)
            }
        };
        let (post, put) = (send("POST"), send("PUT"));
        let ours = format!("/files?path={}", path.display());
        let ours = (envd, ours.as_str(), &post as &Transfer<'_>);
        let peers = (nginx, "/uploaded-to-nginx", &put as &Transfer<'_>);
        figures.push(against(what, unit, bytes, requests, target, ours, peers)?);
        for name in ["uploaded", "uploaded-to-nginx"] {
            let written = std::fs::metadata(folder.join(name))?.len();
            if written != bytes {
                bail!("{name} has {written} bytes of {bytes}");
            }
            std::fs::remove_file(folder.join(name))?;
        }
    }
    Ok(figures)
}

/// Carries one file over a connection and says how many bytes it was.
type Transfer<'a> = dyn Fn(&mut Connection, &str) -> Result<u64> + 'a;

fn against(
    what: &'static str,
    unit: &'static str,
    bytes: u64,
    requests: u32,
    target: Option<Target>,
    ours: (&Peer, &str, &Transfer<'_>),
    peers: (&Peer, &str, &Transfer<'_>),
) -> Result<Figure> {
    let sides = [ours, peers];
    let mut speeds = [Vec::new(), Vec::new()];
    let mut cpu = [0.0, 0.0];
    let mut connections = [ours.0.connect()?, peers.0.connect()?];
    for round in 0..FILE_ROUNDS {
        // Who goes second writes into a disk the first has filled: they take turns at that too.
        for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let (server, target, transfer) = sides[at];
            let (began, used) = (Instant::now(), server.cpu_seconds()?);
            for _ in 0..requests {
                let carried = transfer(&mut connections[at], target)?;
                if carried != bytes {
                    bail!("{what}: {carried} bytes of {bytes}");
                }
            }
            cpu[at] += server.cpu_seconds()? - used;
            speeds[at].push(match unit {
                "MB/s" => megabytes_a_second(bytes, began),
                _ => f64::from(requests) / began.elapsed().as_secs_f64(),
            });
        }
    }
    let gigabytes = bytes as f64 * f64::from(requests) * FILE_ROUNDS as f64 / 1e9;
    Ok(Figure {
        what,
        unit,
        ours: median(&mut speeds[0]),
        peer: Some(median(&mut speeds[1])),
        target,
        cpu_seconds_per_gb: (unit == "MB/s")
            .then(|| (cpu[0] / gigabytes, Some(cpu[1] / gigabytes))),
    })
}

fn fill(path: &Path, bytes: u64) -> Result<()> {
    let piece: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251).to_le_bytes()[0]).collect();
    let mut file = std::fs::File::create(path)?;
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(piece.len()).min(piece.len());
        std::io::Write::write_all(&mut file, &piece[..length])?;
        left -= length as u64;
    }
    // What is still to be written back would disturb whoever is measured first.
    Ok(file.sync_all()?)
}

fn megabytes_a_second(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / 1e6 / began.elapsed().as_secs_f64()
}

/// A program that writes that many bytes as fast as it can.
fn writing(bytes: u64) -> (&'static str, [String; 4]) {
    let count = format!("count={}", bytes >> 17);
    ("/bin/dd", ["if=/dev/zero".to_owned(), "bs=128K".to_owned(), count, "status=none".to_owned()])
}

fn writer(connection: &mut Connection, codec: Codec, bytes: u64) -> Result<()> {
    let (program, args) = writing(bytes);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    start(connection, codec, program, &args)
}

/// Has a process write that many bytes and counts them as they arrive.
fn stream(connection: &mut Connection, codec: Codec, bytes: u64) -> Result<()> {
    writer(connection, codec, bytes)?;
    let mut counter = Counter::new(codec);
    connection.answer(|piece| counter.take(piece))?;
    if counter.payload_bytes != bytes || counter.end.as_deref() != Some("{}") {
        bail!("{} bytes of {bytes} arrived, end {:?}", counter.payload_bytes, counter.end);
    }
    Ok(())
}

/// Runs a command to its end.
fn run(connection: &mut Connection, program: &str, args: &[&str]) -> Result<()> {
    start(connection, Codec::Json, program, args)?;
    let mut stream = Vec::new();
    connection.answer(|piece| stream.extend_from_slice(piece))?;
    let text = String::from_utf8_lossy(&stream);
    if !text.contains("exit status 0") {
        bail!("{program} did not end well: {text}");
    }
    Ok(())
}

fn start(connection: &mut Connection, codec: Codec, program: &str, args: &[&str]) -> Result<()> {
    let body = match codec {
        Codec::Json => {
            let envs = json!({ "HOME": HOME });
            let process: Value = json!({ "cmd": program, "args": args, "envs": envs });
            json!({ "process": process, "stdin": false }).to_string().into_bytes()
        }
        Codec::Proto => {
            let mut process = text_field(0x0a, program);
            for arg in args {
                process.extend(text_field(0x12, arg));
            }
            let variable = [text_field(0x0a, "HOME"), text_field(0x12, HOME)].concat();
            process.extend([0x1a, u8::try_from(variable.len())?]);
            process.extend(variable);
            let mut request = vec![0x0a, u8::try_from(process.len())?];
            request.extend(process);
            // `stdin = 4: bool` is false.
            request.extend([0x20, 0]);
            request
        }
    };
    let length = u32::try_from(body.len())?;
    let envelope = [&[0][..], &length.to_be_bytes(), &body].concat();
    let headers = [("content-type", codec.content_type()), ("connect-protocol-version", "1")];
    connection.send("POST", "/process.Process/Start", &headers, &envelope)
}

/// A protobuf text of under 128 bytes.
fn text_field(tag: u8, text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).unwrap_or(u8::MAX) & 0x7f;
    [&[tag, length], text.as_bytes()].concat()
}
