//! The manifest of an image: its size and where each of its blocks is. Layout in `docs/formats.md`.

use std::ops::Range;

use crate::device::BLOCK_BYTES;

use super::Corrupt;
use super::bytes_of::{hash_at, u32_at, u64_at, usize_of};
use super::index::Shape;
use super::layout::{ImageId, ObjectId, hash_of};
use super::runs::{self, Run};

/// Largest image, in bytes: 2^32 blocks.
pub const IMAGE_BYTES_MAX: u64 = BLOCK_BYTES << 32;
/// Largest manifest, in bytes: some eight million runs, so a 32 GiB image without two blocks in a row.
pub const MANIFEST_BYTES_MAX: u64 = 128 << 20;

const MAGIC: [u8; 8] = *b"bljimage";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 72;
const OBJECT_BYTES: usize = 48;
const RUN_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 32;
const BLOCK_BYTES_FIELD: u32 = BLOCK_BYTES as u32;

/// An object an image uses, with what finding its index needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectUse {
    /// Its name.
    pub id: ObjectId,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its blocks.
    pub blocks: u32,
    /// Blocks of each of its frames but the last.
    pub frame_blocks: u32,
}

impl ObjectUse {
    pub(crate) fn shape(&self) -> Shape {
        Shape { blocks: self.blocks, frame_blocks: self.frame_blocks }
    }
}

/// A flat map of an image. Reading it never needs the manifest of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageManifest {
    id: ImageId,
    size_bytes: u64,
    parent: Option<ImageId>,
    salt: u32,
    objects: Vec<ObjectUse>,
    runs: Vec<Run>,
}

impl ImageManifest {
    /// The manifest of an image, from a sorted map and the objects it points into, in any order. Objects
    /// that no run points into are left out; the order of the rest is the order of their ids.
    ///
    /// # Errors
    /// When it would break the format's limits; the text says which.
    pub(super) fn new(
        size_bytes: u64,
        parent: Option<ImageId>,
        objects: &[ObjectUse],
        runs: Vec<Run>,
    ) -> Result<ImageManifest, String> {
        let (objects, runs) = canonical(objects, runs);
        check(size_bytes, &objects, &runs)?;
        let id = ImageId([0; 32]);
        let mut manifest = ImageManifest { id, size_bytes, parent, salt: 0, objects, runs };
        let bytes = manifest.body_bytes();
        if bytes > MANIFEST_BYTES_MAX {
            return Err(format!(
                "its map takes {bytes} bytes, at most {MANIFEST_BYTES_MAX} may be"
            ));
        }
        manifest.id = ImageId(hash_of(&manifest.body()));
        Ok(manifest)
    }

    /// The same image under another name, for when a manifest of this name is being deleted.
    pub(super) fn with_salt(mut self, salt: u32) -> ImageManifest {
        self.salt = salt;
        self.id = ImageId(hash_of(&self.body()));
        self
    }

    /// Its name, made of everything in it.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Size of the image in bytes; a multiple of [`BLOCK_BYTES`].
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Blocks of the image.
    pub fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES
    }

    /// The image it was made from. For people: nothing looks it up.
    pub fn parent(&self) -> Option<ImageId> {
        self.parent
    }

    /// The objects its runs point into, by id.
    pub fn objects(&self) -> &[ObjectUse] {
        &self.objects
    }

    /// Its map, in order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The map of the blocks `blocks`.
    pub fn runs_within(&self, blocks: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        runs::within(&self.runs, blocks)
    }

    /// Blocks that are not zeros by the map. One content in two places counts twice.
    pub fn mapped_blocks(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count)).sum()
    }

    /// Blocks that may differ between two images: those that lie in different places, and those
    /// beyond the end of the shorter image unless they are zeros. In order, without the ends.
    ///
    /// Blocks that differ are always among them; equal content that was stored twice is too.
    pub fn differing(&self, other: &ImageManifest) -> Vec<Range<u64>> {
        let mut cuts: Vec<u64> = self
            .runs
            .iter()
            .chain(&other.runs)
            .flat_map(|run| [run.blocks().start, run.blocks().end])
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        let mut found: Vec<Range<u64>> = Vec::new();
        for cut in cuts.windows(2) {
            let blocks = cut[0]..cut[1];
            if self.place(&blocks) == other.place(&blocks) {
                continue;
            }
            match found.last_mut() {
                Some(last) if last.end == blocks.start => last.end = blocks.end,
                _ => found.push(blocks),
            }
        }
        found
    }

    /// Where `blocks` begin, which lie inside one run or outside of all.
    fn place(&self, blocks: &Range<u64>) -> Option<(ObjectId, u32)> {
        let run = self.runs_within(blocks.clone()).next()?;
        Some((self.objects[usize_of(run.object)].id, run.at))
    }

    /// The bytes of the manifest.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.body();
        bytes.extend_from_slice(&self.id.0);
        bytes
    }

    fn body_bytes(&self) -> u64 {
        (HEAD_BYTES + self.objects.len() * OBJECT_BYTES + self.runs.len() * RUN_BYTES) as u64
    }

    fn body(&self) -> Vec<u8> {
        let count = |length: usize| u32::try_from(length).expect("runs are distinct 32-bit blocks");
        let mut bytes =
            Vec::with_capacity(crate::device::index(self.body_bytes()) + CHECKSUM_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&BLOCK_BYTES_FIELD.to_le_bytes());
        bytes.extend_from_slice(&self.size_bytes.to_le_bytes());
        bytes.extend_from_slice(&count(self.objects.len()).to_le_bytes());
        bytes.extend_from_slice(&count(self.runs.len()).to_le_bytes());
        bytes.extend_from_slice(&self.parent.map_or([0; 32], |parent| parent.0));
        bytes.extend_from_slice(&self.salt.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for object in &self.objects {
            bytes.extend_from_slice(&object.id.0);
            bytes.extend_from_slice(&object.bytes.to_le_bytes());
            bytes.extend_from_slice(&object.blocks.to_le_bytes());
            bytes.extend_from_slice(&object.frame_blocks.to_le_bytes());
        }
        for run in &self.runs {
            for field in [run.first, run.count, run.object, run.at] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        bytes
    }

    /// Checks and reads the manifest of image `id`.
    ///
    /// # Errors
    /// [`Corrupt`], when `bytes` are not what `id` was made of, or break the format.
    pub fn parse(id: ImageId, bytes: &[u8]) -> Result<ImageManifest, Corrupt> {
        let corrupt = |what: String| Corrupt { thing: format!("image {id}"), what };
        let end = bytes.len().saturating_sub(CHECKSUM_BYTES);
        if end < HEAD_BYTES {
            return Err(corrupt(format!("its manifest has only {} bytes", bytes.len())));
        }
        let (body, checksum) = bytes.split_at(end);
        if hash_of(body) != id.0 || checksum != id.0 {
            return Err(corrupt("its manifest does not have the hash that names it".to_owned()));
        }
        let (objects, runs) = parse_tables(body).map_err(corrupt)?;
        let size_bytes = u64_at(body, 16);
        check(size_bytes, &objects, &runs).map_err(corrupt)?;
        let parent = Some(ImageId(hash_at(body, 32))).filter(|parent| parent.0 != [0; 32]);
        Ok(ImageManifest { id, size_bytes, parent, salt: u32_at(body, 64), objects, runs })
    }
}

/// The two tables of a manifest without its checksum, field by field.
fn parse_tables(body: &[u8]) -> Result<(Vec<ObjectUse>, Vec<Run>), String> {
    if body[..8] != MAGIC {
        return Err("it does not begin as a manifest does".to_owned());
    }
    match u32_at(body, 8) {
        VERSION => {}
        other => return Err(format!("its manifest has version {other}, known is {VERSION}")),
    }
    if u32_at(body, 12) != BLOCK_BYTES_FIELD {
        return Err(format!("it has blocks of {} bytes, not {BLOCK_BYTES}", u32_at(body, 12)));
    }
    let (objects, runs) = (usize_of(u32_at(body, 24)), usize_of(u32_at(body, 28)));
    // In 64 bits neither product nor sum of 32-bit counts overflows.
    let runs_at = HEAD_BYTES + objects * OBJECT_BYTES;
    if body.len() != runs_at + runs * RUN_BYTES || body[68..72] != [0; 4] {
        return Err(format!("its manifest does not hold {objects} objects and {runs} runs"));
    }
    let objects = body[HEAD_BYTES..runs_at].chunks_exact(OBJECT_BYTES).map(|field| ObjectUse {
        id: ObjectId(hash_at(field, 0)),
        bytes: u64_at(field, 32),
        blocks: u32_at(field, 40),
        frame_blocks: u32_at(field, 44),
    });
    let runs = body[runs_at..].chunks_exact(RUN_BYTES).map(|field| Run {
        first: u32_at(field, 0),
        count: u32_at(field, 4),
        object: u32_at(field, 8),
        at: u32_at(field, 12),
    });
    Ok((objects.collect(), runs.collect()))
}

/// The rules every manifest keeps, whoever made it.
fn check(size_bytes: u64, objects: &[ObjectUse], runs: &[Run]) -> Result<(), String> {
    if size_bytes == 0 || size_bytes > IMAGE_BYTES_MAX || !size_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(format!(
            "its size of {size_bytes} bytes is not a multiple of {BLOCK_BYTES} up to {IMAGE_BYTES_MAX}"
        ));
    }
    let blocks = size_bytes / BLOCK_BYTES;
    for object in objects {
        let shape =
            object.shape().check().map_err(|what| format!("object {}: {what}", object.id))?;
        if !(shape.bytes_min()..=shape.bytes_max()).contains(&object.bytes) {
            return Err(format!("object {} cannot have {} bytes", object.id, object.bytes));
        }
    }
    if !objects.is_sorted_by(|a, b| a.id < b.id) {
        return Err("its objects are not sorted, each once".to_owned());
    }
    let mut end = 0;
    for (number, run) in runs.iter().enumerate() {
        let own = run.blocks();
        let object = objects.get(usize_of(run.object));
        let is_inside = object.is_some_and(|object| {
            u64::from(run.at) + u64::from(run.count) <= u64::from(object.blocks)
        });
        if run.count == 0 || own.start < end || own.end > blocks || !is_inside {
            return Err(format!("run {number} of its map points outside of what there is"));
        }
        end = own.end;
    }
    Ok(())
}

/// Objects that are used, sorted, and the runs pointing to them there: one image has one manifest.
fn canonical(objects: &[ObjectUse], mut runs: Vec<Run>) -> (Vec<ObjectUse>, Vec<Run>) {
    let mut used: Vec<u32> = runs.iter().map(|run| run.object).collect();
    used.sort_unstable();
    used.dedup();
    used.sort_by_key(|number| objects[usize_of(*number)].id);
    let mut place = vec![0; objects.len()];
    let mut sorted: Vec<ObjectUse> = Vec::new();
    for number in used {
        let object = objects[usize_of(number)];
        // A table may hold an object twice: once from the base and once as a place to share from.
        if sorted.last().is_none_or(|last| last.id != object.id) {
            sorted.push(object);
        }
        place[usize_of(number)] = u32::try_from(sorted.len() - 1).expect("fewer than the runs");
    }
    for run in &mut runs {
        run.object = place[usize_of(run.object)];
    }
    let mut merged = Vec::with_capacity(runs.len());
    for run in runs {
        runs::push(&mut merged, run);
    }
    (sorted, merged)
}

#[cfg(test)]
mod tests;
