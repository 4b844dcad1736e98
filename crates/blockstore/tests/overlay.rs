//! The overlay against a model, against itself from many threads, and on a full disk.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use belljar_blockstore::{
    BLOCK_BYTES, BlockDevice as _, LayerName, LayerStore, LayeredImage, Overlay,
};
use proptest::prelude::*;

const BLOCKS: usize = 150;
const SIZE: usize = BLOCKS * 4096;

/// A base with data, a hole in its middle, and data again.
fn base_content() -> Vec<u8> {
    let mut content: Vec<u8> =
        (0..SIZE).map(|i| u8::try_from(i % 251).expect("below 251")).collect();
    content[40 * 4096..90 * 4096].fill(0);
    content
}

fn overlay(dir: &Path) -> Overlay {
    use std::os::unix::fs::FileExt as _;
    let content = base_content();
    let file = fs::File::create(dir.join("base")).expect("create");
    file.set_len(u64::try_from(SIZE).expect("small")).expect("grow");
    file.write_all_at(&content[..40 * 4096], 0).expect("write");
    file.write_all_at(&content[90 * 4096..], 90 * 4096).expect("write");
    Overlay::create(base_image(dir), &dir.join("overlay")).expect("create")
}

fn base_image(dir: &Path) -> Arc<LayeredImage> {
    let store = LayerStore::open(dir).expect("a folder");
    let name = LayerName::new("base").expect("a name");
    Arc::new(LayeredImage::raw(&store, &name).expect("open"))
}

#[derive(Debug, Clone)]
enum Op {
    Read { offset: usize, len: usize },
    Write { offset: usize, len: usize, byte: u8 },
    Zero { offset: usize, len: usize },
    Trim { offset: usize, len: usize },
}

fn ranges() -> impl Strategy<Value = (usize, usize)> {
    let lengths = prop_oneof![3 => 0..6000_usize, 2 => Just(4096_usize), 1 => 0..SIZE];
    (0..SIZE, lengths, 0..3).prop_map(|(offset, len, align)| {
        let offset = if align == 0 { offset } else { offset - offset % 4096 };
        (offset, len.min(SIZE - offset))
    })
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => ranges().prop_map(|(offset, len)| Op::Read { offset, len }),
        4 => (ranges(), any::<u8>())
            .prop_map(|((offset, len), byte)| Op::Write { offset, len, byte }),
        2 => ranges().prop_map(|(offset, len)| Op::Zero { offset, len }),
        2 => ranges().prop_map(|(offset, len)| Op::Trim { offset, len }),
    ]
}

fn u(n: usize) -> u64 {
    u64::try_from(n).expect("small")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn it_reads_like_a_plain_array(ops in proptest::collection::vec(ops(), 1..40)) {
        let dir = tempfile::tempdir().expect("temp folder");
        let disk = overlay(dir.path());
        let mut model = base_content();
        for op in ops {
            match op {
                Op::Read { offset, len } => {
                    let mut buf = vec![0xee; len];
                    disk.read_at(&mut buf, u(offset)).expect("read");
                    prop_assert!(buf == model[offset..offset + len], "{len} bytes at {offset}");
                }
                Op::Write { offset, len, byte } => {
                    disk.write_at(&vec![byte; len], u(offset)).expect("write");
                    model[offset..offset + len].fill(byte);
                }
                Op::Zero { offset, len } => {
                    disk.zero(u(offset), u(len)).expect("zero");
                    model[offset..offset + len].fill(0);
                }
                Op::Trim { offset, len } => {
                    disk.trim(u(offset), u(len)).expect("trim");
                    // Whole blocks only.
                    let (from, to) = (offset.next_multiple_of(4096), (offset + len) / 4096 * 4096);
                    model[from..to.max(from)].fill(0);
                }
            }
        }
        let mut whole = vec![0; SIZE];
        disk.read_at(&mut whole, 0).expect("read");
        prop_assert!(whole == model, "the whole disk differs");
        prop_assert_eq!(fs::read(dir.path().join("base")).expect("read"), base_content());
    }
}

#[test]
fn threads_do_not_lose_each_others_bytes() {
    const WRITERS: usize = 8;
    let dir = tempfile::tempdir().expect("temp folder");
    let disk = overlay(dir.path());
    let slice = 4096 / WRITERS;
    // Every writer owns one slice of every block and writes it in its own order, so each block sees
    // partial writes from all of them, first writes included.
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let disk = &disk;
            scope.spawn(move || {
                let byte = u8::try_from(writer + 1).expect("small");
                for step in 0..BLOCKS {
                    let block = (step * (2 * writer + 1) + writer * 7) % BLOCKS;
                    let offset = block * 4096 + writer * slice;
                    disk.write_at(&vec![byte; slice], u(offset)).expect("write");
                    let mut back = vec![0; slice];
                    disk.read_at(&mut back, u(offset)).expect("read");
                    assert_eq!(back, vec![byte; slice], "writer {writer} lost block {block}");
                }
            });
        }
    });
    let mut whole = vec![0; SIZE];
    disk.read_at(&mut whole, 0).expect("read");
    let untouched = base_content();
    for writer in 0..WRITERS {
        // A stride that shares a factor with the number of blocks skips some of them.
        let touched: std::collections::BTreeSet<usize> =
            (0..BLOCKS).map(|step| (step * (2 * writer + 1) + writer * 7) % BLOCKS).collect();
        for block in 0..BLOCKS {
            let at = block * 4096 + writer * slice;
            let found = &whole[at..at + slice];
            if touched.contains(&block) {
                assert!(found.iter().all(|b| usize::from(*b) == writer + 1));
            } else {
                assert_eq!(found, &untouched[at..at + slice]);
            }
        }
    }
}

#[test]
fn writers_and_trimmers_leave_whole_blocks() {
    let dir = tempfile::tempdir().expect("temp folder");
    let disk = overlay(dir.path());
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..400_u64 {
                    let block = round % 3;
                    if thread % 2 == 0 {
                        let data = [thread + 1; 4096];
                        disk.write_at(&data, block * BLOCK_BYTES).expect("write");
                    } else {
                        disk.trim(block * BLOCK_BYTES, BLOCK_BYTES).expect("trim");
                        // A partial write after a trim must not bring old bytes back.
                        disk.write_at(&[0], block * BLOCK_BYTES + 5).expect("write");
                    }
                }
            });
        }
    });
    for block in 0..3 {
        disk.trim(block * BLOCK_BYTES, BLOCK_BYTES).expect("trim");
        disk.write_at(&[1], block * BLOCK_BYTES + 100).expect("write");
        let mut back = [9; 4096];
        disk.read_at(&mut back, block * BLOCK_BYTES).expect("read");
        assert_eq!(back.iter().map(|b| u32::from(*b)).sum::<u32>(), 1, "old bytes came back");
    }
}

#[test]
fn trimmed_space_goes_back_to_the_host() {
    let dir = tempfile::tempdir().expect("temp folder");
    let disk = overlay(dir.path());
    disk.write_at(&vec![1; SIZE], 0).expect("write");
    let full = fs::metadata(disk.path()).expect("stat").blocks();
    disk.trim(0, u(SIZE)).expect("trim");
    let empty = fs::metadata(disk.path()).expect("stat").blocks();
    assert!(empty < full / 2, "{full} sectors before the trim, {empty} after it");
    assert_eq!(disk.stats().zero_blocks, u(BLOCKS));
    assert_eq!(disk.stats().written_blocks, 0);
    disk.remove().expect("remove");
    disk.remove().expect("remove again");
    assert!(!disk.path().exists());
    disk.write_at(&[1; 10], 0).expect("an unlinked overlay still works");
}

#[test]
fn blocks_of_zeros_are_stored_only_when_space_is_asked_for() {
    let dir = tempfile::tempdir().expect("temp folder");
    let disk = overlay(dir.path());
    let mut data = vec![0; 6 * 4096];
    data[2 * 4096 + 17] = 1;
    disk.write_at(&data, 0).expect("write");
    assert_eq!((disk.stats().written_blocks, disk.stats().zero_blocks), (1, 5));
    disk.write_at(&data, 1).expect("unaligned");
    assert_eq!((disk.stats().written_blocks, disk.stats().zero_blocks), (3, 4), "two edges");
    disk.trim(0, 7 * BLOCK_BYTES).expect("trim");
    disk.zero_allocated(BLOCK_BYTES, 2 * BLOCK_BYTES).expect("zero");
    assert_eq!((disk.stats().written_blocks, disk.stats().zero_blocks), (2, 5));
    let held = fs::metadata(disk.path()).expect("stat").blocks();
    assert!(held >= 2 * 8, "{held} sectors for two blocks");
    let before = disk.stats();
    disk.trim(8 * BLOCK_BYTES + 1, BLOCK_BYTES).expect("a trim of two parts of blocks");
    assert_eq!(disk.stats(), before, "a trim took space");
    assert!(disk.trim(u(SIZE), 1).is_err());
    let mut back = vec![9; 7 * 4096];
    disk.read_at(&mut back, 0).expect("read");
    assert!(back.iter().all(|byte| *byte == 0));
}

#[test]
fn an_overlay_never_takes_over_a_file() {
    let dir = tempfile::tempdir().expect("temp folder");
    let disk = overlay(dir.path());
    assert!(Overlay::create(base_image(dir.path()), disk.path()).is_err());
}

/// Mounts a tiny tmpfs to have a file system that is really full.
#[test]
fn a_full_host_disk_is_reported_as_such() {
    let dir = tempfile::tempdir().expect("temp folder");
    let small = dir.path().join("small");
    fs::create_dir(&small).expect("mkdir");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(&small)
        .output()
        .is_ok_and(|out| out.status.success());
    if !mounted {
        belljar_testkit::skip("mounting a small tmpfs needs root");
        return;
    }
    drop(overlay(dir.path()));
    let disk = Overlay::create(base_image(dir.path()), &small.join("overlay")).expect("create");
    let e = disk.write_at(&vec![1; SIZE], 0).expect_err("256 KiB cannot hold it");
    let content = {
        let mut buf = vec![0; 4096];
        disk.read_at(&mut buf, u(SIZE - 4096)).expect("what was not written reads from the base");
        buf
    };
    drop(disk);
    let unmounted =
        std::process::Command::new("umount").arg(&small).status().expect("umount runs").success();
    assert!(unmounted);
    assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(content, base_content()[SIZE - 4096..]);
}
