//! Logs of a sandbox. Source: contract section 1.2.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Time;

/// How bad a line is, least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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

/// One line of a sandbox's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxLogEntry {
    /// When.
    pub timestamp: Time,
    /// What was said.
    pub message: String,
    /// How bad.
    pub level: LogLevel,
    /// What else is known of it. An open list.
    pub fields: BTreeMap<String, String>,
}

/// One line of a sandbox's log as version 1 has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxLog {
    /// When.
    pub timestamp: Time,
    /// A JSON object with at least `level`, `logger` and `message`, as text: clients parse it.
    pub line: String,
}

/// Answer to `GET /sandboxes/{id}/logs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SandboxLogs {
    /// The lines as old clients read them.
    pub logs: Vec<SandboxLog>,
    /// The same lines.
    pub log_entries: Vec<SandboxLogEntry>,
}

/// Answer to `GET /v2/sandboxes/{id}/logs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxLogsV2 {
    /// In the order asked for.
    pub logs: Vec<SandboxLogEntry>,
}
