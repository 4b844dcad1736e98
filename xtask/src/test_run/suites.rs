//! The programs under `e2e/`: what runs each, against what, and for how long at most.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::tally::Tally;
use crate::command;
use crate::places::Places;
use crate::sdk_programs::SdkPrograms;
use crate::server::Server;

/// One suite on emulated CPUs takes one to four minutes.
const SUITE_LIMIT: Duration = Duration::from_secs(8 * 60);
/// Ten minutes of it are silence.
const LONG_LIMIT: Duration = Duration::from_secs(30 * 60);

/// What runs a suite.
#[derive(Debug, Clone, Copy)]
pub(super) enum Runner {
    Python,
    OldPython,
    Schemathesis,
    Node,
}

/// A program that prints one line for each check: `ok NAME`, `FAIL NAME: reason`,
/// `skip NAME: reason`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Suite {
    name: &'static str,
    runner: Runner,
    /// Below `e2e/`.
    file: &'static str,
}

const fn suite(name: &'static str, runner: Runner, file: &'static str) -> Suite {
    Suite { name, runner, file }
}

/// Against the guest daemon alone, on this machine.
pub(super) const NATIVE: &[Suite] = &[
    suite("guest, python sync", Runner::Python, "python/guest_suite.py"),
    suite("guest, python async", Runner::Python, "python/guest_suite_async.py"),
    suite("guest, js", Runner::Node, "js/guest_suite.mjs"),
    suite("guest, other RPC", Runner::Python, "python/rpc_forms.py"),
];

/// Against a server whose sandboxes are names only: what is asked of the API alone, often enough to
/// fill many pages.
pub(super) const CONTROL: &[Suite] = &[
    suite("control, python sync", Runner::Python, "python/control_suite.py"),
    suite("control, python async", Runner::Python, "python/control_suite_async.py"),
    suite("control, js", Runner::Node, "js/control_suite.mjs"),
    suite("several teams", Runner::Python, "python/platform_suite.py"),
    suite("webhooks", Runner::Python, "python/webhooks_suite.py"),
    suite("API against its document", Runner::Schemathesis, "python/api_schema.py"),
];

/// Against a server, one after the other: each has the emulated processors to itself.
pub(super) const LIVE: &[Suite] = &[
    suite("python sync", Runner::Python, "python/suite.py"),
    suite("python async", Runner::Python, "python/suite_async.py"),
    suite("python, oldest SDK", Runner::OldPython, "python/suite_old.py"),
    suite("js", Runner::Node, "js/suite.mjs"),
    suite("js, oldest SDK", Runner::Node, "js-old/suite_old.mjs"),
    suite("command line", Runner::Python, "cli/suite.py"),
    suite("bad input", Runner::Python, "python/bad_input.py"),
    suite("loopback", Runner::Python, "python/loopback.py"),
    suite("process logs", Runner::Python, "python/process_logs.py"),
    suite("guest limits", Runner::Python, "python/guest_limits.py"),
    suite("live guest, other RPC", Runner::Python, "python/rpc_forms.py"),
    suite("live guest, python sync", Runner::Python, "python/guest_suite.py"),
    suite("live guest, python async", Runner::Python, "python/guest_suite_async.py"),
    suite("live guest, js", Runner::Node, "js/guest_suite.mjs"),
    suite("snapshots, python sync", Runner::Python, "python/snapshots_suite.py"),
    suite("snapshots, python async", Runner::Python, "python/snapshots_suite_async.py"),
    suite("snapshots, js", Runner::Node, "js/snapshots_suite.mjs"),
    suite("machines that die", Runner::Python, "python/deaths_suite.py"),
    suite("integrity", Runner::Python, "python/integrity.py"),
];

/// Against a server too, beside all of the others: they mostly wait.
pub(super) const LONG: &[Suite] = &[
    suite("silence, python", Runner::Python, "python/guest_long.py"),
    suite("silence, js", Runner::Node, "js/guest_long.mjs"),
];

/// How the suites are started, and by when the whole run has to be over.
pub(super) struct Suites<'a> {
    pub(super) places: &'a Places,
    pub(super) sdks: &'a SdkPrograms,
    /// On which programs that a suite starts are found.
    pub(super) search_path: OsString,
    pub(super) end: Instant,
}

impl Suites<'_> {
    /// Runs one against the guest daemon, which it starts itself.
    pub(super) fn run_native(&self, suite: &Suite, tally: &mut Tally) {
        let mut command = self.command(suite);
        command.env("BELLJAR_ENVD", self.places.envd());
        self.run(suite, command, tally);
    }

    /// Runs one against the server.
    pub(super) fn run_live(&self, suite: &Suite, server: &Server, tally: &mut Tally) {
        let mut command = self.command(suite);
        server.describe_to(&mut command);
        self.run(suite, command, tally);
    }

    /// Starts one against the server, to be shown and counted later.
    pub(super) fn start_live(&self, suite: &'static Suite, server: &Server) -> Result<Running> {
        let mut command = self.command(suite);
        server.describe_to(&mut command);
        let limit = self.within(LONG_LIMIT);
        // The kernel ends the program with the thread that started it, which waits for it.
        let thread = std::thread::Builder::new().name(suite.name.to_owned()).spawn(move || {
            let mut lines = Vec::new();
            let status = command::run_streamed(command, limit, |line| lines.push(line.to_owned()));
            (lines, status.map(fault))
        })?;
        Ok(Running { suite, thread })
    }

    fn command(&self, suite: &Suite) -> Command {
        let program: PathBuf = match suite.runner {
            Runner::Python => self.sdks.python(),
            Runner::OldPython => self.sdks.old_python(),
            Runner::Schemathesis => self.sdks.schemathesis_python(),
            Runner::Node => self.sdks.node(),
        };
        let mut command = command::tied(program);
        command.arg(self.places.root.join("e2e").join(suite.file));
        command.env("PYTHONUNBUFFERED", "1").env("PATH", &self.search_path);
        command
    }

    fn run(&self, suite: &Suite, command: Command, tally: &mut Tally) {
        println!("\n-- {}", suite.name);
        let mut count = Count::of(suite, tally);
        let status = command::run_streamed(command, self.within(SUITE_LIMIT), |line| {
            println!("  {line}");
            count.line(line);
        });
        count.end(status.map(fault));
    }

    /// A limit that does not outlive the run, so that a hang is still counted and shown.
    fn within(&self, limit: Duration) -> Duration {
        limit.min(self.end.saturating_duration_since(Instant::now()))
    }
}

/// A suite that runs beside others.
pub(super) struct Running {
    suite: &'static Suite,
    thread: JoinHandle<(Vec<String>, Result<Option<String>>)>,
}

impl Running {
    /// Waits for its end, then shows and counts what it printed.
    pub(super) fn finish(self, tally: &mut Tally) -> Result<()> {
        let outcome = self.thread.join().ok().context("a suite's thread panicked")?;
        let (lines, status) = outcome;
        println!("\n-- {}", self.suite.name);
        let mut count = Count::of(self.suite, tally);
        for line in &lines {
            println!("  {line}");
            count.line(line);
        }
        count.end(status);
        Ok(())
    }
}

/// One suite's lines on their way into the tally.
struct Count<'a> {
    suite: &'a Suite,
    tally: &'a mut Tally,
    before: u64,
    failed: bool,
}

impl Count<'_> {
    fn of<'a>(suite: &'a Suite, tally: &'a mut Tally) -> Count<'a> {
        let before = tally.counted();
        Count { suite, tally, before, failed: false }
    }

    fn line(&mut self, line: &str) {
        self.failed |= self.tally.add_suite_line(self.suite.name, line);
    }

    /// `status` is how the program ended, `None` for success.
    fn end(self, status: Result<Option<String>>) {
        let reason = match status {
            Ok(None) if self.tally.counted() == self.before => "the suite checked nothing".into(),
            Ok(None) => return,
            Ok(Some(_)) if self.failed => return,
            Ok(Some(status)) => format!("the suite ended with {status}"),
            Err(error) => format!("{error:#}"),
        };
        self.tally.fail(self.suite.name, &reason);
    }
}

/// What is left of an exit status once success is out of the way.
fn fault(status: ExitStatus) -> Option<String> {
    (!status.success()).then(|| status.to_string())
}
