//! A saved memory to be served, and a server for it.

use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use belljar_runtime::uffd::{
    FileMemory, MemorySource, PageServeError, PageServer, PageServerLimits, PageServerSpec,
    WorkingSet,
};

pub(crate) const PAGE: usize = 4096;
/// Longer than anything takes on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn limits(fault_threads: usize, window_pages: usize) -> PageServerLimits {
    let window_bytes = (window_pages * PAGE) as u64;
    PageServerLimits { fault_threads, window_bytes, ..PageServerLimits::default() }
}

pub(crate) fn assert_no_failure(server: &PageServer) {
    if let Some(failure) = server.failure() {
        panic!("failed to {failure}: {failure:?}");
    }
}

/// What the page of this number holds: bytes of its own, or zeros in every run of 5 after 13 pages.
pub(crate) fn content(page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if page % 18 < 13 {
        let seed = (page as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&seed.rotate_left(index as u32 % 64).to_le_bytes());
        }
    }
    bytes
}

/// A memory file of so many pages, with holes where pages are zeros.
pub(crate) struct Saved {
    folder: tempfile::TempDir,
    pub(crate) pages: usize,
}

impl Saved {
    pub(crate) fn new(pages: usize) -> Saved {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = std::fs::File::create(folder.path().join("memory")).expect("make the memory");
        file.set_len((pages * PAGE) as u64).expect("size it");
        for page in (0..pages).filter(|page| page % 18 < 13) {
            file.write_all_at(&content(page), (page * PAGE) as u64).expect("fill it");
        }
        (&file).flush().expect("files do not buffer");
        Saved { folder, pages }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn expected(&self) -> Vec<u8> {
        (0..self.pages).flat_map(content).collect()
    }

    /// Serves it; failures come out of the channel.
    pub(crate) fn serve(
        &self,
        limits: PageServerLimits,
        working_set: Option<WorkingSet>,
    ) -> (PageServer, Receiver<Arc<PageServeError>>) {
        self.serve_from(Arc::new(self.memory()), limits, working_set)
    }

    pub(crate) fn memory(&self) -> FileMemory {
        FileMemory::open(&self.path("memory")).expect("open the memory")
    }

    pub(crate) fn serve_from(
        &self,
        source: Arc<dyn MemorySource>,
        limits: PageServerLimits,
        working_set: Option<WorkingSet>,
    ) -> (PageServer, Receiver<Arc<PageServeError>>) {
        let (failed, failures) = channel();
        let server = PageServer::bind(PageServerSpec {
            socket: self.path("socket"),
            owner: None,
            source,
            working_set,
            limits,
            on_failure: Box::new(move |failure| {
                // A test that has seen enough has hung up.
                let _heard = failed.send(failure);
            }),
        });
        (server.expect("serve the memory"), failures)
    }
}

/// Waits for what another thread or process does.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for this: {what}");
        std::thread::yield_now();
    }
}

/// All pages in an order that depends on `seed`.
pub(crate) fn shuffled(pages: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<_> = (0..pages).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for last in (1..pages).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order
}
