//! Every byte is right, whatever goes on.

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use belljar_runtime::contract::memory_source_suite;
use belljar_runtime::uffd::{
    BindPagesError, FileMemory, MemoryRun, MemorySource, PageServer, PageServerLimits,
    PageServerSpec, WorkingSet,
};

use crate::monitor::{hand_over, regions, send};
use crate::saved::{LIMIT, PAGE, Saved, assert_no_failure, content, limits, shuffled, until};
use crate::sys::GuardedMemory;

const PAGES: usize = 2048;

fn touch(memory: &GuardedMemory, page: usize) {
    let _there = memory.byte(page * PAGE);
}

/// All of a memory, to be prefetched.
fn everything(saved: &Saved) -> WorkingSet {
    let (server, _failures) = saved.serve(limits(1, 512), None);
    let memory = GuardedMemory::new(saved.pages * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    (0..saved.pages).for_each(|page| touch(&memory, page));
    let set = server.working_set().expect("it records");
    assert_eq!(set.bytes(), memory.bytes());
    set
}

#[test]
fn a_file_is_a_memory_source() {
    let saved = Saved::new(100);
    let memory = FileMemory::open(&saved.path("memory")).expect("open it");
    memory_source_suite(&memory, &saved.expected());
    std::fs::write(saved.path("odd"), [1; 4097]).expect("write a file");
    let error = FileMemory::open(&saved.path("odd")).expect_err("no pages");
    assert!(error.to_string().contains("of 4097 bytes as memory"), "{error}");
    FileMemory::open(&saved.path("none")).expect_err("no file");
}

#[test]
fn every_byte_is_right_whoever_asks_and_in_whatever_order() {
    let saved = Saved::new(PAGES);
    for (threads, window) in [(1, 1), (1, 16), (3, 16), (2, 512)] {
        let (server, _failures) = saved.serve(limits(threads, window), None);
        let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
        let _connection = hand_over(server.socket(), &memory).expect("hand it over");
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    for page in shuffled(PAGES, seed) {
                        assert!(memory.page(page * PAGE) == content(page), "page {page}");
                    }
                });
            }
        });
        assert_no_failure(&server);
        let stats = server.stats();
        assert_eq!(stats.installed_pages, PAGES as u64, "each page once");
        assert!(stats.faults <= 4 * PAGES as u64, "{stats:?}");
        if window > 1 {
            assert!(stats.faults < PAGES as u64, "windows save faults: {stats:?}");
        }
        server.close().expect("close it");
        assert!(!saved.path("socket").exists());
    }
}

#[test]
fn writes_stay_and_zeros_are_zeros() {
    let saved = Saved::new(PAGES);
    let (server, _failures) = saved.serve(limits(1, 16), None);
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    for page in shuffled(PAGES, 7) {
        memory.write(page * PAGE + 9, 0xA5);
        let mut expected = content(page);
        expected[9] = 0xA5;
        assert!(memory.page(page * PAGE) == expected, "page {page}");
    }
    assert_no_failure(&server);
}

/// Each thread has pages of its own, and gives them back and asks for them while the others do, and while the
/// whole memory is prefetched: what was given back is zeros for good, and everything else is not.
#[test]
fn pages_given_back_are_zeros_whatever_else_goes_on() {
    const THREADS: usize = 4;
    let saved = Saved::new(PAGES);
    let set = everything(&saved);
    for (round, fault_threads) in [1, 1, 3, 1, 2, 1].into_iter().enumerate() {
        let (server, _failures) = saved.serve(limits(fault_threads, 16), Some(set.clone()));
        let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
        let _connection = hand_over(server.socket(), &memory).expect("hand it over");
        std::thread::scope(|scope| {
            for own in 0..THREADS {
                let memory = &memory;
                scope.spawn(move || {
                    for page in shuffled(PAGES, (round * THREADS + own) as u64) {
                        if page % THREADS == own {
                            come_and_go(memory, page);
                        }
                    }
                });
            }
        });
        assert_no_failure(&server);
        assert!(server.stats().removed_pages >= (PAGES / 3) as u64, "{:?}", server.stats());
    }
}

/// A memory that lets the first reader have its bytes only when it is told to.
struct HeldMemory {
    memory: FileMemory,
    reached: SyncSender<()>,
    go: Mutex<Receiver<()>>,
}

impl MemorySource for HeldMemory {
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn run_at(&self, offset: u64, limit: u64) -> MemoryRun {
        self.memory.run_at(offset, limit)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(buf, offset)?;
        // The wait ends when the other end is dropped, and then nobody waits any more.
        if self.reached.try_send(()).is_ok() {
            let _dropped = self.go.lock().expect("one reader").recv();
        }
        Ok(())
    }
}

/// Content that was read before its page was given back does not come in after it.
#[test]
fn a_page_given_back_while_it_is_prefetched_stays_zeros() {
    let saved = Saved::new(64);
    let set = everything(&saved);
    let (reached, is_reached) = sync_channel(1);
    let (tell, go) = channel();
    let source = HeldMemory { memory: saved.memory(), reached, go: Mutex::new(go) };
    let limits = PageServerLimits { prefetch_threads: 1, ..limits(1, 1) };
    let (server, _failures) = saved.serve_from(Arc::new(source), limits, Some(set));
    let memory = GuardedMemory::new(64 * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    is_reached.recv_timeout(LIMIT).expect("the first pages are read");
    memory.remove(2 * PAGE, PAGE);
    drop(tell);
    until("the rest is there", || server.stats().prefetching_threads == 0);
    assert!(memory.page(2 * PAGE) == [0; PAGE], "it was given back");
    for page in [0, 1, 3, 4, 63] {
        assert!(memory.page(page * PAGE) == content(page), "page {page}");
    }
    assert_no_failure(&server);
}

fn come_and_go(memory: &GuardedMemory, page: usize) {
    let at = page * PAGE;
    let zeros = [0; PAGE];
    match page % 3 {
        0 => {
            memory.remove(at, PAGE);
            assert!(memory.page(at) == zeros, "page {page}, given back unseen");
        }
        1 => {
            assert!(memory.page(at) == content(page), "page {page}");
            memory.write(at + 5, 7);
            memory.remove(at, PAGE);
            assert!(memory.page(at) == zeros, "page {page}, given back");
            memory.write(at + 6, 8);
            memory.remove(at, PAGE);
            assert!(memory.page(at) == zeros, "page {page}, given back again");
        }
        _ => assert!(memory.page(at) == content(page), "page {page}"),
    }
}

#[test]
fn prefetching_races_with_faults_and_leaves_none() {
    let saved = Saved::new(PAGES);
    let set = everything(&saved);
    let (server, _failures) = saved.serve(limits(1, 1), Some(set));
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let memory = &memory;
            scope.spawn(move || {
                for page in shuffled(PAGES, seed).into_iter().take(PAGES / 2) {
                    assert!(memory.page(page * PAGE) == content(page), "page {page}");
                }
            });
        }
    });
    until("the working set is there", || {
        server.stats().installed_pages == PAGES as u64 && server.stats().prefetching_threads == 0
    });
    let before = server.stats();
    for page in 0..PAGES {
        assert!(memory.page(page * PAGE) == content(page), "page {page}");
    }
    assert_eq!(server.stats(), before, "nothing was missing");
    assert_no_failure(&server);
}

#[test]
fn what_was_asked_for_first_is_there_the_next_time() {
    let saved = Saved::new(PAGES);
    let touched: Vec<_> = shuffled(PAGES, 3).into_iter().take(200).collect();
    let (server, _failures) = saved.serve(limits(1, 4), None);
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let connection = hand_over(server.socket(), &memory).expect("hand it over");
    touched.iter().for_each(|page| touch(&memory, *page));
    let set = server.working_set().expect("it records");
    server.close().expect("close it");
    drop((memory, connection));
    // In the order of the faults, by aligned windows of four pages.
    let first = set.runs().next().expect("some runs");
    assert_eq!(first.start / PAGE as u64, (touched[0] & !3) as u64);
    let windows: BTreeSet<_> = touched.iter().map(|page| page / 4).collect();
    assert_eq!(set.bytes(), (windows.len() * 4 * PAGE) as u64);
    let path = saved.path("working-set");
    set.save(&path).expect("save it");
    let set = WorkingSet::load(&path, (PAGES * PAGE) as u64).expect("load it");

    let (server, _failures) = saved.serve(limits(1, 4), Some(set.clone()));
    let memory = GuardedMemory::new(PAGES * PAGE, false).expect("guard some memory");
    let _connection = hand_over(server.socket(), &memory).expect("hand it over");
    until("the working set is there", || {
        server.stats().installed_pages * PAGE as u64 == set.bytes()
    });
    for page in &touched {
        assert!(memory.page(page * PAGE) == content(*page), "page {page}");
    }
    assert_eq!(server.stats().faults, 0);
    let new = (0..PAGES).find(|page| !windows.contains(&(page / 4))).expect("not all are touched");
    assert!(memory.page(new * PAGE) == content(new));
    let more = server.working_set().expect("it records");
    assert_eq!(more.bytes(), set.bytes() + 4 * PAGE as u64, "what is known, and what is new");
    assert_eq!(more.runs().next(), set.runs().next());
}

#[test]
fn a_working_set_of_another_memory_is_refused() {
    let (small, large) = (Saved::new(64), Saved::new(128));
    let spec = PageServerSpec {
        socket: large.path("socket"),
        owner: None,
        source: Arc::new(FileMemory::open(&large.path("memory")).expect("open it")),
        working_set: Some(everything(&small)),
        limits: PageServerLimits::default(),
        on_failure: Box::new(drop),
    };
    let refused = PageServer::bind(spec).err().expect("another memory");
    assert!(matches!(refused, BindPagesError::OtherMemory { .. }), "{refused}");
    assert!(!large.path("socket").exists());
}

#[test]
fn huge_pages_are_served_whole() {
    const HUGE: usize = 2 << 20;
    let memory = match GuardedMemory::new(2 * HUGE, true) {
        Ok(memory) => memory,
        Err(e) => return belljar_testkit::skip(&format!("needs two free pages of 2 MiB: {e}")),
    };
    let saved = Saved::new(2 * HUGE / PAGE);
    let (server, _failures) = saved.serve(limits(1, 1), None);
    let told = regions(&memory, HUGE as u64);
    let connection = send(server.socket(), told.as_bytes(), &[memory.userfault()]);
    let _connection = connection.expect("hand it over");
    for page in shuffled(saved.pages, 5) {
        assert!(memory.page(page * PAGE) == content(page), "page {page}");
    }
    assert_eq!(server.stats().installed_pages, saved.pages as u64);
    memory.remove(HUGE, HUGE);
    assert!(memory.page(HUGE + 3 * PAGE) == [0; PAGE], "given back");
    assert!(memory.page(3 * PAGE) == content(3), "the other is as it was");
    assert_no_failure(&server);
}
