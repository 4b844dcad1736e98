//! The two programs of this project, built by cargo.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::BuildKind;
use crate::places::Places;
use crate::steps::{Outcome, StepContext, StepError};

/// The daemon's target. Named even where it is the host's own: only then do `RUSTFLAGS` spare
/// build scripts and procedural macros, which cannot be static.
const ENVD_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where `belljar` is after [`belljar`].
pub(crate) fn belljar_program(places: &Places, build: BuildKind) -> PathBuf {
    let folder = match build {
        BuildKind::Dev => "debug",
        BuildKind::Release => "release",
    };
    places.target.join(folder).join("belljar")
}

/// Builds the server and command line.
pub(super) fn belljar(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let mut cargo = context.places.cargo();
    cargo.args(["build", "--package", "belljar-cli", "--bin", "belljar"]);
    if context.goal.build == BuildKind::Release {
        cargo.arg("--release");
    }
    let compiled = cargo_build(context, cargo)?;
    let program = belljar_program(context.places, context.goal.build);
    Ok(outcome(compiled, &program.display().to_string()))
}

/// Builds the guest daemon and puts it among the assets.
pub(super) fn envd(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let mut cargo = context.places.cargo();
    cargo
        .args(["build", "--package", "belljar-envd", "--profile", "guest"])
        .args(["--target", ENVD_TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    let compiled = cargo_build(context, cargo)?;
    let built = context.places.target.join(ENVD_TARGET).join("guest/belljar-envd");
    let asset = context.places.envd();
    let fresh = asset.with_extension("new");
    std::fs::copy(&built, &fresh).with_context(|| format!("cannot copy {}", built.display()))?;
    std::fs::rename(&fresh, &asset)?;
    let kib = std::fs::metadata(&asset)?.len() / 1024;
    Ok(outcome(compiled, &format!("static, {kib} KiB")))
}

/// Runs a cargo build; gives back how many crates it compiled.
fn cargo_build(context: &StepContext<'_>, command: Command) -> Result<u64> {
    let mut compiled = 0;
    context.run(command, |line| {
        if let Some(name) = line.trim_start().strip_prefix("Compiling ") {
            compiled += 1;
            context.say(&format!("compiles crate {compiled}: {name}"));
        }
    })?;
    Ok(compiled)
}

fn outcome(compiled: u64, text: &str) -> Outcome {
    match compiled {
        0 => Outcome::Cached(text.to_owned()),
        count => Outcome::Done(format!("{text}, {count} crates compiled")),
    }
}
