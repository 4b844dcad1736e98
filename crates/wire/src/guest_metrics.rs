//! What the guest daemon answers to `GET /metrics`, as far as the host reads it.
//!
//! Source: `contract/e2b-wire.md` section 2.1.

use serde::Deserialize;

/// Longest answer that is read, bytes; real ones have under 300.
pub const METRICS_MAX_BYTES: usize = 16 * 1024;

/// The answer. Sizes are bytes. Fields a later daemon adds are passed over.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct GuestMetrics {
    /// Online processors.
    pub cpu_count: u32,
    /// Share of all processors used since the call before, percent.
    pub cpu_used_pct: f32,
    /// Memory.
    pub mem_total: u64,
    /// Memory in use, without what the kernel could drop.
    pub mem_used: u64,
    /// Page cache.
    #[serde(default)]
    pub mem_cache: u64,
    /// Root file system in use.
    pub disk_used: u64,
    /// Root file system.
    pub disk_total: u64,
}
