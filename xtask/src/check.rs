//! `cargo xtask check`: what must be clean before a commit.

use std::process::Command;

use anyhow::{Context, Result};

use crate::command::describe;
use crate::places::Places;
use crate::tidy;

/// Runs all three, so that one round shows everything; `false` if any is not clean.
pub(crate) fn run(places: &Places) -> Result<bool> {
    let mut format = places.cargo();
    format.args(["fmt", "--all", "--check"]);
    let mut clippy = places.cargo();
    clippy.args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    let formatted = is_clean(format, "run `cargo fmt --all`")?;
    let linted = is_clean(clippy, "fix what clippy names, or expect it with a reason")?;
    let tidy = tidy::run(places)?.is_clean();
    Ok(formatted && linted && tidy)
}

fn is_clean(mut command: Command, fix: &str) -> Result<bool> {
    let text = describe(&command);
    let status = command.status().with_context(|| format!("cannot start `{text}`"))?;
    if !status.success() {
        eprintln!("`{text}` is not clean: {fix}");
    }
    Ok(status.success())
}
