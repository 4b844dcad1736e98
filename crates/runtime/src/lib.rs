//! Isolation drivers: start, restore, save, freeze and kill one machine.
//!
//! [`Runtime`] is the door; [`qemu`] and [`fake`] are behind it, and [`contract`] is the one suite
//! both pass. Nothing above this crate knows which driver it talks to, except to say its tier.

pub mod machine;

pub use machine::{
    BootSource, ControlStream, DiskExport, ExitCause, Identity, KillError, Machine, MachineSpec,
    NetworkAttachment, PauseError, Runtime, SaveError, StartError,
};
