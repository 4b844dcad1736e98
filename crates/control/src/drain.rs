//! A request body that is read to its end even when the handler gave up on it.
//!
//! Over HTTP/1.1, closing a connection while the client still sends makes its kernel drop the answer that
//! was on the way. So what a handler leaves of a body is read and thrown away, within limits,
//! while the answer is sent: a client that sends 300 MB sees its 413.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

/// Bytes thrown away at most for one request.
const MAX_BYTES: usize = 512 << 20;
/// Longest time spent on one request's rest.
const MAX_TIME: Duration = Duration::from_secs(15);

/// A body that drains itself when dropped early.
pub(crate) struct Drained {
    body: Option<Incoming>,
    scope: Scope,
}

impl Drained {
    /// The rest of `body` is drained on a task of `scope`.
    pub(crate) fn new(body: Incoming, scope: &Scope) -> Drained {
        Drained { body: Some(body), scope: scope.clone() }
    }
}

impl Body for Drained {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = self.body.as_mut() else { return Poll::Ready(None) };
        let frame = std::task::ready!(Pin::new(body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        self.scope.spawn("drain request body", OnError::Log, async move {
            // Running out of time or bytes ends the same way: the connection is closed.
            let _ended = tokio::time::timeout(MAX_TIME, drain(body)).await;
            Ok::<(), Infallible>(())
        });
    }
}

async fn drain(mut body: Incoming) {
    let mut drained = 0;
    while drained < MAX_BYTES
        && let Some(Ok(frame)) = body.frame().await
    {
        drained += frame.data_ref().map_or(0, Bytes::len);
    }
}
