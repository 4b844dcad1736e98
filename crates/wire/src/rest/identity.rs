//! Teams, keys and tokens as their owners see them. Source: contract section 1.6.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::TeamUser;

/// What is shown of a key or token after it was made: enough to know it by, too little to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct IdentifierMask {
    /// What all of its kind begin with.
    pub prefix: String,
    /// Characters after the prefix.
    pub value_length: u32,
    /// The first of them.
    pub masked_value_prefix: String,
    /// The last of them.
    pub masked_value_suffix: String,
}

/// One team in the answer to `GET /teams`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct UserTeam {
    /// A UUID.
    #[serde(rename = "teamID")]
    pub team_id: String,
    /// For people.
    pub name: String,
    /// A whole key, made for this answer; the CLI keeps it and uses it from then on.
    pub api_key: String,
    /// Whether it is the one to take when the user names none.
    pub is_default: bool,
}

/// Without the key: values of this type are safe to log.
impl std::fmt::Debug for UserTeam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserTeam")
            .field("team_id", &self.team_id)
            .field("name", &self.name)
            .field("is_default", &self.is_default)
            .finish_non_exhaustive()
    }
}

/// Body of `POST /api-keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NewTeamApiKey {
    /// What to know it by.
    pub name: String,
}

/// Body of `PATCH /api-keys/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UpdateTeamApiKey {
    /// Its new name.
    pub name: String,
}

/// One key of a team.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct TeamApiKey {
    /// A UUID; opens nothing.
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// What it looks like.
    pub mask: IdentifierMask,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Who made it; null when the operator did.
    pub created_by: Option<TeamUser>,
    /// When it last opened something, known some seconds late; null when it never did.
    pub last_used: Option<DateTime<Utc>>,
}

/// A key just made: the only answer that holds all of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreatedTeamApiKey {
    /// The whole key.
    pub key: String,
    /// What is shown of it from now on.
    #[serde(flatten)]
    pub shown: TeamApiKey,
}

/// Without the key: values of this type are safe to log.
impl std::fmt::Debug for CreatedTeamApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedTeamApiKey").field("shown", &self.shown).finish_non_exhaustive()
    }
}

/// Body of `POST /access-tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NewAccessToken {
    /// What to know it by.
    pub name: String,
}

/// One access token of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct AccessToken {
    /// A UUID; opens nothing.
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// What it looks like.
    pub mask: IdentifierMask,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last opened something, known some seconds late; null when it never did.
    pub last_used: Option<DateTime<Utc>>,
}

/// A token just made: the only answer that holds all of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreatedAccessToken {
    /// The whole token.
    pub token: String,
    /// What is shown of it from now on.
    #[serde(flatten)]
    pub shown: AccessToken,
}

/// Without the token: values of this type are safe to log.
impl std::fmt::Debug for CreatedAccessToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedAccessToken").field("shown", &self.shown).finish_non_exhaustive()
    }
}
