//! The index of an object: what vouches for every byte of it. Layout in `docs/formats.md`.

use std::ops::Range;

use crate::device::BLOCK_BYTES;

use super::Corrupt;
use super::bytes_of::{hash_at, u32_at, usize_of};
use super::frame::{Codec, FRAME_BLOCKS_MAX};
use super::layout::{ObjectId, hash_of};

/// Most blocks of an object: 64 MiB of them.
pub const OBJECT_BLOCKS_MAX: u32 = 16_384;

/// First bytes of every object.
pub(crate) const OBJECT_MAGIC: [u8; 8] = *b"bljobj\r\n";
const TAIL_MAGIC: [u8; 8] = *b"bljindex";
const VERSION: u32 = 1;
pub(super) const TAIL_BYTES: usize = 72;
const ENTRY_BYTES: usize = 40;
const HASH_BYTES: usize = 32;
const BLOCK_BYTES_FIELD: u32 = BLOCK_BYTES as u32;

/// One frame, as the index tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameEntry {
    /// Bytes it takes in the object.
    pub stored_bytes: u32,
    /// How they are stored.
    pub codec: Codec,
    /// BLAKE3 of them.
    pub hash: [u8; 32],
}

/// Where everything is in an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectIndex {
    id: ObjectId,
    blocks: u32,
    frame_blocks: u32,
    salt: u32,
    hashes_hash: [u8; 32],
    frames: Vec<FrameEntry>,
    /// Where each frame begins, and after the last one where the block hashes do.
    offsets: Vec<u64>,
}

/// Sizes of the parts of an object that follow from its counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) blocks: u32,
    pub(crate) frame_blocks: u32,
}

impl Shape {
    /// Refuses counts outside the format.
    pub(super) fn check(self) -> Result<Shape, String> {
        if !(1..=OBJECT_BLOCKS_MAX).contains(&self.blocks) {
            return Err(format!("{} blocks, allowed are 1 to {OBJECT_BLOCKS_MAX}", self.blocks));
        }
        if !(1..=FRAME_BLOCKS_MAX).contains(&self.frame_blocks) {
            let frame_blocks = self.frame_blocks;
            return Err(format!(
                "{frame_blocks} blocks a frame, allowed are 1 to {FRAME_BLOCKS_MAX}"
            ));
        }
        Ok(self)
    }

    pub(crate) fn frames(self) -> u32 {
        self.blocks.div_ceil(self.frame_blocks)
    }

    /// Bytes of index and tail.
    pub(crate) fn index_bytes(self) -> u64 {
        u64::from(self.frames()) * ENTRY_BYTES as u64 + TAIL_BYTES as u64
    }

    pub(crate) fn hashes_bytes(self) -> u64 {
        u64::from(self.blocks) * HASH_BYTES as u64
    }

    /// Fewest bytes an object of this shape has: frames of one byte each.
    pub(super) fn bytes_min(self) -> u64 {
        OBJECT_MAGIC.len() as u64
            + u64::from(self.frames())
            + self.hashes_bytes()
            + self.index_bytes()
    }

    /// Most bytes: every frame raw.
    pub(super) fn bytes_max(self) -> u64 {
        OBJECT_MAGIC.len() as u64
            + u64::from(self.blocks) * BLOCK_BYTES
            + self.hashes_bytes()
            + self.index_bytes()
    }

    /// Blocks of frame `frame`.
    pub(crate) fn blocks_of(self, frame: u32) -> u32 {
        self.frame_blocks.min(self.blocks - frame * self.frame_blocks)
    }
}

impl ObjectIndex {
    /// The index of a new object, and its bytes.
    pub(super) fn make(
        shape: Shape,
        salt: u32,
        hashes: &[u8],
        frames: Vec<FrameEntry>,
    ) -> (ObjectIndex, Vec<u8>) {
        let hashes_hash = hash_of(hashes);
        let mut bytes = Vec::with_capacity(crate::device::index(shape.index_bytes()));
        for frame in &frames {
            bytes.extend_from_slice(&frame.stored_bytes.to_le_bytes());
            bytes.extend_from_slice(&[frame.codec.number(), 0, 0, 0]);
            bytes.extend_from_slice(&frame.hash);
        }
        for field in [shape.blocks, shape.frame_blocks, shape.frames(), BLOCK_BYTES_FIELD, salt, 0]
        {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&hashes_hash);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        bytes.extend_from_slice(&TAIL_MAGIC);
        let id = ObjectId(hash_of(&bytes));
        let Shape { blocks, frame_blocks } = shape;
        let offsets = offsets(&frames);
        (ObjectIndex { id, blocks, frame_blocks, salt, hashes_hash, frames, offsets }, bytes)
    }

    /// What the last [`TAIL_BYTES`] of an object say of its shape. Nothing vouches for it yet:
    /// it is only good for finding the index.
    pub(crate) fn shape_of_tail(id: ObjectId, tail: &[u8]) -> Result<Shape, Corrupt> {
        let corrupt = |what: String| Corrupt { thing: format!("object {id}"), what };
        if tail.len() != TAIL_BYTES {
            return Err(corrupt(format!("its tail has {} bytes, not {TAIL_BYTES}", tail.len())));
        }
        if tail[64..72] != TAIL_MAGIC {
            return Err(corrupt("it does not end as an object does".to_owned()));
        }
        match u32_at(tail, 56) {
            VERSION => {}
            other => return Err(corrupt(format!("it has version {other}, known is {VERSION}"))),
        }
        let shape = Shape { blocks: u32_at(tail, 0), frame_blocks: u32_at(tail, 4) };
        shape.check().map_err(corrupt)
    }

    /// Checks and reads the index of object `id`, whose size is `object_bytes`. `bytes` are all
    /// of it, tail included.
    ///
    /// # Errors
    /// [`Corrupt`], when `bytes` are not what `id` was made of, or break the format.
    pub(crate) fn parse(
        id: ObjectId,
        bytes: &[u8],
        object_bytes: u64,
    ) -> Result<ObjectIndex, Corrupt> {
        let corrupt = |what: &str| Corrupt { thing: format!("object {id}"), what: what.to_owned() };
        if hash_of(bytes) != id.0 {
            return Err(corrupt("its index does not have the hash that names it"));
        }
        let start =
            bytes.len().checked_sub(TAIL_BYTES).ok_or_else(|| corrupt("its index is too short"))?;
        let tail = &bytes[start..];
        let shape = Self::shape_of_tail(id, tail)?;
        if bytes.len() as u64 != shape.index_bytes()
            || u32_at(tail, 8) != shape.frames()
            || u32_at(tail, 12) != BLOCK_BYTES_FIELD
            || u32_at(tail, 20) != 0
            || u32_at(tail, 60) != 0
        {
            return Err(corrupt("the counts of its index do not fit together"));
        }
        let frames = (0..usize_of(shape.frames())).map(|frame| {
            let entry = &bytes[frame * ENTRY_BYTES..][..ENTRY_BYTES];
            parse_entry(shape, frame, entry)
        });
        let frames = frames.collect::<Result<Vec<_>, _>>().map_err(|what| corrupt(&what))?;
        let index = ObjectIndex {
            id,
            blocks: shape.blocks,
            frame_blocks: shape.frame_blocks,
            salt: u32_at(tail, 16),
            hashes_hash: hash_at(tail, 24),
            offsets: offsets(&frames),
            frames,
        };
        if index.object_bytes() != object_bytes {
            return Err(corrupt(&format!(
                "it has {object_bytes} bytes, and should have {}",
                index.object_bytes()
            )));
        }
        Ok(index)
    }

    /// Its object.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Blocks in the object.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// What sets this object apart from others of the same blocks; 0 but where one was being deleted.
    pub fn salt(&self) -> u32 {
        self.salt
    }

    /// Its frames.
    pub fn frames(&self) -> &[FrameEntry] {
        &self.frames
    }

    pub(crate) fn shape(&self) -> Shape {
        Shape { blocks: self.blocks, frame_blocks: self.frame_blocks }
    }

    /// Where frame `frame` is in the object.
    pub(crate) fn frame_range(&self, frame: u32) -> Range<u64> {
        let frame = usize_of(frame);
        self.offsets[frame]..self.offsets[frame + 1]
    }

    /// Where the hashes of its blocks are in the object.
    pub(crate) fn hashes_range(&self) -> Range<u64> {
        let start = self.offsets[self.frames.len()];
        start..start + self.shape().hashes_bytes()
    }

    pub(crate) fn are_hashes_whole(&self, hashes: &[u8]) -> bool {
        hash_of(hashes) == self.hashes_hash
    }

    /// Size of the object, in bytes.
    pub fn object_bytes(&self) -> u64 {
        self.hashes_range().end + self.shape().index_bytes()
    }
}

fn parse_entry(shape: Shape, frame: usize, entry: &[u8]) -> Result<FrameEntry, String> {
    let bad = |what: &str| format!("frame {frame} {what}");
    let codec = Codec::of_number(entry[4]).ok_or_else(|| bad("is compressed in an unknown way"))?;
    if entry[5..8] != [0; 3] {
        return Err(bad("has bytes set that mean nothing"));
    }
    let stored_bytes = u32_at(entry, 0);
    let number = u32::try_from(frame).expect("frames were counted in 32 bits");
    let raw_bytes = shape.blocks_of(number) * BLOCK_BYTES_FIELD;
    let is_right = match codec {
        Codec::Raw => stored_bytes == raw_bytes,
        Codec::Zstd => stored_bytes > 0 && stored_bytes < raw_bytes,
    };
    if !is_right {
        return Err(bad(&format!("takes {stored_bytes} bytes for {raw_bytes}")));
    }
    Ok(FrameEntry { stored_bytes, codec, hash: hash_at(entry, 8) })
}

fn offsets(frames: &[FrameEntry]) -> Vec<u64> {
    let mut offsets = Vec::with_capacity(frames.len() + 1);
    let mut at = OBJECT_MAGIC.len() as u64;
    offsets.push(at);
    for frame in frames {
        at += u64::from(frame.stored_bytes);
        offsets.push(at);
    }
    offsets
}
