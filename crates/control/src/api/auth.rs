//! Who is asking: the API key in `X-API-Key`, and the team it acts for.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, HeaderName};

use super::error::ApiError;
use crate::app::App;
use crate::keys::ApiKey;
use crate::team::Team;

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The team a request acts for; put there by [`require_team`].
pub(crate) type Caller = Extension<Arc<Team>>;

/// Lets a request through with its team, or answers 401.
pub(crate) async fn require_team(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let key = key_in(request.headers())?;
    // An unknown key and a malformed one look the same from outside.
    let team = app.team_of(&key).await?.ok_or_else(not_valid)?;
    request.extensions_mut().insert(team);
    Ok(next.run(request).await)
}

fn key_in(headers: &HeaderMap) -> Result<ApiKey, ApiError> {
    let value = headers
        .get(API_KEY)
        .ok_or_else(|| ApiError::unauthorized("the header X-API-Key is missing"))?;
    value.to_str().ok().and_then(|text| text.trim().parse().ok()).ok_or_else(not_valid)
}

fn not_valid() -> ApiError {
    ApiError::unauthorized("the API key in the header X-API-Key is not valid")
}
