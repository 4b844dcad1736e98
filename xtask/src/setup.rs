//! Everything a bare Debian machine with a Rust toolchain lacks, as steps.

mod apt;
mod apt_sources;
mod binaries;
mod kernel;
mod outer;
mod packages;
mod sdks;
mod template;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::places::Places;
use crate::steps::{self, Finished, Step};

pub(crate) use binaries::belljar_program;
pub(crate) use outer::OuterParts;

/// How `belljar` is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BuildKind {
    /// The `dev` profile: quick to build.
    Dev,
    /// The `release` profile.
    Release,
}

impl BuildKind {
    /// From the `--release` flag.
    pub(crate) fn from_release(release: bool) -> BuildKind {
        if release { BuildKind::Release } else { BuildKind::Dev }
    }
}

/// What setup is to end with.
#[derive(Debug, Clone)]
pub(crate) struct Goal {
    /// How `belljar` is compiled.
    pub(crate) build: BuildKind,
    /// The server's data folder, which gets the base template.
    pub(crate) data: PathBuf,
}

/// A step failed, and the user was told which, why and what to do.
#[derive(Debug)]
pub(crate) struct SetupFailed;

impl std::fmt::Display for SetupFailed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a setup step failed")
    }
}

impl std::error::Error for SetupFailed {}

const BELLJAR: Step = Step {
    name: "belljar",
    why: "the server and command line",
    needs: &[],
    fix: "the compiler's message is above; `cargo build -p belljar-cli` repeats it",
    run: binaries::belljar,
};

const STEPS: &[Step] = &[
    Step {
        name: "packages",
        why: "Debian packages that build the guest and run sandboxes",
        needs: &[],
        fix: "run `apt-get update` by hand and read what it says, then try again",
        run: packages::install,
    },
    BELLJAR,
    Step {
        name: "envd",
        why: "the static daemon inside every sandbox",
        needs: &[],
        fix: "the compiler's message is above; `rustup target list --installed` must name \
              x86_64-unknown-linux-gnu",
        run: binaries::envd,
    },
    Step {
        name: "kernel",
        why: "the guest kernel, once for each machine",
        needs: &["packages"],
        fix: "read the log; a change to guest/kernel/config.fragment is the usual cause",
        run: kernel::build,
    },
    Step {
        name: "sdks",
        why: "the official Python and JS SDKs, unmodified",
        needs: &["packages"],
        fix: "check that pip and npm reach their registries, then try again",
        run: sdks::install,
    },
    Step {
        name: "rootfs",
        why: "the Debian root file system of the base template",
        needs: &["packages", "belljar", "envd"],
        fix: "read the log; `belljar doctor` checks what this step needs",
        run: template::rootfs,
    },
    Step {
        name: "template",
        why: "the base template: booted once, snapshotted with its memory",
        needs: &["kernel", "rootfs"],
        fix: "read the log; `belljar doctor` checks what this step needs",
        run: template::build,
    },
];

/// What the native benchmark of the guest daemon needs.
const NATIVE_BENCH_STEPS: &[Step] = &[
    Step {
        name: "bench-packages",
        why: "Debian packages the guest daemon is compared with",
        needs: &[],
        fix: "run `apt-get update` by hand and read what it says, then try again",
        run: packages::install_for_native_bench,
    },
    Step {
        name: "envd",
        why: "the static daemon inside every sandbox",
        needs: &[],
        fix: "the compiler's message is above",
        run: binaries::envd,
    },
];

/// What the machine of `cargo xtask nested` needs.
const NESTED_STEPS: &[Step] = &[
    Step {
        name: "nested-packages",
        why: "Debian packages that run the outer machine",
        needs: &[],
        fix: "run `apt-get update` by hand and read what it says, then try again",
        run: packages::install_for_nested,
    },
    Step {
        name: "outer",
        why: "kernel and first files of the outer machine, from Debian packages",
        needs: &["nested-packages"],
        fix: "read the log; `apt-get download linux-image-amd64` must work",
        run: outer::build,
    },
];

/// What the benchmark of the control plane needs.
const CONTROL_BENCH_STEPS: &[Step] = &[BELLJAR];

/// Runs the steps of the native benchmark only. The caller holds the cache's lock.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_native_bench(places: &Places) -> Result<()> {
    std::fs::create_dir_all(places.assets())?;
    let goal = Goal { build: BuildKind::Release, data: places.test_data() };
    steps::run_all(NATIVE_BENCH_STEPS, places, &goal).map_err(|failure| {
        failure.show();
        anyhow::Error::from(SetupFailed)
    })?;
    Ok(())
}

/// Brings about the parts of the outer machine only. The caller holds the cache's lock.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_nested(places: &Places) -> Result<OuterParts> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the outer machine needs an x86_64 host; this one is {}", std::env::consts::ARCH);
    }
    let goal = Goal { build: BuildKind::Dev, data: places.test_data() };
    steps::run_all(NESTED_STEPS, places, &goal).map_err(|failure| {
        failure.show();
        anyhow::Error::from(SetupFailed)
    })?;
    OuterParts::current(places)
}

/// Builds the server only, optimised. The caller holds the cache's lock.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_control_bench(places: &Places) -> Result<()> {
    let goal = Goal { build: BuildKind::Release, data: places.test_data() };
    steps::run_all(CONTROL_BENCH_STEPS, places, &goal).map_err(|failure| {
        failure.show();
        anyhow::Error::from(SetupFailed)
    })?;
    Ok(())
}

/// Runs every step. The caller holds the cache's lock.
///
/// # Errors
/// [`SetupFailed`] after the failure was shown; anything else before the first step.
pub(crate) fn run(places: &Places, goal: &Goal) -> Result<Vec<Finished>> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("sandboxes need an x86_64 machine; this one is {}", std::env::consts::ARCH);
    }
    std::fs::create_dir_all(places.assets())?;
    steps::run_all(STEPS, places, goal).map_err(|failure| {
        failure.show();
        SetupFailed.into()
    })
}

/// A short name for content: the first 64 bits of a SHA-256 over length-prefixed parts.
fn content_key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(u64::try_from(part.len()).expect("usize fits in 64 bits").to_le_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..8])
}

/// Points a fixed name at something kept by content. A link, so that the cache stays the only copy.
fn publish(kept: &Path, asset: &Path) -> Result<()> {
    if std::fs::read_link(asset).is_ok_and(|target| target == kept) {
        return Ok(());
    }
    let fresh = asset.with_extension("new");
    if std::fs::symlink_metadata(&fresh).is_ok() {
        std::fs::remove_file(&fresh)?;
    }
    std::os::unix::fs::symlink(kept, &fresh)?;
    std::fs::rename(&fresh, asset).with_context(|| format!("cannot write {}", asset.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_need_names_an_earlier_step() {
        for steps in [STEPS, NESTED_STEPS] {
            for (at, step) in steps.iter().enumerate() {
                for need in step.needs {
                    let is_earlier = steps[..at].iter().any(|earlier| earlier.name == *need);
                    assert!(is_earlier, "{} needs {need}", step.name);
                }
            }
        }
    }

    #[test]
    fn keys_depend_on_where_parts_end() {
        let joined = content_key([&b"ab"[..], b"c"]);
        assert_eq!(joined.len(), 16);
        assert_ne!(joined, content_key([&b"a"[..], b"bc"]));
    }

    #[test]
    fn the_asset_follows_the_cache() {
        let folder = std::env::temp_dir().join(format!("xtask-kernel-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let asset = folder.join("vmlinux");
        for target in ["one", "two", "two"] {
            publish(&folder.join(target), &asset).unwrap();
            assert_eq!(std::fs::read_link(&asset).unwrap(), folder.join(target));
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
