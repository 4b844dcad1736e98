//! The page server against what it competes with, in one run: `cargo xtask bench uffd`.
//!
//! In bulk: installing a whole saved memory as a working set, beside a plain copy of the same file into
//! fresh memory. One at a time: a fault that the server answers, beside a fault of a private mapping of
//! the same file. Rounds alternate, so whatever else the machine does falls on all. Ends with an error
//! if a target is missed. Needs the right to make userfaultfds: root, on most hosts.

#[path = "../tests/uffd/monitor.rs"]
mod monitor;
#[path = "../tests/uffd/saved.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod saved;
#[path = "../tests/uffd/sys.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod sys;
#[path = "page_server/sys.rs"]
mod unguarded;

use std::os::unix::fs::FileExt as _;
use std::process::ExitCode;
use std::time::Instant;

use belljar_runtime::uffd::{PageServerLimits, WorkingSet};
use monitor::hand_over;
use saved::{PAGE, Saved, limits, shuffled, until};
use sys::GuardedMemory;
use unguarded::PlainMemory;

/// 128 MiB, 13 of 18 pages with content.
const PAGES: usize = 32 << 10;
/// Pages of a window of 64 KiB. One page of each is touched, so that each touch is a fault.
const WINDOW: usize = 16;
const ROUNDS: usize = 5;
/// Pages installed a second in bulk, at least.
const BULK_TARGET: f64 = 100_000.0;
/// Median of one fault, in microseconds, at most.
const FAULT_TARGET_US: f64 = 25.0;

/// Seconds for all pages of a working set with so many threads.
fn in_bulk(saved: &Saved, set: &WorkingSet, prefetch_threads: usize) -> f64 {
    let limits = PageServerLimits { prefetch_threads, ..PageServerLimits::default() };
    let (server, _failures) = saved.serve(limits, Some(set.clone()));
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let started = Instant::now();
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    until("all is there", || server.stats().installed_pages == PAGES as u64);
    started.elapsed().as_secs_f64()
}

/// Seconds for reading the same file into memory that nobody has touched.
fn copied(saved: &Saved) -> f64 {
    let file = std::fs::File::open(saved.path("memory")).expect("open the memory");
    let mut memory = PlainMemory::empty(PAGES * PAGE).expect("map some memory");
    let started = Instant::now();
    for (index, part) in memory.bytes_mut().chunks_mut(64 << 10).enumerate() {
        file.read_exact_at(part, (index * (64 << 10)) as u64).expect("read it");
    }
    started.elapsed().as_secs_f64()
}

/// Microseconds of each first touch of a page, in random order.
fn touched(mut touch: impl FnMut(usize) -> u8, seed: u64) -> Vec<f64> {
    shuffled(PAGES / WINDOW, seed)
        .into_iter()
        .map(|window| window * WINDOW + window % WINDOW)
        .map(|page| {
            let started = Instant::now();
            std::hint::black_box(touch(page * PAGE));
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect()
}

fn served(saved: &Saved, window_pages: usize, seed: u64) -> Vec<f64> {
    let (server, _failures) = saved.serve(limits(1, window_pages), None);
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    // The first one pays for the handshake.
    memory.byte(0);
    touched(|at| memory.byte(at), seed)
}

fn mapped(saved: &Saved, seed: u64) -> Vec<f64> {
    let file = std::fs::File::open(saved.path("memory")).expect("open the memory");
    let mut memory = PlainMemory::of(&file, PAGES * PAGE).expect("map it");
    let bytes = memory.bytes_mut();
    touched(|at| std::mem::replace(std::hint::black_box(&mut bytes[at]), 1), seed)
}

/// The whole memory as a working set.
fn everything(saved: &Saved) -> WorkingSet {
    let (server, _failures) = saved.serve(limits(1, 512), None);
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    for page in 0..PAGES {
        memory.byte(page * PAGE);
    }
    server.working_set().expect("it records")
}

/// The value below which this part of them lies.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part) as usize]
}

fn bulk_is_met(saved: &Saved) -> bool {
    let set = everything(saved);
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        times[0].push(in_bulk(saved, &set, 1));
        times[1].push(in_bulk(saved, &set, 2));
        times[2].push(copied(saved));
    }
    let speeds = times.map(|mut times| PAGES as f64 / quantile(&mut times, 0.5));
    println!("{:44} {:>12} {:>8}", "in bulk, whole memory", "pages/s", "ratio");
    for (name, speed) in
        ["working set, 1 thread", "working set, 2 threads", "file read into fresh memory"]
            .iter()
            .zip(speeds)
    {
        println!("{name:44} {speed:12.0} {:8.2}", speed / speeds[2]);
    }
    speeds[0].max(speeds[1]) >= BULK_TARGET
}

fn faults_are_met(saved: &Saved) -> bool {
    let mut times = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        let seed = round as u64;
        times[0].extend(served(saved, 1, seed));
        times[1].extend(served(saved, WINDOW, seed));
        times[2].extend(mapped(saved, seed));
    }
    println!("{:44} {:>12} {:>8} {:>8}", "one touch, random order", "p50 us", "p99 us", "ratio");
    let names = [
        "page server, the page alone",
        "page server, windows of 64 KiB",
        "private file mapping, written",
    ];
    let base = quantile(&mut times[2], 0.5);
    let mut worst: f64 = 0.0;
    for (place, (name, mut times)) in names.iter().zip(times).enumerate() {
        let (p50, p99) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
        println!("{name:44} {p50:12.1} {p99:8.1} {:8.2}", p50 / base);
        worst = if place < 2 { worst.max(p50) } else { worst };
    }
    worst < FAULT_TARGET_US
}

fn main() -> ExitCode {
    let saved = Saved::new(PAGES);
    let is_met = [bulk_is_met(&saved), faults_are_met(&saved)];
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average: {}", load.trim());
    println!("targets: {BULK_TARGET} pages/s in bulk: {}", verdict(is_met[0]));
    println!("         {FAULT_TARGET_US} us for one fault at p50: {}", verdict(is_met[1]));
    if is_met == [true; 2] { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "MISSED" }
}
