//! Where the memory of a restored machine comes from, and how its own pages are told later.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom as Sparse;

use super::FirecrackerRuntime;
use super::api::{MemoryBackend, short_path};
use super::jail::Jail;
use crate::machine::{MachineSpec, StartError};
use crate::memory::{Abandon, MemoryFile};
use crate::pages::{PAGE_BYTES, PageSource, SavedMemory, check_run};

/// Its name in the jail.
const MEMORY: &str = "memory";
/// Copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// What a machine's memory lies over.
#[derive(Debug)]
pub(super) enum Backing {
    /// A file the process maps privately: pages that are not its, the kernel tells. Some of its pages
    /// are not the base's: they were laid over it here.
    Mapped { file: MemoryFile, laid: Arc<Laid> },
    /// Memory of the process alone, which held what `base` has, or zeros.
    Anonymous { base: Option<Arc<File>> },
}

/// Which pages were laid over a base, by their numbers: a bit each.
#[derive(Debug, Default)]
pub(super) struct Laid(Vec<u64>);

impl Laid {
    fn note(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            let word = usize::try_from(page / 64).expect("memory is addressable");
            if word >= self.0.len() {
                self.0.resize(word + 1, 0);
            }
            self.0[word] |= 1 << (page % 64);
        }
    }

    pub(super) fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|word| self.0.get(word));
        word.is_some_and(|word| word & (1 << (page % 64)) != 0)
    }
}

impl Backing {
    pub(super) fn anonymous(base: Option<File>) -> Backing {
        Backing::Anonymous { base: base.map(Arc::new) }
    }
}

/// The memory of a machine that will be loaded.
pub(super) struct Backed {
    pub(super) backing: Backing,
    pub(super) backend: MemoryBackend,
    /// Serves it, as long as this lives.
    pub(super) handler: Option<Box<dyn Send + Sync>>,
}

/// Makes the memory reachable from the jail.
pub(super) async fn back(
    runtime: &FirecrackerRuntime,
    spec: &MachineSpec,
    jail: &mut Jail,
    memory: SavedMemory,
) -> Result<Backed, StartError> {
    match (&memory.base, &memory.pages, &runtime.config.page_handler) {
        (Some(base), None, _) => {
            jail.show("saved memory", base, MEMORY, false)?;
            mapped(&File::open(base).map_err(failed)?, Laid::default())
        }
        (_, _, Some(handler)) => {
            let run = File::open(jail.outside("run")).map_err(failed)?;
            let handler = Arc::clone(handler);
            let given = memory.clone();
            let serving = tokio::task::spawn_blocking(move || {
                handler.serve(&short_path(&run, "memory"), &given)
            });
            let served = serving.await.map_err(|e| failed(e.into()))?.map_err(failed)?;
            jail.give_path(&jail.outside("run/memory")).map_err(failed)?;
            let base = memory.base.as_deref().map(File::open).transpose().map_err(failed)?;
            Ok(Backed {
                backing: Backing::anonymous(base),
                backend: MemoryBackend::Uffd("/run/memory".to_owned()),
                handler: Some(served),
            })
        }
        _ => {
            let bytes = spec.memory.bytes();
            let (file, laid) = compose(memory, jail.outside(MEMORY), bytes).await?;
            mapped(&file, laid)
        }
    }
}

fn failed(source: io::Error) -> StartError {
    StartError::Io { step: "serve the saved memory", source }
}

fn mapped(file: &File, laid: Laid) -> Result<Backed, StartError> {
    let backing = {
        let file = MemoryFile::of(file).map_err(failed)?;
        Backing::Mapped { file, laid: Arc::new(laid) }
    };
    let backend = MemoryBackend::File(format!("/{MEMORY}"));
    Ok(Backed { backing, backend, handler: None })
}

/// One file at `path` of a base and the pages over it. Firecracker reads the memory while it loads a
/// machine, so nothing can be written over it later.
async fn compose(
    memory: SavedMemory,
    path: PathBuf,
    memory_bytes: u64,
) -> Result<(File, Laid), StartError> {
    let abandon = Abandon::default();
    let abandoned = abandon.flag();
    let composing = tokio::task::spawn_blocking(move || {
        // Its user maps it and must not write it.
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o444).open(&path)?;
        file.set_len(memory_bytes)?;
        if let Some(base) = &memory.base {
            copy(&File::open(base)?, &file, &abandoned)?;
        }
        let laid = match &memory.pages {
            Some(pages) => lay(&**pages, &file, memory_bytes, &abandoned)?,
            None => Laid::default(),
        };
        Ok((file, laid))
    });
    let composed = composing.await.unwrap_or_else(|e| Err(e.into()));
    composed.map_err(|source: io::Error| StartError::Pages { source })
}

fn lay(
    pages: &dyn PageSource,
    file: &File,
    memory_bytes: u64,
    abandoned: &AtomicBool,
) -> io::Result<Laid> {
    let mut laid = Laid::default();
    pages.read_runs(&mut |offset, bytes| {
        if abandoned.load(Ordering::Acquire) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        check_run(offset, bytes.len(), memory_bytes)?;
        laid.note(offset / PAGE_BYTES, bytes.len() as u64 / PAGE_BYTES);
        file.write_all_at(bytes, offset)
    })?;
    Ok(laid)
}

/// Shares the blocks where the file system can, else copies what is not empty.
fn copy(from: &File, to: &File, abandoned: &AtomicBool) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    for (start, end) in extents(from)? {
        let (mut at, mut to_at) = (start, start);
        while at < end {
            if abandoned.load(Ordering::Acquire) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let length = usize::try_from((end - at).min(COPY_BYTES)).expect("a mebibyte");
            let ends = (Some(&mut at), Some(&mut to_at));
            if rustix::fs::copy_file_range(from, ends.0, to, ends.1, length)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
    Ok(())
}

/// The parts of a file that have blocks: where each begins and ends.
fn extents(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let (mut found, mut at) = (Vec::new(), 0);
    loop {
        let start = match rustix::fs::seek(file, Sparse::Data(at)) {
            Ok(start) => start,
            // Nothing but emptiness to the end.
            Err(rustix::io::Errno::NXIO) => return Ok(found),
            Err(e) => return Err(e.into()),
        };
        at = rustix::fs::seek(file, Sparse::Hole(start))?;
        found.push((start, at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::KeptPages;
    use crate::pages::PageSink as _;

    #[tokio::test]
    async fn a_base_and_pages_become_one_sparse_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().join("base");
        let file = File::create(&base).expect("a file");
        file.set_len(4 << 20).expect("a sparse file");
        file.write_all_at(&[1; 8192], 1 << 20).expect("room");
        file.write_all_at(&[2; 4096], (4 << 20) - 4096).expect("room");
        let mut kept = KeptPages::default();
        kept.write((1 << 20) + 4096, &[3; 4096]).expect("memory");
        let pages: Arc<dyn PageSource> = Arc::new(kept);
        let memory = SavedMemory { base: Some(base.clone()), pages: Some(pages) };
        let whole = folder.path().join("whole");
        let (made, laid) = compose(memory, whole, 4 << 20).await.expect("room");
        let page = (1 << 20) / PAGE_BYTES + 1;
        assert!(laid.has(page) && !laid.has(page - 1) && !laid.has(page + 1) && !laid.has(1 << 40));
        let byte = |at: u64| {
            let mut byte = [9];
            made.read_exact_at(&mut byte, at).expect("inside");
            byte[0]
        };
        let at = |page: u64| (1 << 20) + page * 4096;
        assert_eq!([byte(0), byte(at(0)), byte(at(1)), byte(at(2))], [0, 1, 3, 0]);
        assert_eq!(byte((4 << 20) - 1), 2);
        assert_eq!(made.metadata().expect("open").len(), 4 << 20);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&made.metadata().expect("open"));
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks of a file with three pages");

        let outside: Arc<dyn PageSource> = {
            let mut kept = KeptPages::default();
            kept.write(4 << 20, &[3; 4096]).expect("memory");
            Arc::new(kept)
        };
        let memory = SavedMemory { base: None, pages: Some(outside) };
        let error = compose(memory, folder.path().join("bad"), 4 << 20).await.expect_err("outside");
        assert!(matches!(error, StartError::Pages { .. }), "{error}");
    }
}
