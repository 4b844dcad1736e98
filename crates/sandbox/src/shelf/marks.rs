//! Which snapshots are in the blob store, on disk.
//!
//! ```text
//! <snapshots>/<id>/uploaded          it is in the store that this names
//! <deleted-snapshots>/<id>           deleted here; to go from the store that this names
//! ```
//!
//! A mark of another store counts for that one: who comes back to it goes on where it was.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use belljar_domain::BuildId;
use tracing::warn;

use crate::record::{RecordError, entries, io_error, name_of, read_record, write_new};
use crate::registry::chain;

const UPLOADED: &str = "uploaded";
/// Beside the folder of snapshots.
const DELETED: &str = "deleted-snapshots";
/// Longest name of a store, in bytes.
const STORE_MAX_BYTES: u64 = 4096;

#[derive(Debug)]
pub(super) struct Marks {
    /// What the store is called; `None` where there is none.
    pub(super) store: Option<String>,
    deleted_dir: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    uploaded: HashSet<BuildId>,
    deleted: HashSet<BuildId>,
}

impl Marks {
    /// Reads the marks of the snapshots `ids` in the folder `snapshots`, as far as they name `store`. Blocks
    /// on file I/O.
    ///
    /// # Errors
    /// [`RecordError`] of the folder of what was deleted.
    pub(super) fn open<'a>(
        snapshots: &Path,
        ids: impl Iterator<Item = &'a BuildId>,
        store: Option<&str>,
    ) -> Result<Marks, RecordError> {
        let deleted_dir = snapshots.with_file_name(DELETED);
        let mut known = Known::default();
        if let Some(store) = store {
            std::fs::create_dir_all(&deleted_dir).map_err(io_error("make", &deleted_dir))?;
            let names = |mark: &Path| {
                read_record(mark, STORE_MAX_BYTES).is_ok_and(|text| text == store.as_bytes())
            };
            let is_uploaded = |id: &&BuildId| names(&snapshots.join(id.as_str()).join(UPLOADED));
            known.uploaded = ids.filter(is_uploaded).cloned().collect();
            for mark in entries(&deleted_dir)? {
                let id = name_of(&mark).parse().ok();
                known.deleted.extend(id.filter(|_| names(&mark)));
            }
        }
        let store = store.map(str::to_owned);
        Ok(Marks { store, deleted_dir, known: Mutex::new(known) })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Inserts and removals are single steps: the sets are whole after a panic elsewhere.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_uploaded(&self, id: &BuildId) -> bool {
        self.known().uploaded.contains(id)
    }

    /// Whether a snapshot is still to be uploaded: not one that is just being deleted.
    pub(super) fn is_to_go_up(&self, id: &BuildId) -> bool {
        let known = self.known();
        !known.uploaded.contains(id) && !known.deleted.contains(id)
    }

    /// Notes that a snapshot is in the store. Where that cannot be written, the next server looks again.
    pub(super) fn set_uploaded(&self, snapshots: &Path, id: &BuildId, store: &str) {
        self.known().uploaded.insert(id.clone());
        let mark = snapshots.join(id.as_str()).join(UPLOADED);
        // One of another store, which counts no more.
        drop(std::fs::remove_file(&mark));
        if let Err(e) = write_new(&mark, store.as_bytes())
            && snapshots.join(id.as_str()).exists()
        {
            warn!(snapshot_id = %id, error = %chain(&e), "it is not noted that a snapshot was uploaded");
        }
    }

    /// Notes that a snapshot is to go from the store, on stable storage.
    pub(super) fn delete(&self, id: &BuildId) -> Result<(), RecordError> {
        let Some(store) = &self.store else { return Ok(()) };
        let mark = self.deleted_dir.join(id.as_str());
        if !mark.exists() {
            write_new(&mark, store.as_bytes())?;
            for path in [&mark, &self.deleted_dir] {
                let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
                synced.map_err(io_error("sync", path))?;
            }
        }
        let mut known = self.known();
        known.uploaded.remove(id);
        known.deleted.insert(id.clone());
        Ok(())
    }

    pub(super) fn deleted(&self) -> Vec<BuildId> {
        self.known().deleted.iter().cloned().collect()
    }

    pub(super) fn forgotten(&self, id: &BuildId) -> bool {
        if let Err(e) = std::fs::remove_file(self.deleted_dir.join(id.as_str()))
            && e.kind() != std::io::ErrorKind::NotFound
        {
            warn!(snapshot_id = %id, error = %e, "it is not noted that a snapshot is gone from the store");
            return false;
        }
        self.known().deleted.remove(id);
        true
    }
}
