//! What the operator does: teams, tiers, users and their credentials, and what runs for whom.
//!
//! The routes that kill, count and cancel, and those of a team's keys, are the contract's
//! (section 1.6). The others are this server's own: one resource, one path, the same verbs.

pub(crate) mod credentials;
pub(crate) mod teams;
pub(crate) mod tiers;
pub(crate) mod users;
pub(crate) mod work;

use std::sync::Arc;

use super::error::ApiError;
use crate::app::App;
use crate::store::TeamRecord;
use crate::team::{TeamId, UserId};

/// The id a path spells; what is no UUID names no team.
fn team_id(text: &str) -> Result<TeamId, ApiError> {
    TeamId::parse(text).ok_or_else(|| no_team(text))
}

fn user_id(text: &str) -> Result<UserId, ApiError> {
    UserId::parse(text).ok_or_else(|| no_user(text))
}

fn no_team(text: &str) -> ApiError {
    ApiError::not_found(format!("there is no team {text:?}"))
}

fn no_user(text: &str) -> ApiError {
    ApiError::not_found(format!("there is no user {text:?}"))
}

/// The team a path names.
async fn team_named(app: &Arc<App>, text: &str) -> Result<TeamRecord, ApiError> {
    let id = team_id(text)?;
    app.store.team(&id).await?.ok_or_else(|| no_team(text))
}
