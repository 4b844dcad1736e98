//! Which blocks a store has already: so that images made from one base share what is equal.
//!
//! Of each block the table keeps eight bytes of its hash and where it is. A hit is believed only after
//! the whole hash was compared with the object's own list, which the cache has checked.

use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::blobs::BlobStore;
use crate::cache::ChunkCache;

use super::Corrupt;
use super::bytes_of::{hash_at, u64_at, usize_of};
use super::index::{ObjectIndex, TAIL_BYTES};
use super::layout::{ObjectId, condemned_folder, object_of_key, objects_folder};
use super::manifest::ObjectUse;
use super::pack::Packed;
use super::read_error::ReadError;

/// Blocks a table holds: 8 GiB of content in some 60 MiB of memory.
const BLOCKS_MAX: usize = 2 << 20;

/// What a table knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockIndexStats {
    /// Objects whose blocks can be shared.
    pub objects: usize,
    /// Blocks that can be found.
    pub blocks: usize,
}

#[derive(Default)]
struct Known {
    /// Beginning of the hash → object, block there.
    places: HashMap<u64, (u32, u32)>,
    /// `None` where one was forgotten.
    objects: Vec<Option<ObjectUse>>,
    numbers: HashMap<ObjectId, u32>,
}

/// The blocks of a store, for all who write to it. Share one by `Arc`.
pub struct BlockIndex {
    cache: Arc<ChunkCache>,
    known: Mutex<Known>,
    blocks_max: usize,
}

impl BlockIndex {
    /// An index that knows nothing yet: writers teach it their base and what they write.
    pub fn new(cache: Arc<ChunkCache>) -> BlockIndex {
        BlockIndex { cache, known: Mutex::default(), blocks_max: BLOCKS_MAX }
    }

    /// The cache it reads through.
    pub fn cache(&self) -> &Arc<ChunkCache> {
        &self.cache
    }

    /// Counts what it knows.
    pub fn stats(&self) -> BlockIndexStats {
        let known = self.known();
        BlockIndexStats { objects: known.numbers.len(), blocks: known.places.len() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // A half-learned object only shares less.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns every object of the store that is not being collected: a server does it once, at start.
    /// Objects that are damaged or vanish meanwhile are left out.
    ///
    /// # Errors
    /// [`ReadError::Store`], when the store cannot be asked.
    pub fn learn_all(&self) -> Result<(), ReadError> {
        let store = Arc::clone(self.cache.store());
        let asked =
            |e| ReadError::Store { thing: "the objects of the store".to_owned(), source: e };
        let marks = store.list(&condemned_folder()).map_err(asked)?;
        let marked: HashSet<String> =
            marks.iter().map(|(key, _)| key.last_part().to_owned()).collect();
        for (key, stat) in store.list(&objects_folder()).map_err(asked)? {
            let Some(id) = object_of_key(&key) else { continue };
            if marked.contains(&format!("object-{id}")) {
                self.forget(&id);
                continue;
            }
            let learned = find_object(&*store, id, stat.bytes).and_then(|found| self.learn(&found));
            match learned {
                Err(e @ ReadError::Store { .. }) => return Err(e),
                Err(e) => tracing::warn!(error = %e, "an object is left out of sharing"),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Learns the blocks of one object.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn learn(&self, object: &ObjectUse) -> Result<(), ReadError> {
        if self.known().numbers.contains_key(&object.id) {
            return Ok(());
        }
        let hashes = self.cache.hashes(object)?;
        self.take_in(object, &hashes);
        Ok(())
    }

    /// Learns an object that was just written.
    pub(super) fn learn_packed(&self, packed: &Packed) {
        self.cache.seed(packed);
        self.take_in(&packed.object(), &packed.hashes);
    }

    fn take_in(&self, object: &ObjectUse, hashes: &[u8]) {
        let mut known = self.known();
        let number = u32::try_from(known.objects.len()).expect("far fewer objects fit in memory");
        if known.numbers.contains_key(&object.id)
            || known.places.len() + usize_of(object.blocks) > self.blocks_max
        {
            return;
        }
        known.objects.push(Some(*object));
        known.numbers.insert(object.id, number);
        for (block, hash) in (0..).zip(hashes.chunks_exact(32)) {
            known.places.entry(u64_at(hash, 0)).or_insert((number, block));
        }
    }

    /// Shares nothing with this object any more.
    pub fn forget(&self, id: &ObjectId) {
        let mut known = self.known();
        if let Some(number) = known.numbers.remove(id) {
            known.objects[usize_of(number)] = None;
            known.places.retain(|_, (object, _)| *object != number);
        }
    }

    /// An object that has a block of this hash, and where in it.
    pub(super) fn find(&self, hash: &[u8; 32]) -> Option<(ObjectUse, u32)> {
        let (object, block) = {
            let known = self.known();
            let (number, block) = *known.places.get(&u64_at(hash, 0))?;
            (known.objects[usize_of(number)]?, block)
        };
        match self.cache.hashes(&object) {
            Ok(hashes) if hash_at(&hashes, usize_of(block) * 32) == *hash => Some((object, block)),
            Ok(_) => None,
            Err(e) => {
                // Storing a block twice costs space; failing a write costs an image.
                tracing::warn!(error = %e, "nothing more is shared with an object");
                self.forget(&object.id);
                None
            }
        }
    }
}

/// What a manifest would say of an object, found by its tail.
///
/// # Errors
/// [`ReadError`].
pub(crate) fn find_object(
    store: &dyn BlobStore,
    id: ObjectId,
    bytes: u64,
) -> Result<ObjectUse, ReadError> {
    let start = bytes.saturating_sub(TAIL_BYTES as u64);
    let tail = store
        .get_range(&id.key(), start..bytes)
        .map_err(|e| ReadError::of(format!("object {id}"), e))?;
    let shape = ObjectIndex::shape_of_tail(id, &tail)?;
    // Whoever reads the whole object next takes in no more than an object may have.
    if !(shape.bytes_min()..=shape.bytes_max()).contains(&bytes) {
        let what = format!("it has {bytes} bytes, which no object of {} blocks has", shape.blocks);
        return Err(Corrupt { thing: format!("object {id}"), what }.into());
    }
    Ok(ObjectUse { id, bytes, blocks: shape.blocks, frame_blocks: shape.frame_blocks })
}
