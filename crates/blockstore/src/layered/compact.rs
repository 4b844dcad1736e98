//! Fewer layers: the small ones of an image merged into one.
//!
//! Each snapshot of a snapshot adds a layer, and each layer costs an open file and a name in the map.
//! Merging copies data, so it happens to small layers only and rarely: half of the allowed number
//! at once, so that a chain of snapshots copies each block a few times, not at every step.

use std::io;
use std::sync::Arc;

use super::runs::Source;
use super::{LAYERS_KEPT, LayeredImage};
use crate::clone::{Extent, copy_extent};
use crate::device::BLOCK_BYTES;
use crate::layers::LayerStore;

/// Layers that become one.
const MERGED: usize = LAYERS_KEPT / 2;

impl LayeredImage {
    /// The same content in at most [`LAYERS_KEPT`] layers, if enough of them are the store's own.
    /// `None` if there are not more than that. Copies data: O(bytes of the smallest layers).
    ///
    /// The lowest layer stays: it is the big one that others share, and what memory is mapped from.
    ///
    /// # Errors
    /// I/O errors; the image is as it was, and nothing new is left.
    pub(crate) fn compacted(&self, store: &LayerStore) -> io::Result<Option<LayeredImage>> {
        if self.layers.len() <= LAYERS_KEPT {
            return Ok(None);
        }
        let used = self.map.used_blocks(self.layers.len());
        let mut candidates: Vec<usize> =
            (1..self.layers.len()).filter(|layer| self.layers[*layer].is_sealed()).collect();
        candidates.sort_by_key(|layer| used[*layer]);
        let over = self.layers.len() - LAYERS_KEPT;
        candidates.truncate(MERGED.max(over + 1));
        if candidates.len() < 2 {
            return Ok(None);
        }
        let mut merged = vec![false; self.layers.len()];
        for layer in candidates {
            merged[layer] = true;
        }
        let draft = store.draft(self.size_bytes())?;
        for (blocks, source) in self.map.all() {
            let Some(layer) = source.layer().filter(|layer| merged[*layer]) else { continue };
            let extent =
                Extent { start: blocks.start * BLOCK_BYTES, end: blocks.end * BLOCK_BYTES };
            copy_extent(self.layers[layer].file(), draft.file(), extent)?;
        }
        let mut layers = self.layers.clone();
        let place = u16::try_from(layers.len()).expect("an image has at most LAYERS_MAX layers");
        layers.push(draft.finish());
        let map = self.map.map(|source| match source.layer() {
            Some(layer) if merged[layer] => Source::Layer(place),
            _ => source,
        });
        Ok(Some(LayeredImage::pruned(&map, &layers)))
    }
}

/// `image`, compacted if it has too many layers. One that cannot be compacted now, because the disk is
/// full, is as good as before: the next seal tries again.
pub(crate) fn compact(image: Arc<LayeredImage>, store: &LayerStore) -> Arc<LayeredImage> {
    match image.compacted(store) {
        Ok(Some(compacted)) => Arc::new(compacted),
        Ok(None) => image,
        Err(e) => {
            tracing::warn!(layers = image.layers.len(), error = %e, "image layers not merged");
            image
        }
    }
}
