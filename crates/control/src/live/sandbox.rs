//! What is known of one sandbox, and from whom.

use std::net::IpAddr;
use std::sync::Arc;

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, UnixMillis, Vcpus};

use super::Metadata;
use crate::nodes::NodeIx;
use crate::placement::Need;
use crate::team::TeamId;
use crate::templates::Template;

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
    pub(crate) metadata: Metadata,
    /// Whether its guest daemon asks for a token.
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
    pub(crate) started_at: UnixMillis,
    pub(crate) end_at: UnixMillis,
    pub(crate) ip: IpAddr,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: Arc<str>,
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
    pub(crate) envd_version: Arc<str>,
    /// What this control plane, or one before it, gave the node to keep.
    pub(crate) terms: String,
}

/// What a node does not know of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) team: TeamId,
    pub(crate) alias: Option<String>,
    pub(crate) metadata: Metadata,
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
}

impl Observed {
    /// With the template's own texts where they are the same, so that its sandboxes share them.
    pub(crate) fn sharing(self, template: &Template) -> Observed {
        fn share<T: PartialEq + Clone>(said: T, known: &T) -> T {
            if said == *known { known.clone() } else { said }
        }
        Observed {
            template: share(self.template, &template.id),
            build: share(self.build, &template.build),
            envd_version: share(self.envd_version, &template.envd_version),
            ..self
        }
    }
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
