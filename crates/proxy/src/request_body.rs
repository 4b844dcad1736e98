//! The body of a request: read from the client, sent to the guest, and never left halfway.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use belljar_daemon::Scope;
use belljar_daemon::drain::{Drained, WhileBusy};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// What a client sends; the rest of it is read and thrown away when nobody wants it.
pub(crate) type ClientBody = Drained<WhileBusy<Scope>>;

/// The body of a request to a guest: the client's, or none at all.
pub(crate) enum GuestBody {
    None,
    Client { body: ClientBody, sent: Arc<AtomicBool> },
}

/// Whether a request has been sent to its end.
pub(crate) struct Sent(Option<Arc<AtomicBool>>);

impl GuestBody {
    pub(crate) fn of(body: ClientBody) -> GuestBody {
        if body.is_end_stream() {
            return GuestBody::None;
        }
        GuestBody::Client { body, sent: Arc::default() }
    }

    pub(crate) fn sent(&self) -> Sent {
        match self {
            GuestBody::None => Sent(None),
            GuestBody::Client { sent, .. } => Sent(Some(Arc::clone(sent))),
        }
    }
}

impl Sent {
    pub(crate) fn is_whole(&self) -> bool {
        self.0.as_ref().is_none_or(|sent| sent.load(Ordering::Acquire))
    }
}

impl Body for GuestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let GuestBody::Client { body, sent } = self.get_mut() else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        // A body of known length is not polled past its last byte.
        if matches!(frame, None | Some(Ok(_))) && body.is_end_stream() {
            sent.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            GuestBody::None => true,
            GuestBody::Client { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            GuestBody::None => SizeHint::with_exact(0),
            GuestBody::Client { body, .. } => body.size_hint(),
        }
    }
}
