//! Images in layers that go into a store and come back as local ones.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use belljar_blockstore::objects::WriteError;
use belljar_blockstore::{
    BLOCK_BYTES, ChunkCache, FetchImageError, ImageManifest, ImageReader, ImageWriter, LayerName,
    LayerStore, LayeredImage, MemoryLayerWriter,
};

use crate::rig::{BLOCK, Rig, SMALL, block, content, name};

const BLOCKS: u64 = 64;

/// A data folder with a template of 64 blocks, half of them a hole, and a layer over it.
fn local() -> (tempfile::TempDir, LayerStore, Arc<LayeredImage>, Arc<LayeredImage>, Vec<u8>) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir_all(dir.path().join("templates/b")).expect("mkdir");
    let seeds: Vec<u32> = (1..33).chain(std::iter::repeat_n(0, 32)).collect();
    let file = std::fs::File::create(dir.path().join("templates/b/memory")).expect("create");
    std::os::unix::fs::FileExt::write_all_at(&file, &content(&seeds[..32]), 0).expect("write");
    file.set_len(BLOCKS * BLOCK_BYTES).expect("grow");
    let layers = LayerStore::open(dir.path()).expect("open");
    let base = LayerName::new("templates/b/memory").expect("a name");
    let base = Arc::new(LayeredImage::raw(&layers, &base).expect("open"));
    let mut writer = MemoryLayerWriter::new(base.clone(), &layers).expect("new");
    let mut expected = seeds;
    for (number, seed) in [(3, 0), (5, 100), (40, 101), (41, 5), (63, 102)] {
        writer.write(number * BLOCK_BYTES, &block(seed)).expect("write");
        expected[usize::try_from(number).expect("small")] = seed;
    }
    (dir, layers, base, writer.finish(), content(&expected))
}

fn store(
    rig: &Rig,
    called: &str,
    base: Option<&ImageManifest>,
    image: &LayeredImage,
) -> belljar_blockstore::objects::Written {
    let over = base.is_some();
    let base = base.cloned().map(Arc::new);
    let mut writer = ImageWriter::new(Arc::clone(&rig.index), base, image.size_bytes(), SMALL)
        .expect("a writer");
    writer.layers(image, over, || Ok(())).expect("written");
    writer.finish(&name(called)).expect("published")
}

fn fetch(rig: &Rig, manifest: &ImageManifest, to: &LayerStore) -> LayeredImage {
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&rig.store), 1 << 20));
    let reader = ImageReader::open(cache, manifest.id()).expect("open");
    LayeredImage::fetch(&reader, to, None).expect("fetched")
}

fn all_of(image: &LayeredImage) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.size_bytes()).expect("small")];
    image.read_at(&mut bytes, 0).expect("read");
    bytes
}

#[test]
fn what_differs_goes_up_and_everything_comes_back() {
    let (_dir, layers, base, image, expected) = local();
    let rig = Rig::new();
    let base = store(&rig, "base", None, &base);
    assert_eq!(base.stats.new_blocks, 32);
    let child = store(&rig, "child", Some(&base.manifest), &image);
    // Of five changes one is zeros and one is a block the base has elsewhere.
    assert_eq!((child.stats.new_blocks, child.stats.shared_blocks), (3, 1));
    // Without its base it is the same image, and shares all.
    let whole = store(&rig, "whole", None, &image);
    assert_eq!(whole.stats.new_blocks, 0);

    let elsewhere = tempfile::tempdir().expect("a temporary folder");
    let there = LayerStore::open(elsewhere.path()).expect("open");
    for manifest in [&child.manifest, &whole.manifest] {
        let fetched = fetch(&rig, manifest, &there);
        assert!(all_of(&fetched) == expected);
        assert_eq!(fetched.data_bytes(), manifest.mapped_blocks() * BLOCK_BYTES);
        let file = fetched.base_file().expect("one layer").to_owned();
        let stat = std::fs::metadata(&file).expect("its file");
        assert_eq!((stat.len(), stat.mode() & 0o777), (BLOCKS * BLOCK_BYTES, 0o444));
        // It is an image like any other: saved, loaded, and kept by its map alone.
        fetched.sync().expect("sync");
        fetched.save(&elsewhere.path().join("a.map")).expect("save");
        drop(fetched);
        let loaded = LayeredImage::load(&elsewhere.path().join("a.map"), &there).expect("load");
        assert!(all_of(&loaded) == expected);
        std::fs::remove_file(elsewhere.path().join("a.map")).expect("removed");
    }
    drop(layers);
}

#[test]
fn what_a_template_here_has_is_not_fetched() {
    let (_dir, _layers, base, image, expected) = local();
    let rig = Rig::new();
    let base = store(&rig, "base", None, &base).manifest;
    let child = store(&rig, "child", Some(&base), &image).manifest;
    let zeros = LayeredImage::zero(BLOCKS * BLOCK_BYTES).expect("zeros");
    // Another host with the same template; one with a template of its own that has a few of the same blocks.
    let (_same, there, template, _, _) = local();
    let reader = |id| {
        let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&rig.store), 1 << 20));
        ImageReader::open(cache, id).expect("open")
    };
    let fetched =
        LayeredImage::fetch(&reader(child.id()), &there, Some(&template)).expect("fetched");
    assert!(all_of(&fetched) == expected);
    assert_eq!(fetched.layers().len(), 2);
    let own: u64 = fetched.runs_beyond(true).expect("runs").iter().map(|run| run.len).sum();
    // Four blocks and one of zeros where the template has data.
    assert_eq!(own, 5 * BLOCK_BYTES);
    assert_eq!(fetched.lowest_template(), template.lowest_template());
    // All of it, and nothing of it.
    let whole = LayeredImage::fetch(&reader(base.id()), &there, Some(&template)).expect("fetched");
    assert_eq!((whole.layers(), all_of(&whole)), (template.layers(), all_of(&template)));
    let path = _same.path().join("templates/b/other");
    std::fs::write(&path, vec![9; 64 * BLOCK]).expect("write");
    let other = LayerName::new("templates/b/other").expect("a name");
    let other = LayeredImage::raw(&there, &other).expect("open");
    let fetched = LayeredImage::fetch(&reader(child.id()), &there, Some(&other)).expect("fetched");
    assert!(all_of(&fetched) == expected && fetched.lowest_template().is_none());
    // What is no single file of this size is no help, and no harm.
    for useless in [&zeros, &*image] {
        let fetched = LayeredImage::fetch(&reader(child.id()), &there, Some(useless));
        assert!(all_of(&fetched.expect("fetched")) == expected);
    }
}

#[test]
fn a_fetch_that_fails_leaves_no_layer_and_zeros_need_none() {
    let (_dir, _layers, base, _image, _) = local();
    let rig = Rig::new();
    let written = store(&rig, "image", None, &base);
    let object = written.manifest.objects()[1];
    std::fs::remove_file(rig.folder.path().join(object.id.key().as_str())).expect("removed");
    let elsewhere = tempfile::tempdir().expect("a temporary folder");
    let there = LayerStore::open(elsewhere.path()).expect("open");
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&rig.store), 1 << 20));
    let reader = ImageReader::open(cache, written.manifest.id()).expect("open");
    let e = LayeredImage::fetch(&reader, &there, None).expect_err("an object is missing");
    assert!(matches!(&e, FetchImageError::Read(_)) && !e.is_disk_full());
    assert!(e.to_string().contains(&format!("object {}", object.id)), "{e}");
    let left = std::fs::read_dir(elsewhere.path().join("layers")).expect("list").count();
    assert_eq!(left, 0);

    let zeros = LayeredImage::zero(BLOCKS * BLOCK_BYTES).expect("zeros");
    let written = store(&rig, "zeros", None, &zeros);
    let fetched = fetch(&rig, &written.manifest, &there);
    assert!(fetched.base_file().is_none() && all_of(&fetched) == vec![0; 64 * BLOCK]);
}

#[test]
fn a_writer_stops_when_it_is_told_to() {
    let (_dir, _layers, base, _image, _) = local();
    let rig = Rig::new();
    let mut writer =
        ImageWriter::new(Arc::clone(&rig.index), None, base.size_bytes(), SMALL).expect("a writer");
    let stop = || Err(io::Error::from(io::ErrorKind::Interrupted));
    let e = writer.layers(&base, false, stop).expect_err("stopped");
    assert!(
        matches!(e, WriteError::Source { source, .. } if source.kind() == io::ErrorKind::Interrupted)
    );
}
