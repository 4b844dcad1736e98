//! What sandboxes use. Source: contract section 1.2.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_domain::SandboxId;
use belljar_wire::rest;
use futures::future::join_all;
use tracing::debug;

use super::auth::Caller;
use super::error::ApiError;
use super::query::Query;
use super::range::range;
use super::sandboxes::Named;
use super::shapes;
use crate::app::App;
use crate::node::{Sample, Span};
use crate::nodes::NodeIx;

/// Sandboxes in one request. Source: contract section 9.
const MAX_IDS: usize = 100;

type Answer = Result<Response, ApiError>;

/// Shows what a sandbox used, oldest first: every 5 seconds for the last hour, every minute for the
/// day before.
#[utoipa::path(
    get, path = "/sandboxes/{id}/metrics", tag = "sandboxes",
    params(
        Named,
        ("start" = Option<i64>, Query, description = "Not before this time, in seconds since 1970", minimum = 0, maximum = 253402300799_i64),
        ("end" = Option<i64>, Query, description = "Not after this time, in seconds since 1970", minimum = 0, maximum = 253402300799_i64),
    ),
    responses(
        (status = 200, description = "The samples", body = Vec<rest::SandboxMetric>),
        (status = 404, description = "There is no such sandbox"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn of_one(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    query: Query,
) -> Answer {
    let (start, end) = range(&query)?;
    let sandbox = app
        .live
        .find_running(&named.id, &team.id, clock::now())
        .ok_or_else(|| ApiError::no_sandbox(&named.text))?;
    let samples = app
        .node_of(&sandbox)
        .rpc
        .samples(&sandbox.id, Span { start, end })
        .await
        .map_err(|error| ApiError::of_sandbox(error.kind(), &error, &named.text))?;
    let metrics: Vec<_> = samples.iter().map(metric).collect();
    Ok(JsonAnswer(metrics).into_response())
}

/// Shows what several sandboxes use now. Unknown ones are left out, and so are those of a node that
/// does not answer, unless no node does.
#[utoipa::path(
    get, path = "/sandboxes/metrics", tag = "sandboxes",
    params(("sandbox_ids" = Vec<String>, Query, style = Form, explode = false, description = "Their ids, separated by commas", min_items = 1, max_items = 100)),
    responses(
        (status = 200, description = "The newest sample of each", body = rest::SandboxesWithMetrics),
        (status = 504, description = "No node of theirs answered in time"),
    ),
)]
pub(crate) async fn of_many(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    query: Query,
) -> Answer {
    let asked: Vec<&str> = query.list("sandbox_ids").take(MAX_IDS + 1).collect();
    if asked.is_empty() || asked.len() > MAX_IDS {
        return Err(ApiError::bad_request(format!(
            "the parameter 'sandbox_ids' must name 1 to {MAX_IDS} sandboxes, separated by commas"
        )));
    }
    let now = clock::now();
    let mut by_node: HashMap<NodeIx, Vec<SandboxId>> = HashMap::new();
    for text in asked {
        let Ok(id) = text.parse::<SandboxId>() else { continue };
        if let Some(sandbox) = app.live.find_running(&id, &team.id, now) {
            by_node.entry(sandbox.node).or_default().push(id);
        }
    }
    let questions = by_node.iter().map(|(&node, ids)| app.nodes.get(node).rpc.newest_samples(ids));
    let (mut sandboxes, mut answered, mut silent) = (BTreeMap::new(), false, None);
    for answer in join_all(questions).await {
        match answer {
            Ok(newest) => {
                answered = true;
                let shown =
                    newest.into_iter().map(|(id, sample)| (id.to_string(), metric(&sample)));
                sandboxes.extend(shown);
            }
            Err(error) => {
                debug!(error = %error, "a node did not say what its sandboxes use");
                silent = Some(error);
            }
        }
    }
    if let Some(error) = silent.filter(|_| !answered) {
        let message = "no node said what its sandboxes use; try again";
        return Err(ApiError::of_node(&error, message));
    }
    Ok(JsonAnswer(rest::SandboxesWithMetrics { sandboxes }).into_response())
}

fn metric(sample: &Sample) -> rest::SandboxMetric {
    let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    rest::SandboxMetric {
        timestamp: shapes::time(sample.at),
        timestamp_unix: sample.at.0.div_euclid(1000),
        cpu_count: sample.cpu_count,
        cpu_used_pct: sample.cpu_used_percent,
        mem_used: bytes(sample.mem_used_bytes),
        mem_total: bytes(sample.mem_total_bytes),
        mem_cache: bytes(sample.mem_cache_bytes),
        disk_used: bytes(sample.disk_used_bytes),
        disk_total: bytes(sample.disk_total_bytes),
    }
}
