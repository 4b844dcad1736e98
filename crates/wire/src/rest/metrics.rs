//! What sandboxes and teams use. Source: contract sections 1.2 and 1.6.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// What a sandbox used at a moment, by its guest's own word.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct SandboxMetric {
    /// When. Old clients read this form.
    pub timestamp: DateTime<Utc>,
    /// The same, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Virtual processors.
    pub cpu_count: u32,
    /// Of all of them together, 0 to 100.
    pub cpu_used_pct: f32,
    /// Memory in use, in bytes, without caches.
    pub mem_used: i64,
    /// All memory, in bytes.
    pub mem_total: i64,
    /// Memory that holds files and can be had back, in bytes.
    pub mem_cache: i64,
    /// Disk in use, in bytes.
    pub disk_used: i64,
    /// All of the disk, in bytes.
    pub disk_total: i64,
}

/// Answer of `GET /sandboxes/metrics`: the newest sample of each sandbox, by its id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxesWithMetrics {
    /// Sandboxes that are not the team's, or have no sample yet, are absent.
    pub sandboxes: BTreeMap<String, SandboxMetric>,
}

/// What a team used in one step of time. Names as in upstream's public specification of the API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct TeamMetric {
    /// When the step begins.
    pub timestamp: DateTime<Utc>,
    /// The same, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Most sandboxes that were seen running at the same time.
    pub concurrent_sandboxes: u32,
    /// Sandboxes started a second, on average.
    pub sandbox_start_rate: f64,
}

/// The highest value of one of a team's metrics. Names as in upstream's public specification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct MaxTeamMetric {
    /// When it was last reached.
    pub timestamp: DateTime<Utc>,
    /// The same, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Sandboxes, or sandboxes a second.
    pub value: f64,
}
