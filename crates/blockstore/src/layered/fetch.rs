//! An image of a blob store as a local one: all of it in one layer of its own.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;

use super::LayeredImage;
use super::runs::{BLOCKS_MAX, RunMap, Source};
use crate::layers::LayerStore;
use crate::objects::{ImageReader, ReadError};

/// Why an image was not fetched. No file is left.
#[derive(Debug, thiserror::Error)]
pub enum FetchImageError {
    /// It could not be read whole; nothing unchecked was used.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its layer could not be written.
    #[error("write the layer of image {image}")]
    Layer {
        /// The image's id.
        image: String,
        /// Why; `StorageFull` is kept as such.
        #[source]
        source: io::Error,
    },
}

impl LayeredImage {
    /// Fetches a whole image into a new layer of `layers`. Nothing is synced: see [`LayeredImage::sync`].
    ///
    /// Zeros are holes of the layer and cost neither traffic nor space. Memory is bounded by the reader's.
    ///
    /// # Errors
    /// [`FetchImageError`].
    pub fn fetch(
        reader: &ImageReader,
        layers: &LayerStore,
    ) -> Result<LayeredImage, FetchImageError> {
        let manifest = reader.manifest();
        let failed = |source| FetchImageError::Layer { image: manifest.id().to_string(), source };
        if manifest.blocks() > BLOCKS_MAX {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        let mut map = RunMap::new();
        for run in manifest.runs() {
            let blocks = run.blocks();
            map.push(blocks.start - map.blocks(), Source::Zero);
            map.push(blocks.end - blocks.start, Source::Layer(0));
        }
        map.push(manifest.blocks() - map.blocks(), Source::Zero);
        if manifest.runs().is_empty() {
            return Ok(LayeredImage::of(map, Vec::new()));
        }
        let draft = layers.draft(reader.size_bytes()).map_err(failed)?;
        reader.materialise(draft.file())?;
        // Machines have users of their own, and map what they are handed. Nobody else can pass the
        // folder of layers.
        draft.file().set_permissions(Permissions::from_mode(0o444)).map_err(failed)?;
        Ok(LayeredImage::of(map, vec![draft.finish()]))
    }
}

impl FetchImageError {
    /// Whether this host's disk has no room for it.
    pub fn is_disk_full(&self) -> bool {
        let source = match self {
            FetchImageError::Layer { source, .. } => source,
            FetchImageError::Read(ReadError::File { source, .. }) => &**source,
            FetchImageError::Read(_) => return false,
        };
        source.kind() == io::ErrorKind::StorageFull
    }
}
