//! Sweeps take what nobody needs, and checkpoints divide what is written while they run.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use belljar_blockstore::{
    BLOCK_BYTES, BlockDevice as _, LayerName, LayerStore, LayeredImage, MemoryLayerWriter, Overlay,
    SweepError,
};

const BLOCKS: u64 = 64;

fn disk(dir: &Path) -> Overlay {
    let zero = Arc::new(LayeredImage::zero(BLOCKS * BLOCK_BYTES).expect("an image"));
    Overlay::create(zero, &dir.join("overlay")).expect("create")
}

fn sealed(store: &LayerStore, dir: &Path, byte: u8) -> Arc<LayeredImage> {
    let disk = disk(dir);
    disk.write_at(&[byte; 4096], 0).expect("write");
    disk.seal(store).expect("seal")
}

fn names(image: &LayeredImage) -> HashSet<LayerName> {
    image.layers().iter().cloned().collect()
}

#[test]
fn a_sweep_removes_what_is_neither_reachable_nor_held() {
    let dir = tempfile::tempdir().expect("temp folder");
    let store = LayerStore::open(dir.path()).expect("open");
    assert_eq!(store.sweep(&HashSet::new()).expect("nothing there").removed, 0);
    let held = sealed(&store, dir.path(), 1);
    let recorded = sealed(&store, dir.path(), 2);
    let garbage = sealed(&store, dir.path(), 3);
    let reachable = names(&recorded);
    let lost = garbage.layers()[0].clone();
    drop((recorded, garbage));
    let draft = MemoryLayerWriter::new(held.clone(), &store).expect("a draft is held, too");
    fs::write(dir.path().join("layers/README"), "not ours").expect("write");
    fs::write(dir.path().join("layers").join("0".repeat(33)), "not ours").expect("write");

    let swept = store.sweep(&reachable).expect("sweep");
    assert_eq!((swept.removed, swept.kept), (1, 3));
    assert!(swept.freed_bytes >= 4096);
    assert!(!dir.path().join(lost.as_str()).exists());
    assert!(dir.path().join("layers/README").exists());
    drop(draft);
    let mut byte = [0];
    held.read_at(&mut byte, 0).expect("read");
    assert_eq!(byte, [1]);

    // What a process held is not held by the next one.
    let next = LayerStore::open(dir.path()).expect("open");
    assert_eq!(next.sweep(&reachable).expect("sweep").removed, 1);
    for name in &reachable {
        next.layer(name).expect("what is reachable stays");
    }
}

#[test]
fn a_layer_recorded_while_a_sweep_looks_around_stays() {
    let dir = tempfile::tempdir().expect("temp folder");
    let store = LayerStore::open(dir.path()).expect("open");
    let image = sealed(&store, dir.path(), 1);
    let name = image.layers()[0].clone();
    // The sweep has read all records; then a snapshot writes its own and lets its image go.
    let swept = store.sweep_with::<SweepError>(|| {
        drop(image);
        Ok(HashSet::new())
    });
    assert_eq!(swept.expect("sweep").removed, 0);
    store.layer(&name).expect("it stays");
    // The next sweep knows the record, or there is none.
    assert_eq!(store.sweep(&HashSet::new()).expect("sweep").removed, 1);
    let failed: Result<_, SweepError> = store.sweep_with(|| {
        let source = std::io::ErrorKind::Other.into();
        Err(SweepError { step: "read", path: dir.path().to_owned(), source })
    });
    assert!(failed.is_err());
}

/// Versions that writers are about to write, and that were answered.
struct Versions {
    started: Vec<AtomicU32>,
    answered: Vec<AtomicU32>,
}

impl Versions {
    fn new() -> Versions {
        let zeros = || (0..BLOCKS).map(|_| AtomicU32::new(0)).collect();
        Versions { started: zeros(), answered: zeros() }
    }

    fn read(of: &[AtomicU32]) -> Vec<u32> {
        of.iter().map(|version| version.load(Ordering::SeqCst)).collect()
    }

    /// Writes ever newer versions over the blocks of one writer.
    fn write(&self, disk: &Overlay, first: usize, step: usize, stop: &AtomicBool) {
        for version in 1.. {
            for block in (first..self.started.len()).step_by(step) {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                self.started[block].store(version, Ordering::SeqCst);
                let content = version.to_le_bytes().repeat(1024);
                let at = u64::try_from(block).expect("small") * BLOCK_BYTES;
                if version % 5 == 0 {
                    // Half a block after the other: the version is the older of the two.
                    disk.trim(at, BLOCK_BYTES).expect("trim");
                }
                disk.write_at(&content, at).expect("write");
                self.answered[block].store(version, Ordering::SeqCst);
            }
        }
    }
}

/// The version of each block; all of a block has one. A trimmed block has none.
fn versions(image: &LayeredImage) -> Vec<Option<u32>> {
    let mut whole = vec![0; usize::try_from(image.size_bytes()).expect("small")];
    image.read_at(&mut whole, 0).expect("read");
    let version = |block: &[u8]| {
        let first: [u8; 4] = block[..4].try_into().expect("four bytes");
        assert!(block.chunks_exact(4).all(|word| word == first), "a torn block");
        Some(u32::from_le_bytes(first)).filter(|version| *version > 0)
    };
    whole.chunks_exact(4096).map(version).collect()
}

#[test]
fn checkpoints_divide_what_writers_do_meanwhile() {
    const WRITERS: usize = 4;
    let dir = tempfile::tempdir().expect("temp folder");
    let store = LayerStore::open(dir.path()).expect("open");
    let disk = disk(dir.path());
    let (state, stop) = (Versions::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (disk, state, stop) = (&disk, &state, &stop);
            scope.spawn(move || state.write(disk, writer, WRITERS, stop));
        }
        for round in 0..120 {
            let before = Versions::read(&state.answered);
            let image = disk.checkpoint(&store).expect("checkpoint");
            let after = Versions::read(&state.started);
            // An older image is let go now and then, so that sweeps have work beside the writers.
            if round % 10 == 0 {
                store.sweep(&HashSet::new()).expect("sweep");
            }
            for (block, found) in versions(&image).into_iter().enumerate() {
                match found {
                    Some(found) => {
                        assert!(found >= before[block], "an answered write is missing");
                        assert!(found <= after[block], "a write from after it is in it");
                    }
                    // Trimmed, and the write that follows each trim not done yet.
                    None => assert!(
                        after[block] == 0
                            || (before[block] + 1..=after[block]).any(|v| v % 5 == 0)
                            || before[block] == 0,
                        "an answered write is missing"
                    ),
                }
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    let last = disk.seal(&store).expect("seal");
    let answered = Versions::read(&state.answered);
    let expected: Vec<_> = answered.iter().map(|v| Some(*v).filter(|v| *v > 0)).collect();
    assert_eq!(versions(&last), expected);
    assert!(answered.iter().all(|version| *version > 0), "a writer did nothing");
}

/// Mounts a tiny tmpfs to have a file system that is really full.
#[test]
fn a_full_disk_is_reported_and_nothing_is_lost() {
    let dir = tempfile::tempdir().expect("temp folder");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(dir.path())
        .output()
        .is_ok_and(|out| out.status.success());
    if !mounted {
        belljar_testkit::skip("mounting a small tmpfs needs root");
        return;
    }
    let outcome = std::panic::catch_unwind(|| fill(dir.path()));
    let unmounted = std::process::Command::new("umount").arg(dir.path()).status();
    assert!(unmounted.expect("umount runs").success());
    outcome.expect("what was done on the full disk");
}

fn fill(dir: &Path) {
    let store = LayerStore::open(dir).expect("open");
    let disk = disk(dir);
    disk.write_at(&[7; 100 * 1024], 0).expect("there is room");
    let image = disk.checkpoint(&store).expect("checkpoint");

    let mut writer = MemoryLayerWriter::new(image.clone(), &store).expect("new");
    let e = writer.write(0, &[1; 256 * 1024]).expect_err("there is no room");
    assert_eq!(e.io_kind(), std::io::ErrorKind::StorageFull);
    let e = image.materialise(&dir.join("raw")).map(drop);
    let e = e.expect_err("there is no room for a copy").source;
    assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
    assert!(!dir.join("raw").exists());
    let e = disk.write_at(&[8; 256 * 1024], 0).expect_err("there is no room");
    assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
    let e = image.save(&dir.join("disk.map")).expect_err("there is no room");
    assert_eq!(e.source.kind(), std::io::ErrorKind::StorageFull);
    assert!(!dir.join("disk.map").exists());
    drop(writer);

    // The draft is gone, so there is room again: the disk goes on, and can be sealed.
    disk.trim(0, BLOCKS * BLOCK_BYTES).expect("a trim takes no space");
    disk.write_at(&[9; 4096], 4096).expect("there is room again");
    let sealed = disk.seal(&store).expect("seal");
    sealed.sync().expect("sync");
    sealed.save(&dir.join("disk.map")).expect("save");
    let mut back = vec![0; 3 * 4096];
    sealed.read_at(&mut back, 0).expect("read");
    assert_eq!([back[0], back[4096], back[8192]], [0, 9, 0]);
    image.read_at(&mut back, 0).expect("read");
    assert_eq!([back[0], back[4096], back[8192]], [7, 7, 7], "an older image changed");
}
