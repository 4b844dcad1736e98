//! Which pages a machine asked for first after it was restored, in their order, to have them there
//! before they are asked for the next time. Format 1 on disk is written down in `docs/formats.md`.
//!
//! It is a hint: a wrong one costs time and never a byte.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::bits::Bits;
use crate::pages::PAGE_BYTES;

const MAGIC: [u8; 8] = *b"BELLJSET";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 28;
const RUN_BYTES: usize = 8;
/// Runs at most: half a megabyte of file.
const RUNS_MAX: usize = 1 << 16;
const FILE_MAX_BYTES: u64 = (HEADER_BYTES + RUNS_MAX * RUN_BYTES) as u64;

/// Pages of a saved memory in the order in which a machine wanted them. None is there twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    memory_bytes: u64,
    runs: Vec<Run>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    count: u32,
}

impl Run {
    fn pages(self) -> Range<u64> {
        u64::from(self.first)..u64::from(self.first) + u64::from(self.count)
    }
}

/// Why a working set could not be saved. What was there before is still there.
#[derive(Debug, thiserror::Error)]
#[error("save working set {}", path.display())]
pub struct SaveWorkingSetError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Why a working set could not be loaded: a restore without it is slower, and nothing else.
#[derive(Debug, thiserror::Error)]
#[error("load working set {}", path.display())]
pub struct LoadWorkingSetError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub problem: WorkingSetProblem,
}

/// What is wrong with a working set.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetProblem {
    /// The file could not be read.
    #[error("read the file")]
    Io(#[source] io::Error),
    /// It does not begin as a working set does.
    #[error("recognise it: it is no working set")]
    NotAWorkingSet,
    /// Another version of Belljar wrote it.
    #[error("read working set format {0}: this version knows format {FORMAT}")]
    Format(u32),
    /// It belongs to another memory.
    #[error("use it for a memory of {expected} bytes: it is of one of {found}")]
    OtherMemory {
        /// The memory's size in bytes.
        expected: u64,
        /// What it says, in bytes.
        found: u64,
    },
    /// Its parts contradict each other.
    #[error("make sense of it: {0}")]
    Malformed(&'static str),
}

impl WorkingSet {
    /// How much memory it names, in bytes.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count)).sum::<u64>() * PAGE_BYTES
    }

    /// The memory it is of, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Its runs as offsets in the memory, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().map(|run| {
            let pages = run.pages();
            pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
        })
    }

    /// Writes it to `path`, mode 0600, in place of what is there, in one step. It is not synced: after
    /// a power cut it may be missing or, as the next load says, damaged.
    ///
    /// # Errors
    /// [`SaveWorkingSetError`] naming the file.
    pub fn save(&self, path: &Path) -> Result<(), SaveWorkingSetError> {
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&new)?.write_all(&self.encode())?;
            std::fs::rename(&new, path)
        };
        write().map_err(|source| {
            // The error that matters is `source`.
            let _removed = std::fs::remove_file(&new);
            SaveWorkingSetError { path: path.to_owned(), source }
        })
    }

    /// Loads the one at `path`, of a memory of `memory_bytes`.
    ///
    /// # Errors
    /// [`LoadWorkingSetError`]: which file, and what is wrong with it.
    pub fn load(path: &Path, memory_bytes: u64) -> Result<WorkingSet, LoadWorkingSetError> {
        let read = || {
            let mut bytes = Vec::new();
            File::open(path)?.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read()
            .map_err(WorkingSetProblem::Io)
            .and_then(|bytes| decode(&bytes, memory_bytes))
            .map_err(|problem| LoadWorkingSetError { path: path.to_owned(), problem })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.runs.len() * RUN_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(u32::try_from(PAGE_BYTES).expect("4096").to_le_bytes());
        bytes.extend((self.memory_bytes / PAGE_BYTES).to_le_bytes());
        bytes.extend(u32::try_from(self.runs.len()).expect("at most RUNS_MAX").to_le_bytes());
        for run in &self.runs {
            bytes.extend(run.first.to_le_bytes());
            bytes.extend(run.count.to_le_bytes());
        }
        bytes
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn decode(bytes: &[u8], memory_bytes: u64) -> Result<WorkingSet, WorkingSetProblem> {
    let malformed = |what| Err(WorkingSetProblem::Malformed(what));
    if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
        return Err(WorkingSetProblem::NotAWorkingSet);
    }
    if bytes.len() < HEADER_BYTES {
        return malformed("it ends in its header");
    }
    if u32_at(bytes, 8) != FORMAT {
        return Err(WorkingSetProblem::Format(u32_at(bytes, 8)));
    }
    if u64::from(u32_at(bytes, 12)) != PAGE_BYTES {
        return malformed("its pages have not 4096 bytes");
    }
    let pages = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
    if pages.checked_mul(PAGE_BYTES) != Some(memory_bytes) {
        let found = pages.saturating_mul(PAGE_BYTES);
        return Err(WorkingSetProblem::OtherMemory { expected: memory_bytes, found });
    }
    let count = usize::try_from(u32_at(bytes, 24)).unwrap_or(usize::MAX);
    if count > RUNS_MAX || bytes.len() != HEADER_BYTES + count * RUN_BYTES {
        return malformed("its length is not what its header says");
    }
    let seen = Bits::new(pages);
    let mut runs = Vec::with_capacity(count);
    for at in bytes[HEADER_BYTES..].chunks_exact(RUN_BYTES) {
        let run = Run { first: u32_at(at, 0), count: u32_at(at, 4) };
        if run.count == 0 || run.pages().end > pages {
            return malformed("a run is empty or goes beyond the memory");
        }
        if run.pages().any(|page| seen.set(page)) {
            return malformed("a page is there twice");
        }
        runs.push(run);
    }
    Ok(WorkingSet { memory_bytes, runs })
}

/// Writes a working set as its pages are asked for.
#[derive(Debug)]
pub(super) struct Recorder {
    seen: Bits,
    pages_left: u64,
    set: WorkingSet,
}

impl Recorder {
    /// Begins with `known`, if it is of this memory, and names at most `at_most_bytes`.
    pub(super) fn new(memory_bytes: u64, at_most_bytes: u64, known: Option<&WorkingSet>) -> Self {
        let pages_left = at_most_bytes / PAGE_BYTES;
        let seen = Bits::new(memory_bytes / PAGE_BYTES);
        let set = WorkingSet { memory_bytes, runs: Vec::new() };
        let mut recorder = Recorder { seen, pages_left, set };
        for run in known.iter().flat_map(|known| &known.runs) {
            recorder.add(run.pages());
        }
        recorder
    }

    /// Adds those of `pages` that are new, while there is room.
    pub(super) fn add(&mut self, pages: Range<u64>) {
        for page in pages {
            // Memory beyond 16 TiB has pages that a run cannot name.
            let Ok(number) = u32::try_from(page) else { return };
            if self.pages_left == 0 || self.seen.get(page) {
                continue;
            }
            let is_full = self.set.runs.len() == RUNS_MAX;
            match self.set.runs.last_mut() {
                Some(run) if run.pages().end == page && run.count < u32::MAX => run.count += 1,
                _ if is_full => return,
                _ => self.set.runs.push(Run { first: number, count: 1 }),
            }
            self.seen.set(page);
            self.pages_left -= 1;
        }
    }

    pub(super) fn recorded(&self) -> WorkingSet {
        self.set.clone()
    }
}

#[cfg(test)]
#[path = "working_set_tests.rs"]
mod tests;
