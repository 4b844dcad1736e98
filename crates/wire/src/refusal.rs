//! Why a node starts no sandbox, in a form that programs read.
//!
//! The error's code says what a caller should do, its message says it to people; this says which of
//! the node's limits was met, as a header of the answer. An answer without it is no refusal: the
//! start was tried and failed.

use connectrpc::ConnectError;
use http::{HeaderName, HeaderValue};

/// The header's name.
const HEADER: HeaderName = HeaderName::from_static("belljar-refusal");

/// Which of a node's limits a create has met. Nothing of the sandbox was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Its processors are given away.
    Cpu,
    /// Its memory is given away.
    Memory,
    /// Its disk has no room.
    Disk,
    /// As many start as may, and none got done in time.
    StartingSlots,
    /// It holds as many sandboxes as it may.
    SandboxesMax,
    /// It has no free network slot.
    NetworkSlots,
    /// It takes no sandboxes now: it is draining, on standby or stopping.
    Draining,
    /// It does not have the template's build.
    NoTemplate,
    /// It has the build, saved under another driver or version than its own.
    Incompatible,
}

impl Refusal {
    /// Every one.
    pub const ALL: [Refusal; 9] = [
        Refusal::Cpu,
        Refusal::Memory,
        Refusal::Disk,
        Refusal::StartingSlots,
        Refusal::SandboxesMax,
        Refusal::NetworkSlots,
        Refusal::Draining,
        Refusal::NoTemplate,
        Refusal::Incompatible,
    ];

    /// The word on the wire, in logs and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::Cpu => "cpu",
            Refusal::Memory => "memory",
            Refusal::Disk => "disk",
            Refusal::StartingSlots => "starting_slots",
            Refusal::SandboxesMax => "sandboxes_max",
            Refusal::NetworkSlots => "network_slots",
            Refusal::Draining => "draining",
            Refusal::NoTemplate => "no_template",
            Refusal::Incompatible => "incompatible",
        }
    }

    /// The refusal of this word.
    pub fn parse(word: &str) -> Option<Refusal> {
        Refusal::ALL.into_iter().find(|refusal| refusal.as_str() == word)
    }

    /// Whether the same node may take the same request later, when others have ended.
    pub fn may_pass(self) -> bool {
        !matches!(self, Refusal::NoTemplate | Refusal::Incompatible)
    }

    /// The error, saying this.
    #[must_use]
    pub fn mark(self, mut error: ConnectError) -> ConnectError {
        error.response_headers_mut().insert(HEADER, HeaderValue::from_static(self.as_str()));
        error
    }

    /// What an error says. `None` when it is no refusal, or one of a newer node that this program
    /// does not know: the error's code still says what to do.
    pub fn of(error: &ConnectError) -> Option<Refusal> {
        Refusal::parse(error.response_headers().get(HEADER)?.to_str().ok()?)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_read_back_from_an_error_that_is_marked_with_it() {
        for refusal in Refusal::ALL {
            let error = refusal.mark(ConnectError::resource_exhausted("full"));
            assert_eq!(Refusal::of(&error), Some(refusal));
            assert_eq!(error.message.as_deref(), Some("full"));
        }
    }

    #[test]
    fn an_error_without_a_known_word_is_no_refusal() {
        let mut error = ConnectError::unavailable("no");
        assert_eq!(Refusal::of(&error), None);
        error.response_headers_mut().insert(HEADER, HeaderValue::from_static("moon"));
        assert_eq!(Refusal::of(&error), None);
    }
}
