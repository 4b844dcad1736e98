//! `cargo xtask demo`: from a bare machine to both official SDKs running code in sandboxes.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::command;
use crate::places::Places;
use crate::sdk_programs::SdkPrograms;
use crate::server::Server;
use crate::setup::{self, BuildKind, Goal, belljar_program};
use crate::steps::Outcome;

/// One demo program on an emulated CPU takes well under a minute.
const PROGRAM_LIMIT: Duration = Duration::from_secs(300);

/// `false` if anything that was shown did not work.
pub(crate) fn run(places: &Places, build: BuildKind) -> Result<bool> {
    let goal = Goal { build, data: places.demo_data() };
    let started = Instant::now();
    let _lock = places.lock()?;
    let steps = setup::run(places, &goal)?;
    let set_up = started.elapsed();
    let sdks = SdkPrograms::current(places)?;

    let server = Server::start(places, &goal)?;
    println!(
        "\nserver ready after {:.2} s: API {}, sandboxes {}, tier {}: {}",
        server.ready_after.as_secs_f64(),
        server.ready.api_url,
        server.ready.sandbox_url,
        server.ready.tier,
        server.ready.tier_reason
    );
    let mut python = command::tied(sdks.python());
    python.arg(places.root.join("e2e/demo.py"));
    let mut javascript = command::tied(sdks.node());
    javascript.arg(places.root.join("e2e/demo.mjs"));
    let shown = [
        show("Python SDK, unmodified", python, &server),
        show("JS SDK, unmodified", javascript, &server),
    ];

    let stopped = server.stop();
    println!("\nwhat happened");
    for step in &steps {
        let (word, text) = match &step.outcome {
            Outcome::Done(text) => ("done", text),
            Outcome::Cached(text) => ("ready", text),
        };
        println!("  {:10} {:7.1} s  {word:6} {text}", step.name, step.took.as_secs_f64());
    }
    println!("  {:10} {:7.1} s  (steps run side by side)", "set-up", set_up.as_secs_f64());
    for program in &shown {
        let word = if program.passed { "passed" } else { "FAILED" };
        println!("  {:10} {:7.1} s  {word}", program.name, program.took.as_secs_f64());
    }
    let clean = if stopped.faults.is_empty() { "clean" } else { "FAILED" };
    println!("  {:10} {:7.1} s  {clean}", "stop", stopped.took.as_secs_f64());
    for fault in &stopped.faults {
        println!("    {fault}");
    }
    println!("  {:10} {:7.1} s", "all", started.elapsed().as_secs_f64());

    let passed = shown.iter().all(|program| program.passed) && stopped.faults.is_empty();
    if passed {
        let program = belljar_program(places, build);
        let program = program.strip_prefix(&places.root).unwrap_or(&program).display();
        println!("\nnext, in one terminal (as root):\n  {program} up");
        println!(
            "in another, before any program that uses an E2B SDK:\n  eval \"$({program} env)\""
        );
    } else {
        println!("\nthe demo FAILED; the server's log is {}/server.log", places.logs().display());
    }
    Ok(passed)
}

struct Shown {
    name: &'static str,
    passed: bool,
    took: Duration,
}

fn show(name: &'static str, mut program: Command, server: &Server) -> Shown {
    println!("\n== {name}");
    server.describe_to(&mut program);
    program.env("PYTHONUNBUFFERED", "1");
    let started = Instant::now();
    let result = command::run_streamed(program, PROGRAM_LIMIT, |line| println!("  {line}"));
    let passed = match result {
        Ok(status) if status.success() => true,
        Ok(status) => {
            println!("  ended with {status}");
            false
        }
        Err(error) => {
            println!("  {error:#}");
            false
        }
    };
    Shown { name: name.split(' ').next().unwrap_or(name), passed, took: started.elapsed() }
}
