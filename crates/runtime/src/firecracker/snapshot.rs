//! A snapshot of a frozen machine: the state Firecracker wrote, and the pages that are the machine's own.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::debug;

use super::machine::{Own, SAVE_LIMIT};
use super::memory::{Backing, Laid};
use super::start::millis;
use crate::draft::Draft;
use crate::keeper::ProcessHandle;
use crate::machine::SaveError;
use crate::memory::{Abandon, GuestMemory, MemoryFile, ReadError};
use crate::pages::{PAGE_BYTES, PageSink};
use crate::saved::Shape;

/// Read and compared at a time.
const RUN_BYTES: usize = 1 << 20;

/// Takes the places of a snapshot's files, before anything that costs time.
///
/// # Errors
/// [`SaveError::Io`].
pub(super) fn begin(own: &Own, folder: &Path) -> Result<Draft, SaveError> {
    let draft = Draft::begin(folder)?;
    // A snapshot that was cancelled may have left something.
    empty(&own.state)?;
    empty(&own.memory)?;
    Ok(draft)
}

/// Takes what Firecracker wrote, and the pages.
///
/// # Errors
/// [`SaveError`]; nothing is left in the folder then.
pub(super) async fn finish(
    own: &Own,
    process: ProcessHandle,
    draft: Draft,
    sink: Box<dyn PageSink>,
) -> Result<Box<dyn PageSink>, SaveError> {
    let cloned = |file: &File| file.try_clone().map_err(|source| SaveError::Memory { source });
    let pages = match &own.backing {
        Backing::Mapped { file, laid } => Pages::OfProcess(*file, laid.clone()),
        Backing::Anonymous { base } => Pages::OfFile(base.clone()),
    };
    let abandon = Abandon::default();
    let copy = Copy {
        process,
        pages,
        shape: own.shape.clone(),
        state: cloned(&own.state)?,
        memory: cloned(&own.memory)?,
        draft,
        sink,
        abandoned: abandon.flag(),
    };
    let copying = tokio::task::spawn_blocking(move || copy.run());
    match tokio::time::timeout(SAVE_LIMIT, copying).await {
        Ok(Ok(copied)) => {
            let (draft, sink) = copied?;
            draft.keep();
            Ok(sink)
        }
        Ok(Err(e)) => Err(SaveError::Memory { source: e.into() }),
        Err(_) => Err(SaveError::TimedOut { waited_ms: millis(SAVE_LIMIT) }),
    }
}

/// Where a machine's own pages are found.
enum Pages {
    /// In its process: those it does not share with its memory file, and those that were laid there.
    OfProcess(MemoryFile, Arc<Laid>),
    /// In the memory Firecracker wrote: those that differ from the base's, or from zeros.
    OfFile(Option<Arc<File>>),
}

/// What the copying thread works with.
struct Copy {
    process: ProcessHandle,
    pages: Pages,
    shape: Shape,
    state: File,
    memory: File,
    draft: Draft,
    sink: Box<dyn PageSink>,
    abandoned: Arc<AtomicBool>,
}

impl Copy {
    /// When nobody takes what this returns, it is dropped, and so the files are removed.
    fn run(mut self) -> Result<(Draft, Box<dyn PageSink>), SaveError> {
        let bytes = match &self.pages {
            Pages::OfProcess(file, laid) => GuestMemory::open(&self.process, *file)
                .map_err(ReadError::Memory)
                .and_then(|memory| {
                    memory.read_private(&mut *self.sink, &|page| laid.has(page), &self.abandoned)
                }),
            Pages::OfFile(base) => {
                let bytes = self.shape.memory.bytes();
                let base = base.as_deref();
                read_changed(&self.memory, base, bytes, &mut *self.sink, &self.abandoned)
            }
        };
        // Reading the memory of a process that ends is reading nothing.
        if !self.process.is_alive() {
            return Err(SaveError::Gone);
        }
        let bytes = bytes.map_err(|e| match e {
            ReadError::Memory(source) => SaveError::Memory { source },
            ReadError::Sink(source) => SaveError::Sink { source },
            // Nobody hears this.
            ReadError::Abandoned => SaveError::Gone,
        })?;
        self.state.seek(SeekFrom::Start(0)).map_err(|source| SaveError::Memory { source })?;
        self.draft.finish(&self.state, &self.shape)?;
        // They were copied, and may be memory.
        empty(&self.state)?;
        empty(&self.memory)?;
        if self.abandoned.load(Ordering::Acquire) {
            return Err(SaveError::Gone);
        }
        debug!(bytes, "took a snapshot");
        Ok((self.draft, self.sink))
    }
}

fn empty(file: &File) -> Result<(), SaveError> {
    file.set_len(0).map_err(|source| SaveError::Memory { source })
}

/// Passes on every page of `memory` that differs from the base's.
fn read_changed(
    memory: &File,
    base: Option<&File>,
    memory_bytes: u64,
    sink: &mut dyn PageSink,
    abandoned: &AtomicBool,
) -> Result<u64, ReadError> {
    let page = usize::try_from(PAGE_BYTES).expect("a page");
    let (mut now, mut before) = (vec![0; RUN_BYTES], vec![0; RUN_BYTES]);
    let (mut at, mut passed_on) = (0, 0);
    while at < memory_bytes {
        if abandoned.load(Ordering::Acquire) {
            return Err(ReadError::Abandoned);
        }
        let left = memory_bytes - at;
        let length = usize::try_from(left).map_or(RUN_BYTES, |left| left.min(RUN_BYTES));
        let (now, before) = (&mut now[..length], &mut before[..length]);
        memory.read_exact_at(now, at).map_err(ReadError::Memory)?;
        if let Some(base) = base {
            base.read_exact_at(before, at).map_err(ReadError::Memory)?;
        }
        let changed: Vec<bool> =
            now.chunks(page).zip(before.chunks(page)).map(|(now, before)| now != before).collect();
        let mut first = 0;
        for run in changed.chunk_by(|one, next| one == next) {
            let bytes = &now[first * page..(first + run.len()) * page];
            if run[0] {
                sink.write(at + (first * page) as u64, bytes).map_err(ReadError::Sink)?;
                passed_on += bytes.len() as u64;
            }
            first += run.len();
        }
        at += length as u64;
    }
    Ok(passed_on)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    /// Offsets and lengths of what was passed on, by first byte.
    #[derive(Default)]
    struct Runs(Vec<(u64, usize, u8)>);

    impl PageSink for Runs {
        fn write(&mut self, offset: u64, pages: &[u8]) -> io::Result<()> {
            self.0.push((offset, pages.len(), pages[0]));
            Ok(())
        }
    }

    #[test]
    fn pages_that_differ_are_passed_on_and_no_others() {
        const MEMORY_BYTES: u64 = (2 << 20) + 8192;
        let file = |writes: &[(u64, u8)]| {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(MEMORY_BYTES).expect("a sparse file");
            for (page, byte) in writes {
                file.write_all_at(&[*byte; 4096], page * 4096).expect("room");
            }
            file
        };
        let memory = file(&[(0, 1), (1, 2), (255, 3), (256, 4), (513, 5)]);
        let go_on = AtomicBool::new(false);
        let mut runs = Runs::default();
        let passed = read_changed(&memory, None, MEMORY_BYTES, &mut runs, &go_on).expect("read");
        assert_eq!(passed, 5 * 4096);
        let wanted =
            [(0, 8192, 1), (255 << 12, 4096, 3), (256 << 12, 4096, 4), (513 << 12, 4096, 5)];
        assert_eq!(runs.0, wanted);

        // A page that became zeros is a change as well.
        let base = file(&[(0, 1), (7, 7), (513, 6)]);
        let mut runs = Runs::default();
        read_changed(&memory, Some(&base), MEMORY_BYTES, &mut runs, &go_on).expect("read");
        let pages: Vec<u64> = runs.0.iter().map(|(offset, ..)| offset >> 12).collect();
        assert_eq!(pages, [1, 7, 255, 256, 513]);

        let stop = AtomicBool::new(true);
        let stopped = read_changed(&memory, None, MEMORY_BYTES, &mut runs, &stop);
        assert!(matches!(stopped, Err(ReadError::Abandoned)));
    }
}
