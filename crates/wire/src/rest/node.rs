//! Nodes, as the operator sees them. Source: contract section 1.6.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Whether a node takes sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum NodeStatus {
    /// It does.
    Ready,
    /// It takes none, and is on its way out.
    Draining,
    /// It has not answered yet.
    Connecting,
    /// It did, and does not now.
    Unhealthy,
    /// It takes none for now.
    Standby,
}

/// The processor of a node's host, in the kernel's own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct MachineInfo {
    /// A number, as text.
    pub cpu_family: String,
    /// A number, as text.
    pub cpu_model: String,
    /// For people.
    pub cpu_model_name: String,
    /// `x86_64` or `aarch64`.
    pub cpu_architecture: String,
}

/// One disk of a node's host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct DiskMetrics {
    /// Where it is mounted.
    pub mount_point: String,
    /// What is mounted there.
    pub device: String,
    /// Its file system.
    pub filesystem_type: String,
    /// Bytes.
    pub used_bytes: u64,
    /// Bytes.
    pub total_bytes: u64,
}

/// What is in use on a node now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct NodeMetrics {
    /// Virtual processors of its sandboxes.
    #[serde(rename = "allocatedCPU")]
    pub allocated_cpu: u64,
    /// Of all the host's processors together, 0 to 100.
    pub cpu_percent: u32,
    /// Processors of the host.
    pub cpu_count: u32,
    /// Memory of its sandboxes, bytes.
    pub allocated_memory_bytes: u64,
    /// Of the host, bytes.
    pub memory_used_bytes: u64,
    /// Of the host, bytes.
    pub memory_total_bytes: u64,
    /// Pages.
    pub huge_pages_total: u64,
    /// Pages.
    pub huge_pages_used: u64,
    /// Pages.
    pub huge_pages_reserved: u64,
    /// Bytes.
    pub huge_page_size_bytes: u64,
    /// Of the host.
    pub disks: Vec<DiskMetrics>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Of its program.
    pub version: String,
    /// Of the source its program was built from; empty when that was not recorded.
    pub commit: String,
    /// The node.
    pub id: String,
    /// Another one after every start of its program.
    #[serde(rename = "serviceInstanceID")]
    pub service_instance_id: String,
    /// The cluster it belongs to. This server has one.
    #[serde(rename = "clusterID")]
    pub cluster_id: String,
    /// The host's processor.
    pub machine_info: MachineInfo,
    /// Whether it takes sandboxes.
    pub status: NodeStatus,
    /// Since when.
    pub status_changed_at: DateTime<Utc>,
    /// Running sandboxes.
    pub sandbox_count: u32,
    /// What is in use.
    pub metrics: NodeMetrics,
    /// Sandboxes it has started, since its program began.
    pub create_successes: u64,
    /// Starts that were begun and failed.
    pub create_fails: u64,
    /// Sandboxes that are starting.
    pub sandbox_starting_count: u32,
}

/// Body of `POST /nodes/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UpdateNodeStatus {
    /// `ready`, `draining` or `standby`; the others are for the server to find.
    pub status: NodeStatus,
}
