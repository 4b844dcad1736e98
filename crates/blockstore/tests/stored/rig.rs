//! A small store with small objects, stores that fail on purpose, and blocks to fill them with.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use belljar_blockstore::blobs::{BlobAction, BlobFault, BlobKey, BlobStat, Created};
use belljar_blockstore::objects::{PackOptions, ReadError, WriteError, Written};
use belljar_blockstore::{
    BlobError, BlobStore, BlockIndex, ChunkCache, DirStore, ImageManifest, ImageReader,
    ImageWriter, RefName,
};
use bytes::Bytes;

pub(crate) const BLOCK: usize = 4096;
/// Several frames an object and several objects an image, of a few blocks.
pub(crate) const SMALL: PackOptions = PackOptions { frame_blocks: 4, object_blocks: 10, level: 1 };

/// A block that depends on nothing but `seed`: 0 is zeros, odd ones do not compress, even ones do.
pub(crate) fn block(seed: u32) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    match seed {
        0 => {}
        odd if odd % 2 == 1 => {
            blake3::Hasher::new().update(&odd.to_le_bytes()).finalize_xof().fill(&mut block);
        }
        even => {
            for chunk in block.chunks_exact_mut(64) {
                chunk[..4].copy_from_slice(&even.to_le_bytes());
            }
        }
    }
    block
}

pub(crate) fn content(seeds: &[u32]) -> Vec<u8> {
    seeds.iter().flat_map(|seed| block(*seed)).collect()
}

pub(crate) fn name(text: &str) -> RefName {
    RefName::new(text).expect("a name")
}

/// A store, and what one process has open of it.
pub(crate) struct Rig {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) store: Arc<dyn BlobStore>,
    pub(crate) index: Arc<BlockIndex>,
}

impl Rig {
    pub(crate) fn new() -> Rig {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = open(folder.path());
        let index = index(&store);
        Rig { folder, store, index }
    }

    /// Writes an image of `seeds`, all of them given.
    pub(crate) fn write(&self, called: &str, seeds: &[u32]) -> Written {
        write(&self.index, called, None, seeds).expect("written")
    }

    pub(crate) fn read(&self, image: &ImageManifest) -> Result<Vec<u8>, ReadError> {
        read(&self.store, image)
    }
}

pub(crate) fn open(folder: &Path) -> Arc<dyn BlobStore> {
    Arc::new(DirStore::open(folder).expect("a store"))
}

/// What a process that has just started knows: nothing.
pub(crate) fn index(store: &Arc<dyn BlobStore>) -> Arc<BlockIndex> {
    let cache = ChunkCache::in_memory(Arc::clone(store), 1 << 20);
    Arc::new(BlockIndex::new(Arc::new(cache)))
}

pub(crate) fn write(
    index: &Arc<BlockIndex>,
    called: &str,
    base: Option<&ImageManifest>,
    seeds: &[u32],
) -> Result<Written, WriteError> {
    let base = base.cloned().map(Arc::new);
    let size = (seeds.len() * BLOCK) as u64;
    let mut writer = ImageWriter::new(Arc::clone(index), base, size, SMALL)?;
    for (number, seed) in (0..).zip(seeds) {
        writer.block(number, &block(*seed))?;
    }
    writer.finish(&name(called))
}

/// The whole image, through a cache that has nothing.
pub(crate) fn read(
    store: &Arc<dyn BlobStore>,
    image: &ImageManifest,
) -> Result<Vec<u8>, ReadError> {
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(store), 1 << 20));
    let reader = ImageReader::open(cache, image.id())?;
    let mut bytes = vec![0xaa; usize::try_from(reader.size_bytes()).expect("small")];
    reader.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

type Hook = Box<dyn FnOnce() + Send>;

/// A store that counts calls, and fails or does something else at a call of its number.
pub(crate) struct Tampered {
    inner: Arc<dyn BlobStore>,
    pub(crate) reads: AtomicU64,
    calls: AtomicU64,
    changes: AtomicU64,
    /// Every call of a multiple of this number fails; 0 for none.
    fails_every: u64,
    /// After so many changes every call fails, as after `kill -9`.
    dies_after: u64,
    hook: Mutex<Option<(u64, Hook)>>,
}

impl Tampered {
    pub(crate) fn new(inner: &Arc<dyn BlobStore>) -> Tampered {
        Tampered {
            inner: Arc::clone(inner),
            reads: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            fails_every: 0,
            dies_after: u64::MAX,
            hook: Mutex::new(None),
        }
    }

    /// Every call of a multiple of this number fails.
    pub(crate) fn failing_every(self, calls: u64) -> Tampered {
        Tampered { fails_every: calls, ..self }
    }

    /// Every call after this many changes fails, as after `kill -9`.
    pub(crate) fn dying_after(self, changes: u64) -> Tampered {
        Tampered { dies_after: changes, ..self }
    }

    /// Runs `hook` before the call of number `call`, counted from 1.
    pub(crate) fn before_call(&self, call: u64, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().expect("not poisoned") = Some((call, Box::new(hook)));
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn call(&self, action: BlobAction, key: &BlobKey) -> Result<(), BlobError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let hook = {
            let mut hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner);
            if hook.as_ref().is_some_and(|(at, _)| *at == call) { hook.take() } else { None }
        };
        if let Some((_, hook)) = hook {
            hook();
        }
        let is_dead = self.changes.load(Ordering::SeqCst) >= self.dies_after;
        if is_dead || (self.fails_every > 0 && call.is_multiple_of(self.fails_every)) {
            let source = Arc::new(std::io::Error::other("the test says so"));
            return Err(BlobError {
                action,
                key: key.to_string(),
                store: self.name().to_owned(),
                fault: BlobFault::Unavailable(source),
            });
        }
        match action {
            BlobAction::Read => self.reads.fetch_add(1, Ordering::SeqCst),
            BlobAction::Write | BlobAction::Delete => self.changes.fetch_add(1, Ordering::SeqCst),
            BlobAction::Stat | BlobAction::List => 0,
        };
        Ok(())
    }
}

impl BlobStore for Tampered {
    fn name(&self) -> &str {
        "a tampered store"
    }

    fn put(&self, key: &BlobKey, body: Bytes) -> Result<(), BlobError> {
        self.call(BlobAction::Write, key)?;
        self.inner.put(key, body)
    }

    fn create(&self, key: &BlobKey, body: Bytes) -> Result<Created, BlobError> {
        self.call(BlobAction::Write, key)?;
        self.inner.create(key, body)
    }

    fn get(&self, key: &BlobKey, max_bytes: u64) -> Result<Bytes, BlobError> {
        self.call(BlobAction::Read, key)?;
        self.inner.get(key, max_bytes)
    }

    fn get_range(&self, key: &BlobKey, range: Range<u64>) -> Result<Bytes, BlobError> {
        self.call(BlobAction::Read, key)?;
        self.inner.get_range(key, range)
    }

    fn stat(&self, key: &BlobKey) -> Result<BlobStat, BlobError> {
        self.call(BlobAction::Stat, key)?;
        self.inner.stat(key)
    }

    fn list(&self, folder: &BlobKey) -> Result<Vec<(BlobKey, BlobStat)>, BlobError> {
        self.call(BlobAction::List, folder)?;
        self.inner.list(folder)
    }

    fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        self.call(BlobAction::Delete, key)?;
        self.inner.delete(key)
    }
}
