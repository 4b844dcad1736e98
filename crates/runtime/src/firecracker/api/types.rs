//! What the calls carry. Field names are Firecracker's.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The name of a device: letters, digits and underscores, at most 64 bytes. It is part of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Id(String);

/// Why a text is no device's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("use `{text}` as a device's name: 1 to 64 letters, digits and underscores are")]
pub struct IdError {
    /// The text.
    pub text: String,
}

impl Id {
    /// # Errors
    /// [`IdError`].
    pub fn new(text: &str) -> Result<Id, IdError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if (1..=64).contains(&text.len()) && text.bytes().all(plain) {
            return Ok(Id(text.to_owned()));
        }
        Err(IdError { text: text.to_owned() })
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootSource {
    /// As Firecracker sees it.
    pub kernel_image_path: String,
    /// The kernel's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Its first files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
}

/// Processors and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// 1 to 32.
    pub vcpu_count: u32,
    /// MiB.
    pub mem_size_mib: u32,
    /// Whether siblings of one core are shown as such.
    #[serde(default)]
    pub smt: bool,
    /// Whether diff snapshots are to be possible.
    #[serde(default)]
    pub track_dirty_pages: bool,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// Its name.
    pub drive_id: Id,
    /// A file or a block device, as Firecracker sees it.
    pub path_on_host: String,
    /// Whether the kernel is told to mount it as root.
    pub is_root_device: bool,
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// Whether the guest's flushes reach the file.
    pub cache_type: &'static str,
    /// Bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Changes of a disk; also how a new size of its file becomes known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DriveUpdate {
    /// Its name.
    pub drive_id: Id,
    /// Another file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// Other bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Bounds of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// So many at once, and so many again in so much time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Bytes or operations.
    pub size: u64,
    /// Milliseconds until an empty bucket is full.
    pub refill_time: u64,
    /// Beyond `size`, once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkInterface {
    /// Its name.
    pub iface_id: Id,
    /// The tap, in Firecracker's network namespace.
    pub host_dev_name: String,
    /// The card's address, `02:00:…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Bounds of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Bounds of what it sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Other bounds for a card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkInterfaceUpdate {
    /// Its name.
    pub iface_id: Id,
    /// Of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Of what it sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Vsock {
    /// The guest's number, from 3.
    pub guest_cid: u32,
    /// The host's socket, as Firecracker sees it. It must not be there.
    pub uds_path: String,
}

pub(super) fn entropy(rate: Option<&RateLimiter>) -> Option<Value> {
    Some(rate.map_or_else(|| json!({}), |rate| json!({ "rate_limiter": rate })))
}

/// A balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// MiB taken from the guest.
    pub amount_mib: u32,
    /// Whether it gives back when the guest's memory ends.
    pub deflate_on_oom: bool,
    /// Seconds between figures; 0 is none.
    #[serde(default)]
    pub stats_polling_interval_s: u32,
}

/// Another size of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BalloonUpdate {
    /// MiB.
    pub amount_mib: u32,
}

/// What the guest says of its memory; what it leaves out is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct BalloonStatistics {
    /// MiB wanted.
    pub target_mib: u64,
    /// MiB taken.
    pub actual_mib: u64,
    /// Bytes nobody uses.
    pub free_memory: Option<u64>,
    /// Bytes there are.
    pub total_memory: Option<u64>,
    /// Bytes that can be had without swapping.
    pub available_memory: Option<u64>,
}

/// How often it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BalloonStatisticsUpdate {
    /// Seconds. Only a balloon that was made with figures takes it.
    pub stats_polling_interval_s: u32,
}

/// Generation of the metadata service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Without sessions.
    V1,
    /// With sessions.
    V2,
}

/// Which cards reach the metadata service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MmdsConfig {
    /// Its generation.
    pub version: MmdsVersion,
    /// The cards.
    pub network_interfaces: Vec<Id>,
    /// Its address, of 169.254.0.0/16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<std::net::Ipv4Addr>,
}

/// Where log lines go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Logger {
    /// A file or a named pipe, as Firecracker sees it.
    pub log_path: String,
    /// `Error`, `Warning`, `Info`, `Debug` or `Trace`.
    pub level: &'static str,
    /// Whether each line says it.
    pub show_level: bool,
    /// Whether each line says where in the program it comes from.
    pub show_log_origin: bool,
}

/// Where figures go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// A file or a named pipe, as Firecracker sees it.
    pub metrics_path: String,
}

/// What can be asked of the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Action {
    /// Boot it.
    InstanceStart,
    /// Write the figures now.
    FlushMetrics,
    /// Press the keys; guests without a keyboard driver do nothing.
    SendCtrlAltDel,
}

pub(super) fn action(action: Action) -> Option<Value> {
    Some(json!({ "action_type": action }))
}

/// Whether the processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum RunState {
    /// They stand still.
    Paused,
    /// They go on.
    Resumed,
}

pub(super) fn run_state(state: RunState) -> Option<Value> {
    Some(json!({ "state": state }))
}

/// What a snapshot's memory file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// What was written since the last one, or since the machine was loaded.
    Diff,
}

/// A snapshot to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotCreate {
    /// Where the state goes, as Firecracker sees it.
    pub snapshot_path: String,
    /// Where the memory goes.
    pub mem_file_path: String,
    /// How much of it.
    pub snapshot_type: SnapshotKind,
}

/// Where a loaded machine's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "backend_type", content = "backend_path")]
pub enum MemoryBackend {
    /// A file that is mapped privately.
    File(String),
    /// The socket of a handler of page faults, which must listen.
    Uffd(String),
}

/// Another tap than the one a machine was saved with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkOverride {
    /// The card.
    pub iface_id: Id,
    /// The tap.
    pub host_dev_name: String,
}

/// A saved machine to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotLoad {
    /// The state, as Firecracker sees it.
    pub snapshot_path: String,
    /// The memory.
    pub mem_backend: MemoryBackend,
    /// Whether diff snapshots are to be possible.
    pub track_dirty_pages: bool,
    /// Whether it runs at once.
    pub resume_vm: bool,
    /// Other taps.
    pub network_overrides: Vec<NetworkOverride>,
}

/// How a release spells what changed between releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// 1.10 to 1.12: `enable_diff_snapshots`.
    Before113,
    /// From 1.13: `track_dirty_pages`.
    Since113,
}

impl SnapshotLoad {
    pub(super) fn in_dialect(&self, dialect: Dialect) -> Value {
        let mut body = json!({
            "snapshot_path": self.snapshot_path,
            "mem_backend": self.mem_backend,
            "resume_vm": self.resume_vm,
        });
        let tracking = match dialect {
            Dialect::Before113 => "enable_diff_snapshots",
            Dialect::Since113 => "track_dirty_pages",
        };
        body[tracking] = self.track_dirty_pages.into();
        if !self.network_overrides.is_empty() {
            body["network_overrides"] = json!(self.network_overrides);
        }
        body
    }
}

/// What runs, and whether.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    /// As it was started with.
    pub id: String,
    /// Whether it runs.
    pub state: InstanceState,
    /// Its release.
    pub vmm_version: String,
}

/// Whether a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    /// It has neither booted nor been loaded.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its processors run.
    Running,
    /// They stand still.
    Paused,
}

/// A release.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// `1.17.0`, or with a word behind it.
    pub firecracker_version: String,
}
