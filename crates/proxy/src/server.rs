//! The listener: accepts, serves and drains client connections.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::downstream::{Downstream, Observed, Overdue};
use belljar_daemon::{OnError, Scope};
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, warn};

use crate::catalog::Routes;
use crate::connect;
use crate::relay::{self, Gateway};
use crate::upstream::Link;
use crate::wake::Wake;

/// How long to leave the listener alone when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const H2_MAX_STREAMS: u32 = 250;
const H2_STREAM_WINDOW_BYTES: u32 = 1 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
const H2_PING_TIMEOUT: Duration = Duration::from_secs(15);

/// The limits of a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// For all tries to connect to a service in a sandbox together.
    pub connect_timeout: Duration,
    /// For the head of a request, from its first byte; for a new connection from its start.
    pub header_timeout: Duration,
    /// How long an unused connection is kept, to a client or to a guest daemon. Longer than the
    /// 600 s of common load balancers in front, shorter than the guest daemon's 640 s.
    /// Source: `contract/e2b-wire.md` section 3.5.
    pub idle_timeout: Duration,
    /// For requests in flight when the scope is cancelled.
    pub drain_timeout: Duration,
    /// Client connections, tunnels included; the next one waits in the kernel's queue.
    pub max_connections: usize,
    /// Requests and tunnels in flight to one sandbox; the next one is answered 429.
    pub max_connections_per_sandbox: usize,
    /// The head of a request or response, in bytes. At least 8192.
    pub max_header_bytes: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            connect_timeout: Duration::from_secs(5),
            header_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(610),
            drain_timeout: Duration::from_secs(5),
            // Upstream's numbers: 16,384 connections, a quarter of them for one host.
            max_connections: 16_384,
            max_connections_per_sandbox: 4096,
            max_header_bytes: 64 << 10,
        }
    }
}

/// What a proxy needs from the rest of the process.
#[derive(Clone)]
pub struct Deps {
    /// Where the sandboxes are.
    pub routes: Arc<dyn Routes>,
    /// Who resumes paused ones for their traffic; `None` lets them sleep.
    pub wake: Option<Arc<dyn Wake>>,
}

/// Why the proxy stopped serving.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener is broken for good.
    #[error("accept a connection for sandbox traffic")]
    Accept(#[source] io::Error),
}

/// Serves sandbox traffic until `scope` is cancelled.
///
/// Returns at once then; connections in use drain on tasks of the scope, so close it with a
/// grace above [`Config::drain_timeout`].
///
/// # Errors
/// [`ServeError`]. Errors of single connections, and shortage of descriptors, are survived.
pub async fn serve(
    config: Config,
    deps: Deps,
    listener: TcpListener,
    scope: Scope,
) -> Result<(), ServeError> {
    let permits = Arc::new(Semaphore::new(config.max_connections));
    let link = Arc::new(Link { config, scope: scope.clone() });
    let gateway = Arc::new(Gateway { routes: deps.routes, wake: deps.wake, link });
    loop {
        let accepted = tokio::select! {
            () = scope.cancelled() => return Ok(()),
            accepted = accept(&listener, &permits) => accepted?,
        };
        let Some((stream, peer, permit)) = accepted else { continue };
        let gateway = Arc::clone(&gateway);
        scope.spawn_shielded("client connection", OnError::Log, async move {
            serve_connection(gateway, stream, peer, permit).await;
            Ok::<(), Infallible>(())
        });
    }
}

/// The next connection; `None` when there was only a passing error.
async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> Result<Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)>, ServeError> {
    let permit = Arc::clone(permits).acquire_owned().await.expect("the semaphore is never closed");
    let error = match listener.accept().await {
        Ok((stream, peer)) => return Ok(Some((stream, peer, permit))),
        Err(error) => error,
    };
    match rustix::io::Errno::from_io_error(&error) {
        Some(rustix::io::Errno::BADF | rustix::io::Errno::INVAL | rustix::io::Errno::NOTSOCK) => {
            Err(ServeError::Accept(error))
        }
        Some(
            rustix::io::Errno::MFILE
            | rustix::io::Errno::NFILE
            | rustix::io::Errno::NOBUFS
            | rustix::io::Errno::NOMEM,
        ) => {
            warn!(%error, "no resources for another connection");
            sleep(ACCEPT_PAUSE).await;
            Ok(None)
        }
        // The client was gone before it was accepted: accept(2) reports errors of the new socket.
        _ => Ok(None),
    }
}

async fn serve_connection(
    gateway: Arc<Gateway>,
    stream: TcpStream,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
) {
    connect::prepare(&stream);
    let link = Arc::clone(&gateway.link);
    let config = &link.config;
    let downstream = Downstream::new(peer, config.header_timeout, config.idle_timeout, permit);
    let io = TokioIo::new(Observed::new(stream, &downstream));
    let of_requests = Arc::clone(&downstream);
    let service = service_fn(move |request| {
        relay::answer(Arc::clone(&gateway), Arc::clone(&of_requests), request)
    });
    let builder = builder(&link);
    let mut connection = pin!(builder.serve_connection_with_upgrades(io, service));
    let mut drained: Option<Instant> = None;
    loop {
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    debug!(%peer, error, "client connection broke");
                }
                return;
            }
            overdue = downstream.overdue(), if drained.is_none() => match overdue {
                Overdue::Head => return,
                Overdue::Idle => {
                    connection.as_mut().graceful_shutdown();
                    drained = Some(Instant::now() + config.drain_timeout);
                }
            },
            () = link.scope.cancelled(), if drained.is_none() => {
                connection.as_mut().graceful_shutdown();
                drained = Some(Instant::now() + config.drain_timeout);
            }
            () = sleep_until(drained.unwrap_or_else(Instant::now)), if drained.is_some() => return,
        }
    }
}

fn builder(link: &Link) -> auto::Builder<ScopeExecutor> {
    let max_header_bytes = link.config.max_header_bytes;
    let mut builder = auto::Builder::new(ScopeExecutor::new(&link.scope));
    builder
        .http1()
        .timer(TokioTimer::new())
        // `downstream` watches the head; see there.
        .header_read_timeout(None)
        .max_buf_size(max_header_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_MAX_STREAMS)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_header_list_size(u32::try_from(max_header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(H2_PING_INTERVAL)
        .keep_alive_timeout(H2_PING_TIMEOUT);
    builder
}

/// Lets hyper start the tasks of HTTP/2 streams in the scope. They end with their connection.
#[derive(Clone)]
pub(crate) struct ScopeExecutor {
    scope: Scope,
}

impl ScopeExecutor {
    pub(crate) fn new(scope: &Scope) -> ScopeExecutor {
        ScopeExecutor { scope: scope.clone() }
    }
}

impl<F> Executor<F> for ScopeExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.scope.spawn_shielded("stream", OnError::Log, async move {
            task.await;
            Ok::<(), Infallible>(())
        });
    }
}
