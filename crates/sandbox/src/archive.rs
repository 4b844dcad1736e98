//! Snapshots in a blob store: up from this host, and down to another one.
//!
//! ```text
//! up:    images of disk and memory (what differs from the template goes up, by unique blocks)
//!        → the record, which names both and holds the folder's files
//! down:  the record → its files, both images → published here like any snapshot
//! ```
//!
//! The record's ref is written last and removed first, so a snapshot is in the store whole or not at all.
//! Everything blocks on the store: call it from a thread that may.

mod fetch;
mod record;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_blockstore::objects::{
    PackOptions, ReadError, RefError, WriteError, WriteStats, delete_ref, resolve,
};
use belljar_blockstore::{
    BLOCK_BYTES, BlobStore, BlockIndex, ChunkCache, ImageId, ImageManifest, ImageWriter, LayerName,
    LayeredImage, RefName,
};
use belljar_domain::{BuildId, Kind};
use tracing::debug;

use crate::source::Source;
use record::{FILES, Header};

pub use fetch::FetchError;
pub(crate) use fetch::Templates;

pub(crate) const BLOCK: usize = BLOCK_BYTES as usize;
/// How often an image is written again at once when something it shares was being collected.
const CONFLICTS_MAX: u32 = 8;
/// The parts of a stored snapshot, each under a ref; the record is what makes it one.
const RECORD: &str = "record";
const DISK: &str = "disk";
const MEMORY: &str = "memory";

/// How soon what failed is tried again: each time twice as late as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// After the first failure.
    pub first: Duration,
    /// At most.
    pub max: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { first: Duration::from_secs(1), max: Duration::from_secs(60) }
    }
}

/// Why a snapshot is not in the store yet. What was uploaded for it is found again by the next try, or collected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    /// It is not wanted any more, or this host stops.
    #[error("upload snapshot {snapshot_id}: it was given up")]
    Stopped {
        /// Which.
        snapshot_id: BuildId,
    },
    /// The store could not be asked.
    #[error("upload snapshot {snapshot_id}: ask the store")]
    Ask {
        /// Which.
        snapshot_id: BuildId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A part of it could not be written.
    #[error("upload the {part} of snapshot {snapshot_id}")]
    Write {
        /// Which.
        snapshot_id: BuildId,
        /// Of what.
        part: &'static str,
        /// Why.
        #[source]
        source: Box<WriteError>,
    },
    /// One of its files here could not be read.
    #[error("upload snapshot {snapshot_id}: read {file}")]
    File {
        /// Which.
        snapshot_id: BuildId,
        /// The file's name.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A blob store that a host keeps its snapshots in, and takes those of others from.
pub struct Archive {
    cache: Arc<ChunkCache>,
    index: Arc<BlockIndex>,
    pace: Pace,
    /// Whether the index knows what was in the store when this process first wrote to it.
    learned: AtomicBool,
    /// What templates of this host are in the store, as this process has written them.
    bases: Mutex<HashMap<LayerName, Arc<ImageManifest>>>,
    /// Parts that are up of snapshots that are not yet: what a try after a failure need not do again.
    parts: Mutex<HashMap<(BuildId, &'static str), ImageId>>,
}

impl Archive {
    /// The store behind `cache`.
    pub fn new(cache: Arc<ChunkCache>, pace: Pace) -> Archive {
        let index = Arc::new(BlockIndex::new(Arc::clone(&cache)));
        Archive {
            cache,
            index,
            pace,
            learned: AtomicBool::new(false),
            bases: Mutex::default(),
            parts: Mutex::default(),
        }
    }

    pub(crate) fn pace(&self) -> Pace {
        self.pace
    }

    /// What to call the store in messages and marks.
    pub(crate) fn store_name(&self) -> &str {
        self.store().name()
    }

    fn store(&self) -> &dyn BlobStore {
        &**self.cache.store()
    }

    /// Puts a snapshot of this host into the store; one that is there stays as it is. `go_on` is asked
    /// before each MiB.
    ///
    /// # Errors
    /// [`UploadError`].
    pub(crate) fn upload(
        &self,
        snapshot: &Source,
        folder: &Path,
        go_on: &dyn Fn() -> bool,
    ) -> Result<WriteStats, UploadError> {
        let id = &snapshot.build_id;
        let ask = |source| UploadError::Ask { snapshot_id: id.clone(), source };
        match resolve(self.store(), &name(id, RECORD)) {
            // A try before this one was not heard of.
            Ok(_) => return Ok(WriteStats::default()),
            Err(RefError::Unknown { .. }) => {}
            Err(e) => return Err(ask(e.into())),
        }
        self.learn().map_err(|e| ask(e.into()))?;
        let upload = Upload { archive: self, id, go_on };
        let (disk, mut stats) = upload.image(DISK, &snapshot.root_disk)?;
        let mut memory = None;
        if let Some(saved) = &snapshot.saved {
            let (image, more) = upload.image(MEMORY, &saved.image)?;
            memory = Some(image);
            stats = sum(stats, more);
        }
        let more = upload.record(folder, disk, memory)?;
        self.parts().retain(|(of, _), _| of != id);
        Ok(sum(stats, more))
    }

    /// Removes a snapshot from the store; what only it used is then for the store's collector. One that is
    /// not there is no error.
    ///
    /// # Errors
    /// [`RefError`] of the first part that stays.
    pub(crate) fn forget(&self, id: &BuildId) -> Result<(), RefError> {
        self.parts().retain(|(of, _), _| of != id);
        [RECORD, MEMORY, DISK].iter().try_for_each(|part| delete_ref(self.store(), &name(id, part)))
    }

    /// Has the index know what the store holds, once: or everything a template shares would go up again.
    fn learn(&self) -> Result<(), ReadError> {
        if !self.learned.load(Ordering::Acquire) {
            self.index.learn_all()?;
            self.learned.store(true, Ordering::Release);
            let stats = self.index.stats();
            debug!(objects = stats.objects, blocks = stats.blocks, "learned what the store has");
        }
        Ok(())
    }

    fn parts(&self) -> MutexGuard<'_, HashMap<(BuildId, &'static str), ImageId>> {
        // As for the bases.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bases(&self) -> MutexGuard<'_, HashMap<LayerName, Arc<ImageManifest>>> {
        // Inserts and removals are single steps: the table is whole after a panic elsewhere.
        self.bases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ref of one part of a snapshot.
fn name(id: &BuildId, part: &str) -> RefName {
    RefName::new(&format!("snapshots/{id}/{part}")).expect("a build id is lower-case hexadecimal")
}

fn sum(a: WriteStats, b: WriteStats) -> WriteStats {
    WriteStats {
        blocks: a.blocks + b.blocks,
        zero_blocks: a.zero_blocks + b.zero_blocks,
        shared_blocks: a.shared_blocks + b.shared_blocks,
        new_blocks: a.new_blocks + b.new_blocks,
        objects: a.objects + b.objects,
        object_bytes: a.object_bytes + b.object_bytes,
    }
}

/// One snapshot on its way up.
struct Upload<'a> {
    archive: &'a Archive,
    id: &'a BuildId,
    go_on: &'a dyn Fn() -> bool,
}

impl Upload<'_> {
    fn check(&self) -> io::Result<()> {
        if (self.go_on)() { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    }

    fn failed(&self, part: &'static str, source: WriteError) -> UploadError {
        let snapshot_id = self.id.clone();
        match source {
            WriteError::Source { .. } if !(self.go_on)() => UploadError::Stopped { snapshot_id },
            source => UploadError::Write { snapshot_id, part, source: Box::new(source) },
        }
    }

    /// Writes an image; again when something it shares was being collected.
    fn image(
        &self,
        part: &'static str,
        image: &LayeredImage,
    ) -> Result<(ImageId, WriteStats), UploadError> {
        let key = (self.id.clone(), part);
        if let Some(image) = self.archive.parts().get(&key) {
            return Ok((*image, WriteStats::default()));
        }
        let mut conflicts = 0;
        loop {
            match self.try_image(part, image) {
                Ok((image, stats)) => {
                    self.archive.parts().insert(key, image);
                    return Ok((image, stats));
                }
                Err(e) if e.kind() == Kind::Conflict && conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                    self.archive.bases().clear();
                }
                Err(e) => return Err(self.failed(part, e)),
            }
        }
    }

    fn try_image(
        &self,
        part: &'static str,
        image: &LayeredImage,
    ) -> Result<(ImageId, WriteStats), WriteError> {
        let base = self.base_of(part, image)?;
        let (over_base, size) = (base.is_some(), image.size_bytes());
        let index = Arc::clone(&self.archive.index);
        let mut writer = ImageWriter::new(index, base, size, PackOptions::default())?;
        writer.layers(image, over_base, || self.check())?;
        let written = writer.finish(&name(self.id, part))?;
        Ok((written.manifest.id(), written.stats))
    }

    /// The template below `image` as an image of the store, if there is one below it. It is written once in the
    /// life of this process, which costs reading it: nothing but this host's own file is believed to be it.
    fn base_of(
        &self,
        part: &'static str,
        image: &LayeredImage,
    ) -> Result<Option<Arc<ImageManifest>>, WriteError> {
        let Some(template) = image.lowest_template() else { return Ok(None) };
        if let Some(base) = self.archive.bases().get(&template) {
            return Ok(Some(Arc::clone(base)));
        }
        let failed = |source| WriteError::Source { block: 0, source };
        let raw = image.lowest_alone().map_err(failed)?;
        let index = Arc::clone(&self.archive.index);
        let mut writer = ImageWriter::new(index, None, raw.size_bytes(), PackOptions::default())?;
        writer.layers(&raw, false, || self.check())?;
        // The ref is that of the image which comes over it, and names that in a moment.
        let written = writer.finish(&name(self.id, part))?;
        let base = Arc::new(written.manifest);
        self.archive.bases().insert(template, Arc::clone(&base));
        Ok(Some(base))
    }

    fn record(
        &self,
        folder: &Path,
        disk: ImageId,
        memory: Option<ImageId>,
    ) -> Result<WriteStats, UploadError> {
        let names = if memory.is_some() { &FILES[..] } else { &FILES[..1] };
        let (mut files, mut open) = (Vec::new(), Vec::new());
        for (number, file) in names.iter().copied().enumerate() {
            let failed = |source| UploadError::File { snapshot_id: self.id.clone(), file, source };
            let handle = File::open(folder.join(file)).map_err(failed)?;
            files.push((number, handle.metadata().map_err(failed)?.len()));
            open.push((file, handle));
        }
        let header = Header { disk, memory, files };
        let (places, blocks) = header.places();
        let refused = |e| self.failed(RECORD, e);
        let mut writer = ImageWriter::new(
            Arc::clone(&self.archive.index),
            None,
            blocks * BLOCK_BYTES,
            PackOptions::default(),
        )
        .map_err(refused)?;
        writer.block(0, &header.encode()).map_err(refused)?;
        for ((file, handle), (place, (_, bytes))) in
            open.iter().zip(places.iter().zip(&header.files))
        {
            let mut left = handle.take(*bytes);
            for number in 0..bytes.div_ceil(BLOCK_BYTES) {
                let mut block = Vec::with_capacity(BLOCK);
                left.by_ref().take(BLOCK_BYTES).read_to_end(&mut block).map_err(|source| {
                    UploadError::File { snapshot_id: self.id.clone(), file, source }
                })?;
                block.resize(BLOCK, 0);
                writer.block(place + number, &block).map_err(refused)?;
            }
        }
        if !(self.go_on)() {
            return Err(UploadError::Stopped { snapshot_id: self.id.clone() });
        }
        Ok(writer.finish(&name(self.id, RECORD)).map_err(refused)?.stats)
    }
}
