//! Programs run inside the sandbox: starting them, their input and output, their end.

mod channel;
mod events;
mod input;
pub(crate) mod log_tap;
mod output;
pub mod registry;
pub mod service;
mod start;
