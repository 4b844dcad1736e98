//! `cargo xtask nested -- COMMAND`: a command as root in a machine that has a working `/dev/kvm`.
//!
//! ```text
//! this host ─ QEMU, emulated processor with SVM ─ Debian's kernel: /dev/kvm works ─ COMMAND
//!     └──────── all files, for reading (9p) ──────────┘   what it writes is memory
//! ```
//!
//! The processor is emulated, so it has hardware virtualisation whatever the host's can do, and runs
//! thirty times slower. The machine's files are the host's own, under the same names, with memory laid
//! over them: no second system has to be made, and a program built here runs there as it is.

mod counter;
mod machine;
mod monitor;
mod saved;
mod script;
mod sys;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::places::Places;
use crate::setup::{self, OuterParts};

/// Names a Firecracker program, for what runs inside.
const FIRECRACKER: &str = "BELLJAR_FIRECRACKER";

/// What to run inside.
pub(crate) struct Request {
    /// Program and arguments, as on this host.
    pub(crate) command: Vec<OsString>,
    /// Where it starts.
    pub(crate) folder: PathBuf,
    /// Everything it finds in its environment.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// How long it may take; starting the machine comes on top.
    pub(crate) limit: Duration,
}

/// The verb: sets up, runs the command with this program's environment, gives back its exit code.
///
/// # Errors
/// Set-up failed, the command took too long, or the machine failed.
pub(crate) fn run(places: &Places, command: Vec<OsString>, limit: Duration) -> Result<u8> {
    let _lock = places.lock()?;
    let parts = setup::for_nested(places)?;
    let folder = std::env::current_dir().context("the current folder is gone")?;
    let request = Request { command, folder, environment: places.handed_on.clone(), limit };
    run_in(places, &parts, &request, &mut std::io::stdout(), &mut std::io::stderr())
}

/// Runs a command in a copy of the saved machine. The caller holds the cache's lock.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_in(
    places: &Places,
    parts: &OuterParts,
    request: &Request,
    out: &mut (dyn Write + Send),
    err: &mut (dyn Write + Send),
) -> Result<u8> {
    check_firecracker(&request.environment)?;
    let work = places.work_folder("nested")?;
    let script = work.path().join("command.sh");
    let text = script::script(&request.command, &request.folder, &request.environment);
    std::fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
    let outer = saved::start(places, parts, work.path())?;
    outer.run(&script, request.limit, out, err)
}

/// A Firecracker that is named must be there: its tests would skip, and nobody would know why.
fn check_firecracker(environment: &[(OsString, OsString)]) -> Result<()> {
    let named = environment.iter().find(|(name, value)| name == FIRECRACKER && !value.is_empty());
    let Some((_, path)) = named.map(|(name, value)| (name, PathBuf::from(value))) else {
        return Ok(());
    };
    if !path.is_absolute() || !path.is_file() {
        bail!(
            "{FIRECRACKER} names {}, which is no file by an absolute path: correct or unset it",
            path.display()
        );
    }
    Ok(())
}

/// What the command finds in its environment: where programs are, and what is for us or for Rust.
pub(crate) fn is_handed_on(name: &str) -> bool {
    matches!(name, "PATH" | "HOME" | "TERM" | "LANG")
        || name.starts_with("BELLJAR_")
        || name.starts_with("RUST_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firecracker_that_is_not_there_is_named() {
        let environment = |path: &str| vec![(FIRECRACKER.into(), path.into())];
        assert!(check_firecracker(&[]).is_ok());
        assert!(check_firecracker(&environment("")).is_ok());
        assert!(check_firecracker(&environment("/bin/sh")).is_ok());
        for bad in ["/nonexistent/firecracker", "firecracker", "/tmp"] {
            let error = check_firecracker(&environment(bad)).unwrap_err().to_string();
            assert!(error.contains(FIRECRACKER) && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn secrets_of_the_environment_stay_here() {
        assert!(is_handed_on("PATH") && is_handed_on("BELLJAR_ASSETS") && is_handed_on("RUST_LOG"));
        assert!(!is_handed_on("AWS_SECRET_ACCESS_KEY") && !is_handed_on("RUSTC"));
    }
}
