//! The routes, what surrounds each of them, and the plain HTTP answers that need no file of
//! their own.

mod freeze;
mod init;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State as Shared};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any_service, get, post};
use belljar_wire::rpc::filesystem::FilesystemExt as _;
use belljar_wire::rpc::process::ProcessExt as _;
use connectrpc::{CompressionPolicy, ConnectError, ConnectRpcService, Limits};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    CACHE_CONTROL, CONTENT_TYPE,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde::Serialize;

use crate::auth;
use crate::files::service::FileService;
use crate::files::{compose, download, upload};
use crate::metrics::Meter;
use crate::process::registry::Registry;
use crate::process::service::ProcessService;
use crate::state::State;

/// Largest message about processes, bytes: one piece of input may be a whole pasted file.
const PROCESS_MESSAGE_MAX_BYTES: usize = 64 * 1024 * 1024;

/// Largest message about files, bytes: two paths.
const FILE_MESSAGE_MAX_BYTES: usize = 64 * 1024;

/// Largest body of an init request, bytes.
const INIT_MAX_BYTES: usize = 4 * 1024 * 1024;

/// What the routes share.
#[derive(Clone)]
pub(crate) struct Services {
    state: Arc<State>,
    meter: Arc<Meter>,
    watchdogs: Arc<freeze::Watchdogs>,
    /// Every process this daemon started.
    pub(crate) processes: Arc<Registry>,
}

impl Services {
    /// Services of a fresh daemon.
    pub(crate) fn new(state: Arc<State>) -> Services {
        let processes = Arc::new(Registry::new(Arc::clone(&state)));
        let (meter, watchdogs) = (Arc::default(), Arc::default());
        Services { state, meter, watchdogs, processes }
    }
}

/// All routes.
pub(crate) fn router(services: &Services) -> Router {
    let state = Arc::clone(&services.state);
    let processes = Arc::new(ProcessService::new(Arc::clone(&services.processes)));
    let processes = processes.register(connectrpc::Router::new());
    let files = Arc::new(FileService::new(Arc::clone(&state))).register(connectrpc::Router::new());
    let rpc = Router::new()
        .route(
            "/process.Process/{method}",
            any_service(rpc_service(processes, PROCESS_MESSAGE_MAX_BYTES)),
        )
        .route(
            "/filesystem.Filesystem/{method}",
            any_service(rpc_service(files, FILE_MESSAGE_MAX_BYTES)),
        )
        .layer(middleware::from_fn_with_state(Arc::clone(&state), select_user));
    let files = Router::new()
        .route("/files", get(download::get).post(upload::post))
        .layer(DefaultBodyLimit::disable())
        .route(
            "/files/compose",
            post(compose::post).layer(DefaultBodyLimit::max(compose::BODY_MAX_BYTES)),
        )
        .with_state(Arc::clone(&state));
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/envs", get(envs))
        .route("/init", post(init::post).layer(DefaultBodyLimit::max(INIT_MAX_BYTES)))
        .route("/freeze", post(freeze::freeze))
        .route("/unfreeze", post(freeze::unfreeze))
        .route("/fsfreeze", post(freeze::freeze_disks))
        .route("/fsthaw", post(freeze::thaw_disks))
        .route("/collapse", post(freeze::collapse))
        .route("/upgrade", post(freeze::upgrade))
        .with_state(services.clone())
        .merge(rpc)
        .merge(files)
        .fallback(async || json_error(StatusCode::NOT_FOUND, "no such route"))
        .method_not_allowed_fallback(async || {
            json_error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
        })
        .layer(middleware::from_fn_with_state(state, auth::require_token))
        .layer(middleware::from_fn(allow_origins))
}

/// Output is compressed nowhere: it is small, or it is bulk on an emulated processor.
fn rpc_service(router: connectrpc::Router, message_max_bytes: usize) -> ConnectRpcService {
    ConnectRpcService::new(router)
        .with_compression_policy(CompressionPolicy::disabled())
        .with_limits(
            Limits::default()
                .with_max_message_size(message_max_bytes)
                .with_max_request_body_size(message_max_bytes),
        )
}

async fn health() -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn metrics(Shared(services): Shared<Services>) -> Response {
    json(StatusCode::OK, &services.meter.read())
}

async fn envs(Shared(services): Shared<Services>) -> Response {
    json(StatusCode::OK, &services.state.global_env())
}

/// Resolves the user an RPC runs as, before its body is read: an unknown one is refused on every
/// method, also on those that need none.
async fn select_user(
    Shared(state): Shared<Arc<State>>,
    mut request: Request,
    next: Next,
) -> Response {
    let name = auth::basic_user(request.headers());
    match auth::find_user(&state, name.as_deref()) {
        Ok(user) => {
            request.extensions_mut().insert(user);
            next.run(request).await
        }
        Err(error) => ConnectError::unauthenticated(error.to_string()).into_response(),
    }
}

/// Browsers may call from anywhere: the token is the guard, not the origin.
///
/// Source: `contract/e2b-wire.md` section 2.1: any origin, 7200 s.
async fn allow_origins(request: Request, next: Next) -> Response {
    let preflight = (request.method() == Method::OPTIONS)
        .then(|| request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS).cloned());
    let mut response = match &preflight {
        Some(_) => StatusCode::NO_CONTENT.into_response(),
        None => next.run(request).await,
    };
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
    if let Some(requested) = preflight {
        // `*` would not cover `Authorization`, so the requested names are echoed.
        let allowed = requested.unwrap_or(HeaderValue::from_static("*"));
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed);
        let methods = HeaderValue::from_static("HEAD, GET, POST, PUT, PATCH, DELETE");
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("7200"));
    }
    response
}

/// A JSON answer.
pub(crate) fn json<T: Serialize>(status: StatusCode, body: &T) -> Response {
    let bytes = serde_json::to_vec(body).expect("answers have string keys and no failing types");
    (status, [(CONTENT_TYPE, "application/json")], bytes).into_response()
}

/// The error body of every plain HTTP route. `code` equals the status.
pub(crate) fn json_error(status: StatusCode, message: &str) -> Response {
    #[derive(Serialize)]
    struct Body<'a> {
        code: u16,
        message: &'a str,
    }
    json(status, &Body { code: status.as_u16(), message })
}
