//! What tests of every crate share: loud skips, the host leak oracle and the log oracle.
//!
//! A dev-dependency only; nothing here is part of a product binary.
#![forbid(unsafe_code)]

pub mod environment;
pub mod leaks;
pub mod logs;
pub mod postgres;

mod cgroups;
mod network;
mod processes;

pub use environment::{Assets, acceleration, assets, firecracker, is_root, patience, skip};
pub use leaks::{HostSnapshot, Sight, assert_clean};
pub use logs::{LogOracle, Transcript};
