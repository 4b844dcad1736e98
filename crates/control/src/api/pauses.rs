//! Pausing sandboxes and making them run again. Source: contract sections 1.2 and 10.

use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_wire::rest;
use http::StatusCode;

use super::auth::Caller;
use super::body::{Json, OptionalJson};
use super::error::ApiError;
use super::sandboxes::{DEFAULT_SECONDS_V1, DEFAULT_SECONDS_V2, Named};
use super::{create, shapes};
use crate::app::App;
use crate::live::OnEnd;
use crate::node::PauseMode;
use crate::pause;
use crate::resume::{self, Rouse, Roused, Running};
use crate::team::Team;

type Answer = Result<Response, ApiError>;

/// Pauses a sandbox: it keeps its disk, and its memory unless that is not wanted, and takes no place
/// any more.
#[utoipa::path(
    post, path = "/sandboxes/{id}/pause", tag = "sandboxes", params(Named),
    request_body = Option<rest::PauseSandbox>,
    responses(
        (status = 204, description = "It is paused"),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is paused already"),
        (status = 503, description = "Its guest does not answer and has to, or there is no room for it; it runs on"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn pause(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    OptionalJson(body): OptionalJson<rest::PauseSandbox>,
) -> Answer {
    let body = body.unwrap_or_default();
    let filesystem_only = body.memory == Some(false);
    // A disk alone is only whole when the guest has written what it held back.
    let require_healthy_guest = filesystem_only || body.require_healthy_guest == Some(true);
    let mode = PauseMode { filesystem_only, require_healthy_guest };
    let paused = pause::pause(&app, &team, &named.id, mode).await;
    paused.map_err(|e| ApiError::of_pause(&e, &named.text))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Resumes a paused sandbox. Deprecated: connecting does the same, and takes a running one too.
#[utoipa::path(
    post, path = "/sandboxes/{id}/resume", tag = "sandboxes", params(Named),
    request_body = Option<rest::ResumeSandbox>,
    responses(
        (status = 201, description = "It runs", body = rest::Sandbox),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It runs already, is changing, or can only boot"),
        (status = 503, description = "The node that keeps it is away"),
        (status = 504, description = "It did not start in time"),
    ),
)]
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    OptionalJson(body): OptionalJson<rest::ResumeSandbox>,
) -> Answer {
    let body = body.unwrap_or_default();
    let seconds = body.timeout.unwrap_or(DEFAULT_SECONDS_V1);
    let on_end = body.auto_pause.map(|pauses| match pauses {
        true => OnEnd::Pause { filesystem_only: false },
        false => OnEnd::Kill,
    });
    let how = Rouse {
        lifetime: create::lifetime(seconds, team.limits.max_length())?,
        cold_boot: body.memory == Some(false),
        on_end,
        running: Running::Refuse,
    };
    run(&app, &team, &named, how).await
}

/// Connects to a sandbox: a paused one is resumed, and the end of a running one moves to at least the
/// given time from now, never closer.
#[utoipa::path(
    post, path = "/sandboxes/{id}/connect", tag = "sandboxes", params(Named),
    request_body = rest::ConnectSandbox,
    responses(
        (status = 200, description = "It was running", body = rest::Sandbox),
        (status = 201, description = "It was paused, and runs", body = rest::Sandbox),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is changing, or can only boot"),
        (status = 503, description = "The node that keeps it is away"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn connect_v1(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    Json(body): Json<rest::ConnectSandbox>,
) -> Answer {
    connect_with(&app, &team, &named, body.timeout, body.memory).await
}

/// Connects to a sandbox: a paused one is resumed, and the end of a running one moves to at least the
/// given time from now, never closer.
#[utoipa::path(
    post, path = "/v2/sandboxes/{id}/connect", tag = "sandboxes", params(Named),
    request_body = Option<rest::ConnectSandboxV2>,
    responses(
        (status = 200, description = "It was running", body = rest::Sandbox),
        (status = 201, description = "It was paused, and runs", body = rest::Sandbox),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is changing, or can only boot"),
        (status = 503, description = "The node that keeps it is away"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn connect_v2(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    OptionalJson(body): OptionalJson<rest::ConnectSandboxV2>,
) -> Answer {
    let body = body.unwrap_or_default();
    let seconds = body.timeout.unwrap_or(DEFAULT_SECONDS_V2);
    connect_with(&app, &team, &named, seconds, body.memory).await
}

async fn connect_with(
    app: &Arc<App>,
    team: &Arc<Team>,
    named: &Named,
    seconds: i64,
    memory: Option<bool>,
) -> Answer {
    let how = Rouse {
        lifetime: create::lifetime(seconds, team.limits.max_length())?,
        cold_boot: memory == Some(false),
        on_end: None,
        running: Running::Extend,
    };
    run(app, team, named, how).await
}

async fn run(app: &Arc<App>, team: &Arc<Team>, named: &Named, how: Rouse) -> Answer {
    let roused = resume::rouse(app, team, &named.id, how).await;
    let (status, sandbox) = match roused.map_err(|e| ApiError::of_resume(e, &named.text))? {
        Roused::Ran(sandbox) => (StatusCode::OK, sandbox),
        Roused::Resumed(sandbox) => (StatusCode::CREATED, sandbox),
    };
    Ok((status, JsonAnswer(shapes::sandbox(app, &sandbox))).into_response())
}
