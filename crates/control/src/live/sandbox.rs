//! What is known of one sandbox, and from whom.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, Secret, TemplateId, UnixMillis, Vcpus};

use super::Metadata;
use crate::nodes::NodeIx;
use crate::placement::Need;
use crate::team::TeamId;
use crate::templates::Template;

/// What a sandbox's processes have in their environment. Often a secret; shared by its copies.
pub(crate) type EnvVars = Arc<Secret<BTreeMap<String, String>>>;

/// One sandbox, running or paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    /// Its run; of a paused one, its last.
    pub(crate) execution: ExecutionId,
    /// Where it runs, or ran before this process knew of it: then the first of all. A paused one is
    /// where its snapshot is.
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
    pub(crate) lifecycle: Lifecycle,
    pub(crate) env_vars: EnvVars,
    /// Its last pause: what a paused one is, and what a running one was resumed from.
    pub(crate) saved: Option<Arc<Saved>>,
    /// Since when it is seen as paused; `None` while it runs.
    pub(crate) asleep_since: Option<UnixMillis>,
}

/// What happens at the end of a sandbox's time, and after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lifecycle {
    pub(crate) on_end: OnEnd,
    /// Whether traffic resumes it.
    pub(crate) auto_resume: bool,
    /// How long it was created for: what a resume by traffic gives it again.
    pub(crate) lifetime: Duration,
}

/// What happens at the end of a sandbox's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnEnd {
    Kill,
    Pause { filesystem_only: bool },
}

/// A snapshot that stands for a paused sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) snapshot: BuildId,
    pub(crate) at: UnixMillis,
    /// Whether it has no memory, so that it can only boot.
    pub(crate) filesystem_only: bool,
    /// Whether its guest did not answer when it was frozen.
    pub(crate) guest_unresponsive: bool,
    /// What it alone takes on disk.
    pub(crate) own_bytes: u64,
}

/// What a node says of one snapshot it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) id: BuildId,
    pub(crate) sandbox: SandboxId,
    pub(crate) execution: ExecutionId,
    /// Of the sandbox.
    pub(crate) template: TemplateId,
    /// What that run was started from.
    pub(crate) build: BuildId,
    /// Whether the sandbox was given up for it, and not only copied.
    pub(crate) is_pause: bool,
    pub(crate) filesystem_only: bool,
    pub(crate) guest_unresponsive: bool,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: Arc<str>,
    pub(crate) terms: String,
    pub(crate) started_at: UnixMillis,
    pub(crate) created_at: UnixMillis,
    /// What it alone takes on disk.
    pub(crate) own_bytes: u64,
    /// Whether other nodes can take it from the blob store, as far as its node has said.
    pub(crate) uploaded: bool,
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
    pub(crate) lifecycle: Lifecycle,
    pub(crate) env_vars: EnvVars,
}

impl Kept {
    /// What it is to the sandbox it stands for.
    pub(crate) fn saved(&self) -> Arc<Saved> {
        Arc::new(Saved {
            snapshot: self.id.clone(),
            at: self.created_at,
            filesystem_only: self.filesystem_only,
            guest_unresponsive: self.guest_unresponsive,
            own_bytes: self.own_bytes,
        })
    }
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
    /// The paused sandbox that `kept` stands for, which was last on `node`.
    pub(crate) fn paused(node: NodeIx, kept: &Kept, terms: Terms) -> Sandbox {
        let observed = Observed {
            id: kept.sandbox.clone(),
            execution: kept.execution.clone(),
            template: kept.template.clone(),
            build: kept.build.clone(),
            ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            started_at: kept.started_at,
            end_at: kept.created_at,
            vcpus: kept.vcpus,
            memory: kept.memory,
            disk: kept.disk,
            envd_version: kept.envd_version.clone(),
            terms: String::new(),
        };
        Sandbox {
            saved: Some(kept.saved()),
            asleep_since: Some(kept.created_at),
            ..Sandbox::new(node, observed, terms)
        }
    }

    /// The terms it was created on.
    pub(crate) fn terms(&self) -> Terms {
        Terms {
            team: self.team.clone(),
            alias: self.alias.clone(),
            metadata: self.metadata.clone(),
            secure: self.secure,
            allow_internet: self.allow_internet,
            lifecycle: self.lifecycle,
            env_vars: Arc::clone(&self.env_vars),
        }
    }

    /// As it is once `saved` stands for it.
    pub(crate) fn asleep_as(&self, saved: Arc<Saved>) -> Sandbox {
        Sandbox { asleep_since: Some(saved.at), saved: Some(saved), ..self.clone() }
    }

    /// As it is seen while its node pauses it at its end; `None` when it is killed then.
    pub(super) fn falling_asleep(&self) -> Option<Sandbox> {
        let asleep_since = Some(self.end_at);
        self.pauses_at_end().then(|| Sandbox { asleep_since, ..self.clone() })
    }

    /// What it has kept, when it is paused; `None` while it runs, and while its pause is under way.
    pub(crate) fn pause(&self) -> Option<&Saved> {
        self.saved.as_deref().filter(|saved| self.asleep_since == Some(saved.at))
    }

    /// Whether it is paused, and not killed, when its time is up.
    pub(crate) fn pauses_at_end(&self) -> bool {
        matches!(self.lifecycle.on_end, OnEnd::Pause { .. })
    }

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
            lifecycle: terms.lifecycle,
            env_vars: terms.env_vars,
            saved: None,
            asleep_since: None,
        }
    }

    /// What it takes of its node.
    pub(crate) fn need(&self) -> Need {
        Need { vcpus: self.vcpus, memory: self.memory, disk: self.disk }
    }
}
