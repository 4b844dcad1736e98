//! What is known of one sandbox, and from whom.

use std::collections::BTreeMap;
use std::net::IpAddr;

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, UnixMillis, Vcpus};

use crate::nodes::NodeIx;
use crate::placement::Need;
use crate::team::TeamId;

/// One live sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    pub(crate) execution: ExecutionId,
    /// Where it runs.
    pub(crate) node: NodeIx,
    pub(crate) team: TeamId,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    pub(crate) alias: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// Whether its guest daemon asks for a token.
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
    pub(crate) started_at: UnixMillis,
    pub(crate) end_at: UnixMillis,
    pub(crate) ip: IpAddr,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: String,
}

/// What a node says of one sandbox it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) id: SandboxId,
    pub(crate) execution: ExecutionId,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    pub(crate) ip: IpAddr,
    pub(crate) started_at: UnixMillis,
    pub(crate) end_at: UnixMillis,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: String,
    /// What this control plane, or one before it, gave the node to keep.
    pub(crate) terms: String,
}

/// What a node does not know of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) team: TeamId,
    pub(crate) alias: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
}

impl Sandbox {
    pub(crate) fn new(node: NodeIx, observed: Observed, terms: Terms) -> Sandbox {
        Sandbox {
            id: observed.id,
            execution: observed.execution,
            node,
            team: terms.team,
            template: observed.template,
            build: observed.build,
            alias: terms.alias,
            metadata: terms.metadata,
            secure: terms.secure,
            allow_internet: terms.allow_internet,
            started_at: observed.started_at,
            end_at: observed.end_at,
            ip: observed.ip,
            vcpus: observed.vcpus,
            memory: observed.memory,
            disk: observed.disk,
            envd_version: observed.envd_version,
        }
    }
    /// What it takes of its node.
    pub(crate) fn need(&self) -> Need {
        Need { vcpus: self.vcpus, memory: self.memory, disk: self.disk }
    }
}
