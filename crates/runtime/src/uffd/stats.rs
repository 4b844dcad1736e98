//! What a page server has done so far.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::pages::PAGE_BYTES;

/// Numbers of one page server, for figures and tests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PageServerStats {
    /// Page faults that were served.
    pub faults: u64,
    /// Pages of 4 KiB that were installed, for whatever reason.
    pub installed_pages: u64,
    /// Pages of 4 KiB that the machine gave back, as often as it did.
    pub removed_pages: u64,
    /// Threads that install the working set. 0: it is done, or there was none.
    pub prefetching_threads: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    faults: AtomicU64,
    installed_bytes: AtomicU64,
    removed_bytes: AtomicU64,
    prefetching: AtomicU64,
}

impl Counters {
    pub(super) fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn installed(&self, bytes: u64) {
        self.installed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn removed(&self, bytes: u64) {
        self.removed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts one thread of those that install the working set, for as long as it lives.
    pub(super) fn prefetcher(self: &Arc<Self>) -> Prefetching {
        self.prefetching.fetch_add(1, Ordering::AcqRel);
        Prefetching(Arc::clone(self))
    }

    pub(super) fn stats(&self) -> PageServerStats {
        PageServerStats {
            faults: self.faults.load(Ordering::Relaxed),
            installed_pages: self.installed_bytes.load(Ordering::Relaxed) / PAGE_BYTES,
            removed_pages: self.removed_bytes.load(Ordering::Relaxed) / PAGE_BYTES,
            prefetching_threads: self.prefetching.load(Ordering::Acquire),
        }
    }
}

pub(super) struct Prefetching(Arc<Counters>);

impl Drop for Prefetching {
    fn drop(&mut self) {
        self.0.prefetching.fetch_sub(1, Ordering::AcqRel);
    }
}
