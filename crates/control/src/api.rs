//! The public REST API: which path means what. Source: contract sections 1.1 to 1.3.

mod auth;
mod body;
mod create;
mod error;
mod logs;
mod page;
mod query;
mod sandboxes;
mod shapes;
mod templates;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{any, get, post};
use http::{Method, StatusCode, Uri, header};
use tracing::info;

use crate::app::App;
use error::ApiError;

/// Every route of the API.
pub(crate) fn router(app: Arc<App>) -> Router {
    let of_teams = Router::new()
        .route("/sandboxes", get(sandboxes::list_v1).post(sandboxes::create_v1))
        .route("/v2/sandboxes", get(sandboxes::list_v2).post(sandboxes::create_v2))
        .route("/sandboxes/{id}", get(sandboxes::detail).delete(sandboxes::kill))
        .route("/sandboxes/{id}/connect", post(sandboxes::connect_v1))
        .route("/v2/sandboxes/{id}/connect", post(sandboxes::connect_v2))
        .route("/sandboxes/{id}/timeout", post(sandboxes::set_timeout))
        .route("/sandboxes/{id}/refreshes", post(sandboxes::refresh))
        .route("/sandboxes/metrics", any(not_yet))
        .route("/sandboxes/{id}/metrics", any(not_yet))
        .route("/sandboxes/{id}/logs", get(logs::list_v1))
        .route("/v2/sandboxes/{id}/logs", get(logs::list_v2))
        .route("/sandboxes/{id}/pause", any(not_yet))
        .route("/sandboxes/{id}/resume", any(not_yet))
        .route("/sandboxes/{id}/fork", any(not_yet))
        .route("/sandboxes/{id}/snapshots", any(not_yet))
        .route("/sandboxes/{id}/network", any(not_yet))
        .route("/snapshots", any(not_yet))
        .route("/templates", get(templates::list_v1))
        .route("/v2/templates", get(templates::list_v2))
        .route("/templates/{id}", get(templates::detail))
        .route("/templates/aliases/{alias}", get(templates::alias))
        .route_layer(from_fn_with_state(Arc::clone(&app), auth::require_team));
    Router::new()
        .route("/health", get(health))
        .merge(of_teams)
        .method_not_allowed_fallback(no_such_route)
        .fallback(no_such_route)
        .layer(from_fn(log_request))
        .with_state(app)
}

async fn health(State(_app): State<Arc<App>>) -> &'static str {
    "Health check successful"
}

async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("no such route: {method} {}", uri.path()))
}

/// Routes of the contract that this server does not serve yet. A 404 would tell an SDK that the
/// sandbox is gone.
async fn not_yet(method: Method, uri: Uri) -> ApiError {
    let message = format!("{method} {} is not supported by this server yet", uri.path());
    ApiError::new(StatusCode::NOT_IMPLEMENTED, message)
}

/// One line a request. Queries and headers can hold what the caller wants kept private.
async fn log_request(request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let agent = request.headers().get(header::USER_AGENT).cloned();
    let response = next.run(request).await;
    info!(
        %method,
        path,
        status = response.status().as_u16(),
        duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        agent = agent.as_ref().and_then(|a| a.to_str().ok()),
        "request"
    );
    response
}
