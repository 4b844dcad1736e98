//! Request rates, in front of the routes. Source: contract section 9.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use belljar_domain::Kind;

use super::error::ApiError;
use crate::app::App;
use crate::peer::Peer;
use crate::rates::TooMany;
use crate::team::Team;

/// Asked by load balancers, often, and costs nothing.
const EXEMPT: &str = "/health";

/// Refuses what an address sends too much of, before anything is looked up for it.
pub(crate) async fn per_address(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if request.uri().path() != EXEMPT
        && let Some(Peer(address)) = request.extensions().get()
    {
        app.limits.of_address(*address).map_err(|e| refusal(&e, "this address"))?;
    }
    Ok(next.run(request).await)
}

/// Refuses what a team sends too much of. Within the layer that finds the team.
pub(crate) async fn per_team(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(team) = request.extensions().get::<Arc<Team>>() {
        app.limits.of_team(&team.id).map_err(|e| refusal(&e, "this team"))?;
    }
    Ok(next.run(request).await)
}

fn refusal(refused: &TooMany, whose: &str) -> ApiError {
    let message = format!(
        "too many requests: {whose} may send {}; wait as long as the header Retry-After says",
        refused.rate
    );
    ApiError::of_kind(Kind::Quota, message).retry_after(refused.wait_seconds())
}
