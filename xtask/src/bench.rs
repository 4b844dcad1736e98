//! `cargo xtask bench`: ratios to the raw mechanism, and what the programs weigh.
//!
//! Nothing here is a test: the figures go to `docs/performance.md` with their conditions.

mod control;
mod envelopes;
mod http;
mod native;
mod peers;
mod report;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::command;
use crate::places::Places;
use crate::sdk_programs::SdkPrograms;
use crate::server::Server;
use crate::setup::{self, BuildKind, Goal, belljar_program};

/// Nine rounds of one and three of ten, each twice, on an emulated CPU.
const LIMIT: Duration = Duration::from_secs(900);

/// Times the guest daemon alone, without a sandbox. `false` if a target was missed.
pub(crate) fn envd(places: &Places, program: Option<PathBuf>, only: &[String]) -> Result<bool> {
    native::run(places, program, only)
}

/// Times the control plane on the fake driver. `false` if a target was missed.
pub(crate) fn control(places: &Places, program: Option<PathBuf>, live: u32) -> Result<bool> {
    control::run(places, program, live)
}

/// Times the disk server against `qemu-nbd`. `false` if a target was missed.
pub(crate) fn nbd(places: &Places) -> Result<bool> {
    let mut bench = places.cargo();
    bench.args(["bench", "--package", "belljar-blockstore", "--bench", "against_qemu_nbd"]);
    Ok(command::run_streamed(bench, LIMIT, |line| println!("{line}"))?.success())
}

/// Times writing and reading images in a blob store against a plain copy. `false` if it did not run.
///
/// A program of its own crate measures: this one uses no crate of the workspace.
pub(crate) fn blobs(places: &Places, dev: bool) -> Result<bool> {
    let mut bench = places.cargo();
    bench.args(["bench", "-p", "belljar-blockstore", "--bench", "blobs"]);
    if dev {
        bench.args(["--profile", "dev"]);
    }
    let result = command::run_streamed(bench, LIMIT, |line| println!("{line}"))?;
    println!("load average: {}", std::fs::read_to_string("/proc/loadavg")?.trim());
    Ok(result.success())
}

/// Times the page server on userfaultfds. `false` if a target was missed.
pub(crate) fn uffd(places: &Places) -> Result<bool> {
    let mut bench = places.cargo();
    bench.args(["bench", "--package", "belljar-runtime", "--bench", "page_server"]);
    Ok(command::run_streamed(bench, LIMIT, |line| println!("{line}"))?.success())
}

/// Times creates that take what stands ready. `false` if the benchmark did not run.
pub(crate) fn pools(places: &Places, build: BuildKind) -> Result<bool> {
    on_server(places, build, Some("base=1"), |bench, goal| {
        bench.arg(places.root.join("bench/pools.py")).arg("--data-dir").arg(&goal.data);
    })
}

/// `false` if a target was missed or the benchmark did not run.
pub(crate) fn run(places: &Places, build: BuildKind) -> Result<bool> {
    on_server(places, build, None, |bench, goal| {
        bench.arg(places.root.join("bench/create.py"));
        bench.arg("--belljar").arg(belljar_program(places, build));
        bench.arg("--data-dir").arg(&goal.data).arg("--envd").arg(places.envd());
    })
}

/// Runs a program of ours against a server of ours, with `warm` as its `--warm`.
fn on_server(
    places: &Places,
    build: BuildKind,
    warm: Option<&str>,
    program: impl FnOnce(&mut Command, &Goal),
) -> Result<bool> {
    let goal = Goal { build, data: places.test_data() };
    let _lock = places.lock()?;
    setup::run(places, &goal)?;
    let sdks = SdkPrograms::current(places)?;
    let mut command = command::as_root(belljar_program(places, build));
    command.envs(warm.map(|warm| ("BELLJAR_WARM", warm)));
    let log = places.logs().join("server.log");
    let server = Server::start_with(command, goal.data.clone(), &log)?;
    let mut bench = command::as_root(sdks.python());
    program(&mut bench, &goal);
    server.describe_to(&mut bench);
    let result = command::run_streamed(bench, LIMIT, |line| println!("{line}"));
    let stopped = server.stop();
    for fault in &stopped.faults {
        println!("{fault}");
    }
    Ok(result?.success() && stopped.faults.is_empty())
}
