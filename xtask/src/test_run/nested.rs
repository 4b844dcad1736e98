//! The machine driver's tests once more, on KVM: in the outer machine of `cargo xtask nested`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::tally::{CargoLines, Tally};
use crate::command::{self, tied};
use crate::nested::{self, Request};
use crate::places::Places;
use crate::setup;

const NAME: &str = "machines on KVM, nested";
/// The tests of the QEMU driver, the contract among them.
const TEST: &str = "host_qemu";
/// Compiles what the tests' smallest machine runs: a compiler inside would take minutes.
const PREPARES: &str = "the_tiny_guest_compiles";
/// Measures and asserts nothing.
const LEFT_OUT: &str = "restoring_ten_times_is_measured";
/// By how much the tests wait longer than on a host: a boot takes 3 to 20 s in there when nothing else
/// runs here, and this is for when something does.
const PATIENCE: &str = "4";
/// Five minutes on a quiet host; 15 were measured on one that three others compiled on.
const LIMIT: Duration = Duration::from_secs(40 * 60);
/// What the outer machine takes at most, and what its own process needs.
const NEEDED_KIB: u64 = 3 << 20;

/// Runs them and counts them; counts a skip, and says why, where no outer machine can be had.
pub(super) fn run(places: &Places, tally: &mut Tally) -> Result<()> {
    println!("\n== {NAME}");
    let available = available_kib()?;
    if available < NEEDED_KIB {
        let (has, needs) = (available >> 10, NEEDED_KIB >> 10);
        let reason = format!("needs {needs} MiB of memory; {has} MiB are available");
        println!("SKIPPED: {reason}");
        tally.skip(NAME, &reason);
        return Ok(());
    }
    let Ok(parts) = setup::for_nested(places) else {
        println!("SKIPPED: the outer machine could not be set up; see above");
        tally.skip(NAME, "the outer machine could not be set up; see above");
        return Ok(());
    };
    let program = test_program(places)?;
    let mut prepare = tied(&program);
    prepare.arg(PREPARES);
    command::output(prepare).context("cannot compile the tests' own guest")?;

    let mut command = vec![program.into_os_string()];
    command.extend(["--test-threads=1", "--skip", LEFT_OUT].map(Into::into));
    let mut environment = places.handed_on.clone();
    environment.push(("BELLJAR_ASSETS".into(), places.assets().into()));
    environment.push(("BELLJAR_TEST_ACCELERATION".into(), "kvm".into()));
    environment.push(("BELLJAR_TEST_PATIENCE".into(), PATIENCE.into()));
    // Where the log of skips would be written, nobody would read it: they are told on stderr as well.
    environment.retain(|(name, _)| name != "BELLJAR_SKIP_LOG");
    let folder = places.root.join("crates/runtime");
    let request = Request { command, folder, environment, limit: LIMIT };
    let mut harness = CargoLines::default();
    let mut skips = String::new();
    let mut out = Lines::new(|line| {
        println!("{line}");
        harness.read(line);
    });
    let mut err = Lines::new(|line| {
        eprintln!("{line}");
        if let Some(reason) = line.strip_prefix("SKIPPED: ") {
            skips.push_str(&format!("{NAME}: {reason}\n"));
        }
    });
    let ended = nested::run_in(places, &parts, &request, &mut out, &mut err);
    drop((out, err));
    match ended {
        Ok(code) => tally.add_cargo(harness, &skips, code == 0),
        Err(error) => tally.fail(NAME, &format!("{error:#}")),
    }
    Ok(())
}

/// Builds the test program as `cargo test --workspace` does, and says where it is.
fn test_program(places: &Places) -> Result<PathBuf> {
    let mut build = places.cargo();
    build.args(["test", "--workspace", "--no-run", "--message-format=json", "--test", TEST]);
    let messages = command::output(build)?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == TEST)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo built no test program {TEST}"))
}

fn available_kib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    available_in(&text).context("/proc/meminfo has no MemAvailable")
}

fn available_in(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    value.split_whitespace().next()?.parse().ok()
}

/// Hands over whole lines of what is written to it, and the rest at its end.
struct Lines<F: FnMut(&str)> {
    partial: Vec<u8>,
    on_line: F,
}

impl<F: FnMut(&str)> Lines<F> {
    fn new(on_line: F) -> Lines<F> {
        Lines { partial: Vec::new(), on_line }
    }
}

impl<F: FnMut(&str)> Write for Lines<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            (self.on_line)(String::from_utf8_lossy(&line[..end]).trim_end_matches('\r'));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: FnMut(&str)> Drop for Lines<F> {
    fn drop(&mut self) {
        if !self.partial.is_empty() {
            (self.on_line)(&String::from_utf8_lossy(&self.partial));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let mut seen = Vec::new();
        let mut lines = Lines::new(|line: &str| seen.push(line.to_owned()));
        for part in [&b"one\ntw"[..], b"o", b"\r\n\n", b"rest"] {
            lines.write_all(part).unwrap();
        }
        drop(lines);
        assert_eq!(seen, ["one", "two", "", "rest"]);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       100 kB\nMemFree: 5 kB\nMemAvailable:   24000000 kB\n";
        assert_eq!(available_in(text), Some(24_000_000));
        assert_eq!(available_in("MemTotal: 1 kB\n"), None);
    }
}
