//! Sandbox endpoints. Source: contract section 1.2.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::{FromRequestParts, State};
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_domain::SandboxId;
use belljar_wire::rest;
use http::StatusCode;
use http::request::Parts;
use utoipa::openapi::Required;
use utoipa::openapi::path::{Parameter, ParameterIn};
use utoipa::{IntoParams, PartialSchema as _};

use super::auth::Caller;
use super::body::{Json, OptionalJson};
use super::error::ApiError;
use super::keyed::Keyed;
use super::path::Segments;
use super::{create, shapes};
use crate::app::App;
use crate::creation::{self, CreateSpec};
use crate::lifecycle::{self, NewEnd};
use crate::team::Team;

/// Seconds to live when a request does not say. Source: contract section 9.
pub(super) const DEFAULT_SECONDS_V1: i64 = 15;
pub(super) const DEFAULT_SECONDS_V2: i64 = 300;
/// Bounds of a refresh. Source: contract section 1.2.
const MIN_REFRESH_SECONDS: i64 = 15;
const MAX_REFRESH_SECONDS: i64 = 3600;

type Answer = Result<Response, ApiError>;

/// The sandbox a path names. What is no id names no sandbox.
pub(crate) struct Named {
    pub(crate) id: SandboxId,
    /// As the client spelled it, for error texts.
    pub(crate) text: String,
}

impl IntoParams for Named {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let id = Parameter::builder().name("id").parameter_in(ParameterIn::Path);
        let id = id.schema(Some(String::schema())).required(Required::True);
        vec![id.description(Some("The sandbox")).build()]
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Segments(text) = Segments::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| ApiError::no_sandbox("?"))?;
        match text.parse() {
            Ok(id) => Ok(Named { id, text }),
            Err(_) => Err(ApiError::no_sandbox(&text)),
        }
    }
}

/// Starts a sandbox. Deprecated: version 2 lives longer by default and is always secured.
#[utoipa::path(
    post, path = "/sandboxes", tag = "sandboxes", request_body = rest::NewSandbox,
    params((
        "Idempotency-Key" = Option<String>, Header, pattern = "^[a-z0-9-]+$", max_length = 255,
        description = "The same key with the same body means the same sandbox, for an hour or as long as it lives",
    )),
    responses(
        (status = 201, description = "It runs", body = rest::Sandbox),
        (status = 403, description = "The template is another team's"),
        (status = 404, description = "There is no such template"),
        (status = 409, description = "The request with this idempotency key is still running, or its outcome is unknown"),
        (status = 422, description = "The idempotency key was used for another request"),
        (status = 504, description = "It did not start in time"),
    ),
)]
pub(crate) async fn create_v1(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    request: Keyed<rest::NewSandbox>,
) -> Answer {
    let secure = request.body.secure.unwrap_or(true);
    create_with(&app, &team, request, DEFAULT_SECONDS_V1, secure).await
}

/// Starts a sandbox.
#[utoipa::path(
    post, path = "/v2/sandboxes", tag = "sandboxes", request_body = rest::NewSandbox,
    params((
        "Idempotency-Key" = Option<String>, Header, pattern = "^[a-z0-9-]+$", max_length = 255,
        description = "The same key with the same body means the same sandbox, for an hour or as long as it lives",
    )),
    responses(
        (status = 201, description = "It runs", body = rest::Sandbox),
        (status = 403, description = "The template is another team's"),
        (status = 404, description = "There is no such template"),
        (status = 409, description = "The request with this idempotency key is still running, or its outcome is unknown"),
        (status = 422, description = "The idempotency key was used for another request"),
        (status = 504, description = "It did not start in time"),
    ),
)]
pub(crate) async fn create_v2(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    request: Keyed<rest::NewSandbox>,
) -> Answer {
    create_with(&app, &team, request, DEFAULT_SECONDS_V2, true).await
}

async fn create_with(
    app: &Arc<App>,
    team: &Arc<Team>,
    Keyed { body, key }: Keyed<rest::NewSandbox>,
    default_seconds: i64,
    secure: bool,
) -> Answer {
    let spec = create::spec(body, default_seconds, secure, team.limits.max_length())?;
    let sandbox = creation::create(app, team, CreateSpec { key, ..spec }).await?;
    let body = JsonAnswer(shapes::sandbox(app, &sandbox));
    Ok((StatusCode::CREATED, body).into_response())
}

/// Shows a sandbox.
#[utoipa::path(
    get, path = "/sandboxes/{id}", tag = "sandboxes", params(Named),
    responses(
        (status = 200, description = "What is known of it", body = rest::SandboxDetail),
        (status = 404, description = "There is no such sandbox"),
    ),
)]
pub(crate) async fn detail(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
) -> Answer {
    let sandbox = app
        .live
        .find(&named.id, &team.id, clock::now())
        .ok_or_else(|| ApiError::no_sandbox(&named.text))?;
    Ok(JsonAnswer(shapes::detail(&app, &sandbox)).into_response())
}

/// Ends a sandbox, running or paused, and all it holds.
#[utoipa::path(
    delete, path = "/sandboxes/{id}", tag = "sandboxes", params(Named),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is changing; try again"),
    ),
)]
pub(crate) async fn kill(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
) -> Answer {
    lifecycle::kill(&app, &team, &named.id).await.map_err(|e| ApiError::of_end(&e, &named.text))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Moves the end of a sandbox to the given time from now, closer or further.
#[utoipa::path(
    post, path = "/sandboxes/{id}/timeout", tag = "sandboxes", params(Named),
    request_body = rest::SetTimeout,
    responses(
        (status = 204, description = "It ends then"),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is changing; try again"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn set_timeout(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    Json(body): Json<rest::SetTimeout>,
) -> Answer {
    let lifetime = create::lifetime(body.timeout, team.limits.max_length())?;
    move_end(&app, &team, &named, NewEnd::In(lifetime)).await
}

/// Moves the end of a sandbox further, if it would be sooner than the given time from now.
#[utoipa::path(
    post, path = "/sandboxes/{id}/refreshes", tag = "sandboxes", params(Named),
    request_body = Option<rest::RefreshSandbox>,
    responses(
        (status = 204, description = "It lives at least until then"),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is changing; try again"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn refresh(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    OptionalJson(body): OptionalJson<rest::RefreshSandbox>,
) -> Answer {
    let seconds = body.and_then(|body| body.duration).unwrap_or(MIN_REFRESH_SECONDS);
    if !(0..=MAX_REFRESH_SECONDS).contains(&seconds) {
        return Err(ApiError::bad_request(format!(
            "the field 'duration' must be from 0 to {MAX_REFRESH_SECONDS}"
        )));
    }
    let seconds = u64::try_from(seconds.max(MIN_REFRESH_SECONDS)).unwrap_or_default();
    move_end(&app, &team, &named, NewEnd::NotBefore(Duration::from_secs(seconds))).await
}

async fn move_end(app: &Arc<App>, team: &Arc<Team>, named: &Named, new_end: NewEnd) -> Answer {
    lifecycle::move_end(app, team, &named.id, new_end)
        .await
        .map_err(|e| ApiError::of_end(&e, &named.text))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
