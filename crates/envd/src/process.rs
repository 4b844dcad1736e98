//! Programs run inside the sandbox: starting them, their input and output, their end.

mod channel;
mod input;
mod output;
pub mod registry;
pub mod service;
mod start;
