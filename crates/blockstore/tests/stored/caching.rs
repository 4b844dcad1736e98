//! The chunk cache: bounded, there after a restart, never believed.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};

use belljar_blockstore::cache::CacheError;
use belljar_blockstore::{BlobStore, CacheLimits, ChunkCache, ImageManifest, ImageReader};

use crate::rig::{Rig, Tampered, content};

const ROOMY: CacheLimits = CacheLimits { disk_bytes: 64 << 20, memory_bytes: 0 };

fn image() -> (Rig, ImageManifest, Vec<u8>) {
    let rig = Rig::new();
    let seeds: Vec<u32> = (1..100).collect();
    let manifest = rig.write("image", &seeds).manifest;
    (rig, manifest, content(&seeds))
}

fn read(cache: &Arc<ChunkCache>, image: &ImageManifest) -> Vec<u8> {
    let reader = ImageReader::open(Arc::clone(cache), image.id()).expect("open");
    let mut bytes = vec![0; usize::try_from(reader.size_bytes()).expect("small")];
    reader.read_at(&mut bytes, 0).expect("read");
    bytes
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.retain(|path| path.file_name().is_some_and(|name| name != "lock"));
    found
}

#[test]
fn after_a_restart_nothing_is_fetched_again() {
    let (rig, image, whole) = image();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = ChunkCache::open(Arc::clone(&rig.store), folder.path(), ROOMY).expect("a cache");
    let cache = Arc::new(cache);
    assert!(read(&cache, &image) == whole);
    assert!(cache.stats().fetches > 10);
    let again = ChunkCache::open(Arc::clone(&rig.store), folder.path(), ROOMY);
    assert!(matches!(again, Err(CacheError::InUse { .. })), "two at once");
    drop(again);
    drop(cache);
    // What a crash leaves, and what was never ours.
    std::fs::write(folder.path().join("v1/unfinished-3"), "x").expect("written");
    std::fs::write(files(folder.path())[0].with_file_name("junk"), "x").expect("written");
    let down: Arc<dyn BlobStore> = Arc::new(Tampered::new(&rig.store).dying_after(0));
    let cache = Arc::new(ChunkCache::open(down, folder.path(), ROOMY).expect("a cache"));
    assert!(read(&cache, &image) == whole);
    let stats = cache.stats();
    assert_eq!((stats.fetches, stats.damaged), (0, 0));
    assert_eq!(stats.disk_chunks, files(folder.path()).len() as u64, "no junk is kept");
}

#[test]
fn a_damaged_entry_is_dropped_and_fetched_again() {
    let (rig, image, whole) = image();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let open = || {
        let store = Arc::clone(&rig.store);
        Arc::new(ChunkCache::open(store, folder.path(), ROOMY).expect("a cache"))
    };
    read(&open(), &image);
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes[0] ^= 1,
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.push(0),
        Vec::clear,
    ];
    for damage in damages {
        let all = files(folder.path());
        for path in &all {
            let mut bytes = std::fs::read(path).expect("an entry");
            damage(&mut bytes);
            std::fs::write(path, bytes).expect("damaged");
        }
        let cache = open();
        assert!(read(&cache, &image) == whole, "damaged bytes were served");
        assert_eq!(cache.stats().damaged, all.len() as u64);
    }
    let cache = open();
    assert!(read(&cache, &image) == whole && cache.stats().fetches == 0);
    // Removed behind its back.
    for path in files(folder.path()) {
        std::fs::remove_file(path).expect("removed");
    }
    assert!(read(&cache, &image) == whole);
}

#[test]
fn the_bound_holds_while_reading_and_when_it_shrinks() {
    let (rig, image, whole) = image();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let limit = |disk_bytes| CacheLimits { disk_bytes, memory_bytes: 20_000 };
    let open = |limits| {
        let store = Arc::clone(&rig.store);
        Arc::new(ChunkCache::open(store, folder.path(), limits).expect("a cache"))
    };
    for disk_bytes in [200 << 10, 64 << 10, 0] {
        let cache = open(limit(disk_bytes));
        for _ in 0..2 {
            assert!(read(&cache, &image) == whole);
            let held: u64 = files(folder.path())
                .iter()
                .map(|path| path.metadata().expect("metadata").len())
                .sum();
            assert!(held <= disk_bytes && cache.stats().disk_bytes <= disk_bytes, "{held}");
        }
        if disk_bytes > 0 {
            assert!(cache.stats().disk_bytes > disk_bytes / 2, "it is used, too");
        }
    }
}

#[test]
fn many_who_want_one_frame_cause_one_fetch() {
    let (rig, image, whole) = image();
    let store = Arc::new(Tampered::new(&rig.store));
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&store) as Arc<dyn BlobStore>, 1 << 20));
    let start = Barrier::new(8);
    std::thread::scope(|threads| {
        for _ in 0..8 {
            threads.spawn(|| {
                start.wait();
                let reader = ImageReader::open(Arc::clone(&cache), image.id()).expect("open");
                let mut bytes = vec![0; 4 * 4096];
                reader.read_at(&mut bytes, 0).expect("read");
                assert!(bytes == whole[..4 * 4096]);
            });
        }
    });
    // The manifest, one index, one frame.
    assert_eq!(store.reads.load(Ordering::SeqCst), 3);
}

#[test]
fn reading_all_asks_for_neighbours_together() {
    let (rig, image, _) = image();
    let store = Arc::new(Tampered::new(&rig.store));
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&store) as Arc<dyn BlobStore>, 1 << 20));
    let reader = ImageReader::open(cache, image.id()).expect("open");
    reader.materialise(&tempfile::tempfile().expect("a file")).expect("materialised");
    // The manifest, and an index and one request for all frames of each object.
    let expected = 1 + 2 * image.objects().len() as u64;
    assert_eq!(store.reads.load(Ordering::SeqCst), expected);
}

#[test]
fn a_folder_that_cannot_be_written_costs_only_the_caching() {
    let (rig, image, whole) = image();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = ChunkCache::open(Arc::clone(&rig.store), folder.path(), ROOMY).expect("a cache");
    let cache = Arc::new(cache);
    std::fs::remove_dir_all(folder.path().join("v1")).expect("removed");
    std::fs::write(folder.path().join("v1"), "in the way").expect("written");
    assert!(read(&cache, &image) == whole);
    assert_eq!(cache.stats().disk_chunks, 0);
}

#[test]
fn a_full_disk_costs_only_the_caching() {
    if !belljar_testkit::is_root() {
        return belljar_testkit::skip("a small file system is mounted by root");
    }
    let (rig, image, whole) = image();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let small = SmallDisk::mount(folder.path());
    let cache = ChunkCache::open(Arc::clone(&rig.store), small.0, ROOMY).expect("a cache");
    let cache = Arc::new(cache);
    for _ in 0..2 {
        assert!(read(&cache, &image) == whole);
    }
    let held = cache.stats().disk_bytes;
    assert!(held > 0 && held <= 192 << 10, "{held}");
}

/// A file system of 192 KiB, gone when this is dropped.
struct SmallDisk<'a>(&'a Path);

impl SmallDisk<'_> {
    fn mount(at: &Path) -> SmallDisk<'_> {
        let options = std::ffi::CString::new("size=192k,mode=0700").expect("no zeros");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", at, "tmpfs", flags, options.as_c_str()).expect("mounted");
        SmallDisk(at)
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.0, flags).expect("unmounted");
    }
}
