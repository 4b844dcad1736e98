//! The base template, made by `belljar` itself; this file decides when that is due.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{belljar_program, content_key};
use crate::command;
use crate::steps::{OrFix, Outcome, StepContext, StepError};

const ROOT_FIX: &str = "run this as root, or let `sudo` run without a password";

/// Writes `rootfs.ext4` when the daemon or the program that writes it changed.
pub(super) fn rootfs(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let places = context.places;
    let program = belljar_program(places, context.goal.build);
    let key = content_key([&digest(&program)?[..], &digest(&places.envd())?]);
    let stamp = Stamp { path: places.cache.join("rootfs.stamp"), key };
    if stamp.is_current() && places.rootfs().is_file() {
        return Ok(Outcome::Cached(places.rootfs().display().to_string()));
    }
    command::require_root().or_fix(ROOT_FIX)?;
    stamp.withdraw()?;
    let mut command = command::as_root(&program);
    command.args(["template", "rootfs", "--envd"]).arg(places.envd());
    command.arg("--output").arg(places.rootfs());
    command.arg("--cache").arg(places.cache.join("packages"));
    run(context, command)?;
    stamp.set()?;
    Ok(Outcome::Done(places.rootfs().display().to_string()))
}

/// Boots the root file system once and snapshots it. `belljar` itself keeps an equal template and
/// is asked each time: not only our files decide, but this host's QEMU and KVM as well.
pub(super) fn build(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let places = context.places;
    let program = belljar_program(places, context.goal.build);
    let data = &context.goal.data;
    command::require_root().or_fix(ROOT_FIX)?;
    let mut command = command::as_root(&program);
    command.args(["template", "build", "base", "--kernel"]).arg(places.kernel());
    command.arg("--rootfs").arg(places.rootfs()).arg("--data-dir").arg(data);
    let mut is_cached = false;
    context.run(command, |line| {
        is_cached |= line.ends_with("is up to date");
        if !line.trim().is_empty() {
            context.say(line);
        }
    })?;
    let text = format!("`base` in {}", data.display());
    Ok(if is_cached { Outcome::Cached(text) } else { Outcome::Done(text) })
}

fn run(context: &StepContext<'_>, command: Command) -> Result<()> {
    context.run(command, |line| {
        if !line.trim().is_empty() {
            context.say(line);
        }
    })
}

/// A file that says from what a result was made.
pub(super) struct Stamp {
    pub(super) path: PathBuf,
    pub(super) key: String,
}

impl Stamp {
    pub(super) fn is_current(&self) -> bool {
        std::fs::read_to_string(&self.path).is_ok_and(|key| key == self.key)
    }

    /// Before the work: a result half made must not pass for the old one.
    pub(super) fn withdraw(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub(super) fn set(&self) -> Result<()> {
        std::fs::write(&self.path, &self.key)
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

fn digest(path: &Path) -> Result<Vec<u8>> {
    struct Hasher(Sha256);
    impl io::Write for Hasher {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut hasher = Hasher(Sha256::new());
    std::fs::File::open(path)
        .and_then(|mut file| io::copy(&mut file, &mut hasher))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hasher.0.finalize().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_holds_until_its_key_changes_or_work_begins() {
        let path = std::env::temp_dir().join(format!("xtask-stamp-{}", std::process::id()));
        let stamp = Stamp { path: path.clone(), key: "one".to_owned() };
        stamp.withdraw().unwrap();
        assert!(!stamp.is_current());
        stamp.set().unwrap();
        assert!(stamp.is_current());
        let other = Stamp { path, key: "two".to_owned() };
        assert!(!other.is_current());
        other.withdraw().unwrap();
        assert!(!stamp.is_current());
    }
}
