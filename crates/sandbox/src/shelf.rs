//! The snapshots of this host, and the layers they are made of. What of them is in a blob store, or is to
//! go from it, is in the marks (`shelf/marks.rs`).

mod marks;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use belljar_blockstore::{LayerName, LayerStore, LayeredImage};
use belljar_domain::{BuildId, ExecutionId, Tier};
use belljar_runtime::Runtime;
use marks::Marks;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::record::RecordError;
use crate::registry::chain;
use crate::snapshot::{self, SnapshotDraft, SnapshotFiles, SnapshotMeta};
use crate::source::Source;

/// No such snapshot is here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("find snapshot {snapshot_id} on this node")]
pub struct SnapshotNotFound {
    /// Which.
    pub snapshot_id: BuildId,
}

/// Why a snapshot is still here.
#[derive(Debug, thiserror::Error)]
pub enum DeleteSnapshotError {
    /// It is not here.
    #[error(transparent)]
    NotFound(#[from] SnapshotNotFound),
    /// It could not be noted that it is to go from the blob store, too. It is here as before.
    #[error("delete snapshot {snapshot_id}: note that it goes from the blob store")]
    Note {
        /// Which.
        snapshot_id: BuildId,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// Its folder cannot be removed. It is no snapshot any more; what is left goes at the next start.
    #[error("delete snapshot {snapshot_id}")]
    Folder {
        /// Which.
        snapshot_id: BuildId,
        /// Why.
        #[source]
        source: RecordError,
    },
}

/// The snapshots of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Shelf {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    layers: LayerStore,
    /// What the driver can restore.
    fingerprint: String,
    runtime: Arc<dyn Runtime>,
    // Held for look-ups and single changes only.
    known: Mutex<BTreeMap<BuildId, Arc<Source>>>,
    /// Held while layers are swept: one at a time is enough.
    sweeping: Mutex<()>,
    /// What snapshots are made of that cannot be used, perhaps until somebody mends them. `None` when that is
    /// not known of one, so that no layer may go.
    spared: Option<HashSet<LayerName>>,
    marks: Marks,
    /// Told when there may be something to do for the blob store.
    news: Notify,
}

impl Shelf {
    /// Loads the snapshots in `dir`, removes what a killed server left half made, and every layer
    /// that nothing is made of. Blocks on file I/O.
    ///
    /// # Errors
    /// [`RecordError`] of the folder itself.
    ///
    /// `store` is what the blob store is called that snapshots are kept in besides, if there is one.
    pub(crate) fn open(
        dir: PathBuf,
        layers: LayerStore,
        runtime: Arc<dyn Runtime>,
        store: Option<&str>,
    ) -> Result<Shelf, RecordError> {
        snapshot::reclaim(&dir)?;
        let (mut known, mut spared) = (BTreeMap::new(), Some(HashSet::new()));
        for folder in snapshot::folders(&dir)? {
            let source = snapshot::load(&folder)
                .map_err(|e| chain(&e))
                .and_then(|meta| open_source(&folder, meta, &layers).map_err(|e| chain(&e)));
            match source {
                Ok(source) => drop(known.insert(source.build_id.clone(), Arc::new(source))),
                // One that is damaged must not keep the others from being used, nor be made worse.
                Err(error) => spared = spare(spared, &folder, &error),
            }
        }
        let marks = Marks::open(&dir, known.keys(), store)?;
        let inner = Inner {
            marks,
            news: Notify::new(),
            dir,
            layers,
            fingerprint: runtime.fingerprint(),
            runtime,
            known: Mutex::new(known),
            sweeping: Mutex::new(()),
            spared,
        };
        let shelf = Shelf { inner: Arc::new(inner) };
        shelf.sweep();
        Ok(shelf)
    }

    pub(crate) fn layers(&self) -> &LayerStore {
        &self.inner.layers
    }

    pub(crate) fn tier(&self) -> Tier {
        self.inner.runtime.tier()
    }

    pub(crate) fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }

    /// Begins a snapshot.
    ///
    /// # Errors
    /// [`RecordError`], also when there is one of this id.
    pub(crate) fn draft(&self, id: &BuildId) -> Result<SnapshotDraft, RecordError> {
        SnapshotDraft::create(&self.inner.dir, id)
    }

    pub(crate) fn put(
        &self,
        meta: &Arc<SnapshotMeta>,
        files: &SnapshotFiles,
        images: (Arc<LayeredImage>, Option<Arc<LayeredImage>>),
    ) {
        let source = Source::of_snapshot(meta.clone(), files, images);
        self.known().insert(meta.snapshot_id.clone(), Arc::new(source));
        self.inner.news.notify_one();
    }

    /// As [`Shelf::put`], of one that came out of the blob store.
    pub(crate) fn put_stored(
        &self,
        meta: &Arc<SnapshotMeta>,
        files: &SnapshotFiles,
        images: (Arc<LayeredImage>, Option<Arc<LayeredImage>>),
    ) {
        if let Some(store) = &self.inner.marks.store {
            self.set_uploaded(&meta.snapshot_id, store);
        }
        self.put(meta, files, images);
    }

    /// The folder of a snapshot.
    pub(crate) fn folder(&self, id: &BuildId) -> PathBuf {
        self.inner.dir.join(id.as_str())
    }

    /// Ends when there may be something to do for the blob store. Cancel-safe.
    pub(crate) async fn news(&self) {
        self.inner.news.notified().await;
    }

    /// Whether a snapshot is in the blob store, too.
    pub(crate) fn is_uploaded(&self, id: &BuildId) -> bool {
        self.inner.marks.is_uploaded(id)
    }

    /// Notes that a snapshot is in the blob store called `store`.
    pub(crate) fn set_uploaded(&self, id: &BuildId, store: &str) {
        self.inner.marks.set_uploaded(&self.inner.dir, id, store);
    }

    /// Snapshots that are not in the blob store and are to be, in no order.
    pub(crate) fn to_upload(&self) -> Vec<Arc<SnapshotMeta>> {
        let mut metas = self.list(None);
        metas.retain(|meta| self.inner.marks.is_to_go_up(&meta.snapshot_id));
        metas
    }

    /// Snapshots that were deleted here and may still be in the blob store.
    pub(crate) fn to_forget(&self) -> Vec<BuildId> {
        self.inner.marks.deleted()
    }

    /// A deleted snapshot is not in the blob store any more. False when that could not be noted.
    pub(crate) fn forgotten(&self, id: &BuildId) -> bool {
        self.inner.marks.forgotten(id)
    }

    pub(crate) fn get(&self, id: &BuildId) -> Option<Arc<Source>> {
        self.known().get(id).cloned()
    }

    /// Whether this host's driver can start from it.
    pub(crate) fn fits(&self, source: &Source) -> bool {
        let meta = source.snapshot.as_ref();
        source.saved.is_none()
            || meta.is_none_or(|meta| self.inner.runtime.restores(&meta.fingerprint))
    }

    /// Snapshots whose ids come after `after`, in the order of their ids.
    pub(crate) fn list(&self, after: Option<&BuildId>) -> Vec<Arc<SnapshotMeta>> {
        let known = self.known();
        let later = known.iter().filter(|(id, _)| after.is_none_or(|after| *id > after));
        later.filter_map(|(_, source)| source.snapshot.clone()).collect()
    }

    /// Runs that ended with their sandbox paused.
    pub(crate) fn paused_runs(&self) -> HashSet<ExecutionId> {
        let known = self.known();
        let metas = known.values().filter_map(|source| source.snapshot.as_ref());
        metas.filter(|meta| meta.paused).map(|meta| meta.execution_id.clone()).collect()
    }

    /// Removes a snapshot, and what only it was made of; from the blob store, too, whether it is here or not. Blocks on file I/O.
    ///
    /// # Errors
    /// [`DeleteSnapshotError`].
    pub(crate) fn delete(&self, id: &BuildId) -> Result<(), DeleteSnapshotError> {
        // Before it is gone here: nothing else would know that it is still there. Also when it is not here:
        // it may be in the store alone.
        let noted = self.inner.marks.delete(id);
        noted.map_err(|source| DeleteSnapshotError::Note { snapshot_id: id.clone(), source })?;
        self.inner.news.notify_one();
        if self.known().remove(id).is_none() {
            return Err(SnapshotNotFound { snapshot_id: id.clone() }.into());
        }
        let removed = snapshot::remove(&self.folder(id));
        self.sweep();
        info!(snapshot_id = %id, "snapshot deleted");
        removed.map_err(|source| DeleteSnapshotError::Folder { snapshot_id: id.clone(), source })
    }

    /// Removes layers that no snapshot is made of and nothing that runs has open. Blocks on file I/O.
    pub(crate) fn sweep(&self) {
        let Some(spared) = &self.inner.spared else { return };
        // The lock guards no memory: a panic in another sweep left nothing half done here.
        let _turn = self.inner.sweeping.lock().unwrap_or_else(PoisonError::into_inner);
        let reachable: HashSet<LayerName> = self
            .known()
            .values()
            .flat_map(|source| source.layers().cloned().collect::<Vec<_>>())
            .chain(spared.iter().cloned())
            .collect();
        if let Err(e) = self.inner.layers.sweep(&reachable) {
            warn!(error = %chain(&e), "layers nobody uses stay until the next sweep");
        }
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<BuildId, Arc<Source>>> {
        // A panic while it was held left at most one snapshot out: the map itself is whole.
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds what the snapshot in `folder`, which cannot be used, is made of.
fn spare(
    spared: Option<HashSet<LayerName>>,
    folder: &Path,
    error: &str,
) -> Option<HashSet<LayerName>> {
    let files = SnapshotFiles::within(folder);
    let memory = Some(files.memory_map).filter(|map| map.exists());
    let maps = std::iter::once(files.disk_map).chain(memory);
    let names: Result<Vec<_>, _> = maps.map(|map| LayeredImage::names_in(&map)).collect();
    let folder = folder.display();
    let Ok(names) = names else {
        warn!(%folder, error, "a snapshot cannot be read: passed over, and no layer is removed");
        return None;
    };
    warn!(%folder, error, "a snapshot cannot be used: passed over");
    let mut spared = spared?;
    spared.extend(names.into_iter().flatten());
    Some(spared)
}

fn open_source(
    folder: &Path,
    meta: SnapshotMeta,
    layers: &LayerStore,
) -> Result<Source, belljar_blockstore::LoadError> {
    let files = SnapshotFiles::within(folder);
    // It may have been cut short with the machine, and is made again when it is wanted.
    drop(std::fs::remove_file(&files.memory));
    let open = |map: &Path| Ok(Arc::new(LayeredImage::load(map, layers)?));
    let root_disk = open(&files.disk_map)?;
    let memory = (!meta.filesystem_only).then(|| open(&files.memory_map)).transpose()?;
    Ok(Source::of_snapshot(Arc::new(meta), &files, (root_disk, memory)))
}
