//! Connections to one sandbox: opened on demand, kept for reuse, closed with its route.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use http::{Method, Request, Response};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use crate::catalog::Route;
use crate::connect::{self, ConnectError};
use crate::guest_socket::GuestSocket;
use crate::request_body::GuestBody;
use crate::routing::ENVD_PORT;
use crate::server::{Config, ScopeExecutor};

/// How long a connection to a user's service is kept unused. Shorter than the keep-alive of
/// common servers (gunicorn 2 s, node and uvicorn 5 s), so that a request rarely meets a
/// connection that its server is just closing; opening a new one costs a fraction of a
/// millisecond. The guest daemon keeps its side longer than we do, by the contract.
const SERVICE_IDLE_LIMIT: Duration = Duration::from_millis(1500);
/// Unused connections kept to one port.
const IDLE_PER_PORT: usize = 32;
/// Ports to which unused connections are kept.
const IDLE_PORTS: usize = 64;

const H2_STREAM_WINDOW_BYTES: u32 = 1 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 2 << 20;
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
const H2_PING_TIMEOUT: Duration = Duration::from_secs(15);

/// Which HTTP is spoken to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    /// HTTP/2 without TLS and without asking first; what gRPC servers speak.
    Http2,
}

/// Why there is no response from the guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    #[error("connect to the service")]
    Connect(#[source] ConnectError),
    #[error("exchange with the service")]
    Broken(#[source] hyper::Error),
}

/// What connections need from the server around them.
pub(crate) struct Link {
    pub(crate) config: Config,
    pub(crate) scope: Scope,
}

/// The kept connections of one route. The locks are held for a look, never over a wait.
#[derive(Default)]
pub(crate) struct Pool {
    idle: Mutex<HashMap<u16, Vec<Kept>>>,
    /// One HTTP/2 connection a port carries every stream to it.
    shared: Mutex<HashMap<u16, Shared>>,
}

struct Shared {
    sender: http2::SendRequest<GuestBody>,
    usage: Arc<Usage>,
}

struct Kept {
    sender: http1::SendRequest<GuestBody>,
    usage: Arc<Usage>,
}

/// A connection in use by one exchange, until dropped.
pub(crate) struct Lease {
    kind: LeaseKind,
    usage: InUse,
}

enum LeaseKind {
    Http1 {
        sender: http1::SendRequest<GuestBody>,
        route: Route,
        port: u16,
    },
    /// The response came before the request had been sent. Its service may close the connection
    /// instead of reading the rest, and nothing says so before the next request meets that.
    Http1Once {
        _sender: http1::SendRequest<GuestBody>,
    },
    Http2,
}

impl Lease {
    /// Keeps the connection for the next exchange. To be called when the response has been read
    /// to its end; a lease that is just dropped closes its HTTP/1 connection.
    pub(crate) fn keep(self) {
        let LeaseKind::Http1 { sender, route, port } = self.kind else { return };
        let kept = Kept { sender, usage: Arc::clone(&self.usage.0) };
        drop(self.usage);
        if !route.has_ended() {
            route.pool().put(port, kept);
        }
    }
}

/// Sends a request to a port of a sandbox and waits for the head of the response.
///
/// Cancel-safe: dropping it closes the connection it used.
///
/// # Errors
/// [`ExchangeError`]. A request that may have reached the service is not sent twice, unless it
/// is safe and has no body.
pub(crate) async fn exchange(
    link: &Arc<Link>,
    route: &Route,
    port: u16,
    protocol: Protocol,
    request: Request<GuestBody>,
) -> Result<(Response<Incoming>, Lease), ExchangeError> {
    match protocol {
        Protocol::Http1 => exchange_http1(link, route, port, request).await,
        Protocol::Http2 => exchange_http2(link, route, port, request).await,
    }
}

async fn exchange_http1(
    link: &Arc<Link>,
    route: &Route,
    port: u16,
    mut request: Request<GuestBody>,
) -> Result<(Response<Incoming>, Lease), ExchangeError> {
    let sent = request.body().sent();
    let lease = |sender, usage| {
        let kind = if sent.is_whole() {
            LeaseKind::Http1 { sender, route: route.clone(), port }
        } else {
            LeaseKind::Http1Once { _sender: sender }
        };
        Lease { kind, usage }
    };
    // Bounded by the pool: each turn takes a kept connection out.
    while let Some((mut sender, usage)) = route.pool().take(port, idle_limit(&link.config, port)) {
        let again = repeatable(&request);
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, lease(sender, usage))),
            // The service closed the connection it had kept for us.
            Err(mut failed) => match failed.take_message().or(again) {
                Some(unsent) => request = unsent,
                None => return Err(ExchangeError::Broken(failed.into_error())),
            },
        }
    }
    let (mut sender, usage) = dial_http1(link, route, port).await?;
    let response = sender.send_request(request).await.map_err(ExchangeError::Broken)?;
    Ok((response, lease(sender, usage)))
}

async fn exchange_http2(
    link: &Arc<Link>,
    route: &Route,
    port: u16,
    mut request: Request<GuestBody>,
) -> Result<(Response<Incoming>, Lease), ExchangeError> {
    if let Some((mut sender, usage)) = route.pool().share(port) {
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, Lease { kind: LeaseKind::Http2, usage })),
            Err(mut failed) => match failed.take_message() {
                Some(unsent) => request = unsent,
                None => return Err(ExchangeError::Broken(failed.into_error())),
            },
        }
    }
    let (mut sender, usage) = dial_http2(link, route, port).await?;
    let response = sender.send_request(request).await.map_err(ExchangeError::Broken)?;
    Ok((response, Lease { kind: LeaseKind::Http2, usage }))
}

/// A copy of a request that may be sent twice: one that changes nothing and has no body.
fn repeatable(request: &Request<GuestBody>) -> Option<Request<GuestBody>> {
    let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if !safe || !request.body().is_end_stream() {
        return None;
    }
    let mut copy = Request::new(GuestBody::None);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

async fn dial(link: &Link, route: &Route, port: u16) -> Result<TcpStream, ExchangeError> {
    let limit = link.config.connect_timeout;
    connect::open(route.target().ip, port, limit).await.map_err(ExchangeError::Connect)
}

async fn dial_http1(
    link: &Arc<Link>,
    route: &Route,
    port: u16,
) -> Result<(http1::SendRequest<GuestBody>, InUse), ExchangeError> {
    let stream = dial(link, route, port).await?;
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(link.config.max_header_bytes)
        .handshake(TokioIo::new(GuestSocket::new(stream)))
        .await
        .map_err(ExchangeError::Broken)?;
    let usage = drive(link, route, port, connection.with_upgrades());
    Ok((sender, usage))
}

async fn dial_http2(
    link: &Arc<Link>,
    route: &Route,
    port: u16,
) -> Result<(http2::SendRequest<GuestBody>, InUse), ExchangeError> {
    let stream = dial(link, route, port).await?;
    let max_header_bytes = u32::try_from(link.config.max_header_bytes).unwrap_or(u32::MAX);
    let (sender, connection) = http2::Builder::new(ScopeExecutor::new(&link.scope))
        .timer(TokioTimer::new())
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(H2_PING_INTERVAL)
        .keep_alive_timeout(H2_PING_TIMEOUT)
        .max_header_list_size(max_header_bytes)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ExchangeError::Broken)?;
    let usage = drive(link, route, port, connection);
    if !route.has_ended() {
        let mut shared = lock(&route.pool().shared);
        shared.retain(|_, kept| !kept.sender.is_closed());
        shared.insert(port, Shared { sender: sender.clone(), usage: Arc::clone(&usage.0) });
    }
    Ok((sender, usage))
}

fn idle_limit(config: &Config, port: u16) -> Duration {
    if port == ENVD_PORT { config.idle_timeout } else { SERVICE_IDLE_LIMIT }
}

/// Runs a connection until it ends, has been unused for too long, or its route ends.
fn drive<C>(link: &Arc<Link>, route: &Route, port: u16, connection: C) -> InUse
where
    C: Future<Output = hyper::Result<()>> + Send + 'static,
{
    let usage = Arc::new(Usage::default());
    let in_use = usage.begin().expect("a new connection is not retired");
    let (link_of_task, route) = (Arc::clone(link), route.clone());
    link.scope.spawn_shielded("guest connection", OnError::Log, async move {
        run(&link_of_task, &route, port, &usage, connection).await;
        Ok::<(), Infallible>(())
    });
    in_use
}

async fn run<C>(link: &Link, route: &Route, port: u16, usage: &Usage, connection: C)
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut connection = pin!(connection);
    let mut limit = idle_limit(&link.config, port);
    let mut drained = None;
    loop {
        let wake = match (usage.idle_since(), drained) {
            (Some(since), _) => Some(since + limit),
            (None, end) => end,
        };
        let woken = async {
            match wake {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    debug!(sandbox = %route.id(), port, %error, "connection to the guest broke");
                }
                return;
            }
            () = route.ended() => return,
            () = link.scope.cancelled(), if drained.is_none() => {
                drained = Some(Instant::now() + link.config.drain_timeout);
                limit = Duration::ZERO;
            }
            () = usage.changed.notified() => {}
            () = woken => {
                if usage.retire(limit) || drained.is_some_and(|end| end <= Instant::now()) {
                    return;
                }
            }
        }
    }
}

impl Pool {
    fn take(&self, port: u16, limit: Duration) -> Option<(http1::SendRequest<GuestBody>, InUse)> {
        let mut ports = lock(&self.idle);
        let idle = ports.get_mut(&port)?;
        idle.retain(|kept| !kept.sender.is_closed());
        // The youngest first. One that is not ready still sends the rest of its last request.
        while let Some(at) = idle.iter().rposition(|kept| kept.sender.is_ready()) {
            let kept = idle.swap_remove(at);
            if kept.usage.idle_since().is_some_and(|since| since.elapsed() < limit)
                && let Some(usage) = kept.usage.begin()
            {
                return Some((kept.sender, usage));
            }
        }
        None
    }

    fn put(&self, port: u16, kept: Kept) {
        let mut ports = lock(&self.idle);
        if ports.len() >= IDLE_PORTS && !ports.contains_key(&port) {
            ports.retain(|_, idle| {
                idle.retain(|kept| !kept.sender.is_closed());
                !idle.is_empty()
            });
            if ports.len() >= IDLE_PORTS {
                return;
            }
        }
        let idle = ports.entry(port).or_default();
        idle.retain(|kept| !kept.sender.is_closed());
        if idle.len() < IDLE_PER_PORT {
            idle.push(kept);
        }
    }

    fn share(&self, port: u16) -> Option<(http2::SendRequest<GuestBody>, InUse)> {
        let mut ports = lock(&self.shared);
        let kept = ports.get(&port)?;
        let open = (!kept.sender.is_closed()).then(|| kept.usage.begin()).flatten();
        match open {
            Some(usage) => Some((kept.sender.clone(), usage)),
            None => {
                ports.remove(&port);
                None
            }
        }
    }

    pub(crate) fn clear(&self) {
        lock(&self.idle).clear();
        lock(&self.shared).clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who uses a connection, and since when nobody does.
#[derive(Default)]
struct Usage {
    state: Mutex<UsageState>,
    changed: Notify,
}

#[derive(Default)]
enum UsageState {
    #[default]
    New,
    Busy {
        exchanges: usize,
    },
    Idle {
        since: Instant,
    },
    /// Being closed; no exchange may begin.
    Retired,
}

impl Usage {
    fn begin(self: &Arc<Usage>) -> Option<InUse> {
        let mut state = lock(&self.state);
        let exchanges = match *state {
            UsageState::New | UsageState::Idle { .. } => 1,
            UsageState::Busy { exchanges } => exchanges + 1,
            UsageState::Retired => return None,
        };
        *state = UsageState::Busy { exchanges };
        Some(InUse(Arc::clone(self)))
    }

    fn end(&self) {
        let mut state = lock(&self.state);
        if let UsageState::Busy { exchanges } = *state {
            *state = match exchanges {
                0 | 1 => UsageState::Idle { since: Instant::now() },
                more => UsageState::Busy { exchanges: more - 1 },
            };
            self.changed.notify_one();
        }
    }

    fn idle_since(&self) -> Option<Instant> {
        match *lock(&self.state) {
            UsageState::Idle { since } => Some(since),
            _ => None,
        }
    }

    /// Closes the door if nobody has used the connection for `limit`.
    fn retire(&self, limit: Duration) -> bool {
        let mut state = lock(&self.state);
        let unused = matches!(*state, UsageState::Idle { since } if since.elapsed() >= limit);
        if unused {
            *state = UsageState::Retired;
        }
        unused
    }
}

/// One exchange on a connection, until dropped.
struct InUse(Arc<Usage>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_retired_only_when_unused() {
        let usage = Arc::new(Usage::default());
        let first = usage.begin().expect("open");
        let second = usage.begin().expect("open");
        drop(first);
        assert!(usage.idle_since().is_none());
        assert!(!usage.retire(Duration::ZERO));
        drop(second);
        assert!(!usage.retire(Duration::from_secs(1)));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(usage.retire(Duration::from_secs(1)));
        assert!(usage.begin().is_none());
    }
}
