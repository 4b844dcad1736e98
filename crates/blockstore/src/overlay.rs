//! A private copy-on-write disk over a shared image.
//!
//! What was written lies in a sparse file of its own, at the same offset as on the disk. A block's
//! bytes in that file mean something only while its state is [`BlockState::Written`]; a block
//! whose state is [`BlockState::Zero`] is never read from any file. Whole blocks of zeros that are
//! written are not stored.
//!
//! Locks: writers of one span of [`BLOCKS_PER_SPAN`] blocks take turns, so that two partial writes
//! to one block never lose each other's bytes and a trim never races a write. Readers take no turn:
//! `block_map` orders data before state. Every call reads the overlay's generation (image, file and
//! map) once and keeps it until it is done; only a seal replaces it, and waits for all of them. So a
//! seal divides calls into those before it and those after it, and nothing is between.
//!
//! Durability: a running overlay ends with the process that made it, because its map is in memory, and
//! with the host. Nobody ever reads it after a crash, so a flush has nothing to promise and costs
//! nothing. What outlives the process is a sealed image: [`LayeredImage::sync`] puts it on stable
//! storage, all of what was written before the seal, flushed by the guest or not.

mod seal;

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use crate::block_map::{BlockMap, BlockState};
use crate::device::{BLOCK_BYTES, BlockDevice, check_range, index, len_u64};
use crate::image::punch_hole;
use crate::layered::LayeredImage;

pub use seal::SealError;

/// Blocks that share a write lock: 256 KiB, above which a longer critical section gains nothing.
const BLOCKS_PER_SPAN: u64 = 64;
const SPAN_BYTES: u64 = BLOCKS_PER_SPAN * BLOCK_BYTES;
/// Spans that do not share a lock by accident; more than the writers a disk has.
const LOCKS: usize = 64;

/// Why an overlay could not be made.
#[derive(Debug, thiserror::Error)]
#[error("create disk overlay {}", path.display())]
pub struct CreateError {
    /// The overlay's file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Why an overlay's file is still there.
#[derive(Debug, thiserror::Error)]
#[error("remove disk overlay {}", path.display())]
pub struct RemoveError {
    /// The overlay's file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// How much of an overlay differs from its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OverlayStats {
    /// Blocks of the disk.
    pub blocks: u64,
    /// Blocks with content of their own.
    pub written_blocks: u64,
    /// Blocks that were zeroed or trimmed.
    pub zero_blocks: u64,
}

/// A disk that reads through to its image until it is written.
pub struct Overlay {
    size_bytes: u64,
    path: PathBuf,
    generation: RwLock<Generation>,
    locks: [Mutex<()>; LOCKS],
}

/// The image below, and what was written over it.
struct Generation {
    base: Arc<LayeredImage>,
    /// `None` once the overlay was sealed: it is read-only then.
    top: Option<Top>,
}

struct Top {
    file: Arc<File>,
    map: BlockMap,
}

impl Top {
    fn mark(&self, blocks: Range<u64>, state: BlockState) {
        for block in blocks {
            if self.map.get(block) != state {
                self.map.set(block, state);
            }
        }
    }
}

impl Overlay {
    /// Makes the overlay's file, mode 0600, at `path`, which must not exist.
    ///
    /// # Errors
    /// [`CreateError`]; no file is left then.
    pub fn create(base: Arc<LayeredImage>, path: &Path) -> Result<Overlay, CreateError> {
        let failed = |source| CreateError { path: path.to_owned(), source };
        let size_bytes = base.size_bytes();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        if let Err(e) = file.set_len(size_bytes) {
            // The error that matters is `e`; the file is empty.
            let _removed = std::fs::remove_file(path);
            return Err(failed(e));
        }
        let top = Top { file: Arc::new(file), map: BlockMap::new(size_bytes / BLOCK_BYTES) };
        Ok(Overlay {
            size_bytes,
            path: path.to_owned(),
            generation: RwLock::new(Generation { base, top: Some(top) }),
            locks: [const { Mutex::new(()) }; LOCKS],
        })
    }

    /// The overlay's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Counts the blocks that differ from the image below: since the last checkpoint, if there was one.
    pub fn stats(&self) -> OverlayStats {
        let generation = self.generation();
        let count = |state| generation.top.as_ref().map_or(0, |top| top.map.count(state));
        OverlayStats {
            blocks: self.size_bytes / BLOCK_BYTES,
            written_blocks: count(BlockState::Written),
            zero_blocks: count(BlockState::Zero),
        }
    }

    /// Removes the overlay's file; sealed layers stay. Idempotent. The disk still works for whoever
    /// holds it; its space is free once the last of them is gone.
    ///
    /// # Errors
    /// [`RemoveError`].
    pub fn remove(&self) -> Result<(), RemoveError> {
        // Not between the two renames of a checkpoint.
        let _no_seal = self.generation();
        remove(&self.path).map_err(|source| RemoveError { path: self.path.clone(), source })
    }

    /// Nobody else waits for it but a seal, which is rare and short.
    fn generation(&self) -> RwLockReadGuard<'_, Generation> {
        // A seal replaces it in one assignment: it is whole after a panic.
        self.generation.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self, span: u64) -> MutexGuard<'_, ()> {
        let lock = index(span % (LOCKS as u64));
        // The lock guards no memory; the data is whole after a panic in another writer.
        self.locks[lock].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` on each span of a range with the span locked.
    fn change(
        &self,
        offset: u64,
        len: u64,
        change: impl Fn(&Writer<'_>, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        check_range(self.size_bytes, offset, len)?;
        let generation = self.generation();
        let Some(top) = &generation.top else {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the disk was sealed: it is only read now",
            ));
        };
        let writer = Writer { base: &generation.base, top };
        for span in spans(offset, len) {
            let _turn = self.lock(span.start / SPAN_BYTES);
            change(&writer, span)?;
        }
        Ok(())
    }
}

/// One generation in the hands of a writer, who has locked the span it works in.
struct Writer<'a> {
    base: &'a LayeredImage,
    top: &'a Top,
}

impl Writer<'_> {
    /// Writes a piece. Whole blocks of zeros are stored only with `keep_zeros`.
    fn write(&self, buf: &[u8], offset: u64, keep_zeros: bool) -> io::Result<()> {
        let end = offset + len_u64(buf);
        let whole = offset.next_multiple_of(BLOCK_BYTES)..end - end % BLOCK_BYTES;
        if whole.start > whole.end {
            // Inside one block, touching neither of its edges.
            return self.write_in_block(buf, offset);
        }
        let (head, rest) = buf.split_at(index(whole.start - offset));
        let (body, tail) = rest.split_at(index(whole.end - whole.start));
        if !head.is_empty() {
            self.write_in_block(head, offset)?;
        }
        let mut at = whole.start;
        for (zeros, part) in parts(body, keep_zeros) {
            let stop = at + len_u64(part);
            if zeros {
                self.zero_blocks(at / BLOCK_BYTES..stop / BLOCK_BYTES)?;
            } else {
                self.top.file.write_all_at(part, at)?;
                self.top.mark(at / BLOCK_BYTES..stop / BLOCK_BYTES, BlockState::Written);
            }
            at = stop;
        }
        if !tail.is_empty() {
            self.write_in_block(tail, whole.end)?;
        }
        Ok(())
    }

    /// Writes a piece that lies inside one block, keeping the rest of it.
    fn write_in_block(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let block = offset / BLOCK_BYTES;
        let start = block * BLOCK_BYTES;
        let mut content = [0; BLOCK_BYTES as usize];
        match self.top.map.get(block) {
            BlockState::Written => return self.top.file.write_all_at(buf, offset),
            BlockState::Base => self.base.read_at(&mut content, start)?,
            BlockState::Zero => {}
        }
        content[index(offset - start)..][..buf.len()].copy_from_slice(buf);
        self.top.file.write_all_at(&content, start)?;
        self.top.map.set(block, BlockState::Written);
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let whole = range.start.next_multiple_of(BLOCK_BYTES)..range.end - range.end % BLOCK_BYTES;
        if whole.start > whole.end {
            return self.zero_in_block(range);
        }
        if range.start < whole.start {
            self.zero_in_block(range.start..whole.start)?;
        }
        self.zero_blocks(whole.start / BLOCK_BYTES..whole.end / BLOCK_BYTES)?;
        if whole.end < range.end {
            self.zero_in_block(whole.end..range.end)?;
        }
        Ok(())
    }

    fn zero_blocks(&self, blocks: Range<u64>) -> io::Result<()> {
        let mut block = blocks.start;
        while block < blocks.end {
            let (state, count) = self.top.map.run(block, blocks.end);
            self.top.mark(block..block + count, BlockState::Zero);
            if state == BlockState::Written {
                // Only gives space back: these blocks are not read any more, hole or not.
                punch_hole(&self.top.file, block * BLOCK_BYTES, count * BLOCK_BYTES)?;
            }
            block += count;
        }
        Ok(())
    }

    fn zero_in_block(&self, range: Range<u64>) -> io::Result<()> {
        if self.top.map.get(range.start / BLOCK_BYTES) == BlockState::Zero {
            return Ok(());
        }
        let zeros = [0; BLOCK_BYTES as usize];
        self.write_in_block(&zeros[..index(range.end - range.start)], range.start)
    }
}

impl BlockDevice for Overlay {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.size_bytes, offset, len_u64(buf))?;
        let generation = self.generation();
        let Some(top) = &generation.top else { return generation.base.read_at(buf, offset) };
        let end = offset + len_u64(buf);
        let last_block = end.div_ceil(BLOCK_BYTES);
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let (state, count) = top.map.run(block, last_block);
            let stop = ((block + count) * BLOCK_BYTES).min(end);
            let part = &mut buf[index(at - offset)..index(stop - offset)];
            match state {
                BlockState::Base => generation.base.read_at(part, at)?,
                BlockState::Written => top.file.read_exact_at(part, at)?,
                BlockState::Zero => part.fill(0),
            }
            at = stop;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, len_u64(buf), |writer, span| {
            let part = &buf[index(span.start - offset)..index(span.end - offset)];
            writer.write(part, span.start, false)
        })
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, |writer, span| writer.zero(span))
    }

    /// The space lasts until the next checkpoint, after which the disk writes into a new file.
    fn zero_allocated(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROS: [u8; SPAN_BYTES as usize] = [0; SPAN_BYTES as usize];
        self.change(offset, len, |writer, span| {
            writer.write(&ZEROS[..index(span.end - span.start)], span.start, true)
        })
    }

    /// The edges inside a block keep their content: zeroing them would take space to give some back.
    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.size_bytes, offset, len)?;
        let end = offset + len;
        let whole = offset.next_multiple_of(BLOCK_BYTES)..end - end % BLOCK_BYTES;
        if whole.is_empty() { Ok(()) } else { self.zero(whole.start, whole.end - whole.start) }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Cuts a byte range at span borders.
fn spans(offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let stop = ((at / SPAN_BYTES + 1) * SPAN_BYTES).min(end);
        let span = at..stop;
        at = stop;
        Some(span)
    })
}

/// Cuts whole blocks into parts that are zeros and parts that are not; one part with `keep_zeros`.
fn parts(body: &[u8], keep_zeros: bool) -> impl Iterator<Item = (bool, &[u8])> {
    const BLOCK: usize = BLOCK_BYTES as usize;
    let mut rest = body;
    std::iter::from_fn(move || {
        let first = rest.get(..BLOCK)?;
        let zeros = !keep_zeros && is_zero(first);
        let len = if keep_zeros {
            rest.len()
        } else {
            let same = rest.chunks_exact(BLOCK).take_while(|block| is_zero(block) == zeros);
            same.count() * BLOCK
        };
        let (part, after) = rest.split_at(len);
        rest = after;
        Some((zeros, part))
    })
}

/// True if `block` has no byte but zero. Content mostly says so in its first word.
pub(crate) fn is_zero(block: &[u8]) -> bool {
    let mut words = block.chunks_exact(16);
    words.by_ref().all(|word| word == [0; 16]) && words.remainder().iter().all(|byte| *byte == 0)
}
