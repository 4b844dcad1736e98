//! Bounded lines from a peer that may be hostile or broken.

use std::io;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};

/// Reads lines of at most a given length. Keeps a half-read line between calls.
pub(crate) struct Lines<R> {
    input: BufReader<R>,
    partial: Vec<u8>,
    max_bytes: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(input: R, max_bytes: usize) -> Lines<R> {
        Lines { input: BufReader::new(input), partial: Vec::new(), max_bytes }
    }

    /// The next line without its line feed; `None` at the end of the input, where an unfinished
    /// line is dropped. Cancel-safe.
    ///
    /// # Errors
    /// I/O errors, and [`io::ErrorKind::InvalidData`] for a line that is too long.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let ready = self.input.fill_buf().await?;
            if ready.is_empty() {
                return Ok(None);
            }
            let end = ready.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(ready.len(), |at| at + 1);
            self.partial.extend_from_slice(&ready[..end.unwrap_or(taken)]);
            self.input.consume(taken);
            if self.partial.len() > self.max_bytes {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line is longer than {} bytes", self.max_bytes),
                ));
            }
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
        }
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
