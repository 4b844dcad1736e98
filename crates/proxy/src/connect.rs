//! Opening a TCP connection to a service in a sandbox: directly, or through the guest daemon to
//! one that listens on the guest's loopback only.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::loopback::{self, TunnelError};
use crate::routing::ENVD_PORT;

/// Waits between tries, 150 ms in all. A service that has just been started is often one of these
/// away from listening; the contract (section 3.5) asks for five tries.
const RETRY_WAITS: [Duration; 4] = [
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
];

const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connect to the port")]
    Port(#[source] io::Error),
    #[error("tunnel to the port: the guest daemon carries as many as it may")]
    TunnelsFull,
}

/// Connects to `port` of the guest at `ip`, all tries together within `limit`.
///
/// # Errors
/// Of the last try; `TimedOut` when the limit passed first.
pub(crate) async fn open(
    ip: IpAddr,
    port: u16,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let stream = match timeout(limit, open_with_retries(ip, port)).await {
        Ok(outcome) => outcome?,
        Err(_) => {
            let late = io::Error::new(io::ErrorKind::TimedOut, "no answer to the connection");
            return Err(ConnectError::Port(late));
        }
    };
    prepare(&stream);
    Ok(stream)
}

async fn open_with_retries(ip: IpAddr, port: u16) -> Result<TcpStream, ConnectError> {
    let mut waits = RETRY_WAITS.into_iter();
    loop {
        let error = match TcpStream::connect(SocketAddr::new(ip, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        // Nobody listens on the address: perhaps somebody does on the guest's loopback.
        if error.kind() == io::ErrorKind::ConnectionRefused && port != ENVD_PORT {
            match loopback::open(SocketAddr::new(ip, ENVD_PORT), port).await {
                Ok(stream) => return Ok(stream),
                Err(TunnelError::Full) => return Err(ConnectError::TunnelsFull),
                Err(refused) => debug!(%ip, port, error = %refused, "no tunnel"),
            }
        }
        match waits.next() {
            Some(wait) if is_refusal(&error) => sleep(wait).await,
            _ => return Err(ConnectError::Port(error)),
        }
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    )
}

/// Sets what both sides of the proxy need: small writes leave at once, and a peer that has
/// vanished is noticed after some two minutes although streams have no time limit.
pub(crate) fn prepare(stream: &TcpStream) {
    let set = || -> io::Result<()> {
        stream.set_nodelay(true)?;
        let fd = stream.as_fd();
        sockopt::set_socket_keepalive(fd, true)?;
        sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?;
        Ok(())
    };
    // A socket that refuses is one whose peer has just reset it; the next read says so.
    if let Err(error) = set() {
        debug!(%error, "failed to set socket options");
    }
}
