//! The public REST API's JSON shapes, field for field as `contract/e2b-wire.md` section 1 has them.
//!
//! Names are the wire's: `MB` means mebibytes, times are RFC 3339 in UTC, and `code` in an error
//! body repeats the HTTP status because clients read it there. Unknown fields in a request are
//! ignored, an explicit `null` reads as "absent".

mod admin;
mod event;
mod identity;
mod log;
mod metrics;
mod node;
mod sandbox;
mod snapshot;
mod template;

use serde::{Deserialize, Serialize};

pub use admin::{
    AdminTeam, CancelledBuilds, KilledSandboxes, LimitOverrides, Limits, Member, NewMember,
    NewTeam, NewUser, Tier, UpdateTeam, User, UserIdentity,
};
pub use event::{
    DeliveryState, EventData, EventExecution, EventType, KillReason, NewWebhook, SandboxEvent,
    UpdateWebhook, Webhook, WebhookDelivery,
};
pub use identity::{
    AccessToken, CreatedAccessToken, CreatedTeamApiKey, IdentifierMask, NewAccessToken,
    NewTeamApiKey, TeamApiKey, UpdateTeamApiKey, UserTeam,
};
pub use log::{LogLevel, SandboxLog, SandboxLogEntry, SandboxLogs, SandboxLogsV2};
pub use metrics::{MaxTeamMetric, SandboxMetric, SandboxesWithMetrics, TeamMetric};
pub use node::{DiskMetrics, MachineInfo, Node, NodeMetrics, NodeStatus, UpdateNodeStatus};
pub use sandbox::{
    AutoResume, ConnectSandbox, ConnectSandboxV2, EgressProxy, EgressProxyTls, HeaderTransform,
    Iam, IamToken, Lifecycle, ListedSandbox, NetworkRule, NewSandbox, PauseMode, RefreshSandbox,
    Sandbox, SandboxDetail, SandboxNetwork, SandboxState, SetTimeout, VolumeMount,
};
pub use snapshot::{
    ForkResult, ForkSandbox, NewSnapshot, PauseSandbox, ResumeSandbox, SnapshotInfo,
};
pub use template::{
    BuildStatus, TeamUser, Template, TemplateAlias, TemplateBuild, TemplateWithBuilds,
};

/// A point in time on the wire.
pub type Time = chrono::DateTime<chrono::Utc>;

/// The body of every error answer. Source: contract section 1.1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Error {
    /// The HTTP status again.
    pub code: u16,
    /// What went wrong, for a person. Clients match on some of these texts.
    pub message: String,
    /// What went wrong, for a program. An open list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<String>,
}
