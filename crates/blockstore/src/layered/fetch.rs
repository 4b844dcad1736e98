//! An image of a blob store as a local one: what a template here does not have is fetched into one layer.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use super::LayeredImage;
use super::runs::{BLOCKS_MAX, RunMap, Source};
use crate::device::{BLOCK_BYTES, index};
use crate::layers::{Layer, LayerStore};
use crate::objects::{ImageReader, ReadError, hash_of};

/// Blocks of a template compared at once: 1 MiB.
const READ_BLOCKS: u64 = 256;
const TEMPLATE: Source = Source::Layer(0);
const FETCHED: Source = Source::Layer(1);

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
    /// Makes a stored image a local one. Blocks that `template`, an image of one file here, has at the same
    /// place are left to it, which is told by their BLAKE3; the others are fetched into a new layer of
    /// `layers`. Nothing is synced: see [`LayeredImage::sync`].
    ///
    /// Zeros are in no layer and cost neither traffic nor space. Memory is bounded by the reader's.
    ///
    /// # Errors
    /// [`FetchImageError`].
    pub fn fetch(
        reader: &ImageReader,
        layers: &LayerStore,
        template: Option<&LayeredImage>,
    ) -> Result<LayeredImage, FetchImageError> {
        let manifest = reader.manifest();
        let failed = |source| FetchImageError::Layer { image: manifest.id().to_string(), source };
        if manifest.blocks() > BLOCKS_MAX {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        let fits = |template: &&LayeredImage| {
            template.layers.len() == 1 && template.size_bytes() == reader.size_bytes()
        };
        let template = template.filter(fits).and_then(|template| template.layers.first());
        let map = plan(reader, template)?;
        let wanted = map.all().filter(|(_, source)| *source == FETCHED);
        let mut draft = None;
        for (blocks, _) in wanted {
            if draft.is_none() {
                draft = Some(layers.draft(reader.size_bytes()).map_err(failed)?);
            }
            let to = draft.as_ref().expect("it was made above").file();
            reader.copy(blocks, to)?;
        }
        let Some(draft) = draft else {
            return Ok(LayeredImage::pruned(&map, template.map_or(&[], std::slice::from_ref)));
        };
        // Machines have users of their own, and map what they are handed. Nobody else can pass the
        // folder of layers.
        draft.file().set_permissions(Permissions::from_mode(0o444)).map_err(failed)?;
        let layer = draft.finish();
        // Without a template its place is the layer's own: it is in no run, and goes.
        let below = template.cloned().unwrap_or_else(|| layer.clone());
        Ok(LayeredImage::pruned(&map, &[below, layer]))
    }
}

/// Where each block of the image will be.
fn plan(reader: &ImageReader, template: Option<&Arc<Layer>>) -> Result<RunMap, FetchImageError> {
    let manifest = reader.manifest();
    let failed = |source| FetchImageError::Layer { image: manifest.id().to_string(), source };
    let mut map = RunMap::new();
    for run in manifest.runs() {
        let blocks = run.blocks();
        map.push(blocks.start - map.blocks(), Source::Zero);
        let Some(template) = template else {
            map.push(blocks.end - blocks.start, FETCHED);
            continue;
        };
        let hashes = reader.hashes(run)?;
        let mut hashes = hashes.chunks_exact(32);
        let mut here = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            let count = READ_BLOCKS.min(blocks.end - at);
            here.resize(index(count * BLOCK_BYTES), 0);
            template.read_at(&mut here, at * BLOCK_BYTES).map_err(failed)?;
            for block in here.chunks_exact(index(BLOCK_BYTES)) {
                let is_same = hashes.next() == Some(&hash_of(block)[..]);
                map.push(1, if is_same { TEMPLATE } else { FETCHED });
            }
            at += count;
        }
    }
    map.push(manifest.blocks() - map.blocks(), Source::Zero);
    Ok(map)
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
