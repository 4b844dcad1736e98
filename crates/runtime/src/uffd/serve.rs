//! What the threads of a page server do: answer faults, and install the working set ahead of them.

use std::collections::VecDeque;
use std::sync::Mutex;

use tracing::{debug, warn};

use super::error::PageServeError;
use super::guest_memory::{Buffer, EVENTS_MAX, GuestMemory, PIECE_BYTES, Stop};
use super::layout::Span;
use super::working_set::WorkingSet;

/// Windows remembered to be filled when nobody waits. Beyond it the oldest are left to later faults.
const WINDOWS_MAX: usize = 64;
/// How much of a window is filled before faults are looked for again, in bytes: some 8 us.
const WINDOW_PIECE_BYTES: u64 = 16 << 10;

/// Answers faults until the end. The page that is waited for comes first, the rest of its window when
/// nobody waits. With `alone` it takes all faults there are, without one at a time, so that others
/// find some, too.
pub(super) fn serve_faults(memory: &GuestMemory, window_bytes: u64, alone: bool) -> Stop {
    let mut server = FaultServer {
        memory,
        window_bytes,
        at_once: if alone { EVENTS_MAX } else { 1 },
        faults: VecDeque::new(),
        windows: VecDeque::new(),
        buffer: memory.buffer(),
    };
    loop {
        if let Err(stop) = server.turn() {
            return stop;
        }
    }
}

struct FaultServer<'a> {
    memory: &'a GuestMemory,
    window_bytes: u64,
    at_once: usize,
    faults: VecDeque<u64>,
    windows: VecDeque<Span>,
    buffer: Buffer,
}

impl FaultServer<'_> {
    fn turn(&mut self) -> Result<(), Stop> {
        if self.windows.is_empty() {
            self.memory.wait()?;
        }
        self.memory.read_events(&mut self.faults, self.at_once)?;
        while let Some(address) = self.faults.pop_front() {
            self.answer(address)?;
        }
        let Some(window) = self.windows.pop_front() else { return Ok(()) };
        let (now, later) = window.split(WINDOW_PIECE_BYTES.max(window.page_bytes));
        if later.bytes > 0 {
            self.windows.push_front(later);
        }
        for missing in missing(self.memory, now) {
            match self.install(missing) {
                // Nobody waits for it. If anybody ever does, the source is asked again, and it counts.
                Err(Stop::Failed(PageServeError::Source { offset, source, .. })) => {
                    debug!(offset, error = %source, "a neighbour of a page is not read");
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn answer(&mut self, address: u64) -> Result<(), Stop> {
        let found = self.memory.layout.page_and_window(address, self.window_bytes);
        let Some((page, window)) = found else {
            return Err(Stop::Failed(PageServeError::Elsewhere { address }));
        };
        let first = page.pages().start;
        let is_new = !self.memory.installed.get(first) && !self.memory.removed.get(first);
        // Noted first: whoever has seen the page must find it in the figures and in the record.
        self.memory.counters.fault();
        if is_new && let Some(mut recorder) = self.memory.recorder() {
            recorder.add(window.pages());
        }
        self.install(page)?;
        if is_new && window.bytes > page.bytes {
            if self.windows.len() == WINDOWS_MAX {
                self.windows.pop_back();
            }
            self.windows.push_front(window);
        }
        Ok(())
    }

    fn install(&mut self, span: Span) -> Result<(), Stop> {
        let faults = &mut self.faults;
        let memory = self.memory;
        memory.install(span, &mut self.buffer, &mut || {
            // Pages are being given back, and nothing can be installed before that was read.
            memory.read_events(faults, EVENTS_MAX)?;
            memory.pause()
        })
    }
}

/// The parts of `span` that are neither installed nor given back, by whole pages.
fn missing(memory: &GuestMemory, span: Span) -> Vec<Span> {
    let mut parts: Vec<Span> = Vec::new();
    let mut rest = span;
    while rest.bytes > 0 {
        let (page, after) = rest.split(rest.page_bytes);
        rest = after;
        let first = page.pages().start;
        if memory.installed.get(first) || memory.removed.get(first) {
            continue;
        }
        match parts.last_mut() {
            Some(last) if last.offset + last.bytes == page.offset => last.bytes += page.bytes,
            _ => parts.push(page),
        }
    }
    parts
}

/// What of the working set is still to be installed.
pub(super) struct Prefetch(Mutex<VecDeque<Span>>);

impl Prefetch {
    /// The working set where this machine has its memory.
    pub(super) fn new(memory: &GuestMemory, set: &WorkingSet) -> Prefetch {
        Prefetch(Mutex::new(set.runs().flat_map(|run| memory.layout.spans_of(run)).collect()))
    }

    /// The next piece, in the set's order.
    fn next(&self) -> Option<Span> {
        let mut spans = self.0.lock().expect("nothing that can panic runs under this lock");
        let span = spans.pop_front()?;
        let (now, later) = span.split(PIECE_BYTES.max(span.page_bytes));
        if later.bytes > 0 {
            spans.push_front(later);
        }
        Some(now)
    }

    /// Installs pieces until there are none. Several threads may.
    ///
    /// # Errors
    /// What ends the machine. A source that fails here does not: it is asked again if the machine ever
    /// wants the page, and then it counts.
    pub(super) fn run(&self, memory: &GuestMemory) -> Result<(), Stop> {
        let mut buffer = memory.buffer();
        while let Some(piece) = self.next() {
            for missing in missing(memory, piece) {
                match memory.install(missing, &mut buffer, &mut || memory.pause()) {
                    Ok(()) => {}
                    Err(Stop::Failed(PageServeError::Source { offset, source, .. })) => {
                        warn!(offset, error = %source, "a working set is not read ahead any more");
                        return Ok(());
                    }
                    Err(stop) => return Err(stop),
                }
            }
        }
        Ok(())
    }
}
