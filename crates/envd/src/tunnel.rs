//! `CONNECT localhost:PORT`: a way in for the proxy to servers that listen on the loopback only.
//!
//! No token is asked for: whoever reaches this port from inside can reach the loopback anyway, and
//! from outside only the proxy can, which lets no client send CONNECT.
//! Source: `docs/decisions/2026-11-22-loopback-tunnel.md`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse as _, Response};
use belljar_daemon::downstream::{Observed, Serving};
use belljar_wire::guest::MAX_TUNNELS;
use bytes::Bytes;
use http::{Request, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::{Parts, downcast};
use tokio::io::{AsyncWriteExt as _, BufReader, copy_buf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::http_api::json_error;
use crate::state::State;

/// Of each direction of a tunnel.
const BUFFER_BYTES: usize = 16 * 1024;

/// For each of the two loopback addresses. Together below the 5 s that the proxy waits.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Between the 200 and the end of HTTP on the connection.
const SWITCH_LIMIT: Duration = Duration::from_secs(10);

/// How long one direction may go on when the other has ended.
///
/// Source: `contract/e2b-wire.md` section 3.5: no shorter than what the proxies in front allow.
const HALF_OPEN_LIMIT: Duration = Duration::from_secs(640);

/// How long what one side has already sent may take when the other is gone.
const REST_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
enum TunnelError {
    #[error("failed to tunnel: CONNECT is served over HTTP/1.1 only")]
    Version,
    #[error("failed to tunnel: the target must be host:port, such as localhost:8080")]
    Malformed,
    #[error("failed to tunnel to {0}: only other servers on localhost can be reached")]
    Forbidden(String),
    #[error("failed to tunnel: {MAX_TUNNELS} tunnels are open; close one and try again")]
    Full,
    #[error("failed to connect to port {port} on localhost: {source}")]
    Connect {
        port: u16,
        #[source]
        source: io::Error,
    },
}

impl TunnelError {
    fn status(&self) -> StatusCode {
        match self {
            TunnelError::Version | TunnelError::Malformed => StatusCode::BAD_REQUEST,
            TunnelError::Forbidden(_) => StatusCode::FORBIDDEN,
            TunnelError::Full => StatusCode::TOO_MANY_REQUESTS,
            TunnelError::Connect { .. } => StatusCode::BAD_GATEWAY,
        }
    }
}

/// The tunnels of a daemon. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Tunnels {
    state: Arc<State>,
    places: Arc<Semaphore>,
}

impl Tunnels {
    pub(crate) fn new(state: Arc<State>) -> Tunnels {
        Tunnels { state, places: Arc::new(Semaphore::new(MAX_TUNNELS)) }
    }

    /// Answers a CONNECT request that came to `own_port`. The tunnel runs on a task of the daemon
    /// until both directions have ended or one has failed, or the guest is another sandbox.
    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
        own_port: u16,
        serving: Arc<Serving>,
    ) -> Response {
        match self.open(&request, own_port).await {
            Ok((server, place)) => {
                self.run(hyper::upgrade::on(request), server, (place, serving));
                StatusCode::OK.into_response()
            }
            Err(error) => json_error(error.status(), &error.to_string()),
        }
    }

    async fn open(
        &self,
        request: &Request<Incoming>,
        own_port: u16,
    ) -> Result<(TcpStream, OwnedSemaphorePermit), TunnelError> {
        if request.version() != Version::HTTP_11 {
            return Err(TunnelError::Version);
        }
        let port = target_port(request.uri(), own_port)?;
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| TunnelError::Full)?;
        let connected = connect(port).await;
        let server = connected.map_err(|source| TunnelError::Connect { port, source })?;
        Ok((server, place))
    }

    /// `held` is given back at the end of the tunnel.
    fn run(
        &self,
        client: OnUpgrade,
        server: TcpStream,
        held: (OwnedSemaphorePermit, Arc<Serving>),
    ) {
        let mut incarnation = self.state.incarnation();
        self.state.tasks.spawn(async move {
            let joined = async {
                // A client that left before its 200 has no tunnel.
                let Ok(Ok(client)) = timeout(SWITCH_LIMIT, client).await else { return };
                let Ok(Parts { io, read_buf, .. }) = downcast::<TokioIo<Observed>>(client) else {
                    return tracing::warn!("a connection is no TCP socket: no tunnel");
                };
                join(io.into_inner().into_inner(), read_buf, server).await;
            };
            tokio::select! {
                () = joined => {}
                _ = incarnation.changed() => {}
            }
            drop(held);
        });
    }
}

/// The port a target names on this machine's loopback.
fn target_port(target: &Uri, own_port: u16) -> Result<u16, TunnelError> {
    let authority = target.authority().ok_or(TunnelError::Malformed)?;
    let port = authority.port_u16().filter(|port| *port != 0).ok_or(TunnelError::Malformed)?;
    // Names are compared and never looked up; user names in a target mean nothing here.
    let is_loopback = ["localhost", "127.0.0.1", "[::1]"]
        .iter()
        .any(|host| authority.as_str() == format!("{host}:{port}"));
    if !is_loopback || port == own_port {
        return Err(TunnelError::Forbidden(authority.to_string()));
    }
    Ok(port)
}

/// Connects to the first of the two loopback addresses on which somebody listens.
///
/// # Errors
/// Of IPv4, which every guest has.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match connect_to(IpAddr::V4(Ipv4Addr::LOCALHOST), port).await {
        Ok(server) => Ok(server),
        Err(error) => connect_to(IpAddr::V6(Ipv6Addr::LOCALHOST), port).await.map_err(|_| error),
    }
}

async fn connect_to(ip: IpAddr, port: u16) -> io::Result<TcpStream> {
    let connecting = TcpStream::connect(SocketAddr::new(ip, port));
    let server =
        timeout(CONNECT_LIMIT, connecting).await.map_err(|_| io::ErrorKind::TimedOut)??;
    // Where nobody listens, a socket may by chance get the very port it connects to, and TCP joins
    // it with itself.
    if server.local_addr()? == server.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    // The connection works without it.
    let _ = server.set_nodelay(true);
    Ok(server)
}

/// Copies both ways. The end of one direction is passed on and the other goes on.
async fn join(client: TcpStream, sent_already: Bytes, server: TcpStream) {
    let (from_client, to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    let up = async {
        to_server.write_all(&sent_already).await?;
        pump(from_client, to_server).await
    };
    let down = pump(from_server, to_client);
    tokio::pin!(up, down);
    let rest_limit = |ended: io::Result<()>| match ended {
        Ok(()) => HALF_OPEN_LIMIT,
        Err(_) => REST_LIMIT,
    };
    // However the rest ends, both connections are closed then.
    tokio::select! {
        ended = &mut up => { let _ = timeout(rest_limit(ended), down).await; }
        ended = &mut down => { let _ = timeout(rest_limit(ended), up).await; }
    }
}

async fn pump(from: OwnedReadHalf, mut to: OwnedWriteHalf) -> io::Result<()> {
    let mut from = BufReader::with_capacity(BUFFER_BYTES, from);
    copy_buf(&mut from, &mut to).await?;
    to.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_other_ports_of_the_loopback_are_targets() {
        let port = |target: &str| {
            let target = target.parse().expect("a URI");
            target_port(&target, 49983).map_err(|error| error.status().as_u16())
        };
        assert_eq!(port("localhost:8080"), Ok(8080));
        assert_eq!(port("127.0.0.1:1"), Ok(1));
        assert_eq!(port("[::1]:65535"), Ok(65535));
        assert_eq!(port("localhost:49983"), Err(403));
        for elsewhere in ["example.com:80", "10.0.0.1:80", "127.0.0.2:80", "a@localhost:80"] {
            assert_eq!(port(elsewhere), Err(403), "{elsewhere}");
        }
        for malformed in ["localhost", "localhost:0", "/path"] {
            assert_eq!(port(malformed), Err(400), "{malformed}");
        }
    }
}
