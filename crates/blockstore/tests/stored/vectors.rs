//! Bytes of format version 1 that were written once and must be read for ever, and written the same.

use std::path::PathBuf;
use std::sync::Arc;

use belljar_blockstore::objects::{ImageId, ObjectId, PackOptions, Packer, read_manifest};
use belljar_blockstore::verify::verify;
use belljar_blockstore::{BlobStore, ChunkCache, DirStore, ImageReader};
use bytes::Bytes;

use crate::rig::{BLOCK, block, index, write};

/// Two blocks a frame. Odd blocks do not compress, so this frame is raw, the next one zstd's, the last raw.
const OBJECT_SEEDS: [u32; 5] = [1, 3, 2, 4, 5];
const OBJECT: &str = "c86467dd199974e9183ecde1f19a346fdcea6cf458641f805e5216bd8b4958ca";
/// Raw frames only: whatever zstd's version, every writer makes these bytes.
const RAW_OBJECT_SEEDS: [u32; 3] = [7, 9, 11];
const RAW_OBJECT: &str = "4b612414db8382efe2fcfd06652bdbadfbaceb42c7e091cbda0691c7441b7563";
const IMAGE: &str = "40b2e2a545fec9f81a075ec163e3c0eef04937ad3413afaf7c8786763a371453";
/// An image of ten blocks of zeros: what the other one was made from.
const PARENT: &str = "4dcd949f0a9753e8c384bc1c952a0a3c66dd253574e8d1286bc593330a5f16f2";
/// Content of the image, block by block.
const IMAGE_SEEDS: [u32; 10] = [0, 1, 3, 2, 0, 9, 11, 5, 5, 0];

fn vector(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    std::fs::read(&path).expect("a committed file")
}

fn pack(seeds: &[u32]) -> Vec<u8> {
    let options = PackOptions { frame_blocks: 2, object_blocks: 100, level: 3 };
    let mut packer = Packer::new(options).expect("a packer");
    for seed in seeds {
        let block = block(*seed);
        packer.add(&block, blake3::hash(&block).as_bytes());
    }
    packer.finish().expect("blocks were added").bytes.to_vec()
}

/// A store that was put together from the files by hand.
fn store(folder: &tempfile::TempDir) -> Arc<dyn BlobStore> {
    let store = DirStore::open(folder.path()).expect("a store");
    for (object, file) in [(OBJECT, "object-v1.bin"), (RAW_OBJECT, "object-raw-v1.bin")] {
        let key = ObjectId::parse(object).expect("an id").key();
        assert_eq!(key.as_str(), format!("objects/{}/{object}", &object[..2]));
        store.put(&key, Bytes::from(vector(file))).expect("put");
    }
    let key = ImageId::parse(IMAGE).expect("an id").key();
    assert_eq!(key.as_str(), format!("manifests/{IMAGE}"));
    store.put(&key, Bytes::from(vector("image-v1.bin"))).expect("put");
    let name = belljar_blockstore::blobs::BlobKey::new("refs/templates/vector").expect("a key");
    store.put(&name, Bytes::from(vector("ref-v1.txt"))).expect("put");
    Arc::new(store)
}

#[test]
fn version_1_is_read() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = store(&folder);
    let report = verify(&*store, |_, _| {}).expect("verified");
    assert_eq!(report.damage, []);
    assert_eq!((report.refs, report.images, report.objects, report.blocks), (1, 1, 2, 8));
    let name = belljar_blockstore::RefName::new("templates/vector").expect("a name");
    let id = belljar_blockstore::objects::resolve(&*store, &name).expect("resolved");
    assert_eq!(id.to_string(), IMAGE);
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&store), 1 << 20));
    let reader = ImageReader::open(cache, id).expect("open");
    let mut bytes = vec![0xaa; IMAGE_SEEDS.len() * BLOCK];
    reader.read_at(&mut bytes, 0).expect("read");
    for (number, (read, seed)) in bytes.chunks_exact(BLOCK).zip(IMAGE_SEEDS).enumerate() {
        assert!(read == block(seed), "block {number}");
    }
    assert_eq!(reader.manifest().parent(), Some(ImageId::parse(PARENT).expect("an id")));
}

#[test]
fn version_1_is_written_byte_for_byte() {
    assert!(pack(&RAW_OBJECT_SEEDS) == vector("object-raw-v1.bin"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = ImageId::parse(IMAGE).expect("an id");
    let store = store(&folder);
    let manifest = read_manifest(&*store, image).expect("read");
    assert!(manifest.to_bytes() == vector("image-v1.bin"));
    // A writer that shares with both objects comes to the same map.
    let index = index(&store);
    index.learn_all().expect("learned");
    let parent = write(&index, "parent", None, &[0; 10]).expect("written").manifest;
    assert_eq!(parent.id().to_string(), PARENT);
    let written = write(&index, "again", Some(&parent), &IMAGE_SEEDS).expect("written");
    assert_eq!((written.manifest.id(), written.stats.new_blocks), (image, 0));
    // The names can be checked with `b3sum`: what each is the hash of is in docs/formats.md.
    let bytes = vector("image-v1.bin");
    assert_eq!(blake3::hash(&bytes[..bytes.len() - 32]).to_string(), IMAGE);
    for (file, id, frames) in [("object-v1.bin", OBJECT, 3), ("object-raw-v1.bin", RAW_OBJECT, 2)] {
        let bytes = vector(file);
        assert_eq!(blake3::hash(&bytes[bytes.len() - frames * 40 - 72..]).to_string(), id);
    }
}

#[test]
fn frames_of_zstd_are_written_so_that_version_1_reads_them() {
    // zstd may choose other bytes in another version; what surrounds them may not change.
    let (ours, vector) = (pack(&OBJECT_SEEDS), vector("object-v1.bin"));
    assert_eq!(ours[..8 + 2 * BLOCK], vector[..8 + 2 * BLOCK], "magic and the raw frame");
    let tail = |bytes: &[u8]| bytes[bytes.len() - 72..].to_vec();
    assert_eq!(tail(&ours), tail(&vector));
}
