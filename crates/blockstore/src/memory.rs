//! What a machine's memory holds beyond the image it was restored from.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use crate::block_map::{BlockMap, BlockState};
use crate::device::{BLOCK_BYTES, check_range, index, len_u64};
use crate::layered::{LAYERS_MAX, LayeredImage, compact};
use crate::layers::{Draft, LayerStore};
use crate::overlay::is_zero;

/// Bytes compared and written at once.
const PIECE_BYTES: usize = 1 << 20;

/// Why a page was not taken. The writer is of no use afterwards: drop it.
#[derive(Debug, thiserror::Error)]
pub enum MemoryWriteError {
    /// The layer could not be written, or the base could not be read.
    #[error("{step} a memory layer")]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// Why; `StorageFull` is kept as such.
        #[source]
        source: io::Error,
    },
    /// The range is not made of whole pages inside the image.
    #[error(
        "write {len} bytes at {offset} of a memory of {size_bytes} bytes: only whole pages of \
         {BLOCK_BYTES} bytes inside it"
    )]
    Range {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// The memory's size.
        size_bytes: u64,
    },
    /// Its base has all the layers it may have, which takes many snapshots on a full disk.
    #[error("add a layer to a memory image that has {LAYERS_MAX}: free some space and try again")]
    TooManyLayers,
}

impl MemoryWriteError {
    /// The kind of the I/O error, or what a caller of `io::Write` would be told.
    pub fn io_kind(&self) -> io::ErrorKind {
        match self {
            MemoryWriteError::Io { source, .. } => source.kind(),
            MemoryWriteError::Range { .. } => io::ErrorKind::InvalidInput,
            MemoryWriteError::TooManyLayers => io::ErrorKind::StorageFull,
        }
    }
}

impl From<MemoryWriteError> for io::Error {
    fn from(e: MemoryWriteError) -> io::Error {
        io::Error::new(e.io_kind(), e)
    }
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> MemoryWriteError {
    move |source| MemoryWriteError::Io { step, source }
}

/// Writes the pages a machine has made its own as a layer over the image it was restored from.
///
/// Pages that are as in the image, and pages of zeros, are not stored. Dropped unfinished, it leaves
/// no file.
pub struct MemoryLayerWriter {
    base: Arc<LayeredImage>,
    store: LayerStore,
    draft: Draft,
    map: BlockMap,
    /// What the base holds where a page is being written.
    below: Vec<u8>,
}

impl MemoryLayerWriter {
    /// A layer over `base`; the memory has its size.
    ///
    /// # Errors
    /// [`MemoryWriteError`]; no file is left.
    pub fn new(
        base: Arc<LayeredImage>,
        store: &LayerStore,
    ) -> Result<MemoryLayerWriter, MemoryWriteError> {
        if base.layer_count() >= LAYERS_MAX {
            return Err(MemoryWriteError::TooManyLayers);
        }
        let draft = store.draft(base.size_bytes()).map_err(failed("make"))?;
        let map = BlockMap::new(base.size_bytes() / BLOCK_BYTES);
        Ok(MemoryLayerWriter { base, store: store.clone(), draft, map, below: Vec::new() })
    }

    /// Takes the pages at `offset` of the memory. Offset and length are multiples of [`BLOCK_BYTES`]. A
    /// page that is given twice has the content it was given last.
    ///
    /// # Errors
    /// [`MemoryWriteError`].
    pub fn write(&mut self, offset: u64, pages: &[u8]) -> Result<(), MemoryWriteError> {
        let (len, size_bytes) = (len_u64(pages), self.base.size_bytes());
        let whole = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
        if !whole || check_range(size_bytes, offset, len).is_err() {
            return Err(MemoryWriteError::Range { offset, len, size_bytes });
        }
        let mut at = offset;
        for piece in pages.chunks(PIECE_BYTES) {
            self.write_piece(at, piece)?;
            at += len_u64(piece);
        }
        Ok(())
    }

    fn write_piece(&mut self, offset: u64, piece: &[u8]) -> Result<(), MemoryWriteError> {
        const PAGE: usize = BLOCK_BYTES as usize;
        self.below.resize(piece.len(), 0);
        self.base.read_at(&mut self.below, offset).map_err(failed("read what is below"))?;
        let first = offset / BLOCK_BYTES;
        let mut block = first;
        // Where the changed pages that are not written yet begin.
        let mut pending = first;
        for (page, below) in piece.chunks_exact(PAGE).zip(self.below.chunks_exact(PAGE)) {
            // A page given before may be in the file: only one that is not can be left to the base.
            let same = page == below && self.map.get(block) == BlockState::Base;
            if same || is_zero(page) {
                self.write_blocks(piece, first, pending..block)?;
                pending = block + 1;
                if !same {
                    self.map.set(block, BlockState::Zero);
                }
            }
            block += 1;
        }
        self.write_blocks(piece, first, pending..block)
    }

    /// Writes `blocks` of `piece`, whose first block is `first`.
    fn write_blocks(
        &self,
        piece: &[u8],
        first: u64,
        blocks: std::ops::Range<u64>,
    ) -> Result<(), MemoryWriteError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let from = index((blocks.start - first) * BLOCK_BYTES);
        let to = index((blocks.end - first) * BLOCK_BYTES);
        let file = self.draft.file();
        file.write_all_at(&piece[from..to], blocks.start * BLOCK_BYTES).map_err(failed("write"))?;
        for block in blocks {
            self.map.set(block, BlockState::Written);
        }
        Ok(())
    }

    /// Bytes stored so far.
    pub fn written_bytes(&self) -> u64 {
        self.map.count(BlockState::Written) * BLOCK_BYTES
    }

    /// The memory as an image. Nothing is synced: see [`LayeredImage::sync`].
    pub fn finish(self) -> Arc<LayeredImage> {
        let written = self.map.count(BlockState::Written) > 0;
        // Without a page of its own the layer goes with the draft.
        let layer = if written { Some(self.draft.finish()) } else { None };
        compact(Arc::new(self.base.under(&self.map, layer)), &self.store)
    }
}
