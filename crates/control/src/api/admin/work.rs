//! What runs for a team, and ending it. Source: contract section 1.6.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_domain::Kind;
use belljar_wire::rest;
use futures::StreamExt as _;

use super::super::error::ApiError;
use super::super::path::Segments;
use super::team_named;
use crate::app::App;
use crate::lifecycle;

/// Kills asked for at the same time; each waits for its node to clean up.
const KILLS_AT_ONCE: usize = 16;

type Answer = Result<Response, ApiError>;

/// Kills every sandbox of a team, running or paused, and answers when nothing is left of them. One that is still
/// starting is not among them: block the team first, and ask again.
#[utoipa::path(
    post, path = "/admin/teams/{teamID}/sandboxes/kill", tag = "admin",
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 200, description = "How many", body = rest::KilledSandboxes),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn kill_sandboxes(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
) -> Answer {
    let team = Arc::new(team_named(&app, &id).await?.team);
    let all = [app.live.all(), app.live.all_paused()].concat();
    let mine = all.into_iter().filter(|sandbox| sandbox.team == team.id);
    let kills = mine.map(|sandbox| {
        let (app, team) = (Arc::clone(&app), Arc::clone(&team));
        async move { lifecycle::kill(&app, &team, &sandbox.id).await }
    });
    let outcomes: Vec<_> =
        futures::stream::iter(kills).buffer_unordered(KILLS_AT_ONCE).collect().await;
    let mut counts = rest::KilledSandboxes { killed_count: 0, failed_count: 0 };
    for outcome in outcomes {
        match outcome {
            Ok(()) => counts.killed_count += 1,
            // It ended by itself meanwhile.
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(_) => counts.failed_count += 1,
        }
    }
    Ok(JsonAnswer(counts).into_response())
}

/// Counts running sandboxes by team. Teams without any are left out.
#[utoipa::path(
    get, path = "/admin/sandboxes/running-counts", tag = "admin",
    responses((status = 200, description = "By team id", body = BTreeMap<String, u32>)),
)]
pub(crate) async fn running_counts(State(app): State<Arc<App>>) -> Answer {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for sandbox in app.live.all() {
        *counts.entry(sandbox.team.to_string()).or_default() += 1;
    }
    Ok(JsonAnswer(counts).into_response())
}

/// Cancels the template builds of a team. This server runs none, so there are none to cancel.
#[utoipa::path(
    post, path = "/admin/teams/{teamID}/builds/cancel", tag = "admin",
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 200, description = "How many", body = rest::CancelledBuilds),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn cancel_builds(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
) -> Answer {
    team_named(&app, &id).await?;
    let counts = rest::CancelledBuilds { cancelled_count: 0, failed_count: 0 };
    Ok(JsonAnswer(counts).into_response())
}
