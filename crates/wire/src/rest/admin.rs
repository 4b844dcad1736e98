//! What the operator of a server sees and changes. The routes that count and end things are those
//! of contract section 1.6; teams, tiers and users are this server's own.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// What one team may have and do at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Sandboxes running or starting at the same time.
    pub max_concurrent_sandboxes: u32,
    /// Longest time to live one request may ask for, seconds.
    pub max_length_seconds: u32,
    /// Virtual processors of one sandbox.
    pub max_vcpus: u32,
    /// Memory of one sandbox, mebibytes.
    #[serde(rename = "maxMemoryMB")]
    pub max_memory_mb: u32,
    /// Root disk of one sandbox, mebibytes.
    #[serde(rename = "maxDiskSizeMB")]
    pub max_disk_size_mb: u32,
    /// Sandboxes begun a second, on average.
    pub creates_per_second: u32,
    /// Template builds at the same time.
    pub max_concurrent_builds: u32,
    /// Days events are kept.
    #[serde(rename = "eventsTTLDays")]
    pub events_ttl_days: u32,
}

/// Where a team differs from its tier; what is absent is the tier's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct LimitOverrides {
    /// See [`Limits`], as for every field here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_concurrent_sandboxes: Option<u32>,
    /// Seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length_seconds: Option<u32>,
    /// Virtual processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// Mebibytes.
    #[serde(rename = "maxMemoryMB", skip_serializing_if = "Option::is_none")]
    pub max_memory_mb: Option<u32>,
    /// Mebibytes.
    #[serde(rename = "maxDiskSizeMB", skip_serializing_if = "Option::is_none")]
    pub max_disk_size_mb: Option<u32>,
    /// Sandboxes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creates_per_second: Option<u32>,
    /// Builds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_concurrent_builds: Option<u32>,
    /// Days.
    #[serde(rename = "eventsTTLDays", skip_serializing_if = "Option::is_none")]
    pub events_ttl_days: Option<u32>,
}

/// One named set of limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Tier {
    /// Its name.
    pub id: String,
    /// What its teams may have.
    #[serde(flatten)]
    pub limits: Limits,
}

/// One team, as the operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct AdminTeam {
    /// A UUID.
    #[serde(rename = "teamID")]
    pub team_id: String,
    /// Namespace of its template names.
    pub slug: String,
    /// For people.
    pub name: String,
    /// The tier its limits come from.
    pub tier: String,
    /// Where it differs from the tier.
    pub limit_overrides: LimitOverrides,
    /// What holds for it: the tier's limits and its own.
    pub limits: Limits,
    /// Address blocks its requests must come from; empty lets everybody in.
    pub allowed_addresses: Vec<String>,
    /// Why nobody may act for it; null when everybody may.
    pub blocked_reason: Option<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// Body of `POST /admin/teams`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct NewTeam {
    /// For people.
    pub name: String,
    /// Namespace of its template names: lower-case letters, digits and `-`. Made from the name when
    /// absent.
    pub slug: Option<String>,
    /// The tier its limits come from; `base` when absent.
    pub tier: Option<String>,
    /// Where it differs from the tier.
    pub limit_overrides: Option<LimitOverrides>,
    /// Address blocks its requests must come from.
    pub allowed_addresses: Option<Vec<String>>,
}

/// Body of `PATCH /admin/teams/{teamID}`; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct UpdateTeam {
    /// Its new name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its new tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// All of where it differs from the tier: replaces what was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_overrides: Option<LimitOverrides>,
    /// All address blocks: replaces what was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_addresses: Option<Vec<String>>,
    /// Whether nobody may act for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked: Option<bool>,
    /// Told to those who try; only with `blocked: true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_reason: Option<String>,
}

/// A person as an identity provider knows them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UserIdentity {
    /// URL of the provider.
    pub issuer: String,
    /// Its name for the person.
    pub subject: String,
}

/// One user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// A UUID.
    pub id: String,
    /// For people.
    pub email: String,
    /// Who signs in as this user.
    pub identities: Vec<UserIdentity>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// Body of `POST /admin/users`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NewUser {
    /// For people; no other user has it.
    pub email: String,
    /// Who signs in as this user.
    pub identity: Option<UserIdentity>,
}

/// One user of a team.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// The user.
    #[serde(rename = "userID")]
    pub user_id: String,
    /// For people.
    pub email: String,
    /// Whether this team is the one to take when the user names none.
    pub is_default: bool,
}

/// Body of `PUT /admin/teams/{teamID}/members/{userID}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct NewMember {
    /// Whether this team becomes the user's default. The first team of a user is in any case.
    pub is_default: Option<bool>,
}

/// Answer to `POST /admin/teams/{teamID}/sandboxes/kill`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct KilledSandboxes {
    /// Gone.
    pub killed_count: u32,
    /// Still there: their node did not do it.
    pub failed_count: u32,
}

/// Answer to `POST /admin/teams/{teamID}/builds/cancel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct CancelledBuilds {
    /// Stopped.
    pub cancelled_count: u32,
    /// Still running.
    pub failed_count: u32,
}
