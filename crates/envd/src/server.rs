//! The listener: accepts connections, serves HTTP/1.1 and HTTP/2 on them, and ends them.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use belljar_daemon::drain::Drained;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::http_api::{self, Services};
use crate::state::State;
use crate::task::Group;
use crate::tunnel::Tunnels;

/// How long a connection may sit between requests.
///
/// Source: `contract/e2b-wire.md` section 3.5: longer than each proxy in front of it.
const IDLE_LIMIT: Duration = Duration::from_secs(640);

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
    let door =
        Door { router: http_api::router(&services), tunnels: Tunnels::new(Arc::clone(&state)) };
    let outcome = loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break Ok(()),
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, _)) => serve_connection(&state, socket, door.clone()),
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

/// Where requests go.
#[derive(Clone)]
struct Door {
    router: axum::Router,
    tunnels: Tunnels,
}

impl Door {
    async fn answer(
        self,
        request: Request<Incoming>,
        own_port: u16,
        tasks: Group,
    ) -> Result<Response<Body>, Infallible> {
        if request.method() == Method::CONNECT {
            return Ok(self.tunnels.answer(request, own_port).await);
        }
        // A handler that refuses an upload leaves the rest of it on the connection.
        let request = Drained::of(request, tasks).map(Body::new);
        TowerToHyperService::new(self.router).call(request).await
    }
}

fn serve_connection(state: &Arc<State>, socket: TcpStream, door: Door) {
    // Gone already, or it would have one.
    let Ok(own_port) = socket.local_addr().map(|address| address.port()) else { return };
    // The connection works without any of these.
    let _ = socket.set_nodelay(true);
    let _ = sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED_LIMIT_MS);
    let _ = sockopt::set_socket_keepalive(&socket, true);
    let _ = sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL);
    let _ = sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_TRIES);
    let mut incarnation = state.incarnation();
    let tasks = state.tasks.clone();
    state.tasks.spawn(async move {
        let mut builder = auto::Builder::new(tasks.clone());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_LIMIT)
            .max_buf_size(READ_MAX_BYTES);
        builder.http2().timer(TokioTimer::new());
        let group = tasks.clone();
        let service =
            service_fn(move |request| door.clone().answer(request, own_port, group.clone()));
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(socket), service);
        tokio::select! {
            // Errors here are a client's: it left, or sent no HTTP.
            _ = connection => {}
            _ = incarnation.changed() => {}
            () = tasks.stopped() => {}
        }
    });
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn is_exhaustion(error: &io::Error) -> bool {
    let exhausted = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error.raw_os_error().is_some_and(|code| exhausted.contains(&code))
}
