//! Calls on a userfaultfd that another process made, about that process' memory. Numbers and layouts:
//! `linux/userfaultfd.h`, and the kernel's document on userfaultfd.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::io::{Errno, ReadWriteFlags};

const UFFDIO_WAKE: libc::Ioctl = 0x8010_AA02;
const UFFDIO_COPY: libc::Ioctl = 0xC028_AA03;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xC020_AA04;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMOVE: u8 = 0x15;

/// The one flag of a fault on a page that is missing. Others are of guards that nobody asked for.
const FAULT_WRITE: u64 = 1;

const MESSAGE_BYTES: usize = 32;
/// Messages taken in one call. A guest has a fault for each of its processors, seldom more.
const MESSAGES: usize = 16;
/// For `preadv2`: a file without a position.
const NO_OFFSET: u64 = u64::MAX;

/// What the kernel tells of the other process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The pages from the first address up to the second were given back.
    Remove(u64, u64),
    /// Another kind, which nobody asked for.
    Other(u8),
}

/// How far an installation came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Installed {
    /// Bytes installed, from the first address on.
    pub(crate) bytes: u64,
    /// Why not all, if nothing was installed. With some bytes the next call tells.
    pub(crate) refused: Option<Errno>,
}

/// The descriptor. It may be held elsewhere too, and memory is guarded until all copies are closed.
#[derive(Debug, Clone)]
pub(crate) struct Userfault(Arc<OwnedFd>);

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeropage: i64,
}

impl Userfault {
    pub(crate) fn new(fd: Arc<OwnedFd>) -> Userfault {
        Userfault(fd)
    }

    /// Adds what has happened to `events`; nothing when nothing has. Never waits.
    ///
    /// # Errors
    /// I/O errors of the descriptor.
    pub(crate) fn read(&self, events: &mut Vec<Event>, at_most: usize) -> io::Result<usize> {
        let mut bytes = [0_u8; MESSAGE_BYTES * MESSAGES];
        let room = &mut bytes[..MESSAGE_BYTES * at_most.clamp(1, MESSAGES)];
        // The process at the other end shares the descriptor's flags and takes messages, too: only
        // the call's own flag keeps this thread from waiting for a message that is gone.
        let slices = &mut [IoSliceMut::new(room)];
        let read = match rustix::io::preadv2(&*self.0, slices, NO_OFFSET, ReadWriteFlags::NOWAIT) {
            // Kernels before 6.10 know no such flag here; the descriptor does not block anyway.
            Err(Errno::OPNOTSUPP) => rustix::io::read(&*self.0, &mut *room),
            other => other,
        };
        let length = match read {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let messages = room[..length].chunks_exact(MESSAGE_BYTES);
        let count = messages.len();
        events.extend(messages.map(event));
        Ok(count)
    }

    /// Installs `pages` at `to` and wakes who waits for them.
    pub(crate) fn copy(&self, to: u64, pages: &[u8]) -> Installed {
        let mut call = Copy {
            dst: to,
            src: u64::try_from(pages.as_ptr().addr()).expect("addresses have 64 bits"),
            len: u64::try_from(pages.len()).expect("a slice is shorter than 2^63 bytes"),
            mode: 0,
            copy: 0,
        };
        // SAFETY: the call reads and writes one `Copy`, which outlives it, and reads `len` bytes at
        // `src`, which `pages` lends. It writes into the other process only.
        let answer = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, &raw mut call) };
        installed(answer, call.copy, call.len)
    }

    /// Installs zeros at `to` and wakes who waits for them. Pages of 4 KiB only.
    pub(crate) fn zero(&self, to: u64, bytes: u64) -> Installed {
        let mut call = ZeroPage { range: Range { start: to, len: bytes }, mode: 0, zeropage: 0 };
        // SAFETY: the call reads and writes one `ZeroPage`, which outlives it.
        let answer = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut call) };
        installed(answer, call.zeropage, bytes)
    }

    /// Wakes who waits for these pages; it looks again whether they are there.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn wake(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut call = Range { start, len: bytes };
        // SAFETY: the call reads one `Range`, which outlives it.
        let answer = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, &raw mut call) };
        super::check(answer)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn installed(answer: libc::c_int, done: i64, asked: u64) -> Installed {
    if answer == 0 {
        return Installed { bytes: asked, refused: None };
    }
    let error = Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO);
    match u64::try_from(done) {
        Ok(bytes) if bytes > 0 => Installed { bytes: bytes.min(asked), refused: None },
        _ => Installed { bytes: 0, refused: Some(error) },
    }
}

fn event(message: &[u8]) -> Event {
    let word = |at: usize| {
        u64::from_ne_bytes(message[at..at + 8].try_into().expect("a message has 32 bytes"))
    };
    match message[0] {
        EVENT_PAGEFAULT if word(8) & !FAULT_WRITE == 0 => Event::Fault(word(16)),
        EVENT_REMOVE => Event::Remove(word(8), word(16)),
        EVENT_FORK => {
            let fd = RawFd::from_ne_bytes(message[8..12].try_into().expect("four bytes"));
            // SAFETY: with this message the kernel has put a new descriptor into this process, which
            // nobody else knows of. It is not wanted: dropping it closes it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Event::Other(EVENT_FORK)
        }
        other => Event::Other(other),
    }
}
