//! Nodes: what they are, what they carry, and whether they take more. Source: contract section 1.6.

use std::sync::Arc;

use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_domain::Kind;
use belljar_wire::rest;
use futures::future::join_all;
use http::StatusCode;

use super::body::Json;
use super::error::ApiError;
use super::path::Segments;
use super::query::Query;
use crate::app::App;
use crate::node::report::{CLUSTER, settable};

type Answer = Result<Response, ApiError>;

/// Lists nodes. One that has never answered is left out; one that does not answer now is shown as it
/// was, as unhealthy.
#[utoipa::path(
    get, path = "/nodes", tag = "admin",
    params(("clusterID" = Option<String>, Query, description = "Only those of this cluster")),
    responses((status = 200, description = "All", body = Vec<rest::Node>)),
)]
pub(crate) async fn list(State(app): State<Arc<App>>, query: Query) -> Answer {
    if query.get("clusterID").is_some_and(|cluster| cluster != CLUSTER) {
        return Ok(JsonAnswer(Vec::<rest::Node>::new()).into_response());
    }
    let nodes: Vec<_> = reports(&app).await.into_iter().flatten().collect();
    Ok(JsonAnswer(nodes).into_response())
}

/// Shows a node.
#[utoipa::path(
    get, path = "/nodes/{id}", tag = "admin",
    params(("id" = String, Path, description = "The node")),
    responses(
        (status = 200, description = "What is known of it", body = rest::Node),
        (status = 404, description = "There is no such node"),
    ),
)]
pub(crate) async fn detail(State(app): State<Arc<App>>, Segments(id): Segments<String>) -> Answer {
    let node = reports(&app).await.into_iter().flatten().find(|node| node.id == id);
    Ok(JsonAnswer(node.ok_or_else(|| no_node(&id))?).into_response())
}

/// Says whether a node takes new sandboxes. Those it has live on; it is `ready` after every start of
/// its program.
#[utoipa::path(
    post, path = "/nodes/{id}", tag = "admin", request_body = rest::UpdateNodeStatus,
    params(("id" = String, Path, description = "The node")),
    responses(
        (status = 204, description = "It is so"),
        (status = 404, description = "There is no such node"),
        (status = 409, description = "The status is not one to be set"),
    ),
)]
pub(crate) async fn set_status(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
    Json(body): Json<rest::UpdateNodeStatus>,
) -> Answer {
    let place =
        reports(&app).await.iter().position(|node| node.as_ref().is_some_and(|node| node.id == id));
    let place = place.ok_or_else(|| no_node(&id))?;
    let status = settable(body.status).ok_or_else(|| {
        ApiError::of_kind(
            Kind::Conflict,
            "the field 'status' may be set to ready, draining or standby; the others are found out",
        )
    })?;
    let member = app.nodes.iter().nth(place).ok_or_else(|| no_node(&id))?;
    member.rpc.set_status(status).await.map_err(|e| {
        tracing::warn!(node = id, error = %e, "the status of a node was not set");
        ApiError::of_kind(Kind::Unavailable, "the node did not do it; try again")
    })?;
    // Whoever places sandboxes asks the node again before this answer is used.
    member.reconcile_soon.notify_one();
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// What each node says now, in the order of the list.
async fn reports(app: &App) -> Vec<Option<rest::Node>> {
    let asked = app.nodes.iter().enumerate().map(|(place, member)| async move {
        match member.rpc.report().await {
            Ok(node) => {
                app.reports.remember(place, &node);
                Some(node)
            }
            Err(_) => app.reports.recall(place),
        }
    });
    join_all(asked).await
}

fn no_node(id: &str) -> ApiError {
    ApiError::not_found(format!("there is no node {id:?}"))
}
