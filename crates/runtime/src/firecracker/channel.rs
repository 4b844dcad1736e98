//! The guest's control stream over Firecracker's socket device.
//!
//! A guest that is up, or whose connections a snapshot ended, knocks: it connects to the host's port
//! [`KNOCK_PORT`]. Then the host connects to [`CONTROL_PORT`] in the guest, where only its root may
//! listen. So readiness is pushed, and a program in the guest that knocks in its daemon's place wins
//! nothing. Whoever uses the stream sees one stream for as long as the process lives: connections
//! come and go below, between lines, because a guest is silent while it is saved.
//!
//! Source: Firecracker's description of its socket device (`CONNECT PORT`, `OK PORT`, `PATH_PORT`).

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use belljar_wire::guest::{CONTROL_PORT, KNOCK_PORT};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

use super::api::{hold_socket, reopened, short_path};
use super::jail::Jail;
use crate::keeper::ProcessHandle;
use crate::sys;

/// The device's socket, as the process sees it.
pub(super) const DEVICE: &str = "/run/vsock";
/// From `CONNECT` to `OK`: the guest's kernel answers, when the guest runs.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// `OK 4294967295`, and its line feed.
const ANSWER_MAX_BYTES: usize = 14;

/// Where a guest knocks, before there is a process.
#[derive(Debug)]
pub(super) struct Door {
    listener: Arc<OwnedFd>,
    knocks: UnixListener,
}

impl Door {
    /// # Errors
    /// I/O errors.
    pub(super) fn open(jail: &Jail) -> io::Result<Door> {
        let folder = File::open(jail.outside("run"))?;
        let name = format!("vsock_{KNOCK_PORT}");
        let listener = std::os::unix::net::UnixListener::bind(short_path(&folder, &name))?;
        listener.set_nonblocking(true)?;
        jail.give_path(&jail.outside("run").join(name))?;
        let ours = Arc::new(OwnedFd::from(listener.try_clone()?));
        Ok(Door { listener: ours, knocks: UnixListener::from_std(listener)? })
    }

    /// The stream of a process whose socket device is there.
    ///
    /// # Errors
    /// I/O errors.
    pub(super) fn channel(
        self,
        jail: &Jail,
        process: &ProcessHandle,
    ) -> io::Result<(Channel, Cut)> {
        let device = Arc::new(hold_socket(&jail.outside(DEVICE))?);
        let cut = Cut { listener: self.listener, asked: Arc::default() };
        let end = sys::watch_readable(process.end_descriptor()?)?;
        let channel = Channel {
            knocks: self.knocks,
            device,
            end,
            cut: cut.asked.clone(),
            link: Link::Waiting,
        };
        Ok((channel, cut))
    }
}

/// Ends the connection of a machine that stands still, because its snapshot ended it in the guest.
#[derive(Debug)]
pub(super) struct Cut {
    listener: Arc<OwnedFd>,
    asked: Arc<AtomicBool>,
}

impl Cut {
    /// A knock of before is none of the guest that goes on.
    pub(super) fn cut(&self) {
        while rustix::net::accept(&self.listener).is_ok() {}
        self.asked.store(true, Ordering::Release);
    }
}

type Connecting = Pin<Box<dyn Future<Output = io::Result<UnixStream>> + Send + Sync>>;

enum Link {
    /// For a knock.
    Waiting,
    /// To the guest's daemon.
    Connecting(Connecting),
    Open(UnixStream),
    /// The process is gone.
    Ended,
}

/// The stream.
pub(super) struct Channel {
    knocks: UnixListener,
    device: Arc<OwnedFd>,
    /// Readable once the process has ended.
    end: AsyncFd<OwnedFd>,
    cut: Arc<AtomicBool>,
    link: Link,
}

impl Channel {
    /// The open connection, or `None` at the end of the process.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<&mut UnixStream>>> {
        loop {
            if self.cut.swap(false, Ordering::AcqRel) {
                self.link = Link::Waiting;
            }
            match &mut self.link {
                Link::Open(_) => break,
                Link::Ended => return Poll::Ready(Ok(None)),
                Link::Waiting => match self.knocks.poll_accept(cx) {
                    Poll::Ready(knock) => {
                        drop(knock?);
                        self.link = Link::Connecting(Box::pin(connect(reopened(&*self.device))));
                    }
                    Poll::Pending => ready!(self.poll_end(cx)),
                },
                Link::Connecting(connecting) => match connecting.as_mut().poll(cx) {
                    Poll::Ready(Ok(stream)) => self.link = Link::Open(stream),
                    // It knocks again when it listens.
                    Poll::Ready(Err(_)) => self.link = Link::Waiting,
                    Poll::Pending => ready!(self.poll_end(cx)),
                },
            }
        }
        match &mut self.link {
            Link::Open(stream) => Poll::Ready(Ok(Some(stream))),
            _ => unreachable!("the loop ends with an open link only"),
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // An error means that it cannot be watched: as good as gone.
        let _ended = ready!(self.end.poll_read_ready(cx));
        self.link = Link::Ended;
        Poll::Ready(())
    }
}

/// Whether a connection's error is its end.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

async fn connect(device: PathBuf) -> io::Result<UnixStream> {
    let connecting = async {
        let mut stream = UnixStream::connect(device).await?;
        stream.write_all(format!("CONNECT {CONTROL_PORT}\n").as_bytes()).await?;
        // A byte at a time: what follows the line is the guest's.
        let mut answer = Vec::with_capacity(ANSWER_MAX_BYTES);
        while answer.last() != Some(&b'\n') && answer.len() < ANSWER_MAX_BYTES {
            answer.push(stream.read_u8().await?);
        }
        if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
            return Ok(stream);
        }
        Err(io::ErrorKind::InvalidData.into())
    };
    tokio::time::timeout(CONNECT_LIMIT, connecting).await?
}

impl AsyncRead for Channel {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let Some(stream) = ready!(this.poll_open(cx))? else { return Poll::Ready(Ok(())) };
            let before = buffer.filled().len();
            match ready!(Pin::new(stream).poll_read(cx, buffer)) {
                Ok(()) if buffer.filled().len() > before => return Poll::Ready(Ok(())),
                Ok(()) => this.link = Link::Waiting,
                Err(e) if is_end(&e) => this.link = Link::Waiting,
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Channel {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            let Some(stream) = ready!(this.poll_open(cx))? else {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            };
            match ready!(Pin::new(stream).poll_write(cx, bytes)) {
                Err(e) if is_end(&e) => this.link = Link::Waiting,
                other => return Poll::Ready(other),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A socket keeps nothing back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().link {
            Link::Open(stream) => Pin::new(stream).poll_shutdown(cx),
            _ => Poll::Ready(Ok(())),
        }
    }
}
