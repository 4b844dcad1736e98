//! Teams, as the operator keeps them.

use std::sync::Arc;
use std::time::Duration;

use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_wire::rest;
use http::StatusCode;

use super::super::body::Json;
use super::super::error::ApiError;
use super::super::names::{name, slug, slug_of};
use super::super::path::Segments;
use super::super::shapes::time;
use super::tiers::{limits, overrides, overrides_from};
use super::{team_id, team_named};
use crate::app::App;
use crate::cidr::Cidr;
use crate::lifecycle::shielded;
use crate::limits::DEFAULT_TIER;
use crate::store::{TeamChange, TeamDraft, TeamError, TeamRecord};
use crate::team::TeamId;

/// Address blocks of one team.
const MAX_RANGES: usize = 256;
/// What callers are told of a team that was blocked without a reason.
const NO_REASON: &str = "ask who runs this server";
/// How long a removal waits for what is on its way to the store.
const SETTLE: Duration = Duration::from_secs(10);

type Answer = Result<Response, ApiError>;

/// Lists teams.
#[utoipa::path(
    get, path = "/admin/teams", tag = "admin",
    responses((status = 200, description = "All, oldest first", body = Vec<rest::AdminTeam>)),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Answer {
    let teams = app.store.teams().await?;
    Ok(JsonAnswer(teams.into_iter().map(shown).collect::<Vec<_>>()).into_response())
}

/// Makes a team.
#[utoipa::path(
    post, path = "/admin/teams", tag = "admin", request_body = rest::NewTeam,
    responses(
        (status = 201, description = "As it is now", body = rest::AdminTeam),
        (status = 409, description = "The slug is another team's"),
    ),
)]
pub(crate) async fn create(State(app): State<Arc<App>>, Json(body): Json<rest::NewTeam>) -> Answer {
    let name = name("name", &body.name)?;
    let draft = TeamDraft {
        slug: match &body.slug {
            Some(text) => slug("slug", text)?,
            None => slug_of(&name)?,
        },
        name,
        tier: body.tier.unwrap_or_else(|| DEFAULT_TIER.to_owned()),
        own_limits: overrides_from(&body.limit_overrides.unwrap_or_default())?,
        allowed: ranges(&body.allowed_addresses.unwrap_or_default())?,
    };
    let made = app.store.create_team(&draft).await?;
    Ok((StatusCode::CREATED, JsonAnswer(shown(made))).into_response())
}

/// Shows a team.
#[utoipa::path(
    get, path = "/admin/teams/{teamID}", tag = "admin",
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 200, description = "What is known of it", body = rest::AdminTeam),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn detail(State(app): State<Arc<App>>, Segments(id): Segments<String>) -> Answer {
    Ok(JsonAnswer(shown(team_named(&app, &id).await?)).into_response())
}

/// Changes a team. Requests feel it at once.
#[utoipa::path(
    patch, path = "/admin/teams/{teamID}", tag = "admin", request_body = rest::UpdateTeam,
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 200, description = "As it is now", body = rest::AdminTeam),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn update(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
    Json(body): Json<rest::UpdateTeam>,
) -> Answer {
    let id = team_id(&id)?;
    let change = TeamChange {
        name: body.name.as_deref().map(|text| name("name", text)).transpose()?,
        tier: body.tier,
        own_limits: body.limit_overrides.as_ref().map(overrides_from).transpose()?,
        allowed: body.allowed_addresses.as_deref().map(ranges).transpose()?,
        blocked: blocked(body.blocked, body.blocked_reason.as_deref())?,
    };
    let changed = app.store.change_team(&id, &change).await?;
    app.access.forget();
    Ok(JsonAnswer(shown(changed)).into_response())
}

/// Removes a team with its keys, events and webhooks. One that has sandboxes stays. Goes on to its end
/// when the caller leaves.
#[utoipa::path(
    delete, path = "/admin/teams/{teamID}", tag = "admin",
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such team"),
        (status = 409, description = "It has running sandboxes"),
    ),
)]
pub(crate) async fn delete(State(app): State<Arc<App>>, Segments(id): Segments<String>) -> Answer {
    let this = Arc::clone(&app);
    // A caller who leaves half way would leave a team that is blocked and not removed.
    let work = async move { close_and_remove(&this, &id).await };
    shielded(&app.scope, "remove team", work).await.unwrap_or_else(|| Err(ApiError::internal()))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn close_and_remove(app: &Arc<App>, id: &str) -> Result<(), ApiError> {
    let record = team_named(app, id).await?;
    let team = &record.team.id;
    // Nobody may begin a sandbox between the look and the end.
    let closed = TeamChange {
        blocked: Some(Some("it is being removed".to_owned())),
        ..TeamChange::default()
    };
    app.store.change_team(team, &closed).await?;
    app.access.forget();
    let outcome = remove(app, team).await;
    if outcome.is_err() {
        let as_before =
            TeamChange { blocked: Some(record.team.blocked.clone()), ..TeamChange::default() };
        app.store.change_team(team, &as_before).await?;
    }
    app.access.forget();
    outcome
}

async fn remove(app: &App, team: &TeamId) -> Result<(), ApiError> {
    // Those that start are in the one count, those on their way out in the other.
    let held = [app.live.all(), app.live.all_paused()].concat();
    let held = held.iter().filter(|sandbox| sandbox.team == *team).count();
    let running = app.live.count(team, clock::now()).max(held);
    if running > 0 {
        let running = u64::try_from(running).unwrap_or(u64::MAX);
        return Err(TeamError::HasSandboxes { running }.into());
    }
    // What is known of its last sandboxes is written before there is no team to write it for.
    let _in_time = app.writer.settled(SETTLE).await;
    Ok(app.store.delete_team(team).await?)
}

impl From<TeamError> for ApiError {
    fn from(error: TeamError) -> Self {
        match error {
            TeamError::Store(e) => e.into(),
            e => ApiError::of_kind(e.kind(), e.to_string()),
        }
    }
}

fn blocked(
    blocked: Option<bool>,
    reason: Option<&str>,
) -> Result<Option<Option<String>>, ApiError> {
    let reason = reason.map(|text| name("blockedReason", text)).transpose()?;
    match (blocked, reason) {
        (None, None) => Ok(None),
        (Some(true), reason) => Ok(Some(Some(reason.unwrap_or_else(|| NO_REASON.to_owned())))),
        (Some(false), None) => Ok(Some(None)),
        (_, Some(_)) => {
            Err(ApiError::bad_request("the field 'blockedReason' goes with \"blocked\": true only"))
        }
    }
}

fn ranges(texts: &[String]) -> Result<Vec<Cidr>, ApiError> {
    if texts.len() > MAX_RANGES {
        return Err(ApiError::bad_request(format!(
            "the field 'allowedAddresses' may have {MAX_RANGES} entries"
        )));
    }
    let range = |text: &String| {
        text.parse().map_err(|e| {
            ApiError::bad_request(format!("the field 'allowedAddresses' is not valid: {e}"))
        })
    };
    texts.iter().map(range).collect()
}

fn shown(record: TeamRecord) -> rest::AdminTeam {
    let team = record.team;
    rest::AdminTeam {
        team_id: team.id.to_string(),
        slug: team.slug,
        name: team.name,
        tier: record.tier,
        limit_overrides: overrides(&record.own_limits),
        limits: limits(&team.limits),
        allowed_addresses: team.allowed.iter().map(Cidr::to_string).collect(),
        blocked_reason: team.blocked,
        created_at: time(record.created_at),
    }
}
