//! The bytes of an open file on their way out.
//!
//! What the kernel holds in memory is read at once on the thread that sends it; only what must come
//! from a disk goes by way of a thread that may wait. Each transfer reads into buffers of its own
//! again and again: a fresh one for every piece costs more than filling it.

use std::fs::File;
use std::io::{self, IoSliceMut, Read as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::stream::{self, Stream};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::task;

/// Read at once, bytes. A client that stops reading holds two of these in memory.
const PIECE_BYTES: usize = 128 * 1024;

/// `preadv2` then reads where the file stands and moves on.
const HERE: u64 = u64::MAX;

/// Yields `first`, then what the file holds from where it stands, at most `rest` bytes.
pub(super) fn pieces(
    first: Bytes,
    file: File,
    rest: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let sending = Sending {
        first: Some(first),
        file: Arc::new(file),
        rest,
        at_once: true,
        spare: Spare::default(),
    };
    stream::try_unfold(sending, |mut sending| async move {
        let piece = match sending.first.take() {
            Some(first) => Some(first),
            None => sending.next().await?,
        };
        Ok(piece.map(|piece| (piece, sending)))
    })
}

/// A buffer that no piece is using.
type Spare = Arc<Mutex<Option<Vec<u8>>>>;

struct Sending {
    first: Option<Bytes>,
    file: Arc<File>,
    rest: u64,
    /// Whether the file's system can say that a read would wait.
    at_once: bool,
    spare: Spare,
}

impl Sending {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let most = usize::try_from(self.rest).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        if most == 0 {
            return Ok(None);
        }
        let spare = lock(&self.spare).take();
        let mut buffer = spare.unwrap_or_else(|| vec![0; PIECE_BYTES]);
        let length = match self.read_at_once(&mut buffer[..most])? {
            Some(length) => length,
            None => {
                let file = Arc::clone(&self.file);
                let read = task::blocking(move || {
                    let length = read(&file, &mut buffer[..most]);
                    (buffer, length)
                });
                let (filled, length) = read.await.map_err(io::Error::other)?;
                buffer = filled;
                length?
            }
        };
        self.rest -= length as u64;
        let piece = Piece { buffer, length, spare: Arc::clone(&self.spare) };
        Ok((length > 0).then(|| Bytes::from_owner(piece)))
    }

    /// `None` when that would wait.
    fn read_at_once(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        if !self.at_once {
            return Ok(None);
        }
        let flags = ReadWriteFlags::NOWAIT;
        match preadv2(&*self.file, &mut [IoSliceMut::new(buffer)], HERE, flags) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                self.at_once = false;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn read(mut file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// The holder only moves a buffer in or out.
fn lock(spare: &Spare) -> MutexGuard<'_, Option<Vec<u8>>> {
    spare.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A filled buffer, which becomes the spare one once it was sent.
struct Piece {
    buffer: Vec<u8>,
    length: usize,
    spare: Spare,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        *lock(&self.spare) = Some(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek as _, SeekFrom, Write as _};

    use futures::stream::StreamExt as _;

    async fn sent(first: &'static [u8], file: File, rest: u64) -> Vec<u8> {
        let mut pieces = Box::pin(pieces(Bytes::from_static(first), file, rest));
        let mut all = Vec::new();
        while let Some(piece) = pieces.next().await {
            all.extend_from_slice(&piece.expect("reads"));
        }
        all
    }

    #[tokio::test]
    async fn every_byte_is_sent_once_and_in_order() {
        let content: Vec<u8> =
            (0..1_000_000_u32).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&content).expect("writes");
        for (start, rest) in [(0, u64::MAX), (0, 1_000_000), (500_000, 131_073), (999_999, 5)] {
            file.seek(SeekFrom::Start(start)).expect("seeks");
            let sent = sent(b"<", file.try_clone().expect("a copy"), rest).await;
            let start = usize::try_from(start).expect("small");
            let end = usize::try_from(rest).unwrap_or(usize::MAX).saturating_add(start);
            let expected = &content[start..end.min(content.len())];
            assert!(sent[0] == b'<' && &sent[1..] == expected, "from {start} for {rest}");
        }
    }

    #[tokio::test]
    async fn a_file_without_a_size_is_sent_too() {
        let file = File::open("/proc/self/status").expect("Linux");
        let sent = sent(b"", file, u64::MAX).await;
        assert!(String::from_utf8_lossy(&sent).contains("Threads:"));
    }

    #[tokio::test]
    async fn pieces_held_by_the_receiver_keep_what_they_say() {
        let mut file = tempfile::tempfile().expect("a file");
        for byte in 0..4 {
            file.write_all(&vec![byte; PIECE_BYTES]).expect("writes");
        }
        file.seek(SeekFrom::Start(0)).expect("seeks");
        let pieces = pieces(Bytes::new(), file, u64::MAX).skip(1);
        let held: Vec<Bytes> = pieces.map(|piece| piece.expect("reads")).collect().await;
        for (byte, piece) in held.iter().enumerate() {
            assert!(piece.iter().all(|got| usize::from(*got) == byte), "piece {byte}");
        }
        assert_eq!(held.len(), 4);
    }
}
