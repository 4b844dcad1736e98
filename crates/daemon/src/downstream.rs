//! One client connection: what it is doing, and when it has taken too long.
//!
//! hyper's own header timeout also ends a connection that is merely unused between two requests.
//! Clients keep those for minutes, so the two are told apart here by watching for bytes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Version;
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, sleep_until};

/// What a client connection is doing.
///
/// ```text
///  Head ──request──► Busy ──last answer ends──► Idle ──bytes──► Head
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A request head is being sent; the first one is due from the start.
    Head { since: Instant },
    /// Requests, or a tunnel, are being served.
    Busy { requests: usize },
    /// Open and unused.
    Idle { since: Instant },
}

/// Why a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overdue {
    /// The head of a request did not arrive in time.
    Head,
    /// Nothing was asked for a long time.
    Idle,
}

/// A client connection.
pub struct Downstream {
    /// The client.
    pub peer: SocketAddr,
    header_timeout: Duration,
    idle_timeout: Duration,
    state: Mutex<State>,
    changed: Notify,
    /// Held until the connection, and the tunnel it may have become, is gone.
    _permit: OwnedSemaphorePermit,
}

struct State {
    phase: Phase,
    /// HTTP/2 sends frames between requests, so bytes alone begin nothing.
    multiplexed: bool,
}

impl Downstream {
    /// A connection whose first request is due. `permit` is given back when neither the connection
    /// nor a tunnel it has become is left.
    pub fn new(
        peer: SocketAddr,
        header_timeout: Duration,
        idle_timeout: Duration,
        permit: OwnedSemaphorePermit,
    ) -> Arc<Downstream> {
        let state = State { phase: Phase::Head { since: Instant::now() }, multiplexed: false };
        Arc::new(Downstream {
            peer,
            header_timeout,
            idle_timeout,
            state: Mutex::new(state),
            changed: Notify::new(),
            _permit: permit,
        })
    }

    /// Says that a request has arrived; it is served until the guard is dropped.
    pub fn begin(self: &Arc<Downstream>, version: Version) -> Serving {
        let mut state = self.state();
        state.multiplexed = version == Version::HTTP_2;
        let requests = match state.phase {
            Phase::Busy { requests } => requests + 1,
            Phase::Head { .. } | Phase::Idle { .. } => 1,
        };
        self.change(&mut state, Phase::Busy { requests });
        drop(state);
        Serving(Arc::clone(self))
    }

    /// Resolves when the connection has kept us waiting for too long. Cancel-safe.
    pub async fn overdue(&self) -> Overdue {
        loop {
            let changed = self.changed.notified();
            let deadline = match self.state().phase {
                Phase::Head { since } => Some((since + self.header_timeout, Overdue::Head)),
                Phase::Idle { since } => Some((since + self.idle_timeout, Overdue::Idle)),
                Phase::Busy { .. } => None,
            };
            let Some((end, overdue)) = deadline else {
                changed.await;
                continue;
            };
            tokio::select! {
                () = changed => {}
                () = sleep_until(end) => return overdue,
            }
        }
    }

    fn bytes_arrived(&self) {
        let mut state = self.state();
        if let (Phase::Idle { .. }, false) = (state.phase, state.multiplexed) {
            self.change(&mut state, Phase::Head { since: Instant::now() });
        }
    }

    fn end(&self) {
        let mut state = self.state();
        let phase = match state.phase {
            Phase::Busy { requests } if requests > 1 => Phase::Busy { requests: requests - 1 },
            _ => Phase::Idle { since: Instant::now() },
        };
        self.change(&mut state, phase);
    }

    fn change(&self, state: &mut MutexGuard<'_, State>, phase: Phase) {
        state.phase = phase;
        self.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request being served, until dropped.
pub struct Serving(Arc<Downstream>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The body of an answer; its request counts as being served until the body is gone.
pub struct Answered<B> {
    body: B,
    _serving: Arc<Serving>,
}

impl<B> Answered<B> {
    /// `body` answers the request that is `serving`.
    pub fn new(body: B, serving: Arc<Serving>) -> Answered<B> {
        Answered { body, _serving: serving }
    }
}

impl<B: Body + Unpin> Body for Answered<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The socket of a client connection; tells it about bytes that arrive.
pub struct Observed {
    stream: TcpStream,
    downstream: Arc<Downstream>,
}

impl Observed {
    /// The socket of `downstream`.
    pub fn new(stream: TcpStream, downstream: &Arc<Downstream>) -> Observed {
        Observed { stream, downstream: Arc::clone(downstream) }
    }

    /// The bare socket, for what comes after HTTP.
    pub fn into_inner(self) -> TcpStream {
        self.stream
    }
}

impl AsyncRead for Observed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.downstream.bytes_arrived();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Observed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::Semaphore;

    const HEADER: Duration = Duration::from_secs(10);
    const IDLE: Duration = Duration::from_secs(610);

    async fn connection() -> Arc<Downstream> {
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("one permit");
        Downstream::new(SocketAddr::from(([127, 0, 0, 1], 1)), HEADER, IDLE, permit)
    }

    async fn ends_after(connection: &Downstream) -> (Overdue, Duration) {
        let start = Instant::now();
        let overdue = connection.overdue().await;
        // Timers fire up to a millisecond late.
        (overdue, Duration::from_secs(start.elapsed().as_secs()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_request_is_due_at_once_and_the_next_one_is_not() {
        let connection = connection().await;
        assert_eq!(ends_after(&connection).await, (Overdue::Head, HEADER));
        drop(connection.begin(Version::HTTP_11));
        assert_eq!(ends_after(&connection).await, (Overdue::Idle, IDLE));
        connection.bytes_arrived();
        connection.bytes_arrived();
        assert_eq!(ends_after(&connection).await, (Overdue::Head, HEADER));
    }

    #[tokio::test(start_paused = true)]
    async fn frames_between_requests_begin_nothing() {
        let connection = connection().await;
        let (one, two) = (connection.begin(Version::HTTP_2), connection.begin(Version::HTTP_2));
        drop(one);
        assert!(tokio::time::timeout(IDLE * 2, connection.overdue()).await.is_err());
        drop(two);
        connection.bytes_arrived();
        assert_eq!(ends_after(&connection).await, (Overdue::Idle, IDLE));
    }
}
