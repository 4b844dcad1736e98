//! One layer, open for reading.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::name::LayerName;
use super::store::Shared;
use crate::clone::{Extent, data_extents};

/// An open layer. While one of its handles lives, no sweep of its store removes the file.
pub struct Layer {
    pub(super) name: LayerName,
    pub(super) path: PathBuf,
    pub(super) size_bytes: u64,
    pub(super) file: Arc<File>,
    /// Its content is on stable storage, or was made by somebody who saw to that.
    pub(super) synced: AtomicBool,
    /// Where the file is not a hole; found when first asked for.
    pub(super) data: OnceLock<Vec<Extent>>,
    pub(super) store: Arc<Shared>,
}

/// A read failed, with the layer it failed in: the caller of a disk knows offsets only.
#[derive(Debug, thiserror::Error)]
#[error("read {len} bytes at {offset} of layer {name}")]
struct ReadError {
    name: LayerName,
    offset: u64,
    len: usize,
    #[source]
    source: io::Error,
}

impl Layer {
    /// Its name in maps.
    pub fn name(&self) -> &LayerName {
        &self.name
    }

    /// Its file, to be mapped or given to another process. It must not be written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of its file, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buf` from `offset` of the file.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|source| {
            let (name, len) = (self.name.clone(), buf.len());
            io::Error::new(source.kind(), ReadError { name, offset, len, source })
        })
    }

    /// The parts of the file that are not holes.
    pub(crate) fn data(&self) -> io::Result<&[Extent]> {
        if let Some(data) = self.data.get() {
            return Ok(data);
        }
        let data = data_extents(&self.file, self.size_bytes)?;
        Ok(self.data.get_or_init(|| data))
    }

    /// True for layers that a store made, false for templates.
    pub(crate) fn is_sealed(&self) -> bool {
        self.name.is_sealed()
    }

    /// Puts its content and its name on stable storage, once. It is read-only from then on, for
    /// whoever is handed its descriptor: a machine of a user of its own may map it. Nobody else
    /// can pass the store's folder.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.synced.load(Ordering::Acquire) {
            return Ok(());
        }
        self.file.set_permissions(Permissions::from_mode(0o444))?;
        self.file.sync_all()?;
        if let Some(folder) = self.path.parent() {
            File::open(folder)?.sync_all()?;
        }
        self.synced.store(true, Ordering::Release);
        Ok(())
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.store.let_go(&self.name);
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer")
            .field("name", &self.name)
            .field("size_bytes", &self.size_bytes)
            .finish()
    }
}
