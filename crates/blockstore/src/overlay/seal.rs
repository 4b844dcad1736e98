//! Freezing what an overlay holds into an image.
//!
//! No data is copied: the overlay's file is renamed into the store and becomes the topmost layer, and
//! its map becomes a part of the image's. The disk stands still for that long: a rename, and a walk
//! over the map.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use super::{Generation, Overlay, Top, remove};
use crate::block_map::{BlockMap, BlockState};
use crate::device::BLOCK_BYTES;
use crate::layered::{LAYERS_MAX, LayeredImage, compact};
use crate::layers::{Draft, Layer, LayerStore};

/// Why an overlay could not be sealed. It is as it was, and still writable if it was.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// A system call failed.
    #[error("{step} disk overlay {}", path.display())]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// The overlay's file.
        path: PathBuf,
        /// Why. An overlay and its store lie in one file system, or it is `CrossesDevices`.
        #[source]
        source: io::Error,
    },
    /// It was sealed before.
    #[error("seal disk overlay {} a second time", path.display())]
    Sealed {
        /// The overlay's file.
        path: PathBuf,
    },
    /// Its image has all the layers it may have, which takes many seals on a full disk.
    #[error(
        "add a layer to the image of disk overlay {}: it has {LAYERS_MAX}, and merging them failed; \
         free some space and try again",
        path.display()
    )]
    TooManyLayers {
        /// The overlay's file.
        path: PathBuf,
    },
}

impl SealError {
    /// True if the host's disk is full.
    pub fn is_storage_full(&self) -> bool {
        match self {
            SealError::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            SealError::TooManyLayers { .. } => true,
            SealError::Sealed { .. } => false,
        }
    }
}

impl Overlay {
    /// The disk's content at this moment as an image; the disk goes on over it, with a new and empty
    /// file at the same path.
    ///
    /// Every write, zero and trim that was answered before the call is in the image, none that
    /// starts after it returned is, and one that is under way is in it whole or not at all.
    /// The disk stands still for O(map), no data is copied; after that, if the image has grown
    /// past 32 layers, the small ones are merged. Nothing is synced: see [`LayeredImage::sync`].
    ///
    /// # Errors
    /// [`SealError`]; the disk goes on as if nothing had been asked.
    pub fn checkpoint(&self, store: &LayerStore) -> Result<Arc<LayeredImage>, SealError> {
        // Made among the layers, where a sweep finds it if this process dies before it is moved.
        let next =
            store.draft(self.size_bytes).map_err(|e| self.failed("make a new file for", e))?;
        let image = self.replace(store, Some(next))?;
        let compacted = compact(image.clone(), store);
        if !Arc::ptr_eq(&image, &compacted) {
            let mut generation = self.generation.write().unwrap_or_else(PoisonError::into_inner);
            // Another checkpoint may have come between: its image is over this one.
            if Arc::ptr_eq(&generation.base, &image) {
                generation.base = compacted.clone();
            }
        }
        Ok(compacted)
    }

    /// As [`Overlay::checkpoint`], for the last time: the disk is only read from now on, and its file is
    /// gone. For a machine that will not go on.
    ///
    /// # Errors
    /// [`SealError`]; the disk is still writable.
    pub fn seal(&self, store: &LayerStore) -> Result<Arc<LayeredImage>, SealError> {
        Ok(compact(self.replace(store, None)?, store))
    }

    /// Moves the top into the store and puts `next` in its place.
    fn replace(
        &self,
        store: &LayerStore,
        next: Option<Draft>,
    ) -> Result<Arc<LayeredImage>, SealError> {
        // Waits for every call under way, and holds back those that come.
        let mut generation = self.generation.write().unwrap_or_else(PoisonError::into_inner);
        let Some(top) = &generation.top else {
            return Err(SealError::Sealed { path: self.path.clone() });
        };
        if generation.base.layer_count() >= LAYERS_MAX {
            return Err(SealError::TooManyLayers { path: self.path.clone() });
        }
        let (layer, file_after) = if top.map.count(BlockState::Written) > 0 {
            let (layer, file) = self.exchange(store, top, next)?;
            (Some(layer), file)
        } else if next.is_some() {
            // Nothing in the file is part of the image: the disk goes on with it.
            (None, Some(top.file.clone()))
        } else {
            remove(&self.path).map_err(|e| self.failed("remove the file of", e))?;
            (None, None)
        };
        let image = Arc::new(generation.base.under(&top.map, layer));
        let map = || BlockMap::new(self.size_bytes / BLOCK_BYTES);
        let top = file_after.map(|file| Top { file, map: map() });
        *generation = Generation { base: image.clone(), top };
        Ok(image)
    }

    /// Moves the top's file into the store, and that of `next` to where it was. Both or none.
    fn exchange(
        &self,
        store: &LayerStore,
        top: &Top,
        next: Option<Draft>,
    ) -> Result<(Arc<Layer>, Option<Arc<File>>), SealError> {
        let layer = store
            .adopt(top.file.clone(), &self.path, self.size_bytes)
            .map_err(|e| self.failed("move into the layers", e))?;
        match next.map(|next| next.move_to(&self.path)).transpose() {
            Ok(file) => Ok((layer, file)),
            Err(e) => {
                self.take_back(&layer);
                Err(self.failed("put a new file in the place of", e))
            }
        }
    }

    /// Undoes the move of a top into the store. The writers' file is the same wherever it lies: if it
    /// cannot go back, the disk works on, and the next sweep frees the space once the disk is gone.
    fn take_back(&self, layer: &Layer) {
        if let Err(e) = std::fs::rename(layer.path(), &self.path) {
            tracing::warn!(overlay = %self.path.display(), error = %e, "overlay not moved back");
        }
    }

    fn failed(&self, step: &'static str, source: io::Error) -> SealError {
        SealError::Io { step, path: self.path.clone(), source }
    }
}
