//! The part of the cache that survives a restart: one file for each chunk, in 256 folders.
//!
//! Files are not synced and nothing vouches for them: whoever reads one checks it, and drops it
//! when it is not what it should be. So a crash can cost entries and never correctness.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, flock};

use super::clock::Clock;
use super::{CacheError, ChunkKey};

/// What a file takes at least: a block of the file system.
const FILE_BLOCK_BYTES: u64 = 4096;
/// Files of another layout are none of ours: a new layout takes another folder.
const LAYOUT: &str = "v1";

pub(super) struct Disk {
    root: PathBuf,
    files: Mutex<Clock<ChunkKey, ()>>,
    next_unfinished: AtomicU64,
    /// Whether the last write failed: said once, not for every chunk.
    is_failing: AtomicBool,
    _lock: File,
}

impl Disk {
    /// Takes over the folder with what an earlier process has left in it, oldest first to go.
    pub(super) fn open(folder: &Path, limit_bytes: u64) -> Result<Disk, CacheError> {
        let failed = |source| CacheError::Folder { path: folder.to_owned(), source };
        let root = folder.join(LAYOUT);
        fs::create_dir_all(&root).map_err(failed)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join("lock"))
            .map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(CacheError::InUse { path: folder.to_owned() });
            }
            other => other.map_err(|e| failed(e.into()))?,
        }
        let disk = Disk {
            root,
            files: Mutex::new(Clock::new(limit_bytes)),
            next_unfinished: AtomicU64::new(0),
            is_failing: AtomicBool::new(false),
            _lock: lock,
        };
        disk.scan().map_err(failed)?;
        Ok(disk)
    }

    fn files(&self) -> MutexGuard<'_, Clock<ChunkKey, ()>> {
        // Whatever a panic left: an entry without its file is a miss, a file without its entry is
        // found by the next scan.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scan(&self) -> io::Result<()> {
        let mut found = Vec::new();
        for folder in fs::read_dir(&self.root)? {
            let folder = folder?;
            if !folder.file_type()?.is_dir() {
                fs::remove_file(folder.path())?;
                continue;
            }
            for file in fs::read_dir(folder.path())? {
                let file = file?;
                let metadata = file.metadata()?;
                let key = ChunkKey::of_file_name(&file.file_name().to_string_lossy());
                match key.filter(|key| self.path(key) == file.path() && metadata.is_file()) {
                    Some(key) => {
                        found.push((metadata.mtime(), metadata.mtime_nsec(), key, metadata.len()))
                    }
                    None => fs::remove_file(file.path())?,
                }
            }
        }
        found.sort_unstable_by_key(|(s, ns, key, _)| (*s, *ns, *key));
        for (_, _, key, bytes) in found {
            self.take_in(key, bytes);
        }
        Ok(())
    }

    fn path(&self, key: &ChunkKey) -> PathBuf {
        let name = key.file_name();
        self.root.join(&name[..2]).join(name)
    }

    fn take_in(&self, key: ChunkKey, bytes: u64) {
        let weight = bytes.next_multiple_of(FILE_BLOCK_BYTES).max(FILE_BLOCK_BYTES);
        let evicted = self.files().insert(key, (), weight);
        self.unlink(&evicted);
    }

    fn unlink(&self, keys: &[ChunkKey]) {
        for key in keys {
            match fs::remove_file(self.path(key)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, file = %self.path(key).display(), "a cache file stays");
                }
                _ => {}
            }
        }
    }

    pub(super) fn contains(&self, key: &ChunkKey) -> bool {
        self.files().contains(key)
    }

    /// The stored bytes, unchecked, at most `max_bytes` and one more of them.
    pub(super) fn read(&self, key: &ChunkKey, max_bytes: u64) -> Option<Vec<u8>> {
        self.files().get(key)?;
        let mut bytes = Vec::new();
        let read = File::open(self.path(key))
            .and_then(|file| file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes));
        match read {
            Ok(_) => Some(bytes),
            Err(e) => {
                // Not there: put out between the look at the table and the opening.
                if e.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(error = %e, file = %self.path(key).display(), "a cache file cannot be read");
                }
                self.remove(key);
                None
            }
        }
    }

    /// Drops an entry.
    pub(super) fn remove(&self, key: &ChunkKey) {
        self.files().remove(key);
        self.unlink(&[*key]);
    }

    /// Keeps bytes if that is possible. A disk that is full or broken makes the cache smaller, never
    /// a read fail.
    pub(super) fn write(&self, key: ChunkKey, bytes: &[u8]) {
        let limit = self.files().limit();
        if bytes.len() as u64 > limit {
            return;
        }
        let mut written = self.try_write(&key, bytes);
        if written.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::StorageFull) {
            // Others fill this disk too: give a part back and try once more.
            let evicted = {
                let mut files = self.files();
                let part = files.weight() / 8 + FILE_BLOCK_BYTES;
                let rest = files.weight().saturating_sub(part);
                files.shrink_to(rest)
            };
            self.unlink(&evicted);
            written = self.try_write(&key, bytes);
        }
        match written {
            Ok(()) => {
                self.is_failing.store(false, Ordering::Relaxed);
                self.take_in(key, bytes.len() as u64);
            }
            Err(e) => {
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(error = %e, folder = %self.root.display(), "nothing new is cached");
                }
            }
        }
    }

    fn try_write(&self, key: &ChunkKey, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(key);
        let folder = path.parent().unwrap_or(&self.root);
        match fs::create_dir(folder) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let number = self.next_unfinished.fetch_add(1, Ordering::Relaxed);
        let unfinished = self.root.join(format!("unfinished-{number}"));
        let result = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&unfinished)?;
            file.write_all(bytes)?;
            fs::rename(&unfinished, &path)
        })();
        if result.is_err() {
            // The error that matters is the first one; the next scan removes what stays.
            let _removed = fs::remove_file(&unfinished);
        }
        result
    }

    /// Bytes the files take, and how many there are.
    pub(super) fn weight(&self) -> (u64, usize) {
        let files = self.files();
        (files.weight(), files.len())
    }
}
