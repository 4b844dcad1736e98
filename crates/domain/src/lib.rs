//! Ids, units, the sandbox lifecycle and error kinds: values and total functions only.
//!
//! No I/O, no clock, no serialisation. Stored and sent shapes live with their store and in `wire`.
#![forbid(unsafe_code)]

pub mod id;
pub mod kind;
pub mod lifecycle;
pub mod secret;
pub mod stock;
pub mod time;
pub mod units;

pub use id::{BuildId, ExecutionId, IdError, SandboxId, TemplateId};
pub use kind::Kind;
pub use secret::Secret;
pub use time::UnixMillis;
pub use units::{MiB, Vcpus};

/// What isolates a sandbox, from strongest to none.
///
/// A sandbox says which tier it runs on, and so does every published number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// A virtual machine on hardware virtualisation.
    Microvm,
    /// A virtual machine whose CPU is emulated: full semantics, slow, not a hardened boundary.
    Emulated,
    /// A user-space kernel.
    Gvisor,
    /// No isolation at all: the fake runtime of tests.
    Fake,
}

impl Tier {
    /// The word used in configuration, on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Tier::Microvm => "microvm",
            Tier::Emulated => "emulated",
            Tier::Gvisor => "gvisor",
            Tier::Fake => "fake",
        }
    }
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
