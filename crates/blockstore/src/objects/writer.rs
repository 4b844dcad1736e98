//! Writing an image: what changed goes into new objects, what did not is named where it already is.
//!
//! Memory is bounded by one object, its block hashes and the map; blocks are taken one by one, in order.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use belljar_domain::Kind;

use crate::blobs::{BlobError, BlobStore};
use crate::clone::data_extents;
use crate::device::{BLOCK_BYTES, index, len_u64};
use crate::layered::{LayeredImage, PageContent};

use super::bytes_of::usize_of;
use super::dedup::BlockIndex;
use super::layout::{ObjectId, RefName, condemned_object, hash_of};
use super::manifest::{ImageManifest, ObjectUse};
use super::pack::{PackOptions, Packed, Packer};
use super::refs::{PublishError, SALTS, is_there, publish};
use super::runs::{self, Run};

/// Blocks read from a source at once: 1 MiB.
const READ_BLOCKS: u64 = 256;
static ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// Why an image was not written. Nothing names what was uploaded for it; it will be collected.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Blocks come in order, each once, and inside the image.
    #[error("write block {block} of an image: expected is one from {next} to below {blocks}")]
    Order {
        /// The block.
        block: u64,
        /// The first that was not decided yet.
        next: u64,
        /// Blocks of the image.
        blocks: u64,
    },
    /// The source of the blocks could not be read.
    #[error("read block {block} of the source")]
    Source {
        /// The block.
        block: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image cannot be written in this format.
    #[error("write an image: {what}")]
    Limits {
        /// What is over which limit.
        what: String,
    },
    /// The compressor has no memory.
    #[error("prepare the compressor")]
    Compressor(#[source] io::Error),
    /// An object could not be stored.
    #[error("store object {object}")]
    Store {
        /// The object.
        object: ObjectId,
        /// Why.
        #[source]
        source: BlobError,
    },
    /// Every name the object could have is being collected: collect until nothing is condemned.
    #[error(
        "store object {object}: objects of the same content are being collected; try again later"
    )]
    Condemned {
        /// The object.
        object: ObjectId,
    },
    /// All was stored, and the image could not be named.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl WriteError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            WriteError::Order { .. } | WriteError::Limits { .. } => Kind::Invalid,
            WriteError::Source { .. } | WriteError::Compressor(_) => Kind::Internal,
            WriteError::Store { source, .. } => source.kind(),
            WriteError::Condemned { .. } => Kind::Conflict,
            WriteError::Publish(e) => e.kind(),
        }
    }
}

/// What writing an image took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteStats {
    /// Blocks given to the writer.
    pub blocks: u64,
    /// Of them, zeros.
    pub zero_blocks: u64,
    /// Of them, found in the store or earlier in this image.
    pub shared_blocks: u64,
    /// Of them, stored now.
    pub new_blocks: u64,
    /// Objects made.
    pub objects: u64,
    /// Bytes of them.
    pub object_bytes: u64,
}

/// A published image.
#[derive(Debug, Clone)]
pub struct Written {
    /// Its map.
    pub manifest: ImageManifest,
    /// What it took.
    pub stats: WriteStats,
}

/// Writes one image.
pub struct ImageWriter {
    index: Arc<BlockIndex>,
    store: Arc<dyn BlobStore>,
    base: Option<Arc<ImageManifest>>,
    size_bytes: u64,
    /// First block whose content is not decided.
    next: u64,
    runs: Vec<Run>,
    /// What runs point to. The object being packed has its place from its first block on.
    objects: Vec<Option<ObjectUse>>,
    numbers: HashMap<ObjectId, u32>,
    packer: Packer,
    packing: Option<u32>,
    /// Blocks of the object being packed.
    packed: HashMap<[u8; 32], u32>,
    stats: WriteStats,
}

impl ImageWriter {
    /// A writer of an image of `size_bytes`, a multiple of [`BLOCK_BYTES`]. Blocks that are not given are
    /// as in `base`, or zeros.
    ///
    /// # Errors
    /// [`WriteError::Limits`], [`WriteError::Compressor`].
    pub fn new(
        index: Arc<BlockIndex>,
        base: Option<Arc<ImageManifest>>,
        size_bytes: u64,
        options: PackOptions,
    ) -> Result<ImageWriter, WriteError> {
        // What every manifest is checked for at the end, before the work instead of after it.
        ImageManifest::new(size_bytes, None, &[], Vec::new())
            .map_err(|what| WriteError::Limits { what })?;
        for object in base.iter().flat_map(|base| base.objects()) {
            if let Err(e) = index.learn(object) {
                // Sharing less costs space; whether the object is there is looked at in the end.
                tracing::warn!(error = %e, "a base's object is left out of sharing");
            }
        }
        Ok(ImageWriter {
            store: Arc::clone(index.cache().store()),
            index,
            base,
            size_bytes,
            next: 0,
            runs: Vec::new(),
            objects: Vec::new(),
            numbers: HashMap::new(),
            packer: Packer::new(options).map_err(WriteError::Compressor)?,
            packing: None,
            packed: HashMap::new(),
            stats: WriteStats::default(),
        })
    }

    fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES
    }

    /// Takes the blocks before `blocks` from the base, and decides those in it.
    fn advance(&mut self, blocks: Range<u64>) -> Result<(), WriteError> {
        if blocks.start < self.next || blocks.end < blocks.start || blocks.end > self.blocks() {
            return Err(WriteError::Order {
                block: blocks.start,
                next: self.next,
                blocks: self.blocks(),
            });
        }
        if let Some(base) = self.base.clone() {
            for run in base.runs_within(self.next..blocks.start) {
                let object = base.objects()[usize_of(run.object)];
                let object = self.number_of(object);
                runs::push(&mut self.runs, Run { object, ..run });
            }
        }
        self.next = blocks.end;
        Ok(())
    }

    fn number_of(&mut self, object: ObjectUse) -> u32 {
        if let Some(number) = self.numbers.get(&object.id) {
            return *number;
        }
        let number = self.new_place();
        self.objects[usize_of(number)] = Some(object);
        self.numbers.insert(object.id, number);
        number
    }

    fn new_place(&mut self) -> u32 {
        self.objects.push(None);
        u32::try_from(self.objects.len() - 1).expect("far fewer objects fit in memory")
    }

    /// Decides one block: its content is `content`, [`BLOCK_BYTES`] long.
    ///
    /// # Errors
    /// [`WriteError`].
    ///
    /// # Panics
    /// When `content` is not one block.
    pub fn block(&mut self, block: u64, content: &[u8]) -> Result<(), WriteError> {
        assert_eq!(len_u64(content), BLOCK_BYTES, "a block has one size");
        self.advance(block..block.saturating_add(1))?;
        self.stats.blocks += 1;
        if content == ZEROS {
            self.stats.zero_blocks += 1;
            return Ok(());
        }
        let hash = hash_of(content);
        let (object, at) = match self.packed.get(&hash) {
            Some(at) => {
                self.stats.shared_blocks += 1;
                (self.packing.expect("blocks are packed into an object"), *at)
            }
            None => match self.index.find(&hash) {
                Some((object, at)) => {
                    self.stats.shared_blocks += 1;
                    (self.number_of(object), at)
                }
                None => self.pack(content, hash)?,
            },
        };
        let first = u32::try_from(block).expect("an image has at most 2^32 blocks");
        runs::push(&mut self.runs, Run { first, count: 1, object, at });
        Ok(())
    }

    fn pack(&mut self, content: &[u8], hash: [u8; 32]) -> Result<(u32, u32), WriteError> {
        if self.packer.is_full() {
            self.end_object()?;
        }
        let object = match self.packing {
            Some(object) => object,
            None => self.new_place(),
        };
        self.packing = Some(object);
        let at = self.packer.add(content, &hash);
        self.packed.insert(hash, at);
        self.stats.new_blocks += 1;
        Ok((object, at))
    }

    /// Decides blocks: they are zeros.
    ///
    /// # Errors
    /// [`WriteError::Order`].
    pub fn zeros(&mut self, blocks: Range<u64>) -> Result<(), WriteError> {
        self.stats.blocks += blocks.end.saturating_sub(blocks.start);
        self.stats.zero_blocks += blocks.end.saturating_sub(blocks.start);
        self.advance(blocks)
    }

    /// Decides every block from a sparse file of the image's size: its holes are zeros and are not read.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn file(&mut self, file: &File) -> Result<(), WriteError> {
        let failed = |source| WriteError::Source { block: 0, source };
        let file_bytes = file.metadata().map_err(failed)?.len();
        if file_bytes != self.size_bytes {
            let what = format!("the file has {file_bytes} bytes, the image {}", self.size_bytes);
            return Err(WriteError::Limits { what });
        }
        let extents = data_extents(file, self.size_bytes).map_err(failed)?;
        for extent in extents {
            // Blocks that have any data; the holes between extents are whole blocks or smaller.
            let start = (extent.start / BLOCK_BYTES).max(self.next);
            let end = extent.end.div_ceil(BLOCK_BYTES);
            self.zeros(self.next..start.max(self.next))?;
            self.copy(start..end, |buf, offset| file.read_exact_at(buf, offset))?;
        }
        self.zeros(self.next..self.blocks())
    }

    /// Decides what `image` holds beyond its lowest layer, where that layer is what the base was made of
    /// (`over_layer0`), or all of it, where there is no base. `check` is asked before each MiB whether to
    /// go on.
    ///
    /// # Errors
    /// [`WriteError`]; what `check` says is [`WriteError::Source`].
    pub fn layers(
        &mut self,
        image: &LayeredImage,
        over_layer0: bool,
        mut check: impl FnMut() -> io::Result<()>,
    ) -> Result<(), WriteError> {
        let failed = |source| WriteError::Source { block: 0, source };
        for run in image.runs_beyond(over_layer0).map_err(failed)? {
            let (start, end) = (run.offset / BLOCK_BYTES, (run.offset + run.len) / BLOCK_BYTES);
            match run.content {
                PageContent::Zero => self.zeros(start..end)?,
                PageContent::Layer(layer) => self.copy(start..end, |buf, offset| {
                    check()?;
                    layer.read_at(buf, offset)
                })?,
            }
        }
        Ok(())
    }

    fn copy(
        &mut self,
        blocks: Range<u64>,
        mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let mut buf = vec![0; index(READ_BLOCKS.min(blocks.end - blocks.start) * BLOCK_BYTES)];
        let mut at = blocks.start;
        while at < blocks.end {
            let count = READ_BLOCKS.min(blocks.end - at);
            let part = &mut buf[..index(count * BLOCK_BYTES)];
            read(part, at * BLOCK_BYTES)
                .map_err(|source| WriteError::Source { block: at, source })?;
            for (block, content) in (at..).zip(part.chunks_exact(index(BLOCK_BYTES))) {
                self.block(block, content)?;
            }
            at += count;
        }
        Ok(())
    }

    /// Stores the object that is being packed.
    fn end_object(&mut self) -> Result<(), WriteError> {
        let (Some(packed), Some(place)) = (self.packer.finish(), self.packing.take()) else {
            return Ok(());
        };
        let packed = self.store_object(packed)?;
        self.packed.clear();
        self.objects[usize_of(place)] = Some(packed.object());
        self.stats.objects += 1;
        self.stats.object_bytes += packed.bytes.len() as u64;
        self.index.learn_packed(&packed);
        Ok(())
    }

    /// Stores an object under the first of its names that no collector has marked.
    fn store_object(&self, mut packed: Packed) -> Result<Packed, WriteError> {
        for salt in 1..=SALTS {
            let object = packed.index.id();
            let failed = |source| WriteError::Store { object, source };
            if !is_there(&*self.store, &condemned_object(&object)).map_err(failed)? {
                // Written even where one is there: that one may be damaged.
                self.store.put(&object.key(), packed.bytes.clone()).map_err(failed)?;
                return Ok(packed);
            }
            packed = packed.with_salt(salt);
        }
        Err(WriteError::Condemned { object: packed.index.id() })
    }

    /// Takes the rest from the base, stores what is left, and names the image `name`, in place of what
    /// that named before. The objects are in the store before the manifest is, and the manifest before
    /// the name.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn finish(mut self, name: &RefName) -> Result<Written, WriteError> {
        let blocks = self.blocks();
        self.advance(blocks..blocks)?;
        self.end_object()?;
        let objects: Vec<ObjectUse> =
            self.objects.iter().map(|each| each.expect("every object was stored above")).collect();
        let parent = self.base.as_ref().map(|base| base.id());
        let manifest = ImageManifest::new(self.size_bytes, parent, &objects, self.runs)
            .map_err(|what| WriteError::Limits { what })?;
        match publish(&*self.store, name, manifest) {
            Ok(manifest) => Ok(Written { manifest, stats: self.stats }),
            Err(e) => {
                if let PublishError::Condemned { object: Some(object), .. } = &e {
                    self.index.forget(object);
                }
                Err(e.into())
            }
        }
    }
}
