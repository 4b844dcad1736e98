//! Routes of the contract that this server does not serve yet, and that its document leaves out.
//!
//! They answer 501: a 404 would tell an SDK that the sandbox or the template is gone.
//! Source: contract sections 1.2 to 1.5.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::routing::{MethodFilter, on};
use belljar_daemon::clock;
use http::{Method, StatusCode, Uri};

use super::auth::Caller;
use super::document::Routes;
use super::error::ApiError;
use super::sandboxes::Named;
use crate::app::App;

const GET: MethodFilter = MethodFilter::GET;
const POST: MethodFilter = MethodFilter::POST;
const PUT: MethodFilter = MethodFilter::PUT;
const PATCH: MethodFilter = MethodFilter::PATCH;
const DELETE: MethodFilter = MethodFilter::DELETE;

/// One line moves out of here with the handler that makes it true.
const LATER: &[(MethodFilter, &str)] = &[
    (GET, "/default-templates"),
    (POST, "/templates"),
    (POST, "/templates/{id}"),
    (PATCH, "/templates/{id}"),
    (PATCH, "/v2/templates/{id}"),
    (POST, "/v2/templates"),
    (POST, "/v3/templates"),
    (GET, "/templates/{id}/files/{hash}"),
    (POST, "/templates/{id}/builds/{build}"),
    (POST, "/v2/templates/{id}/builds/{build}"),
    (GET, "/templates/{id}/builds/{build}/status"),
    (GET, "/templates/{id}/builds/{build}/logs"),
    (POST, "/templates/tags"),
    (DELETE, "/templates/tags"),
    (GET, "/templates/{id}/tags"),
    (GET, "/templates/{id}/tags/count"),
    (GET, "/templates/{id}/tags/exists"),
    (GET, "/templates/{id}/tags/groups"),
    (GET, "/templates/{id}/tags/{tag}/assignments"),
    (GET, "/volumes"),
    (POST, "/volumes"),
    (GET, "/volumes/{id}"),
    (DELETE, "/volumes/{id}"),
    (GET, "/secrets"),
    (POST, "/secrets"),
    (GET, "/secrets/{id}"),
    (POST, "/secrets/{id}"),
    (DELETE, "/secrets/{id}"),
];

/// As [`LATER`], of one sandbox: one that is not there is 404 all the same.
const LATER_OF_SANDBOXES: &[(MethodFilter, &str)] = &[(PUT, "/sandboxes/{id}/network")];

/// Mounts them beside what is served.
pub(crate) fn mount(routes: Routes) -> Routes {
    let routes = LATER
        .iter()
        .fold(routes, |routes, (method, path)| routes.route(path, on(*method, not_yet)));
    LATER_OF_SANDBOXES
        .iter()
        .fold(routes, |routes, (method, path)| routes.route(path, on(*method, not_yet_of_sandbox)))
}

async fn not_yet_of_sandbox(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    method: Method,
    uri: Uri,
) -> ApiError {
    match app.live.find(&named.id, &team.id, clock::now()) {
        Some(_) => not_yet(method, uri).await,
        None => ApiError::no_sandbox(&named.text),
    }
}

async fn not_yet(method: Method, uri: Uri) -> ApiError {
    not_supported(&format!("{method} {}", uri.path()))
}

/// The answer to a request for `what`, which comes later.
pub(super) fn not_supported(what: &str) -> ApiError {
    let message = format!("{what} is not supported by this server yet");
    ApiError::new(StatusCode::NOT_IMPLEMENTED, message)
}
