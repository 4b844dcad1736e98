//! Logs of a sandbox. Source: contract section 1.2.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

pub use crate::log_level::LogLevel;

/// One line of a sandbox's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxLogEntry {
    /// When.
    pub timestamp: DateTime<Utc>,
    /// What was said.
    pub message: String,
    /// How bad.
    pub level: LogLevel,
    /// What else is known of it. An open list.
    pub fields: BTreeMap<String, String>,
}

/// One line of a sandbox's log as version 1 has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxLog {
    /// When.
    pub timestamp: DateTime<Utc>,
    /// A JSON object with at least `level`, `logger` and `message`, as text: clients parse it.
    pub line: String,
}

/// Answer to `GET /sandboxes/{id}/logs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct SandboxLogs {
    /// The lines as old clients read them.
    pub logs: Vec<SandboxLog>,
    /// The same lines.
    pub log_entries: Vec<SandboxLogEntry>,
}

/// Answer to `GET /v2/sandboxes/{id}/logs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxLogsV2 {
    /// In the order asked for.
    pub logs: Vec<SandboxLogEntry>,
}
