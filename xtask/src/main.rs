//! Project automation: `cargo xtask demo`, `test`, `bench`, `setup`, `check`, `tidy`.
//!
//! A fresh machine needs nothing but a Rust toolchain: every verb that needs packages, the guest
//! kernel or a template runs the setup steps first, and they are cheap when nothing changed.
#![forbid(unsafe_code)]

mod bench;
mod check;
mod command;
mod demo;
mod leftovers;
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
    /// Time writing and reading stored images against a plain copy of the same file.
    Blobs,
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Its story is on the screen already, with the log and the fix.
        Err(error) if error.is::<SetupFailed>() => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `false` means that the verb ran and what it looked at is not in order.
fn run(verb: Verb) -> Result<bool> {
    let places = Places::find(settings())?;
    match verb {
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
        Verb::Bench { only: Some(BenchOnly::Blobs), dev } => bench::blobs(&places, dev),
        Verb::Bench { dev, only: None } => bench::run(&places, BuildKind::from_release(!dev)),
        Verb::Check => check::run(&places),
        Verb::Tidy => Ok(tidy::run(&places)?.is_clean()),
    }
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
    }
}
