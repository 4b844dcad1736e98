//! Images in layers: checkpoints, seals, maps and memory layers against plain arrays.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use belljar_blockstore::{
    BLOCK_BYTES, BlockDevice as _, LayerName, LayerStore, LayeredImage, MemoryLayerWriter,
    MemoryWriteError, Overlay, PageContent, SealError,
};
use proptest::prelude::*;

const BLOCKS: usize = 100;
const SIZE: usize = BLOCKS * 4096;
const BASE: &str = "templates/b/rootfs.ext4";

fn u(n: usize) -> u64 {
    u64::try_from(n).expect("small")
}

/// Data, a hole, and data again.
fn base_content() -> Vec<u8> {
    let mut content: Vec<u8> =
        (0..SIZE).map(|i| u8::try_from(i % 251).expect("below 251")).collect();
    content[30 * 4096..60 * 4096].fill(0);
    content
}

/// A data folder with one template.
fn data_folder() -> (tempfile::TempDir, LayerStore) {
    let dir = tempfile::tempdir().expect("temp folder");
    fs::create_dir_all(dir.path().join("templates/b")).expect("mkdir");
    let content = base_content();
    let file = fs::File::create(dir.path().join(BASE)).expect("create");
    file.set_len(u(SIZE)).expect("grow");
    file.write_all_at(&content[..30 * 4096], 0).expect("write");
    file.write_all_at(&content[60 * 4096..], 60 * 4096).expect("write");
    let store = LayerStore::open(dir.path()).expect("open");
    (dir, store)
}

fn base(store: &LayerStore) -> Arc<LayeredImage> {
    let name = LayerName::new(BASE).expect("a name");
    Arc::new(LayeredImage::raw(store, &name).expect("open"))
}

fn content(image: &LayeredImage) -> Vec<u8> {
    let mut whole = vec![0xee; usize::try_from(image.size_bytes()).expect("small")];
    image.read_at(&mut whole, 0).expect("read");
    whole
}

fn layer_files(dir: &Path) -> usize {
    fs::read_dir(dir.join("layers")).map_or(0, |entries| entries.count())
}

#[derive(Debug, Clone)]
enum Op {
    Write {
        block: usize,
        at: usize,
        len: usize,
        byte: u8,
    },
    Zero {
        block: usize,
        blocks: usize,
    },
    Trim {
        block: usize,
        blocks: usize,
    },
    Checkpoint,
    /// Seals, forgets everything, loads the map, goes on over it.
    Restart,
}

fn ops() -> impl Strategy<Value = Op> {
    let places = (0..BLOCKS, 0..9_usize);
    prop_oneof![
        8 => (0..BLOCKS, 0..4096_usize, 1..20_000_usize, 0..4_u8)
            .prop_map(|(block, at, len, byte)| Op::Write { block, at: at % 3 * 1000, len, byte }),
        2 => places.clone().prop_map(|(block, blocks)| Op::Zero { block, blocks }),
        2 => places.prop_map(|(block, blocks)| Op::Trim { block, blocks }),
        3 => Just(Op::Checkpoint),
        1 => Just(Op::Restart),
    ]
}

/// Writes, zeros or trims, in the disk and in its model.
fn change(disk: &Overlay, model: &mut [u8], op: &Op) {
    match *op {
        Op::Write { block, at, len, byte } => {
            let start = block * 4096 + at;
            let end = (start + len).min(SIZE);
            disk.write_at(&vec![byte; end - start], u(start)).expect("write");
            model[start..end].fill(byte);
        }
        Op::Zero { block, blocks } | Op::Trim { block, blocks } => {
            let (start, end) = (block * 4096, ((block + blocks) * 4096).min(SIZE));
            let result = match op {
                Op::Zero { .. } => disk.zero(u(start), u(end - start)),
                _ => disk.trim(u(start), u(end - start)),
            };
            result.expect("zero");
            model[start..end].fill(0);
        }
        Op::Checkpoint | Op::Restart => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn every_image_stays_what_the_disk_was(ops in proptest::collection::vec(ops(), 1..40)) {
        let (dir, store) = data_folder();
        let path = dir.path().join("overlay");
        let mut disk = Overlay::create(base(&store), &path).expect("create");
        let mut model = base_content();
        let mut images = vec![(base(&store), model.clone())];
        for (step, op) in ops.iter().enumerate() {
            change(&disk, &mut model, op);
            match op {
                Op::Checkpoint => {
                    let image = disk.checkpoint(&store).expect("checkpoint");
                    images.push((image, model.clone()));
                }
                Op::Restart => {
                    let image = disk.seal(&store).expect("seal");
                    let map = dir.path().join(format!("{step}.map"));
                    image.sync().expect("sync");
                    image.save(&map).expect("save");
                    prop_assert!(!path.exists(), "a sealed overlay has no file");
                    let again = LayerStore::open(dir.path()).expect("open");
                    let image = Arc::new(LayeredImage::load(&map, &again).expect("load"));
                    images.push((image.clone(), model.clone()));
                    disk = Overlay::create(image, &path).expect("create");
                }
                _ => {}
            }
            let mut now = vec![0; SIZE];
            disk.read_at(&mut now, 0).expect("read");
            prop_assert!(now == model, "the disk after step {}", step);
        }
        for (number, (image, then)) in images.iter().enumerate() {
            prop_assert!(content(image) == *then, "image {} changed", number);
            let raw = dir.path().join("raw");
            image.materialise(&raw).expect("materialise");
            prop_assert!(fs::read(&raw).expect("read") == *then, "image {} as a file", number);
            let blocks = fs::metadata(&raw).expect("stat").blocks() * 512;
            prop_assert!(blocks <= image.data_bytes() + 16 * 4096, "holes were filled");
            fs::remove_file(&raw).expect("remove");
        }
    }

    /// Laying what is beyond a base over that base gives the image, with either base.
    #[test]
    fn runs_beyond_a_base_complete_it(ops in proptest::collection::vec(ops(), 1..25)) {
        let (dir, store) = data_folder();
        let disk = Overlay::create(base(&store), &dir.path().join("overlay")).expect("create");
        let mut model = base_content();
        for op in &ops {
            change(&disk, &mut model, op);
            if matches!(op, Op::Checkpoint) {
                disk.checkpoint(&store).expect("checkpoint");
            }
        }
        let image = disk.seal(&store).expect("seal");
        for over_layer0 in [true, false] {
            let mut laid = vec![0; SIZE];
            if over_layer0 && let Some(base) = image.base_file() {
                laid = fs::read(base).expect("read");
            }
            image.read_beyond(over_layer0, &mut |offset, bytes| {
                let at = usize::try_from(offset).expect("small");
                laid[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }).expect("read");
            prop_assert!(laid == model);
        }
        let zeros: u64 = image.runs_beyond(false).expect("runs").iter()
            .filter(|run| matches!(run.content, PageContent::Zero)).map(|run| run.len).sum();
        prop_assert_eq!(zeros, 0, "zeros over zeros");
    }

    #[test]
    fn a_memory_layer_holds_only_what_differs(
        pages in proptest::collection::vec((0..BLOCKS, 0..4_u8, 1..12_usize), 0..40),
    ) {
        let (dir, store) = data_folder();
        let below = base_content();
        let mut model = below.clone();
        let mut writer = MemoryLayerWriter::new(base(&store), &store).expect("new");
        for (block, kind, count) in pages {
            let (start, end) = (block * 4096, ((block + count) * 4096).min(SIZE));
            let bytes = match kind {
                0 => vec![0; end - start],
                1 => below[start..end].to_vec(),
                2 => below[start..end].iter().map(|b| b ^ 0x55).collect(),
                _ => vec![kind; end - start],
            };
            writer.write(u(start), &bytes).expect("write");
            model[start..end].copy_from_slice(&bytes);
        }
        let image = writer.finish();
        prop_assert!(content(&image) == model);
        let own: u64 = image.runs_beyond(true).expect("runs").iter()
            .filter(|run| matches!(run.content, PageContent::Layer(_))).map(|run| run.len).sum();
        let differ = (0..BLOCKS).map(|b| b * 4096..(b + 1) * 4096)
            .filter(|r| model[r.clone()] != below[r.clone()] && model[r.clone()].iter().any(|b| *b != 0));
        // A page that was given twice, changed and then as below, is stored.
        prop_assert!(own >= u(differ.count()) * BLOCK_BYTES);
        prop_assert_eq!(layer_files(dir.path()), usize::from(own > 0));
    }
}

#[test]
fn untouched_memory_makes_no_layer() {
    let (dir, store) = data_folder();
    let mut writer = MemoryLayerWriter::new(base(&store), &store).expect("new");
    writer.write(0, &base_content()).expect("write");
    assert_eq!(writer.written_bytes(), 0);
    let image = writer.finish();
    assert_eq!(image.layers(), base(&store).layers());
    assert_eq!(layer_files(dir.path()), 0);

    let mut writer = MemoryLayerWriter::new(base(&store), &store).expect("new");
    writer.write(4096, &[1; 8192]).expect("write");
    assert_eq!((writer.written_bytes(), layer_files(dir.path())), (8192, 1));
    for (offset, len) in [(1, 4096), (0, 100), (u(SIZE), 4096), (u64::MAX - 4095, 4096)] {
        let e = writer.write(offset, &vec![0; len]).expect_err("no whole pages inside");
        assert!(matches!(e, MemoryWriteError::Range { .. }));
        assert_eq!(io::Error::from(e).kind(), io::ErrorKind::InvalidInput);
    }
    drop(writer);
    assert_eq!(layer_files(dir.path()), 0, "a dropped writer leaves its file");
}

#[test]
fn an_image_of_zeros_takes_no_space() {
    let dir = tempfile::tempdir().expect("temp folder");
    let store = LayerStore::open(dir.path()).expect("open");
    let zero = Arc::new(LayeredImage::zero(u(SIZE) - 1).expect("an image"));
    assert_eq!((zero.size_bytes(), zero.data_bytes()), (u(SIZE), 0));
    assert!(zero.base_file().is_none());
    assert!(LayeredImage::zero(0).is_err() && LayeredImage::zero(1 << 45).is_err());
    let mut writer = MemoryLayerWriter::new(zero, &store).expect("new");
    writer.write(8192, &[3; 4096]).expect("write");
    let image = writer.finish();
    image.save(&dir.path().join("memory.map")).expect("save");
    let image = LayeredImage::load(&dir.path().join("memory.map"), &store).expect("load");
    assert_eq!(image.data_bytes(), 4096);
    assert_eq!(content(&image).iter().map(|b| u64::from(*b)).sum::<u64>(), 3 * 4096);
}

#[test]
fn a_sealed_disk_is_read_only_and_sealed_once() {
    let (dir, store) = data_folder();
    let path = dir.path().join("overlay");
    let disk = Overlay::create(base(&store), &path).expect("create");
    disk.write_at(&[9; 4096], 4096).expect("write");
    let image = disk.seal(&store).expect("seal");
    assert!(!path.exists());
    let mut back = [0; 4096];
    disk.read_at(&mut back, 4096).expect("a sealed disk is read");
    assert_eq!(back, [9; 4096]);
    let e = disk.write_at(&[1], 0).expect_err("read-only");
    assert_eq!(e.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(matches!(disk.seal(&store), Err(SealError::Sealed { .. })));
    assert!(matches!(disk.checkpoint(&store), Err(SealError::Sealed { .. })));
    disk.remove().expect("its layer is not its file any more");
    assert_eq!(content(&image)[4096], 9);
    assert_eq!(layer_files(dir.path()), 1, "a refused checkpoint left a file");
}

#[test]
fn a_checkpoint_that_fails_changes_nothing() {
    let (dir, store) = data_folder();
    let path = dir.path().join("overlay");
    let disk = Overlay::create(base(&store), &path).expect("create");
    disk.write_at(&[9; 4096], 4096).expect("write");
    // A file where the folder of layers goes.
    fs::write(dir.path().join("layers"), "in the way").expect("write");
    assert!(matches!(disk.checkpoint(&store), Err(SealError::Io { .. })));
    assert!(matches!(disk.seal(&store), Err(SealError::Io { .. })));
    disk.write_at(&[8; 4096], 8192).expect("still writable");
    assert_eq!(disk.stats().written_blocks, 2);
    fs::remove_file(dir.path().join("layers")).expect("remove");
    let image = disk.seal(&store).expect("seal");
    assert_eq!((content(&image)[4096], content(&image)[8192]), (9, 8));
}

#[test]
fn nothing_written_makes_no_layer() {
    let (dir, store) = data_folder();
    let disk = Overlay::create(base(&store), &dir.path().join("overlay")).expect("create");
    disk.trim(0, 4096).expect("trim");
    let first = disk.checkpoint(&store).expect("checkpoint");
    assert_eq!((layer_files(dir.path()), disk.stats().zero_blocks), (0, 0));
    disk.write_at(&[1; 4096], 8192).expect("the same file goes on");
    let second = disk.seal(&store).expect("seal");
    assert_eq!((first.layers().len(), second.layers().len(), layer_files(dir.path())), (1, 2, 1));
    assert_eq!((content(&second)[0], content(&second)[8192]), (0, 1));
}

#[test]
fn a_long_chain_keeps_few_layers_and_all_content() {
    let (dir, store) = data_folder();
    let disk = Overlay::create(base(&store), &dir.path().join("overlay")).expect("create");
    let mut model = base_content();
    let mut kept = Vec::new();
    for round in 0..90_usize {
        let (at, byte) = (round * 7 % BLOCKS * 4096, u8::try_from(round + 1).expect("small"));
        disk.write_at(&[byte; 4096], u(at)).expect("write");
        model[at..at + 4096].fill(byte);
        let image = disk.checkpoint(&store).expect("checkpoint");
        assert!(image.layers().len() <= 32, "{} layers", image.layers().len());
        if round % 40 == 0 {
            kept.push((image, model.clone()));
        }
    }
    let last = disk.seal(&store).expect("seal");
    assert!(content(&last) == model);
    assert_eq!(last.layers()[0].as_str(), BASE, "the shared base is never merged");
    drop(disk);
    store.sweep(&HashSet::new()).expect("sweep");
    for (image, model) in &kept {
        assert!(content(image) == *model, "merging disturbed an older image");
    }
    let mut named: HashSet<LayerName> = last.layers().iter().cloned().collect();
    named.extend(kept.iter().flat_map(|(image, _)| image.layers().iter().cloned()));
    named.remove(&LayerName::new(BASE).expect("a name"));
    assert_eq!(layer_files(dir.path()), named.len(), "merged layers were not let go");
}

#[test]
fn a_child_lets_go_of_layers_it_has_overwritten() {
    let (dir, store) = data_folder();
    let disk = Overlay::create(base(&store), &dir.path().join("overlay")).expect("create");
    for byte in 1..5 {
        disk.write_at(&vec![byte; SIZE], 0).expect("write");
        assert_eq!(disk.checkpoint(&store).expect("checkpoint").layers().len(), 1);
    }
    let swept = store.sweep(&HashSet::new()).expect("sweep");
    assert_eq!((swept.removed, swept.kept), (3, 1));
    assert!(swept.freed_bytes >= 3 * u(SIZE));
}
