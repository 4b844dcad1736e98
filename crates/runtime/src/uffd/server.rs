//! The socket, the threads and their end.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::thread::{self, JoinHandle, Scope};
use std::time::Duration;
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tracing::{debug, error, warn};

use super::bits::Bits;
use super::error::{BindPagesError, ClosePagesError, HandshakeError, PageServeError};
use super::guest_memory::{GuestMemory, Stop};
use super::halt::Halt;
use super::handshake::{Greeting, receive};
use super::layout::Layout;
use super::serve::{Prefetch, serve_faults};
use super::source::MemorySource;
use super::stats::{Counters, PageServerStats};
use super::working_set::{Recorder, WorkingSet};
use crate::machine::Identity;
use crate::pages::PAGE_BYTES;
use crate::sys::userfault::Userfault;

/// Threads of each kind, at most.
const THREADS_MAX: usize = 16;
/// Longest window in bytes.
const WINDOW_MAX_BYTES: u64 = 2 << 20;
/// How long [`PageServer::close`] waits for a source that does not answer.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);
/// The threads keep their buffers on the heap; a source may call deeper than we do.
const STACK_BYTES: usize = 512 << 10;
/// Longest path of a unix socket, without its final zero. Source: `sockaddr_un` of Linux.
const SOCKET_PATH_MAX_BYTES: usize = 107;

/// How much of the host a page server takes.
#[derive(Debug, Clone, Copy)]
pub struct PageServerLimits {
    /// Threads that answer faults: 1 to 16. One is quickest where content is at hand; more, where it is
    /// fetched from afar, since each waits for its page.
    pub fault_threads: usize,
    /// Threads that install the working set, and end when that is done: 1 to 16.
    pub prefetch_threads: usize,
    /// What is installed around a page that is asked for, in bytes: a power of two from 4 KiB to 2 MiB.
    pub window_bytes: u64,
    /// How much memory a recorded working set names at most, in bytes. 0 records nothing.
    pub record_bytes: u64,
}

impl Default for PageServerLimits {
    /// For content on this host's disk.
    fn default() -> PageServerLimits {
        PageServerLimits {
            fault_threads: 1,
            prefetch_threads: 2,
            window_bytes: 64 << 10,
            record_bytes: 256 << 20,
        }
    }
}

/// Ends a machine that cannot be given its memory any more.
pub type OnFailure = Box<dyn FnOnce(Arc<PageServeError>) + Send>;

/// What a page server is to do.
pub struct PageServerSpec {
    /// Where the machine monitor connects. It must not exist.
    pub socket: PathBuf,
    /// Who may connect, besides root.
    pub owner: Option<Identity>,
    /// The saved memory.
    pub source: Arc<dyn MemorySource>,
    /// What to install before it is asked for.
    pub working_set: Option<WorkingSet>,
    /// How much of the host it takes.
    pub limits: PageServerLimits,
    /// Ends the machine, which waits for pages that will not come. Called at most once, from a thread of
    /// the server; the machine must not run again after it returned. Dropped when serving has ended
    /// without a failure: the machine is gone, or the server closed.
    pub on_failure: OnFailure,
}

/// Gives one machine its memory, as it asks for it. Dropping it closes it.
///
/// Memory is never wrong: as long as the server is not closed, a page that it could not install keeps
/// the machine waiting. Close it when the machine is dead.
pub struct PageServer {
    shared: Arc<Shared>,
    threads: Mutex<Threads>,
}

struct Threads {
    /// Its sender goes when the last thread ends.
    ended: Receiver<()>,
    main: Option<JoinHandle<()>>,
}

struct Shared {
    socket: PathBuf,
    unlinked: Mutex<bool>,
    halt: Arc<Halt>,
    counters: Arc<Counters>,
    recorder: Option<Arc<Mutex<Recorder>>>,
    /// The descriptors that came: while one is open, memory that was not installed stays guarded.
    kept: Mutex<Vec<Arc<OwnedFd>>>,
    failure: Mutex<Option<Arc<PageServeError>>>,
    on_failure: Mutex<Option<OnFailure>>,
}

/// What the main thread works with.
struct Job {
    listener: UnixListener,
    source: Arc<dyn MemorySource>,
    working_set: Option<WorkingSet>,
    limits: PageServerLimits,
}

impl PageServer {
    /// Makes the socket, mode 0600, and waits on it for one machine monitor, for as long as it takes.
    /// The machine is served by threads of the server's own. Blocks for a few system calls.
    ///
    /// # Errors
    /// [`BindPagesError`]; nothing is left then.
    pub fn bind(spec: PageServerSpec) -> Result<PageServer, BindPagesError> {
        let PageServerSpec { socket, owner, source, working_set, limits, on_failure } = spec;
        let memory_bytes = source.size_bytes();
        if let Some(set) = working_set.as_ref().filter(|set| set.memory_bytes() != memory_bytes) {
            let found = set.memory_bytes();
            return Err(BindPagesError::OtherMemory { expected: memory_bytes, found });
        }
        let failed = |step| {
            let path = socket.clone();
            move |source| BindPagesError::Io { step, path, source }
        };
        let recorder = (limits.record_bytes > 0).then(|| {
            let known = working_set.as_ref();
            Arc::new(Mutex::new(Recorder::new(memory_bytes, limits.record_bytes, known)))
        });
        let shared = Arc::new(Shared {
            halt: Arc::new(Halt::new().map_err(failed("make the stop event of"))?),
            counters: Arc::default(),
            recorder,
            kept: Mutex::default(),
            failure: Mutex::default(),
            on_failure: Mutex::new(Some(on_failure)),
            unlinked: Mutex::new(false),
            socket: socket.clone(),
        });
        let listener = listen(&socket, owner)?;
        let job = Job { listener, source, working_set, limits };
        let (sender, ended) = channel();
        let running = Arc::clone(&shared);
        let main = thread::Builder::new().name("uffd".to_owned()).stack_size(STACK_BYTES).spawn(
            move || {
                // Goes with the thread, however it ends.
                let _ended = sender;
                running.run(job);
            },
        );
        match main {
            Ok(main) => {
                let threads = Mutex::new(Threads { ended, main: Some(main) });
                Ok(PageServer { shared, threads })
            }
            Err(e) => {
                // The error that matters is `e`.
                let _removed = fs::remove_file(&socket);
                Err(failed("start the thread of")(e))
            }
        }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// Why the machine had to end, if it had.
    pub fn failure(&self) -> Option<Arc<PageServeError>> {
        lock(&self.shared.failure).clone()
    }

    /// What has been done so far.
    pub fn stats(&self) -> PageServerStats {
        self.shared.counters.stats()
    }

    /// The working set as it is known now: what was given, and what has been asked for since. `None`
    /// when nothing is recorded.
    pub fn working_set(&self) -> Option<WorkingSet> {
        self.shared.recorder.as_ref().map(|recorder| lock(recorder).recorded())
    }

    /// Ends every thread, removes the socket and lets the machine's memory go. Idempotent. Blocks until
    /// reads of the source under way are done, at most 10 s: call it from a blocking thread.
    ///
    /// # Errors
    /// [`ClosePagesError`] naming what is left; another call tries again.
    pub fn close(&self) -> Result<(), ClosePagesError> {
        self.shared.halt.say();
        let mut threads = lock(&self.threads);
        if threads.main.is_some() {
            if threads.ended.recv_timeout(CLOSE_DEADLINE) == Err(RecvTimeoutError::Timeout) {
                return Err(ClosePagesError::Stuck {
                    path: self.shared.socket.clone(),
                    waited_ms: u64::try_from(CLOSE_DEADLINE.as_millis()).unwrap_or(u64::MAX),
                });
            }
            if threads.main.take().is_some_and(|main| main.join().is_err()) {
                error!(socket = %self.shared.socket.display(), "a page server panicked");
            }
        }
        self.shared.unlink()?;
        lock(&self.shared.kept).clear();
        Ok(())
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            warn!(error = %e, "page server dropped but not closed");
        }
    }
}

impl Shared {
    /// The main thread, from its first moment to its last.
    fn run(&self, job: Job) {
        let _guard = PanicGuard(self);
        let Job { listener, source, working_set, limits } = job;
        match self.greet(&listener, source.size_bytes()) {
            Ok(Some((peer, userfault, layout))) => {
                drop(listener);
                let memory = self.memory(source, peer, userfault, layout);
                self.serve(&memory, working_set.as_ref(), &limits);
            }
            Ok(None) => self.finish(Stop::Halted),
            Err(e) => self.finish(Stop::Failed(PageServeError::Handshake(e))),
        }
    }

    /// Waits for a monitor and takes its memory. `None` when it was called off.
    fn greet(
        &self,
        listener: &UnixListener,
        memory_bytes: u64,
    ) -> Result<Option<(UnixStream, Userfault, Layout)>, HandshakeError> {
        let Some(peer) = self.accept(listener).map_err(HandshakeError::Io)? else {
            return Ok(None);
        };
        // A machine has one monitor, and it comes once.
        if let Err(e) = self.unlink() {
            warn!(error = %e, "a used page socket stays until its server is closed");
        }
        let keep = |fd| lock(&self.kept).push(fd);
        match receive(&peer, memory_bytes, &self.halt, &keep)? {
            Greeting::Ready(userfault, layout) => Ok(Some((peer, userfault, layout))),
            Greeting::Halted => Ok(None),
        }
    }

    fn accept(&self, listener: &UnixListener) -> io::Result<Option<UnixStream>> {
        loop {
            let mut watched =
                [PollFd::new(&*self.halt, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(&mut watched, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
                Ok(_) if !watched[0].revents().is_empty() => return Ok(None),
                Ok(_) => {}
            }
            match listener.accept() {
                Ok((peer, _)) => return Ok(Some(peer)),
                // It went away before it was accepted.
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn memory(
        &self,
        source: Arc<dyn MemorySource>,
        peer: UnixStream,
        userfault: Userfault,
        layout: Layout,
    ) -> GuestMemory {
        let pages = source.size_bytes() / PAGE_BYTES;
        GuestMemory {
            userfault,
            layout,
            source,
            peer,
            halt: Arc::clone(&self.halt),
            counters: Arc::clone(&self.counters),
            recorder: self.recorder.clone(),
            removed: Bits::new(pages),
            installed: Bits::new(pages),
            gate: RwLock::new(()),
        }
    }

    /// Serves the machine with all threads it takes, until the last of them has ended.
    fn serve(&self, memory: &GuestMemory, set: Option<&WorkingSet>, limits: &PageServerLimits) {
        let window = limits.window_bytes.clamp(PAGE_BYTES, WINDOW_MAX_BYTES).next_power_of_two();
        let fault_threads = limits.fault_threads.clamp(1, THREADS_MAX);
        let answer = || {
            // Inside the scope: that waits for its threads before a panic of this one goes on.
            let _guard = PanicGuard(self);
            self.finish(serve_faults(memory, window, fault_threads == 1));
        };
        let prefetch = set.map(|set| Prefetch::new(memory, set));
        let prefetch_threads = set.map_or(0, |_| limits.prefetch_threads.clamp(1, THREADS_MAX));
        thread::scope(|scope| {
            for _ in 1..fault_threads {
                self.start(scope, "uffd-fault", answer);
            }
            for _ in 0..prefetch_threads {
                let counted = self.counters.prefetcher();
                let prefetch = prefetch.as_ref();
                self.start(scope, "uffd-prefetch", move || {
                    let _counted = counted;
                    if let Some(Err(stop)) = prefetch.map(|prefetch| prefetch.run(memory)) {
                        self.finish(stop);
                    }
                });
            }
            answer();
        });
    }

    /// With a thread less it is slower, and not worse.
    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        body: impl FnOnce() + Send + 'scope,
    ) {
        let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
        let guarded = move || {
            let _guard = PanicGuard(self);
            body();
        };
        if let Err(e) = thread.spawn_scoped(scope, guarded) {
            warn!(error = %e, "a page server has a thread less than it should");
        }
    }

    /// Ends all threads. The first failure is the one that counts, and ends the machine at once.
    fn finish(&self, stop: Stop) {
        match stop {
            // Nothing can fail any more: whoever waits for a failure learns that.
            Stop::Halted => drop(lock(&self.on_failure).take()),
            Stop::Gone => {
                drop(lock(&self.on_failure).take());
                debug!(socket = %self.socket.display(), "the machine of a page server is gone");
                lock(&self.kept).clear();
            }
            Stop::Failed(failure) => {
                let failure = Arc::new(failure);
                lock(&self.failure).get_or_insert_with(|| Arc::clone(&failure));
                let on_failure = lock(&self.on_failure).take();
                if let Some(on_failure) = on_failure {
                    on_failure(failure);
                }
            }
        }
        self.halt.say();
    }

    fn unlink(&self) -> Result<(), ClosePagesError> {
        let mut unlinked = lock(&self.unlinked);
        if *unlinked {
            return Ok(());
        }
        match fs::remove_file(&self.socket) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(ClosePagesError::Unlink { path: self.socket.clone(), source })
            }
            _ => {
                *unlinked = true;
                Ok(())
            }
        }
    }
}

/// Ends the machine when a thread that serves it panics.
struct PanicGuard<'a>(&'a Shared);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.finish(Stop::Failed(PageServeError::Panicked));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing that can panic runs under these locks")
}

/// Binds and listens. In between the socket gets its mode and owner: nobody can connect before.
fn listen(path: &Path, owner: Option<Identity>) -> Result<UnixListener, BindPagesError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX_BYTES {
        return Err(BindPagesError::PathTooLong { path: path.to_owned() });
    }
    let failed = |step| move |source| BindPagesError::Io { step, path: path.to_owned(), source };
    let address = SocketAddrUnix::new(path).map_err(io::Error::from).map_err(failed("name"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(io::Error::from)
        .map_err(failed("make"))?;
    rustix::net::bind(&socket, &address).map_err(io::Error::from).map_err(failed("bind"))?;
    let opened = fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .and_then(|()| match owner {
            Some(owner) => chown(path, Some(owner.uid), Some(owner.gid)),
            None => Ok(()),
        })
        .and_then(|()| Ok(rustix::net::listen(&socket, 1)?));
    match opened {
        Ok(()) => Ok(UnixListener::from(socket)),
        Err(e) => {
            // The error that matters is `e`.
            let _removed = fs::remove_file(path);
            Err(failed("open")(e))
        }
    }
}
