//! Control messages between a host and the guest daemon, one JSON object a line over virtio-serial.
//!
//! The channel is the only thing the host trusts to say "ready": it needs no network, survives a
//! snapshot, and the guest pushes on it. A line is at most [`LINE_MAX_BYTES`]; a longer one, or one
//! that does not parse, ends the channel, because the peer is hostile or broken. What a guest says
//! is held to [`FROM_GUEST_LINE_MAX_BYTES`]. An empty line says nothing and is passed over: a guest
//! that had to stop in the middle of a line ends it with a line feed before it goes on.
//!
//! Order: after a cold boot the guest sends [`FromGuest::Booted`]. After a boot or a restore the
//! host sends [`ToGuest::Init`] and the guest answers [`FromGuest::Ready`] with the same nonce
//! once it serves requests with the new identity. Before a snapshot the host sends
//! [`ToGuest::PrepareSnapshot`] and waits for [`FromGuest::Prepared`]. A machine that goes on after
//! its snapshot is told so by [`ToGuest::Continue`] and answers [`FromGuest::Continued`]; one that
//! is started from the snapshot gets an `Init` as any other.
//!
//! Logs: a guest that was told to by [`Init::logs`] sends [`FromGuest::Log`] between its answers,
//! until it is told to prepare a snapshot: a saved guest is never in the middle of a line. What it
//! has to say from then on it keeps; `Continue` has it sent, and `Init` has it thrown away, because a
//! clone must not repeat what its origin said.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::log_level::LogLevel;

/// Name of the virtio-serial port that carries this channel.
pub const PORT_NAME: &str = "belljar.control.1";

/// Port in a guest, on its socket device, where its daemon listens for the host when the machine has
/// no virtio-serial port. Only root may listen on ports below 1024.
pub const CONTROL_PORT: u32 = 1000;

/// Port of the host to which such a daemon connects, and says nothing, when it waits for the host:
/// after a boot, and whenever its connection has ended.
pub const KNOCK_PORT: u32 = 1024;

/// Longest line either side accepts, in bytes, line feed included.
pub const LINE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// Longest line a host accepts, in bytes. A guest's answers are short; its logs are cut to fit.
pub const FROM_GUEST_LINE_MAX_BYTES: usize = 256 * 1024;

/// Longest text of one log line, in bytes of UTF-8. A longer line of output becomes several.
pub const LOG_TEXT_MAX_BYTES: usize = 4096;

/// Longest name of a command in a log line, in bytes of UTF-8.
pub const LOG_COMMAND_MAX_BYTES: usize = 256;

/// Connections to servers on the guest's loopback that its daemon carries at a time; one more gets
/// 429, and the proxy tells the client. Two descriptors and 32 KiB each.
pub const MAX_TUNNELS: usize = 512;

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
    /// Go on as the sandbox the guest was before [`ToGuest::PrepareSnapshot`]: nothing of it is
    /// closed or forgotten.
    Continue {
        /// Echoed in [`FromGuest::Continued`].
        nonce: u64,
        /// The host's clock, nanoseconds since the Unix epoch; 0 leaves the guest's clock alone.
        time_unix_ns: u64,
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
    /// Whether to send the output of processes as [`FromGuest::Log`] from now on.
    pub logs: bool,
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
    /// A [`ToGuest::Continue`] was applied.
    Continued {
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
    /// What processes said and did, oldest first.
    Log {
        /// At most as many as fit in a line.
        lines: Vec<LogLine>,
    },
}

/// One line of a process's output, or one event of its life. Hostile: every field is what the
/// guest says it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When, by the guest's clock, milliseconds since the Unix epoch.
    pub at_unix_ms: i64,
    /// How bad.
    pub level: LogLevel,
    /// What it is about.
    pub event: LogEvent,
    /// The process; 0 when it is about none.
    pub pid: u32,
    /// Its program and arguments, cut to [`LOG_COMMAND_MAX_BYTES`].
    pub command: String,
    /// The line without its end, cut to [`LOG_TEXT_MAX_BYTES`].
    pub text: String,
    /// Whether the line was longer and goes on in the next one of the same process and stream.
    pub cut: bool,
}

/// What a log line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogEvent {
    /// A line of standard output.
    Stdout,
    /// A line of standard error.
    Stderr,
    /// A line on a terminal.
    Pty,
    /// A process was started.
    ProcessStart,
    /// A process ended.
    ProcessEnd,
    /// Lines were left out, because they came faster than a log takes them.
    Dropped,
}

impl LogEvent {
    /// Its word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            LogEvent::Stdout => "stdout",
            LogEvent::Stderr => "stderr",
            LogEvent::Pty => "pty",
            LogEvent::ProcessStart => "process_start",
            LogEvent::ProcessEnd => "process_end",
            LogEvent::Dropped => "dropped",
        }
    }
}

/// The longest start of `text` that has at most `max_bytes` and ends between two characters.
pub fn cut_text(text: &str, max_bytes: usize) -> &str {
    text.get(..text.floor_char_boundary(max_bytes)).unwrap_or(text)
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
    fn going_on_is_spelled_as_both_sides_know_it() {
        let go_on = ToGuest::Continue { nonce: 3, time_unix_ns: 1_700_000_000_000_000_000 };
        let line = br#"{"type":"continue","nonce":3,"time_unix_ns":1700000000000000000}"#;
        assert_eq!(decode::<ToGuest>(line).expect("a message"), go_on);
        assert_eq!(decode::<ToGuest>(&encode(&go_on)).expect("own line"), go_on);
        let line = br#"{"type":"continued","nonce":3}"#;
        assert_eq!(
            decode::<FromGuest>(line).expect("a message"),
            FromGuest::Continued { nonce: 3 }
        );
    }

    fn log_line() -> LogLine {
        LogLine {
            at_unix_ms: 1_700_000_000_000,
            level: LogLevel::Error,
            event: LogEvent::Stderr,
            pid: 7,
            command: "/bin/sh -c x".into(),
            text: "two\nlines".into(),
            cut: false,
        }
    }

    #[test]
    fn logs_are_spelled_as_both_sides_know_them() {
        let log = FromGuest::Log { lines: vec![log_line()] };
        let line = encode(&log);
        let text = String::from_utf8(line.clone()).expect("JSON is text");
        assert_eq!(
            text,
            concat!(
                r#"{"type":"log","lines":[{"at_unix_ms":1700000000000,"level":"error","#,
                r#""event":"stderr","pid":7,"command":"/bin/sh -c x","text":"two\nlines","#,
                r#""cut":false}]}"#,
                "\n"
            )
        );
        assert_eq!(decode::<FromGuest>(&line).expect("own line"), log);
        let events = [
            LogEvent::Stdout,
            LogEvent::Stderr,
            LogEvent::Pty,
            LogEvent::ProcessStart,
            LogEvent::ProcessEnd,
            LogEvent::Dropped,
        ];
        for event in events {
            let json = serde_json::to_string(&event).expect("a word");
            assert_eq!(json, format!("\"{}\"", event.as_str()));
        }
        for word in ["debug", "info", "warn", "error"] {
            let level = LogLevel::parse(word).expect("a level");
            assert_eq!(serde_json::to_string(&level).expect("a word"), format!("\"{word}\""));
        }
        assert_eq!(LogLevel::parse("fatal"), None);
        assert!(LogLevel::Debug < LogLevel::Info && LogLevel::Warn < LogLevel::Error);
    }

    /// A line with few bytes must not become a structure with many: fields are all required.
    #[test]
    fn a_log_line_without_its_fields_is_refused() {
        let empty = br#"{"type":"log","lines":[{}]}"#;
        assert!(matches!(decode::<FromGuest>(empty), Err(LineError::Malformed { .. })));
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut_text("h\u{fc}h", 2), "h");
        assert_eq!(cut_text("h\u{fc}h", 3), "h\u{fc}");
        assert_eq!(cut_text("short", 100), "short");
        assert_eq!(cut_text("\u{1f600}", 3), "");
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
