//! Control messages between a host and the guest daemon, one JSON object a line over virtio-serial.
//!
//! The channel is the only thing the host trusts to say "ready": it needs no network, survives a
//! snapshot, and the guest pushes on it. A line is at most [`LINE_MAX_BYTES`]; a longer one, or one
//! that does not parse, ends the channel, because the peer is hostile or broken.
//!
//! Order: after a cold boot the guest sends [`FromGuest::Booted`]. After a boot or a restore the
//! host sends [`ToGuest::Init`] and the guest answers [`FromGuest::Ready`] with the same nonce
//! once it serves requests with the new identity. Before a snapshot the host sends
//! [`ToGuest::PrepareSnapshot`] and waits for [`FromGuest::Prepared`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries this channel.
pub const PORT_NAME: &str = "belljar.control.1";

/// Longest line either side accepts, in bytes, line feed included.
pub const LINE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// What the host says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// Become this sandbox.
    Init(Init),
    /// Flush file systems and drop what a snapshot should not carry.
    PrepareSnapshot {
        /// Echoed in the answer.
        nonce: u64,
    },
    /// Stop user processes, flush and power off.
    Shutdown,
}

/// The identity and environment of one run of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Init {
    /// Echoed in [`FromGuest::Ready`].
    pub nonce: u64,
    /// The sandbox the guest now is. Empty while a template is built.
    pub sandbox_id: String,
    /// The template it was started from.
    pub template_id: String,
    /// What `X-Access-Token` must say. `None` asks for no token.
    pub access_token: Option<String>,
    /// Environment of every process, below what a request sets.
    pub env_vars: BTreeMap<String, String>,
    /// The host's clock, nanoseconds since the Unix epoch; 0 leaves the guest's clock alone.
    pub time_unix_ns: u64,
    /// Fresh randomness for the guest kernel's pool, hex. A clone must not repeat its sibling's.
    pub entropy_hex: String,
    /// The user requests run as when they name none; `None` keeps the current one.
    pub default_user: Option<String>,
    /// The directory an empty path means; `None` keeps the current one.
    pub default_workdir: Option<String>,
}

/// What the guest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromGuest {
    /// PID 1 is up and its server listens.
    Booted {
        /// The guest daemon's version.
        envd_version: String,
    },
    /// An [`ToGuest::Init`] was applied.
    Ready {
        /// The nonce of that message.
        nonce: u64,
        /// The guest daemon's version.
        envd_version: String,
    },
    /// A [`ToGuest::PrepareSnapshot`] was applied.
    Prepared {
        /// The nonce of that message.
        nonce: u64,
    },
    /// The guest could not do what it was told.
    Failed {
        /// The nonce of the message it could not follow.
        nonce: u64,
        /// What went wrong. Hostile text: never shown to clients.
        message: String,
    },
}

/// Why a line was not a message.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The line is longer than [`LINE_MAX_BYTES`].
    #[error("parse a guest control line of {len_bytes} bytes, more than {LINE_MAX_BYTES}")]
    TooLong {
        /// Its length.
        len_bytes: usize,
    },
    /// The line is not one of the messages.
    #[error("parse a guest control line")]
    Malformed {
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Encodes one message with its line feed.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let mut line =
        serde_json::to_vec(message).expect("guest messages have string keys and no failing types");
    line.push(b'\n');
    line
}

/// Decodes one line, with or without its line feed.
///
/// # Errors
/// [`LineError`] when the line is too long or not a message.
pub fn decode<M: for<'de> Deserialize<'de>>(line: &[u8]) -> Result<M, LineError> {
    if line.len() > LINE_MAX_BYTES {
        return Err(LineError::TooLong { len_bytes: line.len() });
    }
    serde_json::from_slice(line).map_err(|source| LineError::Malformed { source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_a_round_trip_as_one_line() {
        let init = ToGuest::Init(Init {
            nonce: 7,
            sandbox_id: "iabc".into(),
            access_token: Some("t\nt".into()),
            ..Init::default()
        });
        let line = encode(&init);
        assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        assert_eq!(decode::<ToGuest>(&line).expect("own line"), init);
    }

    #[test]
    fn junk_is_refused_by_name() {
        assert!(matches!(
            decode::<FromGuest>(b"{\"type\":\"rooted\"}"),
            Err(LineError::Malformed { .. })
        ));
        let long = vec![b'x'; LINE_MAX_BYTES + 1];
        assert!(matches!(decode::<FromGuest>(&long), Err(LineError::TooLong { .. })));
    }
}
