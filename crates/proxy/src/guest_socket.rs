//! The socket of a connection to a guest: what its service said is read even when it no longer
//! listens.
//!
//! A service that answers early and closes resets the connection. The answer is in our kernel
//! then, but hyper gives up on the first write that fails. So failed writes are swallowed: what
//! has arrived is read, and then the read side says how the connection ended.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

pub(crate) struct GuestSocket {
    stream: TcpStream,
    /// A write has failed; the peer is gone.
    deaf: bool,
    /// The last word of the peer has been read.
    ended: bool,
}

impl GuestSocket {
    pub(crate) fn new(stream: TcpStream) -> GuestSocket {
        GuestSocket { stream, deaf: false, ended: false }
    }

    fn unless_deaf(
        &mut self,
        length: usize,
        write: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if !self.deaf {
            match ready!(write(Pin::new(&mut self.stream))) {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(_gone) => self.deaf = true,
            }
        }
        let outcome = if self.ended { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(length) };
        Poll::Ready(outcome)
    }
}

impl AsyncRead for GuestSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        self.ended = outcome.is_err() || buffer.filled().len() == before;
        Poll::Ready(outcome)
    }
}

impl AsyncWrite for GuestSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.unless_deaf(bytes.len(), |stream| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        self.unless_deaf(length, |stream| stream.poll_write_vectored(cx, slices))
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
