//! How bad a line of a sandbox's log is: one scale from the guest to the REST API.

use serde::{Deserialize, Serialize};

/// How bad a line is, least first.
// Source of the words: `contract/e2b-wire.md` section 1.2, SandboxLogEntry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// For whoever looks for a fault.
    Debug,
    /// As it should be.
    Info,
    /// To be looked at.
    Warn,
    /// Wrong.
    Error,
}

impl LogLevel {
    /// Its word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warn => "warn",
            LogLevel::Error => "error",
        }
    }

    /// The level a word names.
    pub fn parse(word: &str) -> Option<LogLevel> {
        let all = [LogLevel::Debug, LogLevel::Info, LogLevel::Warn, LogLevel::Error];
        all.into_iter().find(|level| level.as_str() == word)
    }
}
