//! `cargo xtask test`: every test there is, counted on one last line.

mod nested;
mod suites;
mod tally;

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::command;
use crate::places::Places;
use crate::sdk_programs::SdkPrograms;
use crate::server::Server;
use crate::setup::{self, BuildKind, Goal};
use crate::tidy;
use suites::Suites;
use tally::Tally;

/// When everything has to be over: a run is cut off after 90 minutes, and a hang is to be counted
/// and shown before.
const RUN_LIMIT: Duration = Duration::from_secs(80 * 60);
/// Compiling and running the whole workspace on two slow cores.
const CARGO_LIMIT: Duration = Duration::from_secs(40 * 60);

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
        let sdks = SdkPrograms::current(places)?;
        let search_path = sdks.search_path(places)?;
        let suites = Suites { places, sdks: &sdks, search_path, end: started + RUN_LIMIT };
        println!("\n== official SDKs against the guest daemon alone");
        for suite in suites::NATIVE {
            suites.run_native(suite, &mut tally);
        }
        control_suites(&suites, &goal, &mut tally);
        live_suites(&suites, &goal, &mut tally)?;
    }
    tally.show(started.elapsed());
    Ok(tally.is_clean())
}

/// The tests of the machine driver on KVM, in the outer machine; `false` if one failed. They are no part
/// of [`run`]: an emulated machine takes two cores for minutes.
pub(crate) fn run_nested(places: &Places) -> Result<bool> {
    let goal = Goal { build: BuildKind::Dev, data: places.test_data() };
    let started = Instant::now();
    let _lock = places.lock()?;
    let mut tally = Tally::default();
    setup::run(places, &goal)?;
    nested::run(places, &mut tally)?;
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

/// The official SDKs' control plane against a server on the fake runtime.
fn control_suites(suites: &Suites<'_>, goal: &Goal, tally: &mut Tally) {
    println!("\n== official SDKs against the control plane");
    let server = match Server::start_fake(suites.places, goal) {
        Ok(server) => server,
        Err(error) => return tally.fail("server on the fake runtime", &format!("{error:#}")),
    };
    for suite in suites::CONTROL {
        suites.run_live(suite, &server, tally);
    }
    stop(server, tally);
}

/// The official SDKs against a server of our own, and the state of the machine after it.
fn live_suites(suites: &Suites<'_>, goal: &Goal, tally: &mut Tally) -> Result<()> {
    println!("\n== official SDKs against a server");
    let server = match Server::start(suites.places, goal) {
        Ok(server) => server,
        Err(error) => {
            tally.fail("server", &format!("{error:#}"));
            return Ok(());
        }
    };
    println!("server ready on {}, tier {}", server.ready.api_url, server.ready.tier);
    let long = suites::LONG.iter().map(|suite| suites.start_live(suite, &server));
    let long = long.collect::<Result<Vec<_>>>()?;
    for suite in suites::LIVE {
        suites.run_live(suite, &server, tally);
    }
    for running in long {
        running.finish(tally)?;
    }
    stop(server, tally);
    Ok(())
}

/// That a server ends well and leaves nothing is a test as well.
fn stop(server: Server, tally: &mut Tally) {
    let stopped = server.stop();
    println!("\n== server stopped in {:.1} s", stopped.took.as_secs_f64());
    if stopped.faults.is_empty() {
        tally.pass();
    }
    for fault in stopped.faults {
        tally.fail("clean stop", &fault);
    }
}
