//! The guest's memory inside a machine's process: found, read and written through `/proc`.
//!
//! A machine maps a file privately. A page it has written is its own and no page of that file any
//! more, which the kernel tells apart in `/proc/PID/pagemap`. Nothing is asked of the process, so a
//! frozen one is read as fast as memory can be copied, and a new one is written before it runs.
//! Sources: Linux's `admin-guide/mm/pagemap.rst` and `filesystems/proc.rst`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::keeper::ProcessHandle;
use crate::pages::{PAGE_BYTES, PageSink, PageSource, check_run};

/// Pages read, and passed on, at a time.
const RUN_BYTES: usize = 1 << 20;
/// Entries of the page map read at a time: 64 KiB, for 32 MiB of memory.
const ENTRIES: usize = 8192;
const ENTRY_BYTES: usize = 8;
/// A process has at most 65,530 mappings, each told in some hundred bytes.
const MAPS_MAX_BYTES: u64 = 16 << 20;

/// Bits of an entry of the page map.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, or of memory shared with others.
const OF_FILE: u64 = 1 << 61;

/// The file a machine maps as its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryFile {
    inode: u64,
    bytes: u64,
}

impl MemoryFile {
    /// # Errors
    /// I/O errors.
    pub(crate) fn of(file: &File) -> io::Result<MemoryFile> {
        let metadata = file.metadata()?;
        Ok(MemoryFile { inode: metadata.ino(), bytes: metadata.len() })
    }
}

/// Why pages were not passed on.
#[derive(Debug)]
pub(crate) enum ReadError {
    Memory(io::Error),
    Sink(io::Error),
    /// Nobody waits for them any more.
    Abandoned,
}

/// Tells a thread that nobody waits for it any more, when dropped.
#[derive(Debug, Default)]
pub(crate) struct Abandon(Arc<AtomicBool>);

impl Abandon {
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The memory of a living process's guest.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    memory: File,
    page_map: File,
    /// Sorted by offset, without gaps.
    pieces: Vec<Piece>,
    bytes: u64,
}

/// A part of the file and where the process has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    address: u64,
    bytes: u64,
}

impl GuestMemory {
    /// Finds the memory of `process`. The files opened here mean this process for good, whatever
    /// becomes of its id.
    ///
    /// # Errors
    /// I/O errors, also when the process is gone or has not mapped all of the file privately.
    pub(crate) fn open(process: &ProcessHandle, file: MemoryFile) -> io::Result<GuestMemory> {
        let pid = process.pid();
        let path = |name: &str| format!("/proc/{pid}/{name}");
        let memory = OpenOptions::new().read(true).write(true).open(path("mem"))?;
        let page_map = File::open(path("pagemap"))?;
        let mut maps = String::new();
        File::open(path("maps"))?.take(MAPS_MAX_BYTES).read_to_string(&mut maps)?;
        // Alive now, so its id meant it until now.
        if !process.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let pieces = pieces(&maps, file)?;
        Ok(GuestMemory { memory, page_map, pieces, bytes: file.bytes })
    }

    /// Passes every page on that the process does not share with the file, or that `also` wants by
    /// its number. Says how many bytes those were.
    ///
    /// # Errors
    /// [`ReadError`].
    pub(crate) fn read_private(
        &self,
        sink: &mut dyn PageSink,
        also: &dyn Fn(u64) -> bool,
        abandoned: &AtomicBool,
    ) -> Result<u64, ReadError> {
        let mut entries = vec![0; ENTRIES * ENTRY_BYTES];
        let mut pages = vec![0; RUN_BYTES];
        let mut passed_on = 0;
        for piece in &self.pieces {
            let mut done = 0;
            while done < piece.bytes {
                let rest = (piece.bytes - done) / PAGE_BYTES;
                let count = usize::try_from(rest).map_or(ENTRIES, |rest| rest.min(ENTRIES));
                let entries = &mut entries[..count * ENTRY_BYTES];
                let first = (piece.address + done) / PAGE_BYTES;
                self.page_map
                    .read_exact_at(entries, first * ENTRY_BYTES as u64)
                    .map_err(ReadError::Memory)?;
                for (start, length) in
                    private_runs(entries, &|place| also((piece.offset + done) / PAGE_BYTES + place))
                {
                    if abandoned.load(Ordering::Acquire) {
                        return Err(ReadError::Abandoned);
                    }
                    let at = done + start * PAGE_BYTES;
                    let run = &mut pages[..length * PAGE_BYTES as usize];
                    self.memory
                        .read_exact_at(run, piece.address + at)
                        .map_err(ReadError::Memory)?;
                    sink.write(piece.offset + at, run).map_err(ReadError::Sink)?;
                    passed_on += run.len() as u64;
                }
                done += count as u64 * PAGE_BYTES;
            }
        }
        Ok(passed_on)
    }

    /// Writes pages over what the process has. Says how many bytes those were.
    ///
    /// # Errors
    /// I/O errors of both sides; [`io::ErrorKind::InvalidData`] for runs that are no pages of the
    /// memory.
    pub(crate) fn install(
        &self,
        source: &dyn PageSource,
        abandoned: &AtomicBool,
    ) -> io::Result<u64> {
        let mut installed = 0;
        source.read_runs(&mut |offset, pages| {
            if abandoned.load(Ordering::Acquire) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            check_run(offset, pages.len(), self.bytes)?;
            installed += pages.len() as u64;
            self.write(offset, pages)
        })?;
        Ok(installed)
    }

    fn write(&self, mut offset: u64, mut pages: &[u8]) -> io::Result<()> {
        let first = self.pieces.partition_point(|piece| piece.offset + piece.bytes <= offset);
        for piece in &self.pieces[first..] {
            if pages.is_empty() {
                break;
            }
            let within = offset - piece.offset;
            let fits = usize::try_from(piece.bytes - within).unwrap_or(usize::MAX);
            let (now, later) = pages.split_at(pages.len().min(fits));
            self.memory.write_all_at(now, piece.address + within)?;
            offset += now.len() as u64;
            pages = later;
        }
        Ok(())
    }
}

/// Runs of pages, private or wanted by `also`, in a piece of a page map: where each starts and its length, in pages, at
/// most [`RUN_BYTES`] long.
fn private_runs(entries: &[u8], also: &dyn Fn(u64) -> bool) -> impl Iterator<Item = (u64, usize)> {
    const LONGEST: usize = RUN_BYTES / PAGE_BYTES as usize;
    let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
    let is_own = move |place: usize| {
        let entry = u64::from_ne_bytes(entries[place]);
        (entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0) || also(place as u64)
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        at += (at..entries.len()).position(is_own)?;
        let run = (at..entries.len()).take(LONGEST).take_while(|place| is_own(*place));
        let (start, length) = (at, run.count());
        at += length;
        Some((start as u64, length))
    })
}

/// Where the process has the file's parts, by the lines of `/proc/PID/maps`.
///
/// The file is known by its inode's number. The device is not compared, because file systems with
/// several volumes show another one there than they say of the file; instead the parts must be
/// private, of one device, and make up the whole file, each byte once.
fn pieces(maps: &str, file: MemoryFile) -> io::Result<Vec<Piece>> {
    let invalid = |what: &str| {
        let what = format!("the machine's process has its memory file mapped {what}");
        io::Error::new(io::ErrorKind::InvalidData, what)
    };
    let mut found: Vec<(&str, Piece)> =
        maps.lines().filter_map(|line| piece(line, file.inode)).collect();
    found.sort_by_key(|(device, piece)| (*device, piece.offset));
    let mut whole = found.chunk_by(|a, b| a.0 == b.0).filter_map(|of_device| {
        let mut end = 0;
        for (_, piece) in of_device {
            if piece.offset != end {
                return None;
            }
            end += piece.bytes;
        }
        (end == file.bytes).then(|| of_device.iter().map(|(_, piece)| *piece).collect())
    });
    match (whole.next(), whole.next()) {
        (Some(pieces), None) => Ok(pieces),
        (Some(_), Some(_)) => Err(invalid("twice")),
        (None, _) => Err(invalid("in part, or not at all")),
    }
}

/// A line of `/proc/PID/maps`, if it is a private mapping of that inode: its device and place.
fn piece(line: &str, inode: u64) -> Option<(&str, Piece)> {
    // 7f0000000000-7f0008000000 rw-p 00000000 08:01 1234   /path
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (offset, device) = (hex(words.next()?)?, words.next()?);
    if words.next()?.parse::<u64>().ok()? != inode || !rights.ends_with('p') {
        return None;
    }
    let address = hex(from)?;
    let bytes = hex(to)?.checked_sub(address)?;
    Some((device, Piece { offset, address, bytes }))
}

#[cfg(test)]
mod tests;
