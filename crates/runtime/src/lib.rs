//! Isolation drivers: start, restore, save, snapshot, freeze and kill one machine.
//!
//! [`Runtime`] is the door; [`qemu`], [`firecracker`] and [`fake`] are behind it, and [`contract`] is
//! the one suite all pass. Nothing above this crate knows which driver it talks to, except to say its tier.

pub mod contract;
pub mod control;
pub mod fake;
pub mod firecracker;
pub mod machine;
pub mod pages;
pub mod qemu;
pub mod uffd;

mod cgroup;
mod draft;
mod keeper;
mod leftovers;
mod lines;
mod memory;
mod saved;
mod sys;
mod tap;

pub use control::{ControlError, GuestControl};
pub use firecracker::{FirecrackerConfig, FirecrackerRuntime};
pub use machine::{
    BootMemory, BootSource, ControlStream, DiskExport, ExitCause, Identity, KillError, Machine,
    MachineSpec, NetworkAttachment, PauseError, Runtime, SaveError, StartError,
};
pub use pages::{PageSink, PageSource, SavedMachine, SavedMemory, SnapshotTarget};
pub use qemu::{QemuConfig, QemuRuntime, TierReason};
pub use saved::sync_saved;
