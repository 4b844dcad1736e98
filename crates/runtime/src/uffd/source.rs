//! Where the pages come from.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;

use crate::pages::PAGE_BYTES;

/// The content of a saved machine's memory, which never changes. Read by several threads at once.
///
/// Offsets and lengths are in bytes. Implementations pass [`crate::contract::memory_source_suite`].
pub trait MemorySource: Send + Sync + 'static {
    /// How much memory: a multiple of [`PAGE_BYTES`].
    fn size_bytes(&self) -> u64;

    /// What lies at `offset`, and for how many bytes at most `limit`. Both are multiples of
    /// [`PAGE_BYTES`], and the range lies inside the memory. Quick: no I/O.
    fn run_at(&self, offset: u64, limit: u64) -> MemoryRun;

    /// Fills `buf` from `offset`. May block; whatever deadline there is, is the source's.
    ///
    /// # Errors
    /// I/O errors, which end the machine: they must name what could not be read. Bytes that were not
    /// verified, where they can be, are an error.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// What lies at a place of a memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryRun {
    /// So many bytes of zeros: a multiple of [`PAGE_BYTES`], not 0.
    Zeros(u64),
    /// So many bytes of anything: a multiple of [`PAGE_BYTES`], not 0.
    Data(u64),
}

/// A memory in a raw file. Its holes are zeros.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    /// What is no hole, in whole pages, in order.
    data: Vec<Range<u64>>,
}

/// Why a file cannot be the source of a memory.
#[derive(Debug, thiserror::Error)]
pub enum OpenMemoryError {
    /// The file could not be read.
    #[error("open memory file {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no memory.
    #[error("use {} of {found} bytes as memory: it must be some pages of {PAGE_BYTES}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
    },
}

impl FileMemory {
    /// Opens the file, which must not change while it is in use, and looks for its holes.
    ///
    /// # Errors
    /// [`OpenMemoryError`] naming the file.
    pub fn open(path: &Path) -> Result<FileMemory, OpenMemoryError> {
        let io = |source| OpenMemoryError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let size_bytes = file.metadata().map_err(io)?.len();
        if size_bytes == 0 || !size_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(OpenMemoryError::Size { path: path.to_owned(), found: size_bytes });
        }
        let data = data_of(&file, size_bytes).map_err(io)?;
        Ok(FileMemory { file, path: path.to_owned(), size_bytes, data })
    }
}

/// What is no hole, widened to whole pages. Source of the rules: lseek(2).
fn data_of(file: &File, size_bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut data: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < size_bytes {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.max(start + 1);
        let run = start - start % PAGE_BYTES..end.next_multiple_of(PAGE_BYTES).min(size_bytes);
        match data.last_mut() {
            Some(last) if last.end >= run.start => last.end = run.end,
            _ => data.push(run),
        }
        at = end;
    }
    Ok(data)
}

impl MemorySource for FileMemory {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn run_at(&self, offset: u64, limit: u64) -> MemoryRun {
        let next = self.data.partition_point(|run| run.end <= offset);
        match self.data.get(next) {
            None => MemoryRun::Zeros(limit),
            Some(run) if run.start > offset => MemoryRun::Zeros(limit.min(run.start - offset)),
            Some(run) => MemoryRun::Data(limit.min(run.end - offset)),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|e| {
            let end = offset.saturating_add(u64::try_from(buf.len()).unwrap_or(u64::MAX));
            let what = format!("read {} from {offset} to {end}: {e}", self.path.display());
            io::Error::new(e.kind(), what)
        })
    }
}
