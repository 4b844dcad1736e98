//! Project automation: `cargo xtask demo`, `test`, `bench`, `nested`, `setup`, `check`, `tidy`.
//!
//! A fresh machine needs nothing but a Rust toolchain: every verb that needs packages, the guest
//! kernel or a template runs the setup steps first, and they are cheap when nothing changed.

mod bench;
mod check;
mod command;
mod demo;
mod leftovers;
mod nested;
mod places;
mod sdk_programs;
mod server;
mod setup;
mod steps;
mod test_run;
mod tidy;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::places::{Places, Settings};
use crate::setup::{BuildKind, Goal, SetupFailed};

/// Belljar's project automation.
#[derive(Parser)]
#[command(name = "cargo xtask", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Set up this machine, start a server, run both official SDKs against it, stop it again.
    Demo {
        /// Build `belljar` optimised (slower to build, lower overhead to run).
        #[arg(long)]
        release: bool,
    },
    /// Set up this machine, then run every test: tidy, unit, host, official SDKs.
    Test,
    /// Only set up: packages, guest kernel, binaries, base template, SDKs.
    Setup {
        /// Build `belljar` optimised.
        #[arg(long)]
        release: bool,
    },
    /// Set up, then time creates against the raw mechanism and weigh what runs (takes minutes).
    Bench {
        /// Bench the unoptimised build: quicker to build, not what users run.
        #[arg(long)]
        dev: bool,
        #[command(subcommand)]
        only: Option<BenchOnly>,
    },
    /// Run a command as root in a machine with a working /dev/kvm, made on the spot from Debian
    /// packages: its files are this host's, what it writes is gone afterwards. Slow: emulated.
    Nested {
        /// Seconds the command may take.
        #[arg(long, value_name = "SECONDS", default_value_t = 900)]
        timeout: u32,
        /// The program and its arguments.
        #[arg(required = true, last = true)]
        command: Vec<OsString>,
    },
    /// Set up, then only the tests of the machine driver on KVM, in that machine.
    TestNested,
    /// What must be clean before a commit: formatting, clippy without warnings, tidy.
    Check,
    /// Only the project's own rules: layers, file sizes, names, stray paths and hosts.
    Tidy,
}

#[derive(Subcommand)]
enum BenchOnly {
    /// Time the guest daemon alone, on this machine, against nginx and bare mechanisms.
    Envd {
        /// A daemon built already; without it the shipped form is built.
        #[arg(long)]
        program: Option<PathBuf>,
        /// Only these of: weights, commands, streams, downloads, uploads.
        parts: Vec<String>,
    },
    /// Time the control plane on the fake driver, on SQLite and on PostgreSQL, without root.
    Control {
        /// A server built already; without it an optimised one is built.
        #[arg(long)]
        program: Option<PathBuf>,
        /// How many sandboxes live when pages and memory are measured.
        #[arg(long, default_value_t = 10_000)]
        live: u32,
    },
    /// Time the disk server against `qemu-nbd` on the same file with the same clients, without root.
    Nbd,
    /// Set up, then time creates that take a sandbox which stands ready against those that start one.
    Pools,
    /// Time writing and reading stored images against a plain copy of the same file.
    Blobs,
    /// Time the page server against a plain copy and a private mapping. Needs root, for userfaultfds.
    Uffd,
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(code) => code,
        // Its story is on the screen already, with the log and the fix.
        Err(error) if error.is::<SetupFailed>() => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What this program ends with: a verb that found something not in order ends with a failure.
fn run(verb: Verb) -> Result<ExitCode> {
    let places = Places::find(settings())?;
    let is_in_order = match verb {
        Verb::Demo { release } => demo::run(&places, BuildKind::from_release(release)),
        Verb::Test => test_run::run(&places),
        Verb::Setup { release } => {
            let _lock = places.lock()?;
            let build = BuildKind::from_release(release);
            setup::run(&places, &Goal { build, data: places.demo_data() })?;
            Ok(true)
        }
        Verb::Bench { only: Some(BenchOnly::Envd { program, parts }), .. } => {
            bench::envd(&places, program, &parts)
        }
        Verb::Bench { only: Some(BenchOnly::Control { program, live }), .. } => {
            bench::control(&places, program, live)
        }
        Verb::Bench { only: Some(BenchOnly::Nbd), .. } => bench::nbd(&places),
        Verb::Bench { dev, only: Some(BenchOnly::Pools) } => {
            bench::pools(&places, BuildKind::from_release(!dev))
        }
        Verb::Bench { only: Some(BenchOnly::Blobs), dev } => bench::blobs(&places, dev),
        Verb::Bench { only: Some(BenchOnly::Uffd), .. } => bench::uffd(&places),
        Verb::Bench { dev, only: None } => bench::run(&places, BuildKind::from_release(!dev)),
        Verb::Nested { timeout, command } => {
            let limit = Duration::from_secs(u64::from(timeout));
            return nested::run(&places, command, limit).map(ExitCode::from);
        }
        Verb::TestNested => test_run::run_nested(&places),
        Verb::Check => check::run(&places),
        Verb::Tidy => Ok(tidy::run(&places)?.is_clean()),
    }?;
    Ok(if is_in_order { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything this program reads from its environment, read once.
fn settings() -> Settings {
    Settings {
        cargo: std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")),
        cache_override: std::env::var_os("BELLJAR_CACHE_DIR").map(Into::into),
        xdg_cache: std::env::var_os("XDG_CACHE_HOME").map(Into::into),
        home: std::env::var_os("HOME").map(Into::into),
        data_override: std::env::var_os("BELLJAR_DATA_DIR").map(Into::into),
        search_path: std::env::var_os("PATH").unwrap_or_default(),
        handed_on: std::env::vars_os()
            .filter(|(name, _)| name.to_str().is_some_and(nested::is_handed_on))
            .collect(),
    }
}
