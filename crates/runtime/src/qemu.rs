//! The QEMU driver: `microvm` machines on KVM, or emulated where no KVM runs guests.
//!
//! A machine's memory is a file. A booted machine shares it, so that saving writes the device
//! state only (some 60 KB in some milliseconds); every restored machine maps it privately, so
//! that all of them share the pages nobody changed. A snapshot of such a machine is its device state
//! and the pages that are its own, copied out of its frozen process; to restore one, those pages are
//! copied into a new process before it runs. The monitor and the guest's control port are
//! socket pairs the process inherits: there is no socket file to guard, to wait for or to leave.
//!
//! The process runs without privileges to gain, in its own cgroup and network namespace, under
//! QEMU's system call filter, as another user if asked, and dies with this process.

mod args;
pub(crate) mod detect;
mod files;
mod machine;
mod qmp;
mod snapshot;
mod start;

pub use detect::{DetectError, TierReason};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use belljar_domain::Tier;
use tracing::debug;

use crate::cgroup::Cgroups;
use crate::keeper::Keeper;
use crate::leftovers;
use crate::machine::{BootSource, KillError, Machine, MachineSpec, Runtime, StartError};
use crate::pages::SavedMachine;
use crate::saved::Shape;
use args::Accelerator;

/// What the driver is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuConfig {
    /// Absolute path of `qemu-system-x86_64`, version 10 or later.
    pub binary: PathBuf,
    /// How guests may run.
    pub acceleration: Acceleration,
    /// Name of the folder the machines' cgroups are in, below each root.
    pub cgroup_parent: String,
    /// Keeps the guest's console in `console.log` of the run folder, and its kernel talkative. For
    /// finding out why a guest does not start: a guest can fill the host's disk this way.
    pub console_log: bool,
    /// How long each step of a start may take: from exec to a monitor that answers (50 ms alone, a
    /// second in a crowd), and loading a saved state (10 ms alone). 20 s; more where QEMU itself runs
    /// on an emulated processor.
    pub step_limit: Duration,
}

impl Default for QemuConfig {
    fn default() -> QemuConfig {
        QemuConfig {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            acceleration: Acceleration::Auto,
            cgroup_parent: "belljar".to_owned(),
            console_log: false,
            step_limit: Duration::from_secs(20),
        }
    }
}

/// How guests may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// On KVM if it really runs guests, else emulated.
    Auto,
    /// On KVM or not at all.
    Kvm,
    /// Emulated, whatever KVM can do.
    Emulated,
}

/// The driver. Machines may outlive it.
#[derive(Debug)]
pub struct QemuRuntime {
    config: QemuConfig,
    tier: Tier,
    fingerprint: String,
    accelerator: Accelerator,
    cgroups: Arc<Cgroups>,
    keeper: Arc<Keeper>,
}

impl QemuRuntime {
    /// Finds out what this host can do, by running QEMU and a tiny KVM guest (up to 4 s, or 30 s where
    /// KVM was asked for by name).
    ///
    /// # Errors
    /// [`DetectError`].
    pub async fn detect(config: QemuConfig) -> Result<(QemuRuntime, TierReason), DetectError> {
        let found = detect::detect(&config).await?;
        let keeper = Keeper::start().map_err(|source| DetectError::Io {
            step: "start the thread that starts machines",
            source,
        })?;
        let cgroups = Cgroups::discover(&config.cgroup_parent);
        debug!(limits = %cgroups, tier = %found.reason.tier, "QEMU driver is up");
        let processor = match found.accelerator {
            Accelerator::Kvm => format!("kvm on {}", detect::processor()),
            Accelerator::Emulated { .. } => format!("emulated {}", args::EMULATED_CPU),
        };
        let runtime = QemuRuntime {
            tier: found.reason.tier,
            fingerprint: format!(
                "qemu {} microvm layout {}, {processor}",
                found.version,
                args::LAYOUT
            ),
            accelerator: found.accelerator,
            cgroups: Arc::new(cgroups),
            keeper,
            config,
        };
        Ok((runtime, found.reason))
    }

    /// What bounds the machines' processes, for people: the cgroups' place, or why nothing does.
    pub fn limited_by(&self) -> String {
        self.cgroups.to_string()
    }

    fn shape(&self, spec: &MachineSpec) -> Shape {
        Shape { fingerprint: self.fingerprint.clone(), vcpus: spec.vcpus, memory: spec.memory }
    }
}

#[async_trait]
impl Runtime for QemuRuntime {
    fn tier(&self) -> Tier {
        self.tier
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    async fn boot(
        &self,
        spec: MachineSpec,
        source: BootSource,
    ) -> Result<Box<dyn Machine>, StartError> {
        Ok(Box::new(start::boot(self, spec, source).await?))
    }

    async fn restore(
        &self,
        spec: MachineSpec,
        saved: SavedMachine,
    ) -> Result<Box<dyn Machine>, StartError> {
        Ok(Box::new(start::restore(self, spec, saved).await?))
    }

    async fn reclaim(&self, name: &str) -> Result<bool, KillError> {
        let fail = |reason: String| KillError {
            name: name.to_owned(),
            what: "what an earlier process left",
            reason,
        };
        if !MachineSpec::is_name(name) {
            return Err(fail("that is no name of a machine".to_owned()));
        }
        let group = self.cgroups.group(name);
        let owned = name.to_owned();
        let removing = move || {
            let [option, value] = args::marker(&owned);
            leftovers::remove(&owned, [&option, &value], &group)
        };
        tokio::task::spawn_blocking(removing).await.map_err(|e| fail(e.to_string()))?
    }
}
