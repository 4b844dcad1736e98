//! One end of a pipe or a terminal, read and written without blocking a thread.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// A pipe end or a terminal's controlling side.
#[derive(Debug)]
pub(super) struct Channel {
    fd: AsyncFd<OwnedFd>,
}

impl Channel {
    /// Takes a descriptor into the runtime. Must be called where a runtime is entered.
    ///
    /// # Errors
    /// When the descriptor cannot be made non-blocking or watched.
    pub(super) fn new(fd: OwnedFd, interest: Interest) -> io::Result<Channel> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Channel { fd: sys::watch_descriptor(fd, interest)? })
    }

    /// Reads what is there into an empty `buffer`, at least one byte and as many as fit; 0 is the
    /// end. The buffer is given room for `least` first, but not before there is anything to read:
    /// most processes say nothing most of the time. Cancel-safe.
    ///
    /// # Errors
    /// As `read(2)`, except that a terminal whose other side is closed counts as its end.
    pub(super) async fn read(&self, buffer: &mut Vec<u8>, least: usize) -> io::Result<usize> {
        let outcome = self
            .fd
            .async_io(Interest::READABLE, |fd| {
                buffer.reserve_exact(least);
                Ok(rustix::io::read(fd, rustix::buffer::spare_capacity(buffer))?)
            })
            .await;
        match outcome {
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(0),
            outcome => outcome,
        }
    }

    /// Bytes that could be read without waiting, as far as the kernel tells.
    pub(super) fn waiting_bytes(&self) -> u64 {
        rustix::io::ioctl_fionread(self.fd.as_fd()).unwrap_or(0)
    }

    /// Lets the pipe hold `bytes`, so that its writer and this daemon wait less for each other. The
    /// kernel takes no memory for room that is not used.
    pub(super) fn widen(&self, bytes: usize) {
        // Refused beyond the user's limit; then it stays as it is.
        let _ = rustix::pipe::fcntl_setpipe_size(self.fd.as_fd(), bytes);
    }

    /// Writes everything. Not cancel-safe: a part may have been written.
    ///
    /// # Errors
    /// As `write(2)`; a pipe nobody reads any more is `BrokenPipe`.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .fd
                .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
                .await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Sets the size of the terminal; the programs on it get SIGWINCH.
    ///
    /// # Errors
    /// When this is not a terminal.
    pub(super) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        Ok(rustix::termios::tcsetwinsize(self.fd.as_fd(), window_size(columns, rows))?)
    }
}

/// A terminal size in character cells; pixels are unknown.
pub(super) fn window_size(columns: u16, rows: u16) -> rustix::termios::Winsize {
    rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
