//! Packing: unique blocks in, the bytes of objects out.

use bytes::Bytes;

use crate::device::{BLOCK_BYTES, index};

use super::frame::{Compressor, FRAME_BLOCKS_MAX};
use super::index::{FrameEntry, OBJECT_BLOCKS_MAX, OBJECT_MAGIC, ObjectIndex, Shape};
use super::manifest::ObjectUse;

/// How blocks are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackOptions {
    /// Blocks of a frame, 1 to [`FRAME_BLOCKS_MAX`].
    pub frame_blocks: u32,
    /// Blocks of an object, 1 to [`OBJECT_BLOCKS_MAX`].
    pub object_blocks: u32,
    /// zstd's level, 1 to 19.
    pub level: i32,
}

impl Default for PackOptions {
    fn default() -> PackOptions {
        // 128 KiB frames: a random read of one block costs a request of some 50 KiB. 32 MiB
        // objects: few requests for a big image, and a writer holds one of them in memory.
        PackOptions { frame_blocks: 32, object_blocks: 8192, level: 1 }
    }
}

impl PackOptions {
    pub(super) fn clamped(self) -> PackOptions {
        PackOptions {
            frame_blocks: self.frame_blocks.clamp(1, FRAME_BLOCKS_MAX),
            object_blocks: self.object_blocks.clamp(1, OBJECT_BLOCKS_MAX),
            level: self.level.clamp(1, 19),
        }
    }
}

/// A finished object.
#[derive(Debug, Clone)]
pub struct Packed {
    /// What vouches for it.
    pub index: ObjectIndex,
    /// All its bytes.
    pub bytes: Bytes,
    /// The BLAKE3 of each of its blocks, 32 bytes each.
    pub hashes: Bytes,
}

impl Packed {
    /// How a manifest names it.
    pub fn object(&self) -> ObjectUse {
        let Shape { blocks, frame_blocks } = self.index.shape();
        ObjectUse { id: self.index.id(), bytes: self.bytes.len() as u64, blocks, frame_blocks }
    }

    /// The same blocks under another name, for when an object of this name is being deleted.
    pub(super) fn with_salt(&self, salt: u32) -> Packed {
        let shape = self.index.shape();
        let frames = self.index.frames().to_vec();
        let (index, tail) = ObjectIndex::make(shape, salt, &self.hashes, frames);
        let kept = self.bytes.len() - tail.len();
        let bytes = [&self.bytes[..kept], &tail].concat();
        Packed { index, bytes: bytes.into(), hashes: self.hashes.clone() }
    }
}

/// Fills one object after the other. Holds one object's stored bytes and one frame's raw ones.
pub struct Packer {
    options: PackOptions,
    compressor: Compressor,
    /// Blocks of the frame that is being filled.
    frame: Vec<u8>,
    bytes: Vec<u8>,
    hashes: Vec<u8>,
    frames: Vec<FrameEntry>,
    blocks: u32,
}

impl Packer {
    /// An empty object. Options outside the format's limits are moved to the next one inside.
    ///
    /// # Errors
    /// When the compressor has no memory.
    pub fn new(options: PackOptions) -> std::io::Result<Packer> {
        let options = options.clamped();
        Ok(Packer {
            compressor: Compressor::new(options.level)?,
            frame: Vec::with_capacity(index(u64::from(options.frame_blocks) * BLOCK_BYTES)),
            bytes: OBJECT_MAGIC.to_vec(),
            hashes: Vec::new(),
            frames: Vec::new(),
            blocks: 0,
            options,
        })
    }

    /// Adds a block and its hash, and tells where in the object it is.
    ///
    /// # Panics
    /// When the object is full, or `content` is no block.
    pub fn add(&mut self, content: &[u8], hash: &[u8; 32]) -> u32 {
        assert!(!self.is_full(), "a full object is finished before the next block");
        assert_eq!(content.len() as u64, BLOCK_BYTES, "a block has one size");
        self.frame.extend_from_slice(content);
        self.hashes.extend_from_slice(hash);
        self.blocks += 1;
        if self.blocks.is_multiple_of(self.options.frame_blocks) {
            self.end_frame();
        }
        self.blocks - 1
    }

    /// Whether it takes no more blocks.
    pub fn is_full(&self) -> bool {
        self.blocks >= self.options.object_blocks
    }

    /// Ends the object and begins the next. `None` if it has no blocks.
    pub fn finish(&mut self) -> Option<Packed> {
        self.end_frame();
        if self.blocks == 0 {
            return None;
        }
        let shape = Shape { blocks: self.blocks, frame_blocks: self.options.frame_blocks };
        let hashes = std::mem::take(&mut self.hashes);
        let frames = std::mem::take(&mut self.frames);
        let (index, tail) = ObjectIndex::make(shape, 0, &hashes, frames);
        let mut bytes = std::mem::replace(&mut self.bytes, OBJECT_MAGIC.to_vec());
        bytes.extend_from_slice(&hashes);
        bytes.extend_from_slice(&tail);
        self.blocks = 0;
        Some(Packed { index, bytes: bytes.into(), hashes: hashes.into() })
    }

    fn end_frame(&mut self) {
        if !self.frame.is_empty() {
            self.frames.push(self.compressor.append(&self.frame, &mut self.bytes));
            self.frame.clear();
        }
    }
}
