//! The guest daemon: what answers inside a sandbox.
//!
//! As PID 1 of a guest VM it sets the machine up ([`guest`]) and serves the sandbox API on TCP
//! port 49983: processes ([`process`]) and file system ([`files`]) over Connect RPC, file content,
//! health and metrics over plain HTTP ([`http_api`]). In host mode it serves the same API for the
//! user who started it, without touching the machine.
//!
//! The daemon is static and runs inside arbitrary root file systems, so it never calls the C
//! library's name services: accounts come from [`accounts`], addresses are never names.

pub mod accounts;
pub mod args;
pub mod auth;
pub mod children;
pub mod clock;
pub mod files;
pub mod guest;
pub mod http_api;
pub mod log;
pub mod metrics;
pub mod process;
pub mod server;
pub mod state;
pub mod task;
pub mod workload;

#[cfg(test)]
mod fuzz;
mod sys;
mod tunnel;

pub use server::serve;
pub use state::{Settings, State};
