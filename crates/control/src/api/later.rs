//! Routes of the contract that this server does not serve yet, and that its document leaves out.
//!
//! They answer 501: a 404 would tell an SDK that the sandbox or the template is gone.
//! Source: contract sections 1.2 to 1.5.

use axum::routing::{MethodFilter, on};
use http::{Method, StatusCode, Uri};

use super::document::Routes;
use super::error::ApiError;

const GET: MethodFilter = MethodFilter::GET;
const POST: MethodFilter = MethodFilter::POST;
const PUT: MethodFilter = MethodFilter::PUT;
const PATCH: MethodFilter = MethodFilter::PATCH;
const DELETE: MethodFilter = MethodFilter::DELETE;

/// One line moves out of here with the handler that makes it true.
const LATER: &[(MethodFilter, &str)] = &[
    (POST, "/sandboxes/{id}/pause"),
    (POST, "/sandboxes/{id}/resume"),
    (POST, "/sandboxes/{id}/fork"),
    (POST, "/sandboxes/{id}/snapshots"),
    (PUT, "/sandboxes/{id}/network"),
    (GET, "/snapshots"),
    (GET, "/default-templates"),
    (POST, "/templates"),
    (POST, "/templates/{id}"),
    (DELETE, "/templates/{id}"),
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

/// Mounts them beside what is served.
pub(crate) fn mount(routes: Routes) -> Routes {
    LATER.iter().fold(routes, |routes, (method, path)| routes.route(path, on(*method, not_yet)))
}

async fn not_yet(method: Method, uri: Uri) -> ApiError {
    let message = format!("{method} {} is not supported by this server yet", uri.path());
    ApiError::new(StatusCode::NOT_IMPLEMENTED, message)
}
