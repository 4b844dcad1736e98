//! Images as the memory that a page server gives to a machine: in layers on this node, or in a blob store.

use std::io;
use std::sync::Arc;

use belljar_blockstore::{BLOCK_BYTES, ImageReader, LayeredImage};
use belljar_runtime::uffd::{MemoryRun, MemorySource};

/// The memory of a snapshot, read block by block from the layers it lies in. Blocks that are zeros are in
/// none, and are never read.
#[derive(Debug, Clone)]
pub struct ImageMemory(Arc<LayeredImage>);

impl ImageMemory {
    /// `image` is a memory.
    pub fn new(image: Arc<LayeredImage>) -> ImageMemory {
        ImageMemory(image)
    }
}

impl MemorySource for ImageMemory {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn run_at(&self, offset: u64, limit: u64) -> MemoryRun {
        match self.0.zeros_at(offset, limit) {
            (true, bytes) => MemoryRun::Zeros(bytes),
            (false, bytes) => MemoryRun::Data(bytes),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }
}

/// A memory that is kept in a blob store, fetched by parts through the node's cache. Every byte is
/// verified before it is given: what is damaged or cannot be fetched is an error with its name.
#[derive(Clone)]
pub struct StoredMemory(Arc<ImageReader>);

impl StoredMemory {
    /// The image of `reader` is a memory.
    pub fn new(reader: Arc<ImageReader>) -> StoredMemory {
        StoredMemory(reader)
    }
}

impl MemorySource for StoredMemory {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn run_at(&self, offset: u64, limit: u64) -> MemoryRun {
        let first = offset / BLOCK_BYTES;
        let end = (offset + limit) / BLOCK_BYTES;
        // Blocks of no run are zeros.
        match self.0.manifest().runs_within(first..end).next().map(|run| run.blocks()) {
            None => MemoryRun::Zeros(limit),
            Some(run) if run.start > first => MemoryRun::Zeros((run.start - first) * BLOCK_BYTES),
            Some(run) => MemoryRun::Data((run.end.min(end) - first) * BLOCK_BYTES),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use belljar_blockstore::objects::PackOptions;
    use belljar_blockstore::{
        BlobStore, BlockDevice as _, BlockIndex, ChunkCache, DirStore, ImageWriter, LayerName,
        LayerStore, Overlay, RefName,
    };
    use belljar_runtime::contract::memory_source_suite;

    use super::*;

    #[test]
    fn an_image_of_several_layers_is_a_memory_source() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let template = folder.path().join("templates/base");
        std::fs::create_dir_all(&template).expect("make a template");
        let mut expected = vec![0; 64 * 4096];
        expected[10 * 4096..40 * 4096].fill(0x11);
        std::fs::write(template.join("memory"), &expected).expect("write its memory");
        let store = LayerStore::open(folder.path()).expect("open the layers");
        let name = LayerName::new("templates/base/memory").expect("a layer's name");
        let base = Arc::new(LayeredImage::raw(&store, &name).expect("open the memory"));
        let overlay = folder.path().join("overlay");
        let overlay = Overlay::create(base, &overlay).expect("lay an overlay over it");
        overlay.write_at(&[0x22; 3 * 4096], 20 * 4096).expect("write over it");
        overlay.write_at(&[0x33; 4096], 50 * 4096).expect("write beside it");
        overlay.zero(30 * 4096, 5 * 4096).expect("clear a part");
        expected[20 * 4096..23 * 4096].fill(0x22);
        expected[50 * 4096..51 * 4096].fill(0x33);
        expected[30 * 4096..35 * 4096].fill(0);
        let image = overlay.checkpoint(&store).expect("make an image of it");
        let memory = ImageMemory::new(image);
        memory_source_suite(&memory, &expected);
        assert_eq!(memory.run_at(30 * 4096, 20 * 4096), MemoryRun::Zeros(5 * 4096));
    }
    #[test]
    fn an_image_of_a_blob_store_is_a_memory_source() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store: Arc<dyn BlobStore> =
            Arc::new(DirStore::open(folder.path()).expect("open a store"));
        let cache = Arc::new(ChunkCache::in_memory(store, 1 << 20));
        let index = Arc::new(BlockIndex::new(Arc::clone(&cache)));
        let mut expected = vec![0; 64 * 4096];
        let options = PackOptions { frame_blocks: 4, object_blocks: 10, level: 1 };
        let size = 64 * BLOCK_BYTES;
        let mut writer = ImageWriter::new(index, None, size, options).expect("write an image");
        // Runs at both ends, one longer than an object, and one of equal blocks.
        for block in (0_u8..3).chain(7..30).chain(40..41).chain(60..64) {
            let content = [if block < 25 { block + 1 } else { 0x77 }; 4096];
            let at = usize::from(block) * 4096;
            expected[at..at + 4096].copy_from_slice(&content);
            writer.block(block.into(), &content).expect("write a block");
        }
        let name = RefName::new("memory").expect("a name");
        let written = writer.finish(&name).expect("finish the image");
        let reader = ImageReader::open(cache, written.manifest.id()).expect("open the image");
        let memory = StoredMemory::new(Arc::new(reader));
        memory_source_suite(&memory, &expected);
        assert_eq!(memory.run_at(3 * 4096, 64 * 1024), MemoryRun::Zeros(4 * 4096));
    }
}
