//! Sandbox traffic: one listener that routes each request to the sandbox it names.
//!
//! A request names its sandbox and port by host (`{port}-{id}.{domain}`), by the headers
//! `E2b-Sandbox-Id` and `E2b-Sandbox-Port`, or by the signature of a file URL. HTTP/1.1, h2c,
//! WebSocket and any other upgrade pass, streamed both ways. Source of every rule and text:
//! `contract/e2b-wire.md` sections 3.2 to 3.6.
#![forbid(unsafe_code)]

pub mod catalog;
pub mod server;
pub mod signature;

mod answers;
mod connect;
mod guest_socket;
mod headers;
mod loopback;
mod relay;
mod request_body;
mod routing;
mod tunnel;
mod upstream;
mod wake;

pub use catalog::{MemoryCatalog, Route, Routes, Target};
pub use server::{Config, Deps, ServeError, serve};
pub use signature::SignedUrl;
pub use wake::{Asleep, Visitor, Wake, Waking};
