//! The public REST API: which path means what. Source: contract sections 1.1 to 1.3.

mod admin;
mod auth;
mod body;
mod create;
mod credentials;
mod document;
mod error;
mod events;
mod head;
mod keyed;
mod later;
mod list;
mod logs;
mod metrics;
mod names;
mod nodes;
mod page;
mod path;
mod pauses;
mod prometheus;
mod query;
mod range;
mod rates;
mod sandboxes;
mod shapes;
mod snapshots;
mod templates;
mod usage;
mod webhooks;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use http::{Method, StatusCode, Uri, header};
use tracing::info;
use utoipa_axum::routes;

use crate::app::App;
use document::{Access, Routes};
use error::ApiError;

/// Every route of the API.
pub(crate) fn router(app: Arc<App>) -> Router {
    let open = document::frame().routes(routes!(health));
    let open = open.merge(figures(&app));
    let all = open.merge(of_teams(&app)).merge(of_people(&app)).merge(of_operator(&app));
    document::serve(all)
        .method_not_allowed_fallback(no_such_method)
        .fallback(no_such_route)
        .layer(from_fn(head::limit))
        .layer(from_fn_with_state(Arc::clone(&app), rates::per_address))
        .layer(from_fn_with_state(Arc::clone(&app), prometheus::count))
        .layer(from_fn(log_request))
        .with_state(app)
}

/// The server's figures, for the operator or for everybody.
fn figures(app: &Arc<App>) -> Routes {
    let routes = Routes::default().routes(routes!(prometheus::show));
    if app.config.metrics_public {
        return routes;
    }
    document::guarded(routes, Access::Operator)
        .route_layer(from_fn_with_state(Arc::clone(app), auth::require_operator))
}

/// What a team does with what is its own.
fn of_teams(app: &Arc<App>) -> Routes {
    let routes = Routes::default()
        .routes(routes!(list::list_v1, sandboxes::create_v1))
        .routes(routes!(list::list_v2, sandboxes::create_v2))
        .routes(routes!(sandboxes::detail, sandboxes::kill))
        .routes(routes!(pauses::pause))
        .routes(routes!(pauses::resume))
        .routes(routes!(pauses::connect_v1))
        .routes(routes!(pauses::connect_v2))
        .routes(routes!(snapshots::take))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::fork))
        .routes(routes!(sandboxes::set_timeout))
        .routes(routes!(sandboxes::refresh))
        .routes(routes!(metrics::of_many))
        .routes(routes!(metrics::of_one))
        .routes(routes!(usage::of_team))
        .routes(routes!(usage::max_of_team))
        .routes(routes!(logs::list_v1))
        .routes(routes!(logs::list_v2))
        .routes(routes!(events::list))
        .routes(routes!(events::list_of_sandbox))
        .routes(routes!(webhooks::list, webhooks::create))
        .routes(routes!(webhooks::detail, webhooks::change, webhooks::remove))
        .routes(routes!(webhooks::deliveries))
        .routes(routes!(webhooks::retry))
        .routes(routes!(templates::list_v1))
        .routes(routes!(templates::list_v2))
        .routes(routes!(templates::detail, snapshots::remove))
        .routes(routes!(templates::alias));
    later::mount(document::guarded(routes, Access::Team))
        .route_layer(from_fn_with_state(Arc::clone(app), rates::per_team))
        .route_layer(from_fn_with_state(Arc::clone(app), auth::require_team))
}

/// What people do with their teams' keys, and their own.
fn of_people(app: &Arc<App>) -> Routes {
    let of_members = Routes::default()
        .routes(routes!(credentials::list_keys, credentials::create_key))
        .routes(routes!(credentials::rename_key, credentials::delete_key));
    let of_members = document::guarded(of_members, Access::Member)
        .route_layer(from_fn_with_state(Arc::clone(app), rates::per_team))
        .route_layer(from_fn_with_state(Arc::clone(app), auth::require_member));
    let of_users = Routes::default().routes(routes!(credentials::list_teams));
    let of_users = document::guarded(of_users, Access::User)
        .route_layer(from_fn_with_state(Arc::clone(app), auth::require_user));
    let of_signed_in = Routes::default()
        .routes(routes!(credentials::create_token))
        .routes(routes!(credentials::delete_token));
    let of_signed_in = document::guarded(of_signed_in, Access::SignedIn)
        .route_layer(from_fn_with_state(Arc::clone(app), auth::require_signed_in));
    of_members.merge(of_users).merge(of_signed_in)
}

/// What whoever runs the server does.
fn of_operator(app: &Arc<App>) -> Routes {
    use admin::{credentials, teams, tiers, users, work};
    let routes = Routes::default()
        .routes(routes!(teams::list, teams::create))
        .routes(routes!(teams::detail, teams::update, teams::delete))
        .routes(routes!(users::list_members))
        .routes(routes!(users::put_member, users::remove_member))
        .routes(routes!(credentials::list_keys, credentials::create_key))
        .routes(routes!(credentials::delete_key))
        .routes(routes!(work::kill_sandboxes))
        .routes(routes!(work::running_counts))
        .routes(routes!(work::cancel_builds))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::detail, nodes::set_status))
        .routes(routes!(tiers::list))
        .routes(routes!(tiers::put, tiers::delete))
        .routes(routes!(users::list, users::create))
        .routes(routes!(users::delete))
        .routes(routes!(credentials::list_tokens, credentials::create_token))
        .routes(routes!(credentials::delete_token));
    document::guarded(routes, Access::Operator)
        .route_layer(from_fn_with_state(Arc::clone(app), auth::require_operator))
}

/// Whether the server answers.
#[utoipa::path(
    get, path = "/health", tag = "server",
    responses((status = 200, description = "It does", body = String, content_type = "text/plain")),
)]
async fn health(State(_app): State<Arc<App>>) -> &'static str {
    "Health check successful"
}

async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("no such route: {method} {}", uri.path()))
}

/// The router adds the header that says which methods there are.
async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("no such route: {method} {}; see the header Allow", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
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
