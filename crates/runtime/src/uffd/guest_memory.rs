//! The memory of one machine: which pages have been installed, which were given back, and how a span of
//! them is filled.
//!
//! What a page holds when it is asked for:
//!
//! ```text
//!                  asked for                     given back
//!   saved content ───────────► installed ────────────────────► zeros
//!         └──────────────────────────────────────────────────►
//! ```
//!
//! A page that was given back once is zeros whenever it is asked for again. The kernel tells of that
//! before it happens, refuses to install anything until the message was read, and drops the pages
//! only then. So whoever reads messages holds `gate` alone until they are noted, and whoever installs
//! saved content holds it together with others and looks at the notes once more: content that was
//! read before the message cannot come in after it.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::bits::Bits;
use super::error::PageServeError;
use super::halt::Halt;
use super::layout::{Layout, Span};
use super::source::{MemoryRun, MemorySource};
use super::stats::Counters;
use super::working_set::Recorder;
use crate::pages::PAGE_BYTES;
use crate::sys::userfault::{Event, Installed, Userfault};

/// Read and installed at once, in bytes. No message of the kernel is read meanwhile: some 30 us.
pub(super) const PIECE_BYTES: u64 = 64 << 10;
/// Faults remembered before they are served. A machine has one for each of its threads.
const FAULTS_MAX: usize = 1 << 16;
/// Messages read at once, so that a machine that never stops sending them does not keep others waiting.
pub(super) const EVENTS_MAX: usize = 1024;
/// How long to wait while the other process is between telling that pages go and dropping them.
const MOMENT: Duration = Duration::from_micros(20);

/// Why serving ended.
#[derive(Debug)]
pub(super) enum Stop {
    /// The machine's process is gone.
    Gone,
    /// It was called off.
    Halted,
    /// The machine cannot go on.
    Failed(PageServeError),
}

/// Shared by the threads of one server.
pub(super) struct GuestMemory {
    pub(super) userfault: Userfault,
    pub(super) layout: Layout,
    pub(super) source: Arc<dyn MemorySource>,
    pub(super) peer: UnixStream,
    pub(super) halt: Arc<Halt>,
    pub(super) counters: Arc<Counters>,
    pub(super) recorder: Option<Arc<Mutex<Recorder>>>,
    /// Given back at some time.
    pub(super) removed: Bits,
    /// Installed, and not given back since, as far as messages tell. Saves work, decides nothing.
    pub(super) installed: Bits,
    pub(super) gate: RwLock<()>,
}

/// Where content is put on its way.
pub(super) struct Buffer(Vec<u8>);

/// What comes into a span next.
enum Content {
    Zeros(u64),
    Saved(u64),
}

impl Content {
    fn of(run: MemoryRun) -> Content {
        match run {
            MemoryRun::Zeros(bytes) => Content::Zeros(bytes),
            MemoryRun::Data(bytes) => Content::Saved(bytes),
        }
    }
}

impl GuestMemory {
    /// A buffer for one thread.
    pub(super) fn buffer(&self) -> Buffer {
        let bytes = PIECE_BYTES.max(self.layout.largest_page_bytes());
        Buffer(vec![0; usize::try_from(bytes).expect("2 MiB at most")])
    }

    /// Waits until the kernel has a message.
    pub(super) fn wait(&self) -> Result<(), Stop> {
        loop {
            let mut watched = [
                PollFd::new(&*self.halt, PollFlags::IN),
                // Only that it hung up; what it may still send is nobody's.
                PollFd::new(&self.peer, PollFlags::empty()),
                PollFd::new(&self.userfault, PollFlags::IN),
            ];
            match poll(&mut watched, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(Stop::io("wait for page faults", e)),
            }
            let [halt, peer, userfault] = watched.map(|each| each.revents());
            if !halt.is_empty() {
                return Err(Stop::Halted);
            }
            if !peer.is_empty() {
                return Err(Stop::Gone);
            }
            if userfault.intersects(PollFlags::ERR | PollFlags::NVAL) {
                // The process at the other end has made it blocking, which its kernel part refuses.
                return Err(Stop::io("poll the machine's userfaultfd", Errno::IO));
            }
            if userfault.contains(PollFlags::IN) {
                return Ok(());
            }
        }
    }

    /// Reads `at_most` of the kernel's messages: notes what was given back, and adds the faults to `faults`.
    pub(super) fn read_events(
        &self,
        faults: &mut VecDeque<u64>,
        at_most: usize,
    ) -> Result<(), Stop> {
        let mut events = Vec::new();
        let mut found = 0;
        let _alone = self.gate.write().expect("nothing that can panic runs under this lock");
        while found < at_most {
            events.clear();
            let read = self.userfault.read(&mut events, at_most - found);
            let read = read.map_err(|e| Stop::io("read page faults", e))?;
            for event in &events {
                match *event {
                    Event::Fault(_) if faults.len() == FAULTS_MAX => {
                        let limit = FAULTS_MAX;
                        return Err(Stop::Failed(PageServeError::TooManyFaults { limit }));
                    }
                    Event::Fault(address) => faults.push_back(address),
                    Event::Remove(start, end) => self.note_removed(start, end),
                    Event::Other(event) => {
                        return Err(Stop::Failed(PageServeError::Event { event }));
                    }
                }
            }
            if read == 0 {
                break;
            }
            found += read;
        }
        Ok(())
    }

    fn note_removed(&self, start: u64, end: u64) {
        for span in self.layout.spans_between(start, end) {
            self.removed.set_all(span.pages());
            self.installed.clear_all(span.pages());
            self.counters.removed(span.bytes);
        }
    }

    /// Installs all pages of `span` that are not there, and wakes who waits for them. While the kernel
    /// refuses because pages are being given back, it calls `stalled` and tries again.
    pub(super) fn install(
        &self,
        span: Span,
        buffer: &mut Buffer,
        stalled: &mut dyn FnMut() -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let mut rest = span;
        while rest.bytes > 0 {
            if self.halt.is_said() {
                return Err(Stop::Halted);
            }
            match self.install_some(rest, buffer)? {
                Some(bytes) => rest = rest.split(bytes).1,
                None => stalled()?,
            }
        }
        Ok(())
    }

    /// Waits a moment for another process to do what it was told it may. `Gone` when it is.
    pub(super) fn pause(&self) -> Result<(), Stop> {
        self.halt.pause(MOMENT);
        let mut watched = [PollFd::new(&self.peer, PollFlags::empty())];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut watched, Some(&now)) {
            Ok(0) | Err(Errno::INTR) => Ok(()),
            Ok(_) => Err(Stop::Gone),
            Err(e) => Err(Stop::io("look whether the machine is gone", e)),
        }
    }

    /// Installs the first pages of `span`: how many bytes are settled, or `None` when the kernel refuses
    /// for the moment.
    fn install_some(&self, span: Span, buffer: &mut Buffer) -> Result<Option<u64>, Stop> {
        let content = self.content(span);
        let (Content::Zeros(bytes) | Content::Saved(bytes)) = content;
        let (mut piece, _) = span.split(bytes);
        if let Content::Saved(_) = content {
            let part = &mut buffer.0[..index(piece.bytes)];
            self.source.read_at(part, piece.offset).map_err(|source| {
                let Span { offset, bytes, .. } = piece;
                Stop::Failed(PageServeError::Source { offset, bytes, source })
            })?;
        } else if piece.page_bytes > PAGE_BYTES {
            buffer.0[..index(piece.bytes)].fill(0);
        }
        let _together = self.gate.read().expect("nothing that can panic runs under this lock");
        if let Content::Saved(_) = content {
            let (removed, pages) = self.removed.run(piece.pages());
            if removed {
                // Given back since it was looked at: the next turn sees that.
                return Ok(Some(0));
            }
            piece = piece.split(pages * PAGE_BYTES).0;
        }
        let done = match content {
            Content::Zeros(_) if piece.page_bytes == PAGE_BYTES => {
                self.userfault.zero(piece.address, piece.bytes)
            }
            _ => self.userfault.copy(piece.address, &buffer.0[..index(piece.bytes)]),
        };
        self.settle(piece, done)
    }

    /// Notes what an installation has done.
    fn settle(&self, piece: Span, done: Installed) -> Result<Option<u64>, Stop> {
        let there = |bytes: u64| self.installed.set_all(piece.split(bytes).0.pages());
        match done.refused {
            None => {
                there(done.bytes);
                self.counters.installed(done.bytes);
                Ok(Some(done.bytes))
            }
            Some(Errno::EXIST) => {
                // Another thread was quicker. Its call has woken who waited then, but not who came
                // to wait between.
                there(piece.page_bytes);
                let woken = self.userfault.wake(piece.address, piece.page_bytes);
                woken.map_err(|e| Stop::io("wake who waits for a page", e))?;
                Ok(Some(piece.page_bytes))
            }
            Some(Errno::AGAIN) => Ok(None),
            Some(Errno::SRCH) => Err(Stop::Gone),
            Some(errno) => {
                let Span { address, bytes, .. } = piece;
                let source = errno.into();
                Err(Stop::Failed(PageServeError::Install { address, bytes, source }))
            }
        }
    }

    /// What the first pages of `span` hold, and how many bytes of it are installed at once.
    fn content(&self, span: Span) -> Content {
        let limit = span.bytes.min(PIECE_BYTES.max(span.page_bytes));
        let (removed, pages) = self.removed.run(span.split(limit).0.pages());
        let limit = (pages * PAGE_BYTES).min(limit);
        if removed {
            return Content::Zeros(whole(limit, span.page_bytes).max(span.page_bytes));
        }
        let limit = whole(limit, span.page_bytes).max(span.page_bytes);
        match Content::of(self.source.run_at(span.offset, limit)) {
            Content::Zeros(bytes) if whole(bytes.min(limit), span.page_bytes) > 0 => {
                Content::Zeros(whole(bytes.min(limit), span.page_bytes))
            }
            // What is zeros in a part of a large page only is read with the rest.
            Content::Zeros(bytes) | Content::Saved(bytes) => {
                Content::Saved(bytes.clamp(1, limit).next_multiple_of(span.page_bytes))
            }
        }
    }

    /// The recorder, if there is one.
    pub(super) fn recorder(&self) -> Option<MutexGuard<'_, Recorder>> {
        let recorder = self.recorder.as_ref()?;
        Some(recorder.lock().expect("nothing that can panic runs under this lock"))
    }
}

impl Stop {
    fn io(step: &'static str, source: impl Into<std::io::Error>) -> Stop {
        Stop::Failed(PageServeError::Io { step, source: source.into() })
    }
}

/// The part of `bytes` that is whole pages.
fn whole(bytes: u64, page_bytes: u64) -> u64 {
    bytes - bytes % page_bytes
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("no longer than a buffer")
}
