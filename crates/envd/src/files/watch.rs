//! Watching directories, by the kernel's inotify: one event a change, named below the directory.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_wire::rpc::filesystem::watch_dir_response::{
    Event as WireEvent, KeepAlive, StartEvent,
};
use belljar_wire::rpc::filesystem::{EventType, FilesystemEvent, WatchDirResponse};
use connectrpc::ConnectError;
use futures::stream::{self, Stream, StreamExt as _};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::entry;
use crate::accounts::Accounts;
use crate::sys;
use crate::task;

/// Events a polled watcher keeps for its client; the oldest go first beyond that.
const BUFFER_MAX_EVENTS: usize = 16_384;

/// Polled watchers at a time; a client that forgets to remove its own meets this.
const WATCHERS_MAX: usize = 1024;

/// Directories one recursive watch covers; the kernel has a limit of its own.
const DIRECTORIES_MAX: usize = 100_000;

/// File systems whose other users' changes inotify does not see: NFS, SMB (three), FUSE, 9p.
/// Source: `statfs(2)`.
const NETWORK_MAGIC: [i64; 6] =
    [0x6969, 0x517B, 0xFF53_4D42, 0xFE53_4D42, 0x6573_5546, 0x0102_1997];

/// What to watch.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) path: PathBuf,
    /// The directories below, too, also those made later.
    pub(super) recursive: bool,
    /// Describe what changed, where it is still there.
    pub(super) include_entry: bool,
    /// Accept a file system whose remote changes cannot be seen.
    pub(super) allow_network_mounts: bool,
}

/// Why a directory is not watched.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    /// Nothing is there.
    #[error("path not found: {}", .0.display())]
    NotFound(PathBuf),
    /// It is something else.
    #[error("path is not a directory: {}", .0.display())]
    NotADirectory(PathBuf),
    /// Its changes cannot be seen.
    #[error("cannot watch a path on a network file system: {}", .0.display())]
    NetworkMount(PathBuf),
    /// No watcher has that id.
    #[error("watcher with id {0} not found")]
    NoWatcher(String),
    /// Too many of them.
    #[error("too many watchers: remove one of the {WATCHERS_MAX} first")]
    TooMany,
    /// The job that set it up is gone.
    #[error(transparent)]
    Lost(#[from] task::JobLost),
    /// The kernel refused.
    #[error("watch {}", path.display())]
    Io {
        /// What was to be watched.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A watched directory and its changes in order.
#[derive(Debug)]
pub(super) struct Changes {
    inotify: AsyncFd<OwnedFd>,
    watched: Watched,
    pending: VecDeque<FilesystemEvent>,
}

#[derive(Debug)]
struct Watched {
    wanted: Wanted,
    directories: HashMap<i32, PathBuf>,
}

/// Starts watching. Not cancel-safe, but leaves nothing behind.
///
/// # Errors
/// [`WatchError`] when the directory cannot be watched.
pub(super) async fn open(wanted: Wanted) -> Result<Changes, WatchError> {
    task::blocking(move || open_blocking(wanted)).await?
}

fn open_blocking(wanted: Wanted) -> Result<Changes, WatchError> {
    let path = wanted.path.clone();
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(WatchError::NotADirectory(path)),
        Err(_) => return Err(WatchError::NotFound(path)),
    }
    let failed = |source: io::Error| WatchError::Io { path: path.clone(), source };
    let file_system = rustix::fs::statfs(&path).map_err(|error| failed(error.into()))?;
    if !wanted.allow_network_mounts && NETWORK_MAGIC.contains(&file_system.f_type) {
        return Err(WatchError::NetworkMount(path));
    }
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
        .map_err(|error| failed(error.into()))?;
    let mut watched = Watched { wanted, directories: HashMap::new() };
    watched.add(&inotify, &path, &mut |_| {}).map_err(failed)?;
    let inotify = sys::watch_descriptor(inotify, Interest::READABLE).map_err(failed)?;
    Ok(Changes { inotify, watched, pending: VecDeque::new() })
}

impl Changes {
    /// The next change; `None` when the directory is gone. Cancel-safe.
    async fn next(&mut self) -> Option<FilesystemEvent> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            if self.watched.directories.is_empty() {
                return None;
            }
            let mut ready = self.inotify.readable().await.ok()?;
            match read_events(ready.get_inner(), &mut self.watched, &mut self.pending) {
                Errno::AGAIN => ready.clear_ready(),
                // A batch is full: there may be more, after what it holds was handed on.
                Errno::INTR => {}
                _ => return None,
            }
        }
    }
}

/// Changes read before they are handed on. A busy tree makes them faster than they are described,
/// and everything else in the daemon waits meanwhile.
const BATCH: usize = 256;

/// Reads until nothing is left, or a batch is full (`INTR`), and returns the error that says so.
fn read_events(
    inotify: &OwnedFd,
    watched: &mut Watched,
    pending: &mut VecDeque<FilesystemEvent>,
) -> Errno {
    // Room for a few dozen events with names of ordinary length.
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let accounts = watched.wanted.include_entry.then(Accounts::load);
    loop {
        // Events in the reader's buffer have left the kernel: they are never left behind.
        if pending.len() >= BATCH && reader.is_buffer_empty() {
            return Errno::INTR;
        }
        let (watch, flags, name) = match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| name.to_bytes().to_vec());
                (event.wd(), event.events(), name)
            }
            Err(Errno::INTR) => continue,
            Err(error) => return error,
        };
        let mut report = |path: &Path, kind: EventType| {
            let name = path.strip_prefix(&watched.wanted.path).unwrap_or(path);
            let name = name.to_string_lossy();
            let name = if name.is_empty() { ".".to_owned() } else { name.into_owned() };
            let entry = accounts.as_ref().and_then(|accounts| entry::describe(path, accounts).ok());
            pending.push_back(FilesystemEvent {
                name,
                r#type: kind.into(),
                entry: entry.into(),
                ..FilesystemEvent::default()
            });
        };
        let Some(directory) = watched.directories.get(&watch).cloned() else {
            continue;
        };
        let is_root = directory == watched.wanted.path;
        let path = match &name {
            Some(name) => directory.join(std::ffi::OsStr::from_bytes(name)),
            None => directory,
        };
        if flags.contains(ReadFlags::IGNORED) {
            watched.directories.remove(&watch);
            continue;
        }
        // What happens to a directory below the watched one is told by the one above it.
        if let Some(kind) = kind(flags).filter(|_| name.is_some() || is_root) {
            report(&path, kind);
        }
        if watched.wanted.recursive && flags.contains(ReadFlags::ISDIR) && name.is_some() {
            if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                let mut found = Vec::new();
                // It may be gone again: then there is nothing to watch.
                let _ = watched.add(inotify, &path, &mut |below| found.push(below.to_owned()));
                for below in found {
                    push_found(watched, pending, accounts.as_ref(), &below);
                }
            } else if flags.contains(ReadFlags::MOVED_FROM) {
                watched.drop_below(inotify, &path);
            }
        }
    }
}

/// Reports what was in a new directory before it was watched.
fn push_found(
    watched: &Watched,
    pending: &mut VecDeque<FilesystemEvent>,
    accounts: Option<&Accounts>,
    path: &Path,
) {
    let name = path.strip_prefix(&watched.wanted.path).unwrap_or(path);
    pending.push_back(FilesystemEvent {
        name: name.to_string_lossy().into_owned(),
        r#type: EventType::EVENT_TYPE_CREATE.into(),
        entry: accounts.and_then(|accounts| entry::describe(path, accounts).ok()).into(),
        ..FilesystemEvent::default()
    });
}

fn kind(flags: ReadFlags) -> Option<EventType> {
    [
        (ReadFlags::CREATE | ReadFlags::MOVED_TO, EventType::EVENT_TYPE_CREATE),
        (ReadFlags::DELETE | ReadFlags::DELETE_SELF, EventType::EVENT_TYPE_REMOVE),
        (ReadFlags::MODIFY, EventType::EVENT_TYPE_WRITE),
        (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, EventType::EVENT_TYPE_RENAME),
        (ReadFlags::ATTRIB, EventType::EVENT_TYPE_CHMOD),
    ]
    .into_iter()
    .find_map(|(mask, kind)| flags.intersects(mask).then_some(kind))
}

impl Watched {
    /// Watches a directory and, when that is wanted, all below it. Tells what is below.
    fn add(
        &mut self,
        inotify: &OwnedFd,
        path: &Path,
        found: &mut dyn FnMut(&Path),
    ) -> io::Result<()> {
        if self.directories.len() >= DIRECTORIES_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVE_SELF
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR;
        let watch = inotify::add_watch(inotify, path, flags)?;
        self.directories.insert(watch, path.to_owned());
        if !self.wanted.recursive {
            return Ok(());
        }
        // The watch stands before the directory is read, so nothing slips between.
        for child in std::fs::read_dir(path)? {
            let child = child?;
            found(&child.path());
            if child.file_type()?.is_dir() {
                match self.add(inotify, &child.path(), found) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    outcome => outcome?,
                }
            }
        }
        Ok(())
    }

    /// Forgets a directory that was moved away, with all below it.
    fn drop_below(&mut self, inotify: &OwnedFd, path: &Path) {
        self.directories.retain(|watch, directory| {
            let gone = directory.starts_with(path);
            if gone {
                // It may have ended by itself.
                let _ = inotify::remove_watch(inotify, *watch);
            }
            !gone
        });
    }
}

/// The changes as a response stream: a start event, changes, and a word in long silence.
pub(super) fn stream(
    changes: Changes,
    keepalive: Duration,
) -> impl Stream<Item = Result<WatchDirResponse, ConnectError>> + Send + 'static {
    let answer = |event: WireEvent| {
        Ok(WatchDirResponse { event: Some(event), ..WatchDirResponse::default() })
    };
    let start = answer(StartEvent::default().into());
    let rest = stream::unfold(changes, move |mut changes| async move {
        let event = match tokio::time::timeout(keepalive, changes.next()).await {
            Ok(Some(event)) => event.into(),
            Ok(None) => return None,
            Err(_) => KeepAlive::default().into(),
        };
        Some((answer(event), changes))
    });
    stream::once(std::future::ready(start)).chain(rest)
}

/// Watchers whose changes are fetched by polling.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    by_id: Mutex<HashMap<String, Watcher>>,
    issued: AtomicU64,
}

#[derive(Debug)]
struct Watcher {
    events: Arc<Mutex<VecDeque<FilesystemEvent>>>,
    stop: CancellationToken,
}

impl Watchers {
    /// Collects the changes from now on and returns the id to fetch them by.
    pub(super) fn add(
        &self,
        tasks: &task::Group,
        mut changes: Changes,
    ) -> Result<String, WatchError> {
        let events = Arc::<Mutex<VecDeque<FilesystemEvent>>>::default();
        let stop = tasks.token();
        let mut by_id = lock(&self.by_id);
        if by_id.len() >= WATCHERS_MAX {
            return Err(WatchError::TooMany);
        }
        let id = format!("w{:08x}", self.issued.fetch_add(1, Ordering::Relaxed) + 1);
        by_id.insert(id.clone(), Watcher { events: Arc::clone(&events), stop: stop.clone() });
        drop(by_id);
        tasks.spawn(async move {
            loop {
                let event = tokio::select! {
                    () = stop.cancelled() => return,
                    event = changes.next() => event,
                };
                let Some(event) = event else { return };
                let mut events = lock(&events);
                if events.len() >= BUFFER_MAX_EVENTS {
                    events.pop_front();
                }
                events.push_back(event);
            }
        });
        Ok(id)
    }

    /// The changes since the last call.
    pub(super) fn take_events(&self, id: &str) -> Result<Vec<FilesystemEvent>, WatchError> {
        let by_id = lock(&self.by_id);
        let watcher = by_id.get(id).ok_or_else(|| WatchError::NoWatcher(id.to_owned()))?;
        Ok(lock(&watcher.events).drain(..).collect())
    }

    /// Stops collecting.
    pub(super) fn remove(&self, id: &str) -> Result<(), WatchError> {
        let watcher = lock(&self.by_id).remove(id);
        watcher.ok_or_else(|| WatchError::NoWatcher(id.to_owned()))?.stop.cancel();
        Ok(())
    }
}

/// Each change under these locks is one insert, push or remove, so a panic leaves them whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
