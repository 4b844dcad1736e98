//! How serving ends: by the monitor's death, by a failure, by being closed. Nothing stays behind.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;

use belljar_runtime::uffd::{MemoryRun, MemorySource, PageServeError, PageServerLimits};

use crate::monitor::{hand_over, regions, send};
use crate::saved::{LIMIT, PAGE, Saved, content, limits, until};
use crate::sys::GuardedMemory;

const PAGES: usize = 2048;

/// A monitor in a process of its own. Killed when dropped.
struct Monitor(Child);

impl Monitor {
    fn start(socket: &Path, pages: usize) -> Monitor {
        let child = Command::new(std::env::current_exe().expect("a test program"))
            .args(["--exact", "ends::monitor_process", "--nocapture", "--test-threads=1"])
            .env("BELLJAR_TEST_PAGE_SOCKET", socket)
            .env("BELLJAR_TEST_PAGES", pages.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Monitor(child.expect("start this program again"))
    }

    /// Has it look at pages, `count` from `first` on.
    fn ask(&mut self, first: usize, count: usize) {
        let input = self.0.stdin.as_mut().expect("its input is a pipe");
        writeln!(input, "{first} {count}").expect("it listens");
    }

    /// Kills it, and what it had said.
    fn end(mut self) -> (Option<i32>, String) {
        self.0.kill().expect("kill it");
        let mut said = String::new();
        let output = self.0.stdout.as_mut().expect("its output is a pipe");
        output.read_to_string(&mut said).expect("its words are text");
        (self.0.wait().expect("wait for it").signal(), said)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // After `end` it is gone.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Not a test by itself: what a [`Monitor`] does. It says what it saw of the pages it was asked for.
#[test]
fn monitor_process() {
    let Some(socket) = std::env::var_os("BELLJAR_TEST_PAGE_SOCKET") else { return };
    let pages = std::env::var_os("BELLJAR_TEST_PAGES").expect("set with the other");
    let pages: usize = pages.to_str().and_then(|pages| pages.parse().ok()).expect("a number");
    let memory = GuardedMemory::new(pages * PAGE, false).expect("guard some memory");
    let _connection = hand_over(Path::new(&socket), &memory).expect("hand it over");
    for line in BufReader::new(std::io::stdin()).lines() {
        let line = line.expect("read a line");
        let (first, count) = line.split_once(' ').expect("two numbers");
        let (first, count): (usize, usize) =
            (first.parse().expect("a number"), count.parse().expect("a number"));
        for page in first..first + count {
            let right = memory.page(page * PAGE) == content(page);
            println!("page {page} {}", if right { "right" } else { "WRONG" });
        }
    }
}

#[test]
fn a_monitor_that_dies_ends_its_server() {
    let saved = Saved::new(PAGES);
    let (server, failures) = saved.serve(limits(2, 1), None);
    let mut monitor = Monitor::start(server.socket(), PAGES);
    monitor.ask(0, PAGES);
    until("it is at work", || server.stats().faults > 50);
    let (signal, said) = monitor.end();
    assert_eq!(signal, Some(9));
    assert!(!said.contains("WRONG"), "{said}");
    // It ends by itself, and a death is no failure of ours.
    let ended = failures.recv_timeout(LIMIT).expect_err("no failure");
    assert_eq!(ended, RecvTimeoutError::Disconnected);
    server.close().expect("close it");
    assert!(server.failure().is_none());
}

#[test]
fn a_source_that_fails_ends_the_machine_and_shows_it_nothing() {
    let saved = Saved::new(PAGES);
    let (server, failures) = saved.serve(limits(1, 16), None);
    let mut monitor = Monitor::start(server.socket(), PAGES);
    monitor.ask(0, 1);
    until("its first page is there", || server.stats().faults > 0);
    let file = std::fs::File::options().write(true).open(saved.path("memory"));
    file.expect("open the memory").set_len((PAGES / 2 * PAGE) as u64).expect("cut it off");
    // A multiple of 18: not zeros.
    monitor.ask(1080, 1);
    let failure = failures.recv_timeout(LIMIT).expect("the failure is told");
    let PageServeError::Source { offset, source, .. } = &*failure else { panic!("{failure:?}") };
    assert_eq!(
        (*offset, failure.to_string()),
        (1080 * 4096, "read 4096 bytes of memory at 4423680".to_owned())
    );
    assert!(source.to_string().contains("memory from 4423680 to 4427776"), "{source}");
    let (_, said) = monitor.end();
    assert!(said.contains("page 0 right") && !said.contains("page 1080"), "{said}");
    server.close().expect("close it");
    assert!(server.failure().is_some());
}

#[test]
fn a_fault_outside_the_told_regions_ends_the_machine() {
    let saved = Saved::new(64);
    let (server, failures) = saved.serve(limits(1, 1), None);
    let memory = GuardedMemory::new(64 * PAGE, false).expect("guard some memory");
    let told = regions(&memory, 4096).replace(&format!("\"size\":{}", 64 * PAGE), "\"size\":4096");
    let _connection = send(server.socket(), told.as_bytes(), &[memory.userfault()]).expect("send");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| memory.page(5 * PAGE));
        let failure = failures.recv_timeout(LIMIT).expect("the failure is told");
        assert!(matches!(*failure, PageServeError::Elsewhere { .. }), "{failure:?}");
        assert!(!thread.is_finished(), "it waits for a page that nobody has");
        memory.let_go();
        thread.join().expect("it goes on with what it finds");
    });
}

#[test]
fn a_server_that_nobody_used_goes_away() {
    let saved = Saved::new(1);
    let (server, failures) = saved.serve(PageServerLimits::default(), None);
    assert!(saved.path("socket").exists());
    server.close().expect("close it");
    server.close().expect("close it again");
    assert!(!saved.path("socket").exists());
    assert!(failures.try_recv().is_err());
}

/// A memory with a bug.
struct BrokenMemory;

impl MemorySource for BrokenMemory {
    fn size_bytes(&self) -> u64 {
        64 * PAGE as u64
    }

    fn run_at(&self, _: u64, limit: u64) -> MemoryRun {
        MemoryRun::Data(limit)
    }

    fn read_at(&self, _: &mut [u8], offset: u64) -> io::Result<()> {
        panic!("asked for {offset}")
    }
}

#[test]
fn a_bug_ends_the_machine() {
    let saved = Saved::new(64);
    for fault_threads in [1, 3] {
        let (server, failures) =
            saved.serve_from(Arc::new(BrokenMemory), limits(fault_threads, 1), None);
        let memory = GuardedMemory::new(64 * PAGE, false).expect("guard some memory");
        let _connection = hand_over(server.socket(), &memory).expect("hand it over");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| memory.byte(0));
            let failure = failures.recv_timeout(LIMIT).expect("the failure is told");
            assert!(matches!(*failure, PageServeError::Panicked), "{failure:?}");
            server.close().expect("close it");
            assert!(!thread.is_finished(), "the monitor's own descriptor guards its memory");
            memory.let_go();
            thread.join().expect("it goes on with what it finds");
        });
    }
}

/// In a process that does nothing else, so that what is counted is the server's.
#[test]
fn a_hundred_restores_leave_nothing() {
    const MARK: &str = "BELLJAR_TEST_COUNTS_ALONE";
    if std::env::var_os(MARK).is_none() {
        let alone = Command::new(std::env::current_exe().expect("a test program"))
            .args(["--exact", "ends::a_hundred_restores_leave_nothing", "--test-threads=1"])
            .env(MARK, "1")
            .output();
        let alone = alone.expect("start this program again");
        assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
        return;
    }
    let saved = Saved::new(64);
    let mut set = None;
    let mut counts = None;
    for round in 0..102 {
        let (server, _failures) = saved.serve(limits(1 + round % 3, 4), set.take());
        let memory = GuardedMemory::new(64 * PAGE, false).expect("guard some memory");
        match round % 5 {
            // Called off before anybody came; refused; and used, with the monitor leaving first or last.
            0 => {}
            1 => drop(send(server.socket(), b"{}", &[memory.userfault()]).expect("send")),
            way => {
                let connection = hand_over(server.socket(), &memory).expect("hand it over");
                for page in (0..64).step_by(2) {
                    assert!(memory.page(page * PAGE) == content(page), "page {page}");
                }
                set = server.working_set();
                if way == 2 {
                    drop(connection);
                }
                server.close().expect("close it");
            }
        }
        drop((server, memory));
        // The first rounds may load what stays, such as a thread's storage.
        if round == 1 {
            counts = Some((count("/proc/self/fd"), count("/proc/self/task")));
        }
    }
    assert_eq!(Some((count("/proc/self/fd"), count("/proc/self/task"))), counts);
    let left: Vec<_> = std::fs::read_dir(saved.path("")).expect("list it").collect();
    assert_eq!(left.len(), 1, "the memory alone: {left:?}");
}

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).expect("proc is mounted").count()
}
