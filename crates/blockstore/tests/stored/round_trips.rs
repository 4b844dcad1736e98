//! What is written is read, whatever is shared.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use belljar_blockstore::objects::{PackOptions, WriteError};
use belljar_blockstore::verify::{store_stats, verify};
use belljar_blockstore::{ChunkCache, ImageReader, ImageWriter};
use proptest::prelude::*;

use crate::rig::{BLOCK, Rig, SMALL, block, content, index, name, write};

#[derive(Debug, Clone, Copy)]
enum Change {
    Keep,
    Zero,
    Write(u32),
}

fn seeds() -> impl Strategy<Value = Vec<u32>> {
    // Few seeds: most blocks repeat, within an image and between images.
    prop::collection::vec(prop_oneof![2 => Just(0), 5 => 1..12u32], 1..70)
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        5 => Just(Change::Keep),
        1 => Just(Change::Zero),
        3 => (0..20u32).prop_map(Change::Write),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_base_and_its_child_read_as_they_were_written(
        base in seeds(),
        changes in prop::collection::vec(change(), 1..90),
        offsets in prop::collection::vec((0..300_000usize, 0..20_000usize), 4),
    ) {
        let rig = Rig::new();
        let first = rig.write("base", &base).manifest;
        // The child may be longer or shorter than its base.
        let mut expected = base.clone();
        expected.resize(changes.len(), 0);
        for (number, change) in changes.iter().enumerate() {
            match change {
                Change::Keep => {}
                Change::Zero => expected[number] = 0,
                Change::Write(seed) => expected[number] = *seed,
            }
        }
        let bytes = content(&expected);
        let base_of_child = Some(Arc::new(first.clone()));
        let mut writer =
            ImageWriter::new(Arc::clone(&rig.index), base_of_child, bytes.len() as u64, SMALL)
                .expect("a writer");
        for (number, change) in (0..).zip(&changes) {
            match change {
                Change::Keep => {}
                Change::Zero => writer.zeros(number..number + 1).expect("zeros"),
                Change::Write(seed) => writer.block(number, &block(*seed)).expect("written"),
            }
        }
        let child = writer.finish(&name("child")).expect("published").manifest;

        prop_assert!(rig.read(&first).expect("read") == content(&base));
        prop_assert!(rig.read(&child).expect("read") == bytes);
        let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&rig.store), 1 << 20));
        let reader = ImageReader::open(cache, child.id()).expect("open");
        let file = tempfile::tempfile().expect("a file");
        let done = reader.materialise(&file).expect("materialised");
        prop_assert_eq!(done.data_bytes, child.mapped_blocks() * BLOCK as u64);
        let mut whole = vec![0xaa; bytes.len()];
        file.read_exact_at(&mut whole, 0).expect("read");
        prop_assert!(whole == bytes);
        prop_assert_eq!(file.metadata().expect("metadata").len(), bytes.len() as u64);
        for (offset, length) in offsets {
            let (start, end) = (offset.min(bytes.len()), (offset + length).min(bytes.len()));
            let mut part = vec![0xaa; end - start];
            reader.read_at(&mut part, start as u64).expect("read");
            prop_assert!(part == bytes[start..end]);
        }
        // No block that differs is left out, and those that lie in the same place are not in it.
        let differing = first.differing(&child);
        for number in 0..base.len().max(expected.len()) {
            let same = base.get(number).unwrap_or(&0) == expected.get(number).unwrap_or(&0);
            let said = differing.iter().any(|range| range.contains(&(number as u64)));
            prop_assert!(same || said, "block {}", number);
        }
        let report = verify(&*rig.store, |_, _| {}).expect("verified");
        prop_assert_eq!(report.damage, Vec::new());
    }
}

#[test]
fn equal_content_is_stored_once_across_images_and_processes() {
    let rig = Rig::new();
    let seeds: Vec<u32> = (0..60).collect();
    let first = rig.write("a", &seeds);
    assert_eq!((first.stats.new_blocks, first.stats.zero_blocks), (59, 1));
    let mut other = seeds.clone();
    other.rotate_left(17);
    other[3] = 1000;
    // A process that learns what the store has.
    let fresh = index(&rig.store);
    fresh.learn_all().expect("learned");
    assert_eq!(fresh.stats().blocks, 59);
    let second = write(&fresh, "b", None, &other).expect("written");
    assert_eq!((second.stats.new_blocks, second.stats.objects), (1, 1));
    assert_eq!(rig.read(&second.manifest).expect("read"), content(&other));
    let third = write(&fresh, "c", None, &seeds).expect("written");
    assert_eq!((third.stats.new_blocks, third.manifest.id()), (0, first.manifest.id()));
    let stats = store_stats(&*rig.store).expect("counted");
    assert_eq!((stats.refs, stats.images), (3, 2));
    assert_eq!(stats.unique_bytes, 60 * BLOCK as u64);
    assert!(stats.dedup_ratio() > 1.9 && stats.compression_ratio() > 1.5, "{stats:?}");
}

#[test]
fn a_child_stores_only_what_changed_and_needs_no_parent() {
    let rig = Rig::new();
    let seeds: Vec<u32> = (1..61).collect();
    let base = rig.write("base", &seeds).manifest;
    // A process that knows only the base.
    let fresh = index(&rig.store);
    let mut changed = seeds.clone();
    (changed[7], changed[8], changed[9]) = (500, 501, 3);
    let base_of_child = Some(Arc::new(base.clone()));
    let size = (60 * BLOCK) as u64;
    let mut writer = ImageWriter::new(fresh, base_of_child, size, SMALL).expect("a writer");
    for number in 7..10u32 {
        let seed = changed[usize::try_from(number).expect("small")];
        writer.block(u64::from(number), &block(seed)).expect("written");
    }
    let child = writer.finish(&name("child")).expect("published");
    assert_eq!((child.stats.new_blocks, child.stats.shared_blocks), (2, 1));
    assert_eq!(child.manifest.parent(), Some(base.id()));
    rig.store.delete(&base.id().key()).expect("deleted");
    assert_eq!(rig.read(&child.manifest).expect("read"), content(&changed));
}

#[test]
fn zeros_take_nothing() {
    let rig = Rig::new();
    let image = rig.write("zeros", &[0; 40]);
    assert_eq!((image.stats.objects, image.manifest.runs().len()), (0, 0));
    assert_eq!(rig.read(&image.manifest).expect("read"), vec![0; 40 * BLOCK]);
    let huge = ImageWriter::new(Arc::clone(&rig.index), None, 16 << 40, SMALL).expect("a writer");
    let huge = huge.finish(&name("huge")).expect("published").manifest;
    assert!(huge.to_bytes().len() < 200);
}

#[test]
fn a_sparse_file_goes_in_and_comes_out_sparse() {
    use std::os::unix::fs::MetadataExt as _;
    let rig = Rig::new();
    let (source, copy) =
        (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
    source.set_len(64 << 20).expect("a size");
    let mut expected = Vec::new();
    for (offset, seed) in [(0, 3), (5 << 20, 4), ((64 << 20) - BLOCK as u64, 5)] {
        source.write_all_at(&block(seed), offset).expect("written");
        expected.push((offset, block(seed)));
    }
    source.write_all_at(b"unaligned", (9 << 20) + 100).expect("written");
    let options = PackOptions::default();
    let mut writer =
        ImageWriter::new(Arc::clone(&rig.index), None, 64 << 20, options).expect("a writer");
    writer.file(&source).expect("read");
    let image = writer.finish(&name("sparse")).expect("published");
    assert_eq!(image.stats.new_blocks, 4);
    assert_eq!(image.stats.blocks, (64 << 20) / BLOCK as u64);
    let reader =
        ImageReader::open(Arc::clone(rig.index.cache()), image.manifest.id()).expect("open");
    reader.materialise(&copy).expect("materialised");
    let mut read = vec![0; BLOCK];
    for (offset, block) in expected {
        copy.read_exact_at(&mut read, offset).expect("read");
        assert_eq!(read, block, "at {offset}");
    }
    copy.read_exact_at(&mut read[..9], (9 << 20) + 100).expect("read");
    assert_eq!(&read[..9], b"unaligned");
    let metadata = copy.metadata().expect("metadata");
    assert_eq!(metadata.len(), 64 << 20);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} sectors", metadata.blocks());
    let mut wrong =
        ImageWriter::new(Arc::clone(&rig.index), None, 32 << 20, options).expect("a writer");
    let e = wrong.file(&source).expect_err("another size");
    assert!(e.to_string().contains("67108864"), "{e}");
}

#[test]
fn blocks_out_of_order_or_outside_are_refused() {
    let rig = Rig::new();
    let writer = || ImageWriter::new(Arc::clone(&rig.index), None, 40960, SMALL).expect("a writer");
    let mut one = writer();
    one.block(4, &block(1)).expect("written");
    for bad in [4, 3, 0, 10, u64::MAX] {
        let e = one.block(bad, &block(1)).expect_err("refused");
        assert!(matches!(e, WriteError::Order { next: 5, blocks: 10, .. }), "{bad}: {e:?}");
    }
    assert!(one.zeros(4..6).is_err() && one.zeros(9..11).is_err());
    one.block(5, &block(1)).expect("a refusal changes nothing");
    for bad in [0, 1, 4095, 4097, (16 << 40) + 4096, u64::MAX] {
        let e = ImageWriter::new(Arc::clone(&rig.index), None, bad, SMALL).err();
        assert!(matches!(e, Some(WriteError::Limits { .. })), "{bad}: {e:?}");
    }
}
