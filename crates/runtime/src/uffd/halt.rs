//! A word to stop that threads can wait for together with what they serve.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Said once, heard by all, for good.
#[derive(Debug)]
pub(super) struct Halt {
    event: OwnedFd,
    said: AtomicBool,
}

impl Halt {
    pub(super) fn new() -> io::Result<Halt> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Halt { event, said: AtomicBool::new(false) })
    }

    pub(super) fn say(&self) {
        self.said.store(true, Ordering::Release);
        // It fails only when the counter is full, and then it can be read already.
        let _already = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    pub(super) fn is_said(&self) -> bool {
        self.said.load(Ordering::Acquire)
    }

    /// Waits so long, or until it is said.
    pub(super) fn pause(&self, time: Duration) {
        let limit = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
        // A signal only makes the pause shorter.
        let _ended = poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&limit));
    }
}

impl AsFd for Halt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
