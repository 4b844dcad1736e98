//! A private copy-on-write disk over a shared base.
//!
//! What was written lies in a sparse file of its own, at the same offset as on the disk. A block's
//! bytes in that file mean something only while its state is [`BlockState::Written`]; a block
//! whose state is [`BlockState::Zero`] is never read from any file.
//!
//! Locks: writers of one span of [`BLOCKS_PER_SPAN`] blocks take turns, so that two partial writes
//! to one block never lose each other's bytes and a trim never races a write. Readers take no lock:
//! `block_map` orders data before state.
//!
//! Durability: an overlay lives only as long as the process that made it, because its map is in
//! memory. So a flush has nothing to promise and costs nothing; a write that returned is visible
//! to whoever copies the overlay later, which is all a snapshot needs.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block_map::{BlockMap, BlockState};
use crate::device::{BLOCK_BYTES, BlockDevice, check_range, index, len_u64};
use crate::image::{BaseImage, punch_hole};

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

/// A block that differs from the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyBlock {
    /// The block at this index has its own content.
    Written(u64),
    /// The block at this index reads as zeros.
    Zero(u64),
}

/// How much of an overlay differs from its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OverlayStats {
    /// Blocks of the disk.
    pub blocks: u64,
    /// Blocks with content of their own.
    pub written_blocks: u64,
    /// Blocks that were zeroed or trimmed.
    pub zero_blocks: u64,
}

/// A disk that reads through to its base until it is written.
pub struct Overlay {
    base: Arc<BaseImage>,
    file: File,
    path: PathBuf,
    map: BlockMap,
    locks: [Mutex<()>; LOCKS],
}

impl Overlay {
    /// Makes the overlay's file, mode 0600, at `path`, which must not exist.
    ///
    /// # Errors
    /// [`CreateError`]; no file is left then.
    pub fn create(base: Arc<BaseImage>, path: &Path) -> Result<Overlay, CreateError> {
        let failed = |source| CreateError { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        if let Err(e) = file.set_len(base.size_bytes()) {
            // The error that matters is `e`; the file is empty.
            let _removed = std::fs::remove_file(path);
            return Err(failed(e));
        }
        Ok(Overlay {
            map: BlockMap::new(base.size_bytes() / BLOCK_BYTES),
            base,
            file,
            path: path.to_owned(),
            locks: [const { Mutex::new(()) }; LOCKS],
        })
    }

    /// The overlay's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The blocks that differ from the base, in order. Blocks written while this runs may be in it.
    pub fn dirty_blocks(&self) -> impl Iterator<Item = DirtyBlock> + '_ {
        self.map.changed().filter_map(|(block, state)| match state {
            BlockState::Base => None,
            BlockState::Written => Some(DirtyBlock::Written(block)),
            BlockState::Zero => Some(DirtyBlock::Zero(block)),
        })
    }

    /// Counts the blocks that differ from the base.
    pub fn stats(&self) -> OverlayStats {
        let mut stats =
            OverlayStats { blocks: self.size_bytes() / BLOCK_BYTES, ..OverlayStats::default() };
        for block in self.dirty_blocks() {
            match block {
                DirtyBlock::Written(_) => stats.written_blocks += 1,
                DirtyBlock::Zero(_) => stats.zero_blocks += 1,
            }
        }
        stats
    }

    /// Removes the overlay's file. Idempotent. The disk still works for whoever holds it; its space
    /// is free once the last of them is gone.
    ///
    /// # Errors
    /// [`RemoveError`].
    pub fn remove(&self) -> Result<(), RemoveError> {
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(RemoveError { path: self.path.clone(), source: e })
            }
            _ => Ok(()),
        }
    }

    fn lock(&self, span: u64) -> MutexGuard<'_, ()> {
        let lock = index(span % (LOCKS as u64));
        // The lock guards no memory; the data is whole after a panic in another writer.
        self.locks[lock].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a piece that lies inside one span.
    fn write_in_span(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _turn = self.lock(offset / SPAN_BYTES);
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
        if !body.is_empty() {
            self.file.write_all_at(body, whole.start)?;
            self.mark(whole.start / BLOCK_BYTES..whole.end / BLOCK_BYTES, BlockState::Written);
        }
        if !tail.is_empty() {
            self.write_in_block(tail, whole.end)?;
        }
        Ok(())
    }

    /// Writes a piece that lies inside one block, keeping the rest of it. The span is locked.
    fn write_in_block(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let block = offset / BLOCK_BYTES;
        let start = block * BLOCK_BYTES;
        let mut content = [0; BLOCK_BYTES as usize];
        match self.map.get(block) {
            BlockState::Written => return self.file.write_all_at(buf, offset),
            BlockState::Base => self.base.read_at(&mut content, start)?,
            BlockState::Zero => {}
        }
        content[index(offset - start)..][..buf.len()].copy_from_slice(buf);
        self.file.write_all_at(&content, start)?;
        self.map.set(block, BlockState::Written);
        Ok(())
    }

    /// Zeroes a range that lies inside one span.
    fn zero_in_span(&self, range: Range<u64>) -> io::Result<()> {
        let _turn = self.lock(range.start / SPAN_BYTES);
        let whole = range.start.next_multiple_of(BLOCK_BYTES)..range.end - range.end % BLOCK_BYTES;
        if whole.start > whole.end {
            return self.zero_in_block(range);
        }
        if range.start < whole.start {
            self.zero_in_block(range.start..whole.start)?;
        }
        let blocks = whole.start / BLOCK_BYTES..whole.end / BLOCK_BYTES;
        let mut block = blocks.start;
        while block < blocks.end {
            let (state, count) = self.map.run(block, blocks.end);
            self.mark(block..block + count, BlockState::Zero);
            if state == BlockState::Written {
                // Only gives space back: these blocks are not read any more, hole or not.
                punch_hole(&self.file, block * BLOCK_BYTES, count * BLOCK_BYTES)?;
            }
            block += count;
        }
        if whole.end < range.end {
            self.zero_in_block(whole.end..range.end)?;
        }
        Ok(())
    }

    fn zero_in_block(&self, range: Range<u64>) -> io::Result<()> {
        if self.map.get(range.start / BLOCK_BYTES) == BlockState::Zero {
            return Ok(());
        }
        let zeros = [0; BLOCK_BYTES as usize];
        self.write_in_block(&zeros[..index(range.end - range.start)], range.start)
    }

    fn mark(&self, blocks: Range<u64>, state: BlockState) {
        for block in blocks {
            if self.map.get(block) != state {
                self.map.set(block, state);
            }
        }
    }
}

impl BlockDevice for Overlay {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.size_bytes(), offset, len_u64(buf))?;
        let end = offset + len_u64(buf);
        let last_block = end.div_ceil(BLOCK_BYTES);
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let (state, count) = self.map.run(block, last_block);
            let stop = ((block + count) * BLOCK_BYTES).min(end);
            let part = &mut buf[index(at - offset)..index(stop - offset)];
            match state {
                BlockState::Base => self.base.read_at(part, at)?,
                BlockState::Written => self.file.read_exact_at(part, at)?,
                BlockState::Zero => part.fill(0),
            }
            at = stop;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.size_bytes(), offset, len_u64(buf))?;
        for span in spans(offset, len_u64(buf)) {
            let part = &buf[index(span.start - offset)..index(span.end - offset)];
            self.write_in_span(part, span.start)?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.size_bytes(), offset, len)?;
        for span in spans(offset, len) {
            self.zero_in_span(span)?;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
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
