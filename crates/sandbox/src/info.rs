//! A sandbox as callers name it: to be created, running, gone.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use belljar_domain::lifecycle::EndReason;
use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, Secret, TemplateId, UnixMillis, Vcpus};

use crate::snapshot::SnapshotMeta;

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
    /// Set: it is paused at its end, and killed otherwise.
    pub auto_pause: Option<AutoPause>,
    /// Whether to boot from the disk of the build alone, without its memory.
    pub cold_boot: bool,
    /// What callers of its guest daemon must show; `None` asks for nothing.
    pub envd_access_token: Option<Secret<String>>,
    /// Environment of every process in it.
    pub env_vars: BTreeMap<String, String>,
    /// Whether it may reach out.
    pub allow_internet_access: bool,
    /// Whatever the caller wants back with it; not looked at. It is on disk before anything of the
    /// sandbox exists, and should have at most 1 MiB.
    pub terms: Arc<str>,
}

/// How a sandbox is paused at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoPause {
    /// The id its snapshot gets.
    pub snapshot_id: BuildId,
    /// Whether to keep its disk alone.
    pub filesystem_only: bool,
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
    pub envd_version: Arc<str>,
    /// What the caller of the create gave with it.
    pub terms: Arc<str>,
}

/// A sandbox whose guest is not ready yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Starting {
    /// Which.
    pub sandbox_id: SandboxId,
    /// Which run of it.
    pub execution_id: ExecutionId,
    /// What the caller of the create gave with it.
    pub terms: Arc<str>,
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
    /// What a paused one left.
    pub snapshot: Option<Arc<SnapshotMeta>>,
}

/// A sandbox that ended when nobody could be told: with a run of this program, or unheard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untold {
    /// Which.
    pub sandbox_id: SandboxId,
    /// Which run of it.
    pub execution_id: ExecutionId,
    /// Its template.
    pub template_id: TemplateId,
    /// The build it was started from.
    pub build_id: BuildId,
    /// What the caller of the create gave with it.
    pub terms: String,
    /// When its start began.
    pub started_at: UnixMillis,
    /// The end it was created with.
    pub end_at: UnixMillis,
    /// Its processors.
    pub vcpus: Vcpus,
    /// Its memory.
    pub memory: MiB,
    /// Its disk.
    pub disk: MiB,
    /// When its end was noticed.
    pub noticed_at: UnixMillis,
    /// How it ended.
    pub how: UntoldHow,
}

/// How a sandbox ended when nobody could be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UntoldHow {
    /// The program was killed; a later run removed what was left.
    Lost,
    /// The program ended it, while nobody listened or because it was stopped itself.
    Ended(EndReason),
}

impl UntoldHow {
    const ALL: [UntoldHow; 5] = [
        UntoldHow::Lost,
        UntoldHow::Ended(EndReason::Killed),
        UntoldHow::Ended(EndReason::Expired),
        UntoldHow::Ended(EndReason::Crashed),
        UntoldHow::Ended(EndReason::Shutdown),
    ];

    /// The word on disk and on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            UntoldHow::Lost => "lost",
            UntoldHow::Ended(reason) => reason.as_str(),
        }
    }

    pub(crate) fn parse(word: &str) -> Option<UntoldHow> {
        UntoldHow::ALL.into_iter().find(|how| how.as_str() == word)
    }
}
