//! Where sandboxes live on a host, within what limits, and what they are made with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use belljar_network::Slots;
use belljar_runtime::Runtime;

/// Where and how sandboxes live on this host.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Told apart from other servers on this host by this, `[a-z0-9]`, at most 4 bytes.
    pub host_tag: String,
    /// Ledger entries.
    pub ledger_dir: PathBuf,
    /// Sockets and logs; every part of the path must be passable by the machines' users.
    pub run_dir: PathBuf,
    /// Private disk files.
    pub overlay_dir: PathBuf,
    /// Template folders.
    pub templates_dir: PathBuf,
    /// First user id for machine processes, one a network slot; `None` keeps the daemon's user.
    pub machine_uid_base: Option<u32>,
    /// Most sandboxes held at once.
    pub sandboxes_max: usize,
    /// Most sandboxes that start at once; more wait their turn.
    pub starting_max: usize,
    /// How long a restored guest may take to say it is ready.
    pub ready_deadline: Duration,
    /// How long one teardown step may take.
    pub teardown_step_deadline: Duration,
}

/// What sandboxes are made with.
#[derive(Clone)]
pub struct Deps {
    /// The isolation driver.
    pub runtime: Arc<dyn Runtime>,
    /// The network slots.
    pub slots: Arc<dyn Slots>,
}
