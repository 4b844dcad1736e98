//! The outer machine, booted once and saved: every run starts from a private copy of it.
//!
//! Its memory is a file that booting writes and runs only read. It is made again when QEMU, the parts
//! or the host's processor are not those it was saved with.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::counter;
use super::machine::{Origin, Outer, PROGRAM, Plan, shape};
use crate::command;
use crate::places::Places;
use crate::setup::OuterParts;

/// What a saved machine fits; the parts are the folder it lies in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Fit {
    /// What QEMU says about itself: devices' states change between versions.
    qemu: String,
    shape: Vec<String>,
    tsc_khz: u64,
}

impl Fit {
    fn of_this_host() -> Result<Fit> {
        let mut version = Command::new(PROGRAM);
        version.arg("--version");
        let qemu = command::output(version)?.lines().next().unwrap_or_default().to_owned();
        Ok(Fit { qemu, shape: shape(), tsc_khz: counter::frequency_khz()? })
    }

    fn holds(&self, now: &Fit) -> bool {
        self.qemu == now.qemu
            && self.shape == now.shape
            && counter::is_same(self.tsc_khz, now.tsc_khz)
    }
}

/// A running copy of the saved machine, which is made first where there is none. Logs go to `folder`.
pub(super) fn start(places: &Places, parts: &OuterParts, folder: &Path) -> Result<Outer> {
    let kept = parts.folder().join("saved");
    let now = Fit::of_this_host()?;
    let fit = match read(&kept).filter(|saved| saved.holds(&now)) {
        Some(saved) => saved,
        None => {
            eprintln!("boots the outer machine, once for this host: less than a minute");
            let began = Instant::now();
            make(places, parts, &now, &kept)?;
            eprintln!("booted and saved in {:.1} s", began.elapsed().as_secs_f64());
            now
        }
    };
    let (memory, state) = (kept.join("memory"), kept.join("state"));
    let origin = Origin::Saved { state: &state };
    let plan = Plan { parts, memory: &memory, tsc_khz: fit.tsc_khz, origin };
    Outer::start(&plan, folder)
        .with_context(|| format!("cannot start the saved machine in {}", kept.display()))
}

fn read(kept: &Path) -> Option<Fit> {
    let text = std::fs::read(kept.join("fit.json")).ok()?;
    serde_json::from_slice(&text).ok()
}

fn make(places: &Places, parts: &OuterParts, fit: &Fit, kept: &Path) -> Result<()> {
    let work = places.work_folder("nested-boot")?;
    let fresh = work.path().join("saved");
    std::fs::create_dir(&fresh)?;
    let memory = fresh.join("memory");
    let plan = Plan { parts, memory: &memory, tsc_khz: fit.tsc_khz, origin: Origin::Boot };
    let mut outer = Outer::start(&plan, work.path())?;
    outer.ready()?;
    outer.save(&fresh.join("state")).context("cannot save the outer machine")?;
    std::fs::write(fresh.join("fit.json"), serde_json::to_vec(fit)?)?;
    if kept.exists() {
        std::fs::remove_dir_all(kept)?;
    }
    std::fs::rename(&fresh, kept)
        .with_context(|| format!("cannot keep the saved machine in {}", kept.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_machine_fits_its_own_host_only() {
        let now = Fit { qemu: "10.0".to_owned(), shape: shape(), tsc_khz: 2_000_000 };
        assert!(now.holds(&Fit { tsc_khz: 2_000_100, ..now.clone() }));
        assert!(!now.holds(&Fit { tsc_khz: 2_500_000, ..now.clone() }));
        assert!(!now.holds(&Fit { qemu: "10.1".to_owned(), ..now.clone() }));
        assert!(!now.holds(&Fit { shape: Vec::new(), ..now.clone() }));
    }
}
