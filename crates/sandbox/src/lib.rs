//! Sandboxes on this host: one owner task each, from restore to teardown.
//!
//! [`Sandboxes`] is the door. What a sandbox holds is written to the [`ledger`] before it exists,
//! acquired in [`boot`], and given back in reverse order by the owner in [`owner`]. A server that
//! was killed leaves ledger entries; [`Sandboxes::open`] reclaims every one of them.
#![forbid(unsafe_code)]

pub mod admission;
pub mod metrics;
pub mod template;

mod archive;
mod boot;
mod chain;
mod fetches;
mod freeze;
mod image_memory;
mod inbox;
mod info;
mod ledger;
mod live;
mod log;
mod owner;
mod probe;
mod ready;
mod reclaim;
mod record;
mod registry;
mod settings;
mod shelf;
mod snapshot;
mod source;
mod spare;
mod table;
mod untold;
mod uploads;
mod warm;

pub use archive::{Archive, FetchError, Pace};
pub use boot::CreateError;
pub use freeze::{KeepError, KeepSandbox};
pub use image_memory::{ImageMemory, StoredMemory};
pub use info::{AutoPause, CreateSandbox, Ended, SandboxInfo, Starting, Untold, UntoldHow};
pub use log::{Direction, LogEntry, LogQuery};
pub use reclaim::Reclaimed;
pub use record::RecordError;
pub use registry::{OpenError, SandboxNotFound, Sandboxes, Usage};
pub use settings::{Deps, MetricsFrom, Settings, Warm};
pub use shelf::{DeleteSnapshotError, SnapshotNotFound};
pub use snapshot::SnapshotMeta;
