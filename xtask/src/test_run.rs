//! `cargo xtask test`: every test there is, counted on one last line.

mod tally;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::command;
use crate::places::Places;
use crate::sdk_programs::SdkPrograms;
use crate::server::Server;
use crate::setup::{self, BuildKind, Goal};
use crate::tidy;
use tally::Tally;

/// Compiling and running the whole workspace on two slow cores.
/// The limits of a run add up to less than 90 minutes, so that a hang is still counted and shown.
const CARGO_LIMIT: Duration = Duration::from_secs(40 * 60);
/// One SDK suite on emulated CPUs takes one to two minutes.
const SUITE_LIMIT: Duration = Duration::from_secs(5 * 60);

/// `false` if anything failed.
pub(crate) fn run(places: &Places) -> Result<bool> {
    let goal = Goal { build: BuildKind::Dev, data: places.test_data() };
    let started = Instant::now();
    let _lock = places.lock()?;
    let mut tally = Tally::default();
    let is_set_up = setup::run(places, &goal);
    if is_set_up.is_err() {
        tally.fail("setup", "the machine could not be set up; see above");
    } else {
        tidy_rules(places, &mut tally)?;
        cargo_tests(places, &mut tally)?;
        sdk_suites(places, &goal, &mut tally)?;
    }
    tally.show(started.elapsed());
    Ok(tally.is_clean())
}

fn tidy_rules(places: &Places, tally: &mut Tally) -> Result<()> {
    println!("\n== tidy");
    match tidy::run(places)?.is_clean() {
        true => tally.pass(),
        false => tally.fail("tidy", "findings above"),
    }
    Ok(())
}

/// Unit, rig and host tests of every crate.
fn cargo_tests(places: &Places, tally: &mut Tally) -> Result<()> {
    println!("\n== cargo test --workspace");
    let skip_log = places.logs().join("skipped-tests.log");
    std::fs::write(&skip_log, "")?;
    let mut tests = places.cargo();
    tests
        .args(["test", "--workspace", "--no-fail-fast"])
        .env("BELLJAR_ASSETS", places.assets())
        .env("BELLJAR_SKIP_LOG", &skip_log);
    let mut harness = tally::CargoLines::default();
    let status = command::run_streamed(tests, CARGO_LIMIT, |line| {
        println!("{line}");
        harness.read(line);
    });
    let is_success = match status {
        Ok(status) => status.success(),
        Err(error) => {
            tally.fail("cargo test", &format!("{error:#}"));
            true
        }
    };
    tally.add_cargo(harness, &std::fs::read_to_string(&skip_log)?, is_success);
    Ok(())
}

/// The official SDKs against a server of our own, and the state of the machine after it.
fn sdk_suites(places: &Places, goal: &Goal, tally: &mut Tally) -> Result<()> {
    println!("\n== official SDKs");
    let sdks = SdkPrograms::current(places)?;
    let server = match Server::start(places, goal) {
        Ok(server) => server,
        Err(error) => {
            tally.fail("server", &format!("{error:#}"));
            return Ok(());
        }
    };
    println!("server ready on {}, tier {}", server.ready.api_url, server.ready.tier);
    let suites = [
        ("python sync", sdks.python(), "e2e/python/suite.py"),
        ("python async", sdks.python(), "e2e/python/suite_async.py"),
        ("python, previous SDK", sdks.old_python(), "e2e/python/suite_old.py"),
        ("js", sdks.node(), "e2e/js/suite.mjs"),
        ("bad input", sdks.python(), "e2e/python/bad_input.py"),
    ];
    for (name, program, file) in suites {
        suite(name, &program, &places.root.join(file), &server, tally);
    }
    let stopped = server.stop();
    println!("\n== server stopped in {:.1} s", stopped.took.as_secs_f64());
    if stopped.faults.is_empty() {
        tally.pass();
    }
    for fault in stopped.faults {
        tally.fail("clean stop", &fault);
    }
    Ok(())
}

/// A suite prints one line for each check: `ok NAME`, `FAIL NAME: reason`, `skip NAME: reason`.
fn suite(name: &str, program: &Path, file: &Path, server: &Server, tally: &mut Tally) {
    println!("\n-- {name}");
    let mut command = command::tied(program);
    command.arg(file).env("PYTHONUNBUFFERED", "1");
    server.describe_to(&mut command);
    let before = tally.counted();
    let mut failed = false;
    let status = command::run_streamed(command, SUITE_LIMIT, |line| {
        println!("  {line}");
        failed |= tally.add_suite_line(name, line);
    });
    match status {
        Ok(status) if status.success() && tally.counted() == before => {
            tally.fail(name, "the suite checked nothing");
        }
        Ok(status) if status.success() || failed => {}
        Ok(status) => tally.fail(name, &format!("the suite ended with {status}")),
        Err(error) => tally.fail(name, &format!("{error:#}")),
    }
}
