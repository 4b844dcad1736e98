//! Sandboxes on this host: one owner task each, from restore to teardown.
//!
//! [`Sandboxes`] is the door. What a sandbox holds is written to the [`ledger`] before it exists,
//! acquired in [`boot`], and given back in reverse order by the owner in [`owner`]. A server that
//! was killed leaves ledger entries; [`Sandboxes::open`] reclaims every one of them.
#![forbid(unsafe_code)]

pub mod template;

mod boot;
mod info;
mod ledger;
mod log;
mod owner;
mod registry;
mod settings;

pub use boot::CreateError;
pub use info::{CreateSandbox, Ended, SandboxInfo};
pub use log::{Direction, LogEntry, LogQuery};
pub use registry::{OpenError, Reclaimed, SandboxNotFound, Sandboxes};
pub use settings::{Deps, Settings};
