//! Bounded lines from a peer that may be hostile or broken.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::ready;

use tokio::io::{AsyncRead, ReadBuf};

/// Read at once, on the stack: a peer that is silent costs no buffer.
const CHUNK_BYTES: usize = 4096;

/// Reads lines of at most a given length. Keeps what it read beyond a line between calls.
pub(crate) struct Lines<R> {
    input: R,
    /// Read and not given out yet; without room of its own while that is nothing.
    pending: Vec<u8>,
    /// How much of `pending` is known to have no line feed.
    searched: usize,
    max_bytes: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(input: R, max_bytes: usize) -> Lines<R> {
        Lines { input, pending: Vec::new(), searched: 0, max_bytes }
    }

    /// Whoever sends the lines, for answers to them.
    pub(crate) fn peer(&mut self) -> &mut R {
        &mut self.input
    }

    /// The next line without its line feed; `None` at the end of the input, where an unfinished
    /// line is dropped. Cancel-safe.
    ///
    /// # Errors
    /// I/O errors, and [`io::ErrorKind::InvalidData`] for a line that is too long.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let fresh = &self.pending[self.searched..];
            let end = fresh.iter().position(|byte| *byte == b'\n').map(|at| self.searched + at);
            self.searched = self.pending.len();
            if end.unwrap_or(self.pending.len()) > self.max_bytes {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line is longer than {} bytes", self.max_bytes),
                ));
            }
            if let Some(end) = end {
                // At most one chunk comes after the line: nothing long is ever moved.
                let rest = self.pending.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.truncate(end);
                self.searched = 0;
                return Ok(Some(line));
            }
            if self.read_chunk().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Reads what is there; 0 at the end of the input. Cancel-safe: the bytes are in `pending`
    /// before it ends.
    async fn read_chunk(&mut self) -> io::Result<usize> {
        poll_fn(|context| {
            let mut chunk = [MaybeUninit::uninit(); CHUNK_BYTES];
            let mut chunk = ReadBuf::uninit(&mut chunk);
            ready!(Pin::new(&mut self.input).poll_read(context, &mut chunk))?;
            self.pending.extend_from_slice(chunk.filled());
            std::task::Poll::Ready(Ok(chunk.filled().len()))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_split_bounded_and_ended() {
        let mut lines = Lines::new(&b"one\n\ntwo\nunfinished"[..], 8);
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.push(lines.next().await.expect("short lines").expect("three lines"));
        }
        assert_eq!(seen, [b"one".to_vec(), Vec::new(), b"two".to_vec()]);
        let error = lines.next().await.expect_err("ten bytes are more than eight");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(Lines::new(&b"cut"[..], 8).next().await.expect("no error"), None);
    }

    #[tokio::test]
    async fn a_cancelled_read_loses_nothing() {
        use tokio::io::AsyncWriteExt as _;
        let (mut ours, theirs) = tokio::io::duplex(64);
        let mut lines = Lines::new(theirs, 64);
        ours.write_all(b"first ").await.expect("room in the pipe");
        tokio::select! {
            biased;
            _ = lines.next() => panic!("the line is not finished"),
            () = std::future::ready(()) => {}
        }
        ours.write_all(b"half\n").await.expect("room in the pipe");
        assert_eq!(lines.next().await.expect("no error"), Some(b"first half".to_vec()));
    }
}
