//! Start, serve, stop.
//!
//! HTTP/1.1 and h2c on one port, told apart by their first bytes. Start-up brings the live table up
//! to date before the first request is taken, so that a sandbox that runs is never reported gone.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use belljar_daemon::drain::Drained;
use belljar_daemon::{OnError, Scope};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower::ServiceExt as _;
use tracing::{debug, info, warn};

use crate::access::Access;
use crate::api;
use crate::app::App;
use crate::config::{Config, Deps};
use crate::metrics::Metrics;
use crate::node::report::Reports;
use crate::node::{NodeCallError, Watch};
use crate::nodes::Nodes;
use crate::oidc::Verifier;
use crate::pause;
use crate::peer::Peer;
use crate::prune;
use crate::rates::Limits;
use crate::reconcile::{self, ReconcileError};
use crate::snapshots::Snapshots;
use crate::store::StoreError;
use crate::templates::Templates;
use crate::unsettled::Unsettled;
use crate::usage::{self, Usage};
use crate::wake::{self, WakeDoor};
use crate::webhook::{Courier, prune};
use crate::writer::Writer;

/// Connections served at the same time; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 4096;
/// From connecting to the end of the first request's headers.
const FIRST_REQUEST_TIME: Duration = Duration::from_secs(15);
/// Between requests on an open connection, and for the headers of each. Longer than the 90 s after
/// which the SDKs' connection pools give an idle connection up, so that they close first.
const HEADER_TIME: Duration = Duration::from_secs(120);
/// A silent HTTP/2 peer is asked for a sign of life this often.
const H2_PING: Duration = Duration::from_secs(30);
/// Headers of one request, in number and in bytes, that are read at all. The API's own limits are
/// below and say so in its words.
const MAX_HEADERS: usize = 200;
const MAX_HEADER_BYTES: u32 = 128 << 10;
/// Concurrent requests on one HTTP/2 connection.
const H2_STREAMS: u32 = 250;
/// Wait after the listener failed, so that a lack of file descriptors is no busy loop.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How much longer than the first node the others get to answer before requests are taken.
const OTHERS_TIME: Duration = Duration::from_secs(5);

/// The control plane could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The store failed.
    #[error("start the control plane with its store")]
    Store(#[from] StoreError),
    /// The store did not take what is to be written to it.
    #[error("start the control plane: its store takes no changes")]
    Behind,
    /// No HTTP client can be made.
    #[error("start the control plane with its HTTP client")]
    Client(#[from] rustls::Error),
    /// It was given no node to work with.
    #[error("start the control plane: the list of nodes is empty")]
    NoNodes,
    /// No node answered in time.
    #[error("start the control plane: no answer from the node at {socket} in {wait_ms} ms")]
    Node {
        /// Where the first node was expected.
        socket: String,
        /// How long it was waited for.
        wait_ms: u128,
        /// What went wrong last.
        #[source]
        source: NodeCallError,
    },
}

/// Serves the REST API on `listener` until `scope` is cancelled.
///
/// Returns after open requests have been answered (at most `config.shutdown_grace`) and what is to
/// be remembered is in the store. Sandboxes go on running. Not cancel-safe: cancel the scope
/// instead of dropping the future.
///
/// # Errors
/// [`ServeError`] when the store fails at start or no node answers within `config.node_wait`.
pub async fn serve(
    config: Config,
    deps: Deps,
    listener: TcpListener,
    scope: Scope,
) -> Result<(), ServeError> {
    let grace = config.shutdown_grace;
    // The writer's scope is nobody's child: it ends when the last thing to remember is written.
    let writing = Scope::root("control writer");
    let requests = scope.child("control");
    deps.store
        .set_local_tier(config.max_concurrent_sandboxes, config.max_sandbox_length.as_secs())
        .await?;
    let access = Arc::new(Access::new(deps.store.clone(), deps.admin_token));
    let app = Arc::new(App {
        live: Arc::default(),
        nodes: Nodes::at(deps.node_sockets),
        reports: Reports::default(),
        repeats: Arc::default(),
        unsettled: Unsettled::default(),
        templates: Templates::default(),
        snapshots: Snapshots::default(),
        writer: Writer::start(deps.store.clone(), &writing),
        scope: requests.clone(),
        routes: deps.routes,
        tokens: deps.store.token_seed().await?,
        access: Arc::clone(&access),
        limits: Limits::new(config.rates),
        usage: Usage::default(),
        metrics: Metrics::new(),
        oidc: Verifier::new(&config.oidc, &requests)?,
        store: deps.store,
        config,
    });
    access.start(&requests);
    // What is paused is shown whether its node answers or not.
    reconcile::load(&app).await?;
    let outcome = tokio::select! {
        () = scope.cancelled() => Ok(()),
        attached = attach_all(&app) => match attached {
            Ok(watches) => {
                for (node, watch) in app.nodes.iter().zip(watches) {
                    let follow = reconcile::follow(Arc::clone(&app), node.ix, watch);
                    requests.spawn("follow node", OnError::FailScope, follow);
                }
                tell_of_events(&app, &requests);
                follow_snapshots(&app, deps.wake, &requests);
                let sampling = Arc::clone(&app);
                requests.spawn("sample usage", OnError::Log, async move {
                    usage::sample(&sampling).await
                });
                requests.spawn("prune runs", OnError::Log, prune::run(Arc::clone(&app)));
                accept(&app, &listener).await;
                Ok(())
            }
            Err(e) => Err(e),
        },
    };
    drop(listener);
    requests.close(grace).await;
    drop(app);
    writing.close(grace).await;
    outcome
}

/// Starts what removes snapshots nobody needs, and what resumes sandboxes for traffic.
fn follow_snapshots(app: &Arc<App>, door: Option<WakeDoor>, requests: &Scope) {
    let remove = pause::remove_given_up(Arc::clone(app));
    requests.spawn("snapshot remover", OnError::Log, remove);
    if let Some(door) = door {
        requests.spawn("wake door", OnError::Log, wake::answer_all(Arc::clone(app), door));
    }
}

/// Starts what sends events to webhooks, and what removes old ones.
fn tell_of_events(app: &App, requests: &Scope) {
    let courier =
        Courier::new(app.store.clone(), &app.config.webhooks, app.metrics.deliveries(), requests);
    requests.spawn("webhook courier", OnError::FailScope, courier.run());
    let prune = prune(app.store.clone(), app.config.event_prune_interval);
    requests.spawn("event pruner", OnError::FailScope, prune);
}

/// Attaches to every node, side by side. Once one has answered the others get a little longer;
/// those that do not answer have no watch yet.
///
/// # Errors
/// [`ServeError`] when none answers within `config.node_wait`.
async fn attach_all(app: &App) -> Result<Vec<Option<Watch>>, ServeError> {
    let wait = app.config.node_wait;
    let give_up = Instant::now() + wait;
    let attach =
        async |place: usize, node| (place, reconcile::attach(app, node, Some(give_up)).await);
    let mut attaching: FuturesUnordered<_> =
        app.nodes.iter().enumerate().map(|(place, node)| attach(place, node)).collect();
    let mut watches: Vec<Option<Watch>> = app.nodes.iter().map(|_| None).collect();
    let (mut deadline, mut error) = (None, None);
    loop {
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let attached = tokio::select! {
            attached = attaching.next() => attached,
            () = late => None,
        };
        match attached {
            Some((place, Ok(watch))) => {
                watches[place] = Some(watch);
                deadline.get_or_insert_with(|| give_up.min(Instant::now() + OTHERS_TIME));
            }
            Some((_, Err(e))) => error = Some(e),
            None => break,
        }
    }
    match error {
        _ if watches.iter().any(Option::is_some) => Ok(watches),
        Some(ReconcileError::Store(e)) => Err(e.into()),
        Some(ReconcileError::Behind) => Err(ServeError::Behind),
        Some(ReconcileError::Node(source)) => Err(ServeError::Node {
            socket: app
                .nodes
                .iter()
                .next()
                .map_or_else(String::new, |node| node.socket.display().to_string()),
            wait_ms: wait.as_millis(),
            source,
        }),
        None => Err(ServeError::NoNodes),
    }
}

async fn accept(app: &Arc<App>, listener: &TcpListener) {
    let router = api::router(Arc::clone(app));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    if let Ok(address) = listener.local_addr() {
        info!(%address, "REST API is up");
    }
    loop {
        let place = tokio::select! {
            () = app.scope.cancelled() => return,
            place = Arc::clone(&places).acquire_owned() => place.expect("it is never closed"),
        };
        let accepted = tokio::select! {
            () = app.scope.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (app, router) = (Arc::clone(app), router.clone());
                let scope = app.scope.clone();
                scope.spawn_shielded("rest connection", OnError::Log, async move {
                    connection(&app, router, stream, peer).await;
                    drop(place);
                    Ok::<(), Infallible>(())
                });
            }
            Err(e) => {
                warn!(error = %e, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Serves one connection until it ends, or until the scope does and what was asked is answered.
async fn connection(app: &App, router: axum::Router, stream: TcpStream, peer: SocketAddr) {
    // Small answers must not wait for the peer's acknowledgement of the ones before.
    if let Err(e) = stream.set_nodelay(true) {
        debug!(%peer, error = %e, "no delay is not set");
    }
    let asked = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        asked.store(true, Ordering::Relaxed);
        let mut request = Drained::of(request, app.scope.clone()).map(Body::new);
        let who = Peer::of(peer.ip(), request.headers(), &app.config.trusted_proxies);
        request.extensions_mut().insert(who);
        router.clone().oneshot(request)
    });
    let mut builder = auto::Builder::new(Spawner(app.scope.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(H2_PING)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_concurrent_streams(H2_STREAMS);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    // The header timeout starts only once the protocol is known, so the first request has its own.
    let nothing_asked = async {
        tokio::time::sleep(FIRST_REQUEST_TIME).await;
        if asked.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        outcome = served.as_mut() => return log_end(peer, outcome.err()),
        () = nothing_asked => return debug!(%peer, "closed a connection that asked nothing"),
        () = app.scope.cancelled() => {}
    }
    served.as_mut().graceful_shutdown();
    match tokio::time::timeout(app.config.shutdown_grace, served).await {
        Ok(outcome) => log_end(peer, outcome.err()),
        Err(_) => debug!(%peer, "closed a connection that was still busy"),
    }
}

fn log_end(peer: SocketAddr, error: Option<Box<dyn std::error::Error + Send + Sync>>) {
    if let Some(e) = error {
        debug!(%peer, error = %e, "connection broke");
    }
}

/// Puts the tasks of HTTP/2 streams into the scope.
#[derive(Clone)]
struct Spawner(Scope);

impl<F> Executor<F> for Spawner
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn_shielded("http2 stream", OnError::Log, async move {
            task.await;
            Ok::<(), Infallible>(())
        });
    }
}
