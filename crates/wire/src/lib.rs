//! Wire shapes: everything that leaves or enters a Belljar process as bytes.
//!
//! - [`rest`]: the public REST API's JSON shapes (feature `rest`).
//! - [`rpc`]: generated Connect services of the guest daemon and the node (feature `rpc`).
//! - [`refusal`]: why a node starts no sandbox, in a form both sides read (feature `rpc`).
//! - [`guest`]: control messages between host and guest over virtio-serial (feature `guest`).
//! - [`guest_metrics`]: what a guest says it uses (feature `guest`).
//!
//! Only this crate names wire fields. Services convert to `domain` types at their edge.
#![forbid(unsafe_code)]

#[cfg(feature = "guest")]
pub mod guest;
#[cfg(feature = "guest")]
pub mod guest_metrics;
#[cfg(any(feature = "guest", feature = "rest"))]
mod log_level;
#[cfg(feature = "rpc")]
pub mod refusal;
#[cfg(feature = "rest")]
pub mod rest;

/// Generated from `proto/`: messages, service traits and (feature `client`) clients.
#[cfg(feature = "rpc")]
#[allow(
    missing_docs,
    unreachable_pub,
    unused,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    clippy::unwrap_used,
    reason = "generated code"
)]
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/rpc.rs"));
}

/// Version of the guest daemon's contract this build implements; SDKs gate features on it.
///
/// Source: `contract/e2b-wire.md` section 2.5.
pub const ENVD_VERSION: &str = "0.6.13";

/// TCP port the guest daemon listens on.
///
/// Source: `contract/e2b-wire.md` section 2.
pub const ENVD_PORT: u16 = 49983;
