//! Isolation drivers: start, restore, save, snapshot, freeze and kill one machine.
//!
//! [`Runtime`] is the door; [`qemu`] and [`fake`] are behind it, and [`contract`] is the one suite
//! both pass. Nothing above this crate knows which driver it talks to, except to say its tier.

pub mod contract;
pub mod control;
pub mod fake;
pub mod machine;
pub mod pages;
pub mod qemu;
pub mod uffd;

mod cgroup;
mod draft;
mod keeper;
mod leftovers;
mod lines;
mod saved;
mod sys;

pub use control::{ControlError, GuestControl};
pub use machine::{
    BootMemory, BootSource, ControlStream, DiskExport, ExitCause, Identity, KillError, Machine,
    MachineSpec, NetworkAttachment, PauseError, Runtime, SaveError, StartError,
};
pub use pages::{PageSink, PageSource, SavedMachine, SavedMemory, SnapshotTarget};
pub use qemu::{QemuConfig, QemuRuntime, TierReason};
pub use saved::sync_saved;
