//! Templates and their builds. Source: contract section 1.3.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum BuildStatus {
    /// Not started.
    Waiting,
    /// Running.
    Building,
    /// Sandboxes can start from it.
    Ready,
    /// It failed.
    Error,
}

/// One template in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// The template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The build sandboxes start from.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Virtual processors.
    pub cpu_count: u32,
    /// Memory, mebibytes.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Root disk, mebibytes.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mb: u32,
    /// Whether other teams may use it.
    pub public: bool,
    /// Names without namespace. Deprecated in favour of `names`.
    pub aliases: Vec<String>,
    /// Names, with a namespace where they have one.
    pub names: Vec<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When its current build was made.
    pub updated_at: DateTime<Utc>,
    /// Who made it; null for templates that belong to the server.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub created_by: Option<TeamUser>,
    /// When a sandbox last started from it.
    #[cfg_attr(feature = "openapi", schema(required))]
    pub last_spawned_at: Option<DateTime<Utc>>,
    /// How many sandboxes ever started from it.
    pub spawn_count: i64,
    /// How many builds it has had.
    pub build_count: i32,
    /// What its guest daemon can do.
    pub envd_version: String,
    /// How far its current build is.
    pub build_status: BuildStatus,
}

/// A person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TeamUser {
    /// A UUID.
    pub id: String,
    /// An address.
    pub email: String,
}

/// Answer to `GET /templates/{id}`: every template field, and its builds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateWithBuilds {
    /// The template.
    #[serde(flatten)]
    pub template: Template,
    /// Newest first.
    pub builds: Vec<TemplateBuild>,
}

/// One build of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateBuild {
    /// The build.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How far it is.
    pub status: BuildStatus,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// Virtual processors.
    pub cpu_count: u32,
    /// Memory, mebibytes.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// Root disk, mebibytes.
    #[serde(rename = "diskSizeMB", default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u32>,
    /// What its guest daemon can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envd_version: Option<String>,
}

/// Answer to `GET /templates/aliases/{alias}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateAlias {
    /// The template the name means.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Whether other teams may use it.
    pub public: bool,
}
