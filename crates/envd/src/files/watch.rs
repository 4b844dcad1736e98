//! Watching directories: streams of changes, and watchers whose changes are fetched by polling.
//!
//! Each watch has a task that takes changes from the kernel, on a thread that may block, and hands
//! them on through a bounded queue. A client that does not take them holds that task up, then the
//! kernel's own queue fills; when that overflows, the watch ends and says so. Nothing is lost in
//! silence. A stream's watch ends when its client leaves.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use belljar_wire::rpc::filesystem::watch_dir_response::{
    Event as WireEvent, KeepAlive, StartEvent,
};
use belljar_wire::rpc::filesystem::{FilesystemEvent, WatchDirResponse};
use connectrpc::ConnectError;
use futures::stream::{self, Stream, StreamExt as _};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::changes::{self, Left, Watched};
use crate::sys;
use crate::task;

/// Watches at a time, streams and polled ones together. The kernel by default lets one user have
/// 128, and other programs of root want some.
const WATCHES_MAX: usize = 100;

/// When all are taken, one that was not polled for this long makes room for a new one. Nothing
/// else ends a polled watcher: its client may have all day.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

/// Changes that wait for a stream's client.
const STREAM_QUEUE: usize = 64;

/// Changes that wait for a poll; as many as the kernel by default keeps for one watch.
const POLL_QUEUE: usize = 16_384;

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
    #[error("too many watches, of at most {WATCHES_MAX}: end one first")]
    TooMany,
    /// More directories than can be watched.
    #[error("too many directories to watch in {}, of at most {}", .0.display(), changes::TREE_MAX)]
    TooLarge(PathBuf),
    /// Changes were missed.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The job that set it up is gone.
    #[error(transparent)]
    JobLost(#[from] task::JobLost),
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

/// Why a watch cannot go on without missing changes.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// The kernel's queue was full.
    #[error(
        "changes came faster than they were taken and some are lost: look at the directory and \
         watch it again"
    )]
    Overflow,
    /// A tree outgrew what can be watched.
    #[error(
        "the tree has more directories than can be watched, at most {}: watch fewer of them",
        changes::TREE_MAX
    )]
    TooLarge,
    /// The kernel does not tell any more.
    #[error("failed to read changes: {0}")]
    Read(io::Error),
}

type Change = Result<FilesystemEvent, Lost>;

/// A watch; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watching {
    changes: mpsc::Receiver<Change>,
    _place: OwnedSemaphorePermit,
}

/// All watches of the daemon.
#[derive(Debug)]
pub(super) struct Watchers {
    places: Arc<Semaphore>,
    polled: Mutex<HashMap<String, Polled>>,
    issued: AtomicU64,
}

#[derive(Debug)]
struct Polled {
    watching: Watching,
    polled_at: Instant,
    /// What is left to say once the changes before it were fetched.
    lost: Option<Lost>,
}

impl Default for Watchers {
    fn default() -> Watchers {
        Watchers {
            places: Arc::new(Semaphore::new(WATCHES_MAX)),
            polled: Mutex::default(),
            issued: AtomicU64::default(),
        }
    }
}

impl Watchers {
    /// Starts watching for a stream. Not cancel-safe, but leaves nothing behind.
    ///
    /// # Errors
    /// [`WatchError`] when the directory cannot be watched.
    pub(super) async fn open(
        &self,
        tasks: &task::Group,
        wanted: Wanted,
    ) -> Result<Watching, WatchError> {
        self.start(tasks, wanted, STREAM_QUEUE).await
    }

    /// Collects the changes from now on and returns the id to fetch them by. Not cancel-safe: the
    /// caller must be told the id.
    ///
    /// # Errors
    /// As [`Watchers::open`].
    pub(super) async fn add(
        &self,
        tasks: &task::Group,
        wanted: Wanted,
    ) -> Result<String, WatchError> {
        let watching = self.start(tasks, wanted, POLL_QUEUE).await?;
        let id = format!("w{:08x}", self.issued.fetch_add(1, Ordering::Relaxed) + 1);
        let polled = Polled { watching, polled_at: Instant::now(), lost: None };
        lock(&self.polled).insert(id.clone(), polled);
        Ok(id)
    }

    /// The changes since the last call.
    ///
    /// # Errors
    /// When there is no such watcher; when it missed changes, after those before were fetched.
    pub(super) fn take_events(&self, id: &str) -> Result<Vec<FilesystemEvent>, WatchError> {
        let mut polled = lock(&self.polled);
        let watcher = polled.get_mut(id).ok_or_else(|| WatchError::NoWatcher(id.to_owned()))?;
        watcher.polled_at = Instant::now();
        let mut events = Vec::new();
        while watcher.lost.is_none()
            && let Ok(change) = watcher.watching.changes.try_recv()
        {
            match change {
                Ok(event) => events.push(event),
                Err(lost) => watcher.lost = Some(lost),
            }
        }
        match &watcher.lost {
            Some(lost) if events.is_empty() => Err(lost.again().into()),
            _ => Ok(events),
        }
    }

    /// Stops collecting.
    ///
    /// # Errors
    /// When there is no such watcher.
    pub(super) fn remove(&self, id: &str) -> Result<(), WatchError> {
        let watcher = lock(&self.polled).remove(id);
        watcher.map(drop).ok_or_else(|| WatchError::NoWatcher(id.to_owned()))
    }

    async fn start(
        &self,
        tasks: &task::Group,
        wanted: Wanted,
        queue: usize,
    ) -> Result<Watching, WatchError> {
        let place = self.place()?;
        let (inotify, watched) = task::blocking(move || changes::open(wanted)).await??;
        let inotify = sys::watch_descriptor(inotify, Interest::READABLE)
            .map_err(|error| WatchError::Lost(Lost::Read(error)))?;
        let (sender, changes) = mpsc::channel(queue);
        tasks.spawn(async move {
            if let Err(lost) = pump(inotify, watched, &sender).await {
                // A client that has left need not know.
                let _ = sender.send(Err(lost)).await;
            }
        });
        Ok(Watching { changes, _place: place })
    }

    fn place(&self) -> Result<OwnedSemaphorePermit, WatchError> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(place);
        }
        let mut polled = lock(&self.polled);
        let oldest = polled.iter().min_by_key(|(_, watcher)| watcher.polled_at);
        let forgotten = oldest.filter(|(_, watcher)| watcher.polled_at.elapsed() > FORGOTTEN_AFTER);
        let forgotten = forgotten.map(|(id, _)| id.clone()).ok_or(WatchError::TooMany)?;
        polled.remove(&forgotten);
        drop(polled);
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| WatchError::TooMany)
    }
}

impl Lost {
    /// The same once more; an I/O error is not to be copied, but its text is.
    fn again(&self) -> Lost {
        match self {
            Lost::Overflow => Lost::Overflow,
            Lost::TooLarge => Lost::TooLarge,
            Lost::Read(error) => Lost::Read(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

/// Carries changes from the kernel to the queue, until nobody takes them or the directory is gone.
async fn pump(
    inotify: AsyncFd<OwnedFd>,
    mut watched: Watched,
    sender: &mpsc::Sender<Change>,
) -> Result<(), Lost> {
    let inotify = Arc::new(inotify);
    loop {
        tokio::select! {
            () = sender.closed() => return Ok(()),
            ready = inotify.readable() => ready.map_err(Lost::Read)?.clear_ready(),
        }
        // What arrives from here on makes it ready again, so reading to the end misses nothing.
        let mut left = Left::More;
        while left == Left::More {
            let descriptor = Arc::clone(&inotify);
            let job = task::blocking(move || {
                let mut events = Vec::new();
                let left = changes::read(descriptor.get_ref(), &mut watched, &mut events);
                (watched, events, left)
            });
            let (back, events, outcome) =
                job.await.map_err(|lost| Lost::Read(io::Error::other(lost)))?;
            watched = back;
            for event in events {
                if sender.send(Ok(event)).await.is_err() {
                    return Ok(());
                }
            }
            left = outcome?;
        }
        if left == Left::Ended {
            return Ok(());
        }
    }
}

/// The changes as a response stream: a start event, changes, and a word in long silence.
pub(super) fn stream(
    watching: Watching,
    keepalive: Duration,
) -> impl Stream<Item = Result<WatchDirResponse, ConnectError>> + Send + 'static {
    let answer = |event: WireEvent| {
        Ok(WatchDirResponse { event: Some(event), ..WatchDirResponse::default() })
    };
    let start = answer(StartEvent::default().into());
    let rest = stream::unfold(watching, move |mut watching| async move {
        let event = match tokio::time::timeout(keepalive, watching.changes.recv()).await {
            Ok(Some(Ok(event))) => answer(event.into()),
            Ok(Some(Err(lost))) => Err(ConnectError::data_loss(lost.to_string())),
            Ok(None) => return None,
            Err(_) => answer(KeepAlive::default().into()),
        };
        Some((event, watching))
    });
    stream::once(std::future::ready(start)).chain(rest)
}

/// Each change under these locks is one insert, push or remove, so a panic leaves them whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_forgotten_watcher_makes_room_and_others_do_not() {
        let watchers = Watchers { places: Arc::new(Semaphore::new(2)), ..Watchers::default() };
        let tasks = task::Group::default();
        let wanted = Wanted {
            path: std::env::temp_dir(),
            recursive: false,
            include_entry: false,
            allow_network_mounts: true,
        };
        let add = || watchers.add(&tasks, wanted.clone());
        let (one, two) = (add().await.expect("watched"), add().await.expect("watched"));
        assert!(matches!(add().await, Err(WatchError::TooMany)));
        assert!(matches!(watchers.open(&tasks, wanted.clone()).await, Err(WatchError::TooMany)));
        let long_ago = Instant::now().checked_sub(FORGOTTEN_AFTER + Duration::from_secs(1));
        let Some(long_ago) = long_ago else {
            return belljar_testkit::skip("the machine has only just been started");
        };
        lock(&watchers.polled).get_mut(&one).expect("there").polled_at = long_ago;
        let three = add().await.expect("watched");
        assert!(matches!(watchers.take_events(&one), Err(WatchError::NoWatcher(_))));
        for id in [two, three] {
            assert!(watchers.take_events(&id).is_ok());
            watchers.remove(&id).expect("there");
        }
        assert!(watchers.open(&tasks, wanted.clone()).await.is_ok());
        assert!(tasks.close(Duration::from_secs(20)).await);
    }
}
