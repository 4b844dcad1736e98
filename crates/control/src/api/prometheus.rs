//! Counting requests, and showing the figures to Prometheus.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{Method, header};

use super::error::Refusal;
use crate::app::App;
use crate::metrics::Answered;

/// Source: OpenMetrics 1.0, section "Protocol Negotiation".
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Counts a request by its route and its outcome.
pub(crate) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().cloned();
    let route = path.as_ref().map(MatchedPath::as_str);
    let creates = method == Method::POST && matches!(route, Some("/sandboxes" | "/v2/sandboxes"));
    let creating = creates.then(|| app.metrics.begin_create());
    let response = next.run(request).await;
    drop(creating);
    let answered = Answered {
        method: &method,
        route,
        status: response.status(),
        reason: response.extensions().get::<Refusal>().map(|refusal| refusal.0),
        took: began.elapsed(),
    };
    app.metrics.answered(&answered, creates);
    response
}

/// Shows figures of this server to Prometheus, which sends the admin token with its setting
/// `http_headers`. Anybody may read them if the server was started so.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text")),
)]
pub(crate) async fn show(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], app.metrics.scrape(&app)).into_response()
}
