//! What every long-lived Belljar process needs: task scopes, teardown stacks, telemetry, listeners.
#![forbid(unsafe_code)]

pub mod clock;
pub mod scope;
pub mod teardown;
pub mod telemetry;

pub use scope::{OnError, Scope};
pub use teardown::Teardown;
