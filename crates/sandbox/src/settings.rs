//! Where sandboxes live on a host, within what limits, and what they are made with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock::Clock;
use belljar_network::Slots;
use belljar_runtime::Runtime;

use crate::admission::Limits;
use crate::archive::Archive;
use crate::metrics::Figures;

/// Where and how sandboxes live on this host.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Told apart from other servers on this host by this, `[a-z0-9]`, at most 4 bytes.
    pub host_tag: String,
    /// The data folder: `templates`, `snapshots` and the `layers` they are made of are in it. Private
    /// disk files become layers, so their folder must be on its file system.
    pub data_dir: PathBuf,
    /// Ledger entries.
    pub ledger_dir: PathBuf,
    /// Ends that nobody could be told of yet.
    pub untold_dir: PathBuf,
    /// Sockets and logs; every part of the path must be passable by the machines' users.
    pub run_dir: PathBuf,
    /// Private disk files.
    pub overlay_dir: PathBuf,
    /// First user id for machine processes, one a network slot; `None` keeps the daemon's user.
    pub machine_uid_base: Option<u32>,
    /// What sandboxes may take together.
    pub limits: Limits,
    /// Templates of which sandboxes stand ready.
    pub warm: Vec<Warm>,
    /// Where figures on what sandboxes use come from.
    pub metrics: MetricsFrom,
    /// How long a guest may take to boot. Emulated ones take some seconds on an idle host.
    pub boot_deadline: Duration,
    /// How long a restored guest may take to say it is ready.
    pub ready_deadline: Duration,
    /// How long one teardown step may take.
    pub teardown_step_deadline: Duration,
}

impl Settings {
    /// Template folders.
    pub fn templates_dir(&self) -> PathBuf {
        self.data_dir.join("templates")
    }

    /// Snapshot folders.
    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.data_dir.join("snapshots")
    }
}

/// Sandboxes of one template that stand ready, so that a create that fits takes one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warm {
    /// An alias or the id of a template of this host, or the id of a build.
    pub template: String,
    /// How many stand ready, as long as the host has room for them. 0 is none.
    pub count: u32,
}

/// Where figures on what sandboxes use come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MetricsFrom {
    /// Each guest's daemon, over HTTP.
    Guests,
    /// Here, the same for every sandbox and at any time: for runtimes without guests. Processors,
    /// memory and disk are those of the sandbox's template.
    Made(Figures),
}

/// What sandboxes are made with.
#[derive(Clone)]
pub struct Deps {
    /// The isolation driver.
    pub runtime: Arc<dyn Runtime>,
    /// The network slots.
    pub slots: Arc<dyn Slots>,
    /// What ends of sandboxes go by.
    pub clock: Clock,
    /// Where snapshots are kept besides this host's disk, and taken from when they are not on it.
    pub archive: Option<Arc<Archive>>,
}
