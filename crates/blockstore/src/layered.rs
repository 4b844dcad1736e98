//! Images: what a disk or a memory holds at one moment, as a flat map of blocks to layers.
//!
//! - `runs`: the map.
//! - `file`: the map on disk, format 1.
//! - `compact`: fewer layers.
//! - `fetch`: an image of a blob store as a local one.
//! - `materialise`: one raw file with the same content.
//! - `pages`: the parts that do not come from the lowest layer, for installing memory.

mod compact;
mod fetch;
mod file;
mod materialise;
mod pages;
mod runs;

use std::io;
use std::sync::Arc;

use crate::block_map::BlockMap;
use crate::device::{BLOCK_BYTES, check_range, index, len_u64};
use crate::image::OpenError;
use crate::layers::{Layer, LayerName, LayerStore};
pub(crate) use compact::compact;
use runs::{BLOCKS_MAX, RunMap, Source};

pub use fetch::FetchImageError;
pub use file::{LoadError, MapProblem, SaveError};
pub use materialise::MaterialiseError;
pub use pages::{PageContent, PageRun};

/// Layers an image may have, at most. More than [`LAYERS_KEPT`] is rare: it means that merging failed.
pub(crate) const LAYERS_MAX: usize = 256;
/// Layers an image has after it was compacted, at most. Each costs an open file.
pub(crate) const LAYERS_KEPT: usize = 32;

/// An image that never changes: each block is zeros, or lies in one of its layers at its own offset.
///
/// A child refers to the data of all its ancestors directly, so a read costs one search in memory
/// and one read of a file, however many snapshots lie behind it. Blocks that are zeros are in no
/// file and are never read from one: that would fill the host's page cache with zeros.
///
/// Its layers stay on disk for as long as it lives.
#[derive(Debug)]
pub struct LayeredImage {
    map: RunMap,
    layers: Vec<Arc<Layer>>,
    names: Vec<LayerName>,
}

impl LayeredImage {
    /// The image that one raw file is, such as a template's disk. Its holes are zeros; they are found
    /// here, once. The file must not change while it is in use.
    ///
    /// # Errors
    /// [`OpenError`] naming the file.
    pub fn raw(store: &LayerStore, name: &LayerName) -> Result<LayeredImage, OpenError> {
        let layer = store.layer(name)?;
        let path = layer.path().to_owned();
        LayeredImage::of_layer(layer).map_err(|source| OpenError::Io { path, source })
    }

    fn of_layer(layer: Arc<Layer>) -> io::Result<LayeredImage> {
        let blocks = layer.size_bytes() / BLOCK_BYTES;
        if blocks > BLOCKS_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut map = RunMap::new();
        for extent in layer.data()? {
            // Where the file system's blocks are smaller than ours, a part of a hole counts as data.
            let first = (extent.start / BLOCK_BYTES).max(map.blocks());
            map.push(first - map.blocks(), Source::Zero);
            let end = extent.end.div_ceil(BLOCK_BYTES);
            map.push(end.saturating_sub(first), Source::Layer(0));
        }
        map.push(blocks - map.blocks(), Source::Zero);
        Ok(LayeredImage::of(map, vec![layer]))
    }

    /// An image of zeros. `size_bytes` is rounded up to whole blocks.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for no bytes and for more than 16 TiB.
    pub fn zero(size_bytes: u64) -> io::Result<LayeredImage> {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        if blocks == 0 || blocks > BLOCKS_MAX {
            let text = format!("an image of {size_bytes} bytes: it has 1 byte to 16 TiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut map = RunMap::new();
        map.push(blocks, Source::Zero);
        Ok(LayeredImage::of(map, Vec::new()))
    }

    /// Every layer that `map` names is in `layers`, and is as long as the image.
    fn of(map: RunMap, layers: Vec<Arc<Layer>>) -> LayeredImage {
        let names = layers.iter().map(|layer| layer.name().clone()).collect();
        LayeredImage { map, layers, names }
    }

    /// This image with `changes` over it; what they have written is in `top`. Layers of which
    /// nothing is visible any more are let go. The caller has checked that there is room for a layer.
    pub(crate) fn under(&self, changes: &BlockMap, top: Option<Arc<Layer>>) -> LayeredImage {
        let place =
            u16::try_from(self.layers.len()).expect("an image has at most LAYERS_MAX layers");
        let layers: Vec<_> = self.layers.iter().cloned().chain(top).collect();
        LayeredImage::pruned(&self.map.under(changes, place), &layers)
    }

    /// The image without layers that its map does not use.
    fn pruned(map: &RunMap, layers: &[Arc<Layer>]) -> LayeredImage {
        let used = map.used_blocks(layers.len());
        let mut places = Vec::with_capacity(layers.len());
        let mut kept = Vec::new();
        for (layer, used) in layers.iter().zip(used) {
            places.push(u16::try_from(kept.len()).expect("an image has at most LAYERS_MAX layers"));
            if used > 0 {
                kept.push(layer.clone());
            }
        }
        let map = map.map(|source| match source.layer() {
            Some(layer) => Source::Layer(places[layer]),
            None => Source::Zero,
        });
        LayeredImage::of(map, kept)
    }

    /// Size in bytes; a multiple of [`BLOCK_BYTES`].
    pub fn size_bytes(&self) -> u64 {
        self.map.blocks() * BLOCK_BYTES
    }

    /// Bytes that are stored in some layer; the rest is zeros.
    pub fn data_bytes(&self) -> u64 {
        self.map.used_blocks(self.layers.len()).iter().sum::<u64>() * BLOCK_BYTES
    }

    /// The layers that its blocks lie in: what a record of this image must keep from the sweep.
    pub fn layers(&self) -> &[LayerName] {
        &self.names
    }

    /// The template's file that this image is made over, if its lowest layer is one.
    pub fn lowest_template(&self) -> Option<LayerName> {
        self.names.first().filter(|name| !name.is_sealed()).cloned()
    }

    /// Its lowest layer alone, as the image that one raw file is. An image of zeros is its own.
    ///
    /// # Errors
    /// I/O errors of looking for the layer's holes.
    pub fn lowest_alone(&self) -> io::Result<LayeredImage> {
        match self.layers.first() {
            Some(layer) => LayeredImage::of_layer(layer.clone()),
            None => LayeredImage::zero(self.size_bytes()),
        }
    }

    pub(crate) fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// I/O errors, which name the layer, and [`io::ErrorKind::InvalidInput`] outside the image.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.size_bytes(), offset, len_u64(buf))?;
        let end = offset + len_u64(buf);
        if offset == end {
            return Ok(());
        }
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        for (run, source) in self.map.within(blocks) {
            let start = (run.start * BLOCK_BYTES).max(offset);
            let stop = (run.end * BLOCK_BYTES).min(end);
            let part = &mut buf[index(start - offset)..index(stop - offset)];
            match source.layer() {
                None => part.fill(0),
                Some(layer) => self.layers[layer].read_at(part, start)?,
            }
        }
        Ok(())
    }

    /// Puts the content of its layers on stable storage: an image is kept through a power cut once
    /// this returned and its saved map was synced. What was synced before costs nothing.
    ///
    /// # Errors
    /// I/O errors of the files; `StorageFull` is kept as such.
    pub fn sync(&self) -> io::Result<()> {
        self.layers.iter().try_for_each(|layer| layer.sync())
    }
}
