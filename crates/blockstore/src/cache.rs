//! Chunks of a blob store, near: whole and checked, from memory, from local disk, or from the store.
//!
//! ```text
//!   read ──► memory (decoded) ──► one fetch at a time for each chunk
//!                                   └─► disk (as stored, checked again) ──► store (checked)
//! ```
//!
//! What leaves this module was checked against the object's or image's name in this very process. Chunks are
//! kept on disk as they are stored, compressed: there the bound goes further, and memory keeps what
//! is in use decoded. Calls block.

mod clock;
mod disk;
mod flights;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::blobs::{BlobKey, BlobStore};
use crate::objects::{
    Corrupt, ImageId, ImageManifest, MANIFEST_BYTES_MAX, ObjectId, ObjectIndex, ObjectUse, Packed,
    ReadError, frame_decode, is_frame_whole,
};
use clock::Clock;
use disk::Disk;
use flights::{Flights, Ticket, Turn};

/// Bytes fetched at once when neighbouring frames are wanted: few requests, bounded memory.
const RANGE_BYTES_MAX: u64 = 4 << 20;

/// Which piece of an object or image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Part {
    Manifest,
    Index,
    Hashes,
    Frame(u32),
}

/// A piece, and whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct ChunkKey {
    of: [u8; 32],
    part: Part,
}

impl ChunkKey {
    fn file_name(&self) -> String {
        let of = ObjectId(self.of);
        match self.part {
            Part::Manifest => format!("{of}.manifest"),
            Part::Index => format!("{of}.index"),
            Part::Hashes => format!("{of}.hashes"),
            Part::Frame(number) => format!("{of}.{number}"),
        }
    }

    fn of_file_name(name: &str) -> Option<ChunkKey> {
        let (of, part) = name.split_once('.')?;
        let part = match part {
            "manifest" => Part::Manifest,
            "index" => Part::Index,
            "hashes" => Part::Hashes,
            number => Part::Frame(number.parse().ok()?),
        };
        Some(ChunkKey { of: ObjectId::parse(of).ok()?.0, part })
    }
}

/// A checked piece, decoded.
#[derive(Debug, Clone)]
enum Chunk {
    Manifest(Arc<ImageManifest>),
    Index(Arc<ObjectIndex>),
    Bytes(Bytes),
}

impl Chunk {
    /// What it takes in memory, roughly, in bytes.
    fn weight(&self) -> u64 {
        match self {
            Chunk::Manifest(manifest) => {
                (manifest.objects().len() * 48 + manifest.runs().len() * 16) as u64
            }
            Chunk::Index(index) => index.frames().len() as u64 * 48,
            Chunk::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// Why a cache could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Its folder cannot be used.
    #[error("open chunk cache {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("open chunk cache {}: another process uses it", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
}

/// How much a cache may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLimits {
    /// On disk, in bytes.
    pub disk_bytes: u64,
    /// Decoded in memory, in bytes.
    pub memory_bytes: u64,
}

impl Default for CacheLimits {
    fn default() -> CacheLimits {
        CacheLimits { disk_bytes: 20 << 30, memory_bytes: 64 << 20 }
    }
}

/// What a cache did since it was opened, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// Chunks found decoded in memory.
    pub memory_hits: u64,
    /// Chunks found on disk.
    pub disk_hits: u64,
    /// Requests to the store.
    pub fetches: u64,
    /// Chunks on disk that were not what they should be, and were dropped.
    pub damaged: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// Chunks on disk.
    pub disk_chunks: u64,
}

#[derive(Default)]
struct Counters {
    memory_hits: AtomicU64,
    disk_hits: AtomicU64,
    fetches: AtomicU64,
    damaged: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

type Fetched = Result<Chunk, ReadError>;

/// A store with what was read of it lately. Share one by `Arc`.
pub struct ChunkCache {
    store: Arc<dyn BlobStore>,
    disk: Option<Disk>,
    memory: Mutex<Clock<ChunkKey, Chunk>>,
    flights: Flights<ChunkKey, Fetched>,
    counters: Counters,
}

impl ChunkCache {
    /// A cache in `folder`, with what an earlier process has left there. One process has it at a time.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn open(
        store: Arc<dyn BlobStore>,
        folder: &Path,
        limits: CacheLimits,
    ) -> Result<ChunkCache, CacheError> {
        let disk = Disk::open(folder, limits.disk_bytes)?;
        Ok(ChunkCache { disk: Some(disk), ..ChunkCache::in_memory(store, limits.memory_bytes) })
    }

    /// A cache that forgets all when it is dropped, of at most `memory_bytes`.
    pub fn in_memory(store: Arc<dyn BlobStore>, memory_bytes: u64) -> ChunkCache {
        ChunkCache {
            store,
            disk: None,
            memory: Mutex::new(Clock::new(memory_bytes)),
            flights: Flights::new(),
            counters: Counters::default(),
        }
    }

    /// The store behind it.
    pub fn store(&self) -> &Arc<dyn BlobStore> {
        &self.store
    }

    /// What it did and holds.
    pub fn stats(&self) -> CacheStats {
        let (disk_bytes, chunks) = self.disk.as_ref().map_or((0, 0), Disk::weight);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheStats {
            memory_hits: read(&self.counters.memory_hits),
            disk_hits: read(&self.counters.disk_hits),
            fetches: read(&self.counters.fetches),
            damaged: read(&self.counters.damaged),
            disk_bytes,
            disk_chunks: chunks as u64,
        }
    }

    /// The manifest of an image.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn manifest(&self, id: ImageId) -> Result<Arc<ImageManifest>, ReadError> {
        let key = ChunkKey { of: id.0, part: Part::Manifest };
        let chunk = self.chunk(key, || {
            let source = Source { key: id.key(), range: None, max_bytes: MANIFEST_BYTES_MAX };
            self.load(key, format!("image {id}"), &source, |bytes| {
                Ok(Chunk::Manifest(Arc::new(ImageManifest::parse(id, bytes)?)))
            })
        })?;
        match chunk {
            Chunk::Manifest(manifest) => Ok(manifest),
            Chunk::Index(_) | Chunk::Bytes(_) => unreachable!("manifests are kept as such"),
        }
    }

    /// The index of an object.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn index(&self, object: &ObjectUse) -> Result<Arc<ObjectIndex>, ReadError> {
        let key = ChunkKey { of: object.id.0, part: Part::Index };
        let chunk = self.chunk(key, || {
            let start = object.bytes.saturating_sub(object.shape().index_bytes());
            let source = Source::range(object.id, start..object.bytes);
            self.load(key, format!("object {}", object.id), &source, |bytes| {
                let index = ObjectIndex::parse(object.id, bytes, object.bytes)?;
                Ok(Chunk::Index(Arc::new(index)))
            })
        })?;
        let Chunk::Index(index) = chunk else { unreachable!("indexes are kept as such") };
        if index.shape() != object.shape() || index.object_bytes() != object.bytes {
            let what =
                "its index and the manifest that uses it do not agree on its size".to_owned();
            return Err(Corrupt { thing: format!("object {}", object.id), what }.into());
        }
        Ok(index)
    }

    /// The BLAKE3 of each block of an object, 32 bytes each.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn hashes(&self, object: &ObjectUse) -> Result<Bytes, ReadError> {
        let index = self.index(object)?;
        let key = ChunkKey { of: object.id.0, part: Part::Hashes };
        let chunk = self.chunk(key, || {
            let source = Source::range(object.id, index.hashes_range());
            let thing = format!("object {}", object.id);
            self.load(key, thing.clone(), &source, |bytes| {
                if index.are_hashes_whole(bytes) {
                    return Ok(Chunk::Bytes(Bytes::copy_from_slice(bytes)));
                }
                let what = "its block hashes do not have the hash in its index".to_owned();
                Err(Corrupt { thing: thing.clone(), what })
            })
        })?;
        Ok(bytes_of(chunk))
    }

    /// The blocks of one frame of an object.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn frame(&self, object: &ObjectUse, frame: u32) -> Result<Bytes, ReadError> {
        let key = ChunkKey { of: object.id.0, part: Part::Frame(frame) };
        // Also where the frame itself is in memory: a manifest that lies about the object's shape
        // would cut it where it has no blocks.
        let index = self.index(object)?;
        let chunk = self.chunk(key, || {
            let source = Source::range(object.id, index.frame_range(frame));
            self.load(key, format!("object {}", object.id), &source, |bytes| {
                decode_frame(&index, frame, bytes)
            })
        })?;
        Ok(bytes_of(chunk))
    }

    /// Fetches those of `frames` that are not here, neighbours together: what a reader of the whole
    /// image asks for ahead.
    ///
    /// # Errors
    /// [`ReadError`] of the first request that failed.
    pub fn fetch_ahead(&self, object: &ObjectUse, frames: Range<u32>) -> Result<(), ReadError> {
        let index = self.index(object)?;
        let mut tickets: Vec<Ticket<'_, ChunkKey, Fetched>> = Vec::new();
        let mut span: Range<u64> = 0..0;
        for frame in frames {
            let key = ChunkKey { of: object.id.0, part: Part::Frame(frame) };
            let place = index.frame_range(frame);
            let ticket = (!self.is_near(&key)).then(|| self.flights.try_begin(&key)).flatten();
            let continues = ticket.is_some() && place.end - span.start <= RANGE_BYTES_MAX;
            if !tickets.is_empty() && !continues {
                self.fetch_span(&index, span.clone(), std::mem::take(&mut tickets))?;
            }
            if let Some(ticket) = ticket {
                let start = if tickets.is_empty() { place.start } else { span.start };
                span = start..place.end;
                tickets.push(ticket);
            }
        }
        if tickets.is_empty() { Ok(()) } else { self.fetch_span(&index, span, tickets) }
    }

    /// One request for neighbouring frames; each is checked by itself.
    fn fetch_span(
        &self,
        index: &ObjectIndex,
        span: Range<u64>,
        tickets: Vec<Ticket<'_, ChunkKey, Fetched>>,
    ) -> Result<(), ReadError> {
        let id = index.id();
        count(&self.counters.fetches);
        let fetched = self.store.get_range(&id.key(), span);
        let bytes = match fetched.map_err(|e| ReadError::of(format!("object {id}"), e)) {
            Ok(bytes) => bytes,
            Err(e) => {
                tickets.into_iter().for_each(|ticket| ticket.land(&Err(e.clone())));
                return Err(e);
            }
        };
        let mut at = 0;
        for ticket in tickets {
            let Part::Frame(frame) = ticket.key().part else { continue };
            let place = index.frame_range(frame);
            let length = crate::device::index(place.end - place.start);
            let stored = &bytes[at..at + length];
            at += length;
            let key = *ticket.key();
            let chunk = decode_frame(index, frame, stored).map_err(ReadError::from);
            if let Ok(chunk) = &chunk {
                self.keep(key, stored, chunk);
            }
            ticket.land(&chunk);
            chunk?;
        }
        Ok(())
    }

    /// Takes in what a writer knows of an object it has just made, so that sharing with it costs no
    /// request.
    pub(crate) fn seed(&self, packed: &Packed) {
        let key = |part| ChunkKey { of: packed.index.id().0, part };
        let end = packed.bytes.len() - crate::device::index(packed.index.shape().index_bytes());
        let index = Chunk::Index(Arc::new(packed.index.clone()));
        self.keep(key(Part::Index), &packed.bytes[end..], &index);
        self.keep(key(Part::Hashes), &packed.hashes, &Chunk::Bytes(packed.hashes.clone()));
    }

    fn memory(&self) -> MutexGuard<'_, Clock<ChunkKey, Chunk>> {
        // Chunks are checked before they get here, and whole: a panic elsewhere breaks none.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_memory_now(&self, key: &ChunkKey) -> Option<Chunk> {
        let found = self.memory().get(key);
        if found.is_some() {
            count(&self.counters.memory_hits);
        }
        found
    }

    fn is_near(&self, key: &ChunkKey) -> bool {
        self.memory().contains(key) || self.disk.as_ref().is_some_and(|disk| disk.contains(key))
    }

    fn keep(&self, key: ChunkKey, stored: &[u8], chunk: &Chunk) {
        if let Some(disk) = &self.disk {
            disk.write(key, stored);
        }
        self.memory().insert(key, chunk.clone(), chunk.weight());
    }

    /// A chunk from memory, or by one call of `load` for all who want it now.
    fn chunk(&self, key: ChunkKey, load: impl FnOnce() -> Fetched) -> Fetched {
        if let Some(chunk) = self.in_memory_now(&key) {
            return Ok(chunk);
        }
        match self.flights.turn(&key) {
            Turn::Result(result) => result,
            Turn::Fetch(ticket) => {
                // Somebody may have landed it between the look above and the turn.
                let result = self.in_memory_now(&key).map_or_else(load, Ok);
                ticket.land(&result);
                result
            }
        }
    }

    /// A chunk from disk or from the store, checked by `check`.
    fn load(
        &self,
        key: ChunkKey,
        thing: String,
        source: &Source,
        check: impl Fn(&[u8]) -> Result<Chunk, Corrupt>,
    ) -> Fetched {
        if let Some(disk) = &self.disk
            && let Some(stored) = disk.read(&key, source.max_bytes)
        {
            match check(&stored) {
                Ok(chunk) => {
                    count(&self.counters.disk_hits);
                    self.memory().insert(key, chunk.clone(), chunk.weight());
                    return Ok(chunk);
                }
                Err(e) => {
                    count(&self.counters.damaged);
                    tracing::warn!(error = %e, "a cached chunk was damaged; it is fetched again");
                    disk.remove(&key);
                }
            }
        }
        count(&self.counters.fetches);
        let stored = match &source.range {
            Some(range) => self.store.get_range(&source.key, range.clone()),
            None => self.store.get(&source.key, source.max_bytes),
        };
        let stored = stored.map_err(|e| ReadError::of(thing, e))?;
        let chunk = check(&stored)?;
        self.keep(key, &stored, &chunk);
        Ok(chunk)
    }
}

/// Where a chunk is in the store.
struct Source {
    key: BlobKey,
    /// `None` for the whole blob.
    range: Option<Range<u64>>,
    max_bytes: u64,
}

impl Source {
    fn range(object: ObjectId, range: Range<u64>) -> Source {
        let max_bytes = range.end - range.start;
        Source { key: object.key(), range: Some(range), max_bytes }
    }
}

fn decode_frame(index: &ObjectIndex, frame: u32, stored: &[u8]) -> Result<Chunk, Corrupt> {
    let corrupt = |what: String| Corrupt {
        thing: format!("object {}", index.id()),
        what: format!("frame {frame}: {what}"),
    };
    let entry = &index.frames()[usize::try_from(frame).expect("frames are few")];
    if !is_frame_whole(entry, stored) {
        return Err(corrupt("its bytes do not have the hash in the index".to_owned()));
    }
    let blocks = index.shape().blocks_of(frame);
    let raw = frame_decode(entry, stored, blocks).map_err(corrupt)?;
    Ok(Chunk::Bytes(raw.into()))
}

fn bytes_of(chunk: Chunk) -> Bytes {
    match chunk {
        Chunk::Bytes(bytes) => bytes,
        Chunk::Manifest(_) | Chunk::Index(_) => unreachable!("frames and hashes are kept as bytes"),
    }
}
