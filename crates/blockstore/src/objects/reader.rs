//! Reading an image: any range of it, or all of it into a file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;

use crate::cache::ChunkCache;
use crate::device::{BLOCK_BYTES, index, len_u64};

use super::bytes_of::usize_of;
use super::layout::ImageId;
use super::manifest::{ImageManifest, ObjectUse};
use super::read_error::ReadError;
use super::runs::Run;

/// Frames asked for ahead when a whole image is read: 4 MiB of the usual ones.
const AHEAD_FRAMES: u32 = 32;

/// What writing an image to a file took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Materialised {
    /// Bytes written; the rest of the file is holes.
    pub data_bytes: u64,
}

/// One image of a store. Reads may come from many threads at once; they block.
#[derive(Clone)]
pub struct ImageReader {
    cache: Arc<ChunkCache>,
    manifest: Arc<ImageManifest>,
}

/// Blocks of one frame that an image uses in a row.
struct Piece {
    /// First block of the image.
    block: u64,
    count: u32,
    frame: u32,
    /// First block in the frame.
    at: u32,
}

impl ImageReader {
    /// The image `id` of the cache's store.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn open(cache: Arc<ChunkCache>, id: ImageId) -> Result<ImageReader, ReadError> {
        let manifest = cache.manifest(id)?;
        Ok(ImageReader { cache, manifest })
    }

    /// Its map.
    pub fn manifest(&self) -> &Arc<ImageManifest> {
        &self.manifest
    }

    /// Size in bytes; a multiple of [`BLOCK_BYTES`].
    pub fn size_bytes(&self) -> u64 {
        self.manifest.size_bytes()
    }

    /// Fills `buf` from byte `offset`, which need not be the beginning of a block. After an error `buf` may hold
    /// anything, but nothing unchecked.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), ReadError> {
        let (bytes, size_bytes) = (len_u64(buf), self.size_bytes());
        let end = offset.checked_add(bytes).filter(|end| *end <= size_bytes);
        let end = end.ok_or(ReadError::OutOfRange { offset, bytes, size_bytes })?;
        buf.fill(0);
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        for run in self.manifest.runs_within(blocks) {
            let object = self.object(&run);
            for piece in pieces(&run, object) {
                let frame = self.cache.frame(object, piece.frame)?;
                // The piece in bytes of the image, cut to what is asked for.
                let piece_start = piece.block * BLOCK_BYTES;
                let start = piece_start.max(offset);
                let stop = (piece_start + u64::from(piece.count) * BLOCK_BYTES).min(end);
                let from = index(u64::from(piece.at) * BLOCK_BYTES + (start - piece_start));
                let length = index(stop - start);
                buf[index(start - offset)..][..length].copy_from_slice(&frame[from..][..length]);
            }
        }
        Ok(())
    }

    /// Writes the whole image to `to`, whose content is replaced; zeros are left as holes. The file
    /// is not synced. After an error it holds a part of the image.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn materialise(&self, to: &File) -> Result<Materialised, ReadError> {
        let failed = |source: io::Error| ReadError::File {
            image: self.manifest.id().to_string(),
            source: Arc::new(source),
        };
        to.set_len(0).and_then(|()| to.set_len(self.size_bytes())).map_err(failed)?;
        self.copy(0..self.manifest.blocks(), to)
    }

    /// Writes `blocks` of the image to their places in `to`; those that are zeros are left out.
    ///
    /// # Errors
    /// [`ReadError`].
    pub(crate) fn copy(&self, blocks: Range<u64>, to: &File) -> Result<Materialised, ReadError> {
        let failed = |source: io::Error| ReadError::File {
            image: self.manifest.id().to_string(),
            source: Arc::new(source),
        };
        let mut done = Materialised::default();
        for run in self.manifest.runs_within(blocks) {
            let object = self.object(&run);
            let end = (run.at + run.count).div_ceil(object.frame_blocks);
            let mut ahead = 0;
            for piece in pieces(&run, object) {
                if piece.frame >= ahead {
                    ahead = end.min(piece.frame + AHEAD_FRAMES);
                    self.cache.fetch_ahead(object, piece.frame..ahead)?;
                }
                let frame = self.cache.frame(object, piece.frame)?;
                let from = index(u64::from(piece.at) * BLOCK_BYTES);
                let part = &frame[from..][..index(u64::from(piece.count) * BLOCK_BYTES)];
                to.write_all_at(part, piece.block * BLOCK_BYTES).map_err(failed)?;
                done.data_bytes += len_u64(part);
            }
        }
        Ok(done)
    }

    /// The BLAKE3 of each block of a run of the map, 32 bytes each.
    pub(crate) fn hashes(&self, run: &Run) -> Result<Bytes, ReadError> {
        let hashes = self.cache.hashes(self.object(run))?;
        Ok(hashes.slice(usize_of(run.at) * 32..usize_of(run.at + run.count) * 32))
    }

    fn object(&self, run: &Run) -> &ObjectUse {
        &self.manifest.objects()[usize_of(run.object)]
    }
}

/// A run, cut where frames end.
fn pieces(run: &Run, object: &ObjectUse) -> impl Iterator<Item = Piece> + use<> {
    let frame_blocks = object.frame_blocks;
    let (start, end) = (run.at, run.at + run.count);
    let first = u64::from(run.first);
    let mut next = start;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let (frame, at) = (next / frame_blocks, next % frame_blocks);
        let count = (frame_blocks - at).min(end - next);
        let piece = Piece { block: first + u64::from(next - start), count, frame, at };
        next += count;
        Some(piece)
    })
}
