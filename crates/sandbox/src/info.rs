//! A sandbox as callers name it: to be created, running, gone.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use belljar_domain::lifecycle::EndReason;
use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, Secret, TemplateId, UnixMillis, Vcpus};

/// A sandbox to create.
#[derive(Debug, Clone)]
pub struct CreateSandbox {
    /// Its id.
    pub sandbox_id: SandboxId,
    /// This run of it.
    pub execution_id: ExecutionId,
    /// Its template.
    pub template_id: TemplateId,
    /// The build to start from.
    pub build_id: BuildId,
    /// When it ends.
    pub end_at: UnixMillis,
    /// What callers of its guest daemon must show; `None` asks for nothing.
    pub envd_access_token: Option<Secret<String>>,
    /// Environment of every process in it.
    pub env_vars: BTreeMap<String, String>,
    /// Whether it may reach out.
    pub allow_internet_access: bool,
}

/// A sandbox that runs.
#[derive(Debug, Clone)]
pub struct SandboxInfo {
    /// Its id.
    pub sandbox_id: SandboxId,
    /// This run of it.
    pub execution_id: ExecutionId,
    /// Its template.
    pub template_id: TemplateId,
    /// The build it was started from.
    pub build_id: BuildId,
    /// Where the host reaches it, any port.
    pub route_ip: Ipv4Addr,
    /// When its start began.
    pub started_at: UnixMillis,
    /// When it ends.
    pub end_at: UnixMillis,
    /// Its processors.
    pub vcpus: Vcpus,
    /// Its memory.
    pub memory: MiB,
    /// Its disk.
    pub disk: MiB,
    /// Its guest daemon's version.
    pub envd_version: String,
}

/// A sandbox that is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub sandbox_id: SandboxId,
    /// Which run of it.
    pub execution_id: ExecutionId,
    /// Why.
    pub reason: EndReason,
}
