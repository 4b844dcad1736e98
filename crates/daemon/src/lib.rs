//! What every long-lived Belljar process needs: task scopes, teardown stacks, telemetry, listeners.
#![forbid(unsafe_code)]

pub mod clock;
#[cfg(feature = "http")]
pub mod downstream;
#[cfg(feature = "http")]
pub mod drain;
pub mod fault;
pub mod scope;
pub mod teardown;
#[cfg(feature = "telemetry")]
pub mod telemetry;

pub use scope::{OnError, Scope};
pub use teardown::Teardown;
