//! What this machine offers a test, and how a test says that something is missing.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// Names the file to which each skipped test adds a line.
const SKIP_LOG_VARIABLE: &str = "BELLJAR_SKIP_LOG";
/// Names the folder with the kernel, the root filesystem and the guest daemon.
const ASSETS_VARIABLE: &str = "BELLJAR_ASSETS";
/// Names a Firecracker program.
const FIRECRACKER_VARIABLE: &str = "BELLJAR_FIRECRACKER";
/// Says how tests of the machine drivers must run their guests.
const ACCELERATION_VARIABLE: &str = "BELLJAR_TEST_ACCELERATION";
/// By how much deadlines of tests are longer.
const PATIENCE_VARIABLE: &str = "BELLJAR_TEST_PATIENCE";

/// Says that the running test cannot run here, and why. The test returns right after.
///
/// Prints `SKIPPED: reason` past the test harness' capture, so that it shows for a test that
/// passes. With `BELLJAR_SKIP_LOG` set, one line `<test>\t<reason>` is added to that file.
///
/// # Panics
/// When the skip log cannot be written: a skip nobody hears of is worse than a failure.
pub fn skip(reason: &str) {
    let line = reason.replace(['\n', '\t'], " ");
    // A closed stderr loses the message but must not fail the test; the log below still counts.
    drop(writeln!(std::io::stderr(), "SKIPPED: {line}"));
    let Some(log) = variable(SKIP_LOG_VARIABLE) else { return };
    let thread = std::thread::current();
    let entry = format!("{}\t{line}\n", thread.name().unwrap_or("unnamed"));
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        // One write: lines of tests that skip at the same time stay whole.
        .and_then(|mut file| file.write_all(entry.as_bytes()))
        .unwrap_or_else(|e| panic!("failed to add to the skip log {log}: {e}"));
}

/// Whether the test runs with root's powers.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The Firecracker that `BELLJAR_FIRECRACKER` names; `None` when unset.
pub fn firecracker() -> Option<PathBuf> {
    variable(FIRECRACKER_VARIABLE).map(PathBuf::from)
}

/// What `BELLJAR_TEST_ACCELERATION` says: `kvm` or `emulated`, and the test fails where that cannot be
/// had; `None`, when unset, is whatever the host can do.
pub fn acceleration() -> Option<String> {
    variable(ACCELERATION_VARIABLE)
}

/// A deadline of a test, `base` on an ordinary machine, times `BELLJAR_TEST_PATIENCE`: a whole number
/// from 1 to 100, for where everything is slower by a known kind of factor. 1 when unset.
///
/// # Panics
/// When the variable holds anything else.
pub fn patience(base: Duration) -> Duration {
    let factor = match variable(PATIENCE_VARIABLE) {
        None => 1,
        Some(text) => match text.parse() {
            Ok(factor @ 1..=100) => factor,
            _ => panic!("{PATIENCE_VARIABLE} is a whole number from 1 to 100, not `{text}`"),
        },
    };
    base.saturating_mul(factor)
}

/// What a test needs to start a real sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assets {
    /// The guest kernel, an uncompressed ELF.
    pub vmlinux: PathBuf,
    /// The base image: ext4 with `belljar-envd` inside.
    pub rootfs: PathBuf,
    /// The static guest daemon itself.
    pub envd: PathBuf,
}

/// The folder named by `BELLJAR_ASSETS`; `None` when unset.
///
/// # Panics
/// When the folder lacks a file: whoever named it wants its tests run, not skipped.
pub fn assets() -> Option<Assets> {
    let folder = PathBuf::from(variable(ASSETS_VARIABLE)?);
    let assets = Assets::within(&folder);
    assert!(assets.is_some(), "{ASSETS_VARIABLE} names {}, which lacks a file", folder.display());
    assets
}

impl Assets {
    fn within(folder: &std::path::Path) -> Option<Assets> {
        let assets = Assets {
            vmlinux: folder.join("vmlinux"),
            rootfs: folder.join("rootfs.ext4"),
            envd: folder.join("belljar-envd"),
        };
        let complete = [&assets.vmlinux, &assets.rootfs, &assets.envd].iter().all(|f| f.is_file());
        complete.then_some(assets)
    }
}

#[expect(clippy::disallowed_methods, reason = "tests are configured by environment")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_every_file_is_no_assets() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(Assets::within(folder.path()), None);
        for name in ["vmlinux", "rootfs.ext4", "belljar-envd"] {
            std::fs::write(folder.path().join(name), b"x").expect("write an asset");
        }
        let found = Assets::within(folder.path()).expect("all three are there");
        assert_eq!(found.rootfs, folder.path().join("rootfs.ext4"));
    }
}
