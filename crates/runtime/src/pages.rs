//! Saved machines and their memory, as drivers give and take it: runs of pages, in no more than a
//! buffer at a time.
//!
//! A driver knows neither images nor layers. It is given a base file to map privately and pages to
//! lay over it, and it gives the pages that a machine does not share with its base.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of a page. Offsets and lengths of runs are multiples of it.
pub const PAGE_BYTES: u64 = 4096;

/// Takes the pages of a machine that is being snapshotted, on a thread that may block.
pub trait PageSink: Send {
    /// Takes the pages at `offset` of the guest's memory: a whole number of pages, at most some
    /// megabytes. Offsets grow from call to call. Pages may equal the base's, or be all zeros.
    ///
    /// # Errors
    /// I/O errors, which end the snapshot.
    fn write(&mut self, offset: u64, pages: &[u8]) -> io::Result<()>;
}

/// The pages that lie over the base of a saved machine's memory.
pub trait PageSource: Send + Sync {
    /// Gives every run of pages that differs from the base to `each`, with its offset in the guest's
    /// memory, in any order: whole numbers of pages, at most some megabytes at a time. Blocks.
    ///
    /// # Errors
    /// I/O errors of reading, and what `each` fails with.
    fn read_runs(&self, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()>;
}

/// A machine on disk, to start others from.
#[derive(Clone)]
pub struct SavedMachine {
    /// Holds `state` and `machine.json`.
    pub folder: PathBuf,
    /// What its memory is.
    pub memory: SavedMemory,
}

/// What the memory of a saved machine is.
#[derive(Clone)]
pub struct SavedMemory {
    /// A raw file as long as the guest's memory, which every machine maps privately and nobody
    /// changes any more. `None` is memory full of zeros.
    pub base: Option<PathBuf>,
    /// What lies over it, and is written into the memory of each machine that is started.
    pub pages: Option<Arc<dyn PageSource>>,
}

impl SavedMachine {
    /// What [`crate::Machine::save`] left in `folder`: its memory is all in one file.
    pub fn template(folder: &Path) -> SavedMachine {
        let memory = SavedMemory { base: Some(folder.join("memory")), pages: None };
        SavedMachine { folder: folder.to_owned(), memory }
    }
}

/// Where a snapshot goes.
pub struct SnapshotTarget {
    /// An existing folder without `state` and `machine.json`, which are written there.
    pub folder: PathBuf,
    /// Takes the pages. It is given back when all went well and dropped otherwise.
    pub pages: Box<dyn PageSink>,
}

/// Whether `offset` and `bytes` are whole pages within `memory_bytes`.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] naming the run.
pub(crate) fn check_run(offset: u64, bytes: usize, memory_bytes: u64) -> io::Result<()> {
    let length = u64::try_from(bytes).unwrap_or(u64::MAX);
    let whole = offset.is_multiple_of(PAGE_BYTES) && length.is_multiple_of(PAGE_BYTES);
    if whole && offset.checked_add(length).is_some_and(|end| end <= memory_bytes) {
        return Ok(());
    }
    let what = format!("{bytes} bytes at {offset} are no pages of {memory_bytes} bytes of memory");
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_pages_inside_the_memory() {
        check_run(0, 8192, 8192).expect("all of it");
        check_run(4096, 0, 8192).expect("nothing");
        for (offset, bytes) in [(1, 4096), (0, 4095), (4096, 8192), (u64::MAX - 4095, 4096)] {
            let error = check_run(offset, bytes, 8192).expect_err("no pages of the memory");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{offset} {bytes}");
        }
    }
}
