//! A request body that is read to its end even when the handler gave up on it.
//!
//! Over HTTP/1.1 the rest of a body stands between its request and the next one. A server that
//! leaves it must close the connection: the client's kernel may then drop the answer that was on
//! the way, and a peer that keeps connections finds one that looks open and is not. So what a
//! handler leaves is read and thrown away, within limits, while the answer is sent: a client that
//! sends 300 MB sees its 413, and its connection serves the next request.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Version, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::rt::Executor;

use crate::downstream::Serving;
use crate::{OnError, Scope};

/// Bytes thrown away at most for one request.
const MAX_BYTES: usize = 512 << 20;
/// Longest time spent on one request's rest.
const MAX_TIME: Duration = Duration::from_secs(15);

/// The reading of one rest; ends by itself within the limits.
pub type Rest = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A body that drains itself when dropped early; `T` runs the reading.
#[derive(Debug)]
pub struct Drained<T: Executor<Rest> + Unpin> {
    body: Option<Incoming>,
    /// `None` where a rest needs no reading.
    tasks: Option<T>,
    /// Whether the client sends: one that waits for `100 Continue` does once it was read from.
    sends: bool,
}

impl<T: Executor<Rest> + Unpin> Drained<T> {
    /// The request with a body whose rest is read on `tasks`.
    ///
    /// HTTP/2 resets one stream, so only HTTP/1 needs that; and a client that waits for
    /// `100 Continue` sends nothing unless it is asked to.
    pub fn of(request: Request<Incoming>, tasks: T) -> Request<Drained<T>> {
        let waits = request.headers().contains_key(header::EXPECT);
        let tasks = (request.version() <= Version::HTTP_11).then_some(tasks);
        request.map(|body| Drained { body: Some(body), tasks, sends: !waits })
    }
}

impl<T: Executor<Rest> + Unpin> Body for Drained<T> {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.sends = true;
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

impl<T: Executor<Rest> + Unpin> Drop for Drained<T> {
    fn drop(&mut self) {
        let rest = self.body.take().filter(|body| self.sends && !body.is_end_stream());
        if let (Some(rest), Some(tasks)) = (rest, self.tasks.take()) {
            tasks.execute(Box::pin(async {
                // Running out of time or bytes ends the same way: the connection is closed.
                let _ended = tokio::time::timeout(MAX_TIME, drain(rest)).await;
            }));
        }
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

/// Reads rests while their connection counts as busy: their bytes are no head of a next request.
#[derive(Clone)]
pub struct WhileBusy<T> {
    /// What runs the reading.
    pub tasks: T,
    /// The request.
    pub serving: Arc<Serving>,
}

impl<T: Executor<Rest>> Executor<Rest> for WhileBusy<T> {
    fn execute(&self, rest: Rest) {
        let serving = Arc::clone(&self.serving);
        self.tasks.execute(Box::pin(async {
            rest.await;
            drop(serving);
        }));
    }
}

/// A rest is not worth waiting for when the scope ends.
impl Executor<Rest> for Scope {
    fn execute(&self, rest: Rest) {
        self.spawn("drain request body", OnError::Log, async {
            rest.await;
            Ok::<(), std::convert::Infallible>(())
        });
    }
}
