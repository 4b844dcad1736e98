//! The listener: accepts connections, serves HTTP/1.1 and HTTP/2 on them, and ends them.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use belljar_daemon::downstream::{Answered, Downstream, Observed, Overdue};
use belljar_daemon::drain::{Drained, WhileBusy};
use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::http_api::{self, Services, json_error};
use crate::state::State;
use crate::task::Group;
use crate::tunnel::Tunnels;

/// How long a connection may sit between requests.
///
/// Source: `contract/e2b-wire.md` section 3.5: longer than each proxy in front of it.
const IDLE_LIMIT: Duration = Duration::from_secs(640);

/// For the head of a request, from its first byte; for a new connection from its start.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// For the answers in flight of a connection that is being closed.
const CLOSE_GRACE: Duration = Duration::from_secs(5);

/// Connections served at a time, tunnels included. An idle one holds some 16 KiB.
const MAX_CONNECTIONS: usize = 2048;

/// Connections beyond those that are told so at a time; more are just closed.
const MAX_REFUSALS: usize = 32;

/// How long a connection is kept that is told so. HTTP/2 has no word for "and close".
const REFUSAL_LIMIT: Duration = Duration::from_secs(5);

/// How long sent bytes may stay unacknowledged before the connection counts as dead,
/// milliseconds. The kernel counts a peer that lives but does not read the same way, and such a
/// pause is a client's right: so this is no shorter than what the proxies in front of us allow.
const UNACKNOWLEDGED_LIMIT_MS: u32 = 610_000;

/// A silent peer is asked whether it is there after this long, and again at this interval, so that
/// one that vanished without a word is noticed within half a minute.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TRIES: u32 = 3;

/// Most bytes of a request read at once, which is also the longest head. It bounds what an upload
/// holds in memory on its way to the disk.
const READ_MAX_BYTES: usize = 128 * 1024;

/// How long to wait before accepting again when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long tasks may take to end after the stop.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Serves until `stop` is cancelled, then kills every process it started and waits for its tasks.
///
/// # Errors
/// When the listener itself is broken.
pub async fn serve(
    listener: TcpListener,
    state: Arc<State>,
    stop: CancellationToken,
) -> io::Result<()> {
    let services = Services::new(Arc::clone(&state));
    let tunnels = Tunnels::new(Arc::clone(&state));
    let open = Door::Open { router: http_api::router(&services), tunnels };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    let outcome = loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break Ok(()),
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, _)) => {
                if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                    serve_connection(&state, socket, open.clone(), place);
                } else if let Ok(place) = Arc::clone(&refusals).try_acquire_owned() {
                    serve_connection(&state, socket, Door::Full, place);
                }
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) if is_exhaustion(&error) => {
                tracing::warn!(%error, "failed to accept a connection; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            Err(error) => break Err(error),
        }
    };
    services.processes.kill_all();
    if !state.tasks.close(STOP_GRACE).await {
        tracing::warn!("tasks still run after the stop");
    }
    outcome
}

/// Where the requests of a connection go.
#[derive(Clone)]
enum Door {
    Open {
        router: Router,
        tunnels: Tunnels,
    },
    /// There are as many connections as there may be.
    Full,
}

impl Door {
    async fn answer(
        self,
        request: Request<Incoming>,
        arrival: Arrival,
    ) -> Result<Response<Body>, Infallible> {
        let serving = Arc::new(arrival.downstream.begin(request.version()));
        let response = match self {
            Door::Full => full(),
            Door::Open { tunnels, .. } if request.method() == Method::CONNECT => {
                tunnels.answer(request, arrival.own_port, Arc::clone(&serving)).await
            }
            Door::Open { router, .. } => {
                // A handler that refuses an upload leaves the rest of it on the connection.
                let rests = WhileBusy { tasks: arrival.tasks, serving: Arc::clone(&serving) };
                let request = Drained::of(request, rests).map(Body::new);
                TowerToHyperService::new(router).call(request).await?
            }
        };
        Ok(response.map(|body| Body::new(Answered::new(body, serving))))
    }
}

fn full() -> Response<Body> {
    let message =
        format!("the sandbox has {MAX_CONNECTIONS} connections open; close some and try again");
    let mut response = json_error(StatusCode::SERVICE_UNAVAILABLE, &message);
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// What a request needs of the connection it came on.
#[derive(Clone)]
struct Arrival {
    downstream: Arc<Downstream>,
    own_port: u16,
    tasks: Group,
}

fn prepare(socket: &TcpStream) {
    // The connection works without any of these.
    let _ = socket.set_nodelay(true);
    let _ = sockopt::set_tcp_user_timeout(socket, UNACKNOWLEDGED_LIMIT_MS);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL);
    let _ = sockopt::set_tcp_keepcnt(socket, KEEPALIVE_TRIES);
}

/// Serves a connection on a task of the daemon; `place` is given back at its end.
fn serve_connection(state: &State, socket: TcpStream, door: Door, place: OwnedSemaphorePermit) {
    // Gone already, or it would have both.
    let (Ok(own), Ok(peer)) = (socket.local_addr(), socket.peer_addr()) else { return };
    prepare(&socket);
    let downstream = Downstream::new(peer, HEAD_LIMIT, IDLE_LIMIT, place);
    let tasks = state.tasks.clone();
    let arrival =
        Arrival { downstream: Arc::clone(&downstream), own_port: own.port(), tasks: tasks.clone() };
    let mut incarnation = state.incarnation();
    let is_full = matches!(door, Door::Full);
    state.tasks.spawn(async move {
        let builder = builder(tasks);
        let io = TokioIo::new(Observed::new(socket, &downstream));
        let service = service_fn(move |request| door.clone().answer(request, arrival.clone()));
        let mut connection = pin!(builder.serve_connection_with_upgrades(io, service));
        // Errors of a connection are its client's: it left, or sent no HTTP.
        let until_overdue = async {
            if is_full {
                let _ = tokio::time::timeout(REFUSAL_LIMIT, connection).await;
                return;
            }
            let overdue = tokio::select! {
                _ = connection.as_mut() => return,
                overdue = downstream.overdue() => overdue,
            };
            if overdue == Overdue::Idle {
                connection.as_mut().graceful_shutdown();
                // A request may have come at the last moment.
                let _ = tokio::time::timeout(CLOSE_GRACE, connection).await;
            }
        };
        tokio::select! {
            () = until_overdue => {}
            _ = incarnation.changed() => {}
        }
    });
}

fn builder(tasks: Group) -> auto::Builder<Group> {
    let mut builder = auto::Builder::new(tasks);
    builder
        .http1()
        .timer(TokioTimer::new())
        // `downstream` watches the head; see there.
        .header_read_timeout(None)
        .max_buf_size(READ_MAX_BYTES);
    builder.http2().timer(TokioTimer::new());
    builder
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn is_exhaustion(error: &io::Error) -> bool {
    let exhausted = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error.raw_os_error().is_some_and(|code| exhausted.contains(&code))
}
