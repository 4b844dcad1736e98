//! Writes behind the live table: a bounded queue and one task, so that no request waits for disk.
//!
//! A change that cannot be queued or written is logged and dropped: the reconciler compares the
//! store with the live table and writes again what is missing.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{OnError, Scope, clock};
use belljar_domain::{BuildId, ExecutionId, UnixMillis};
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};

use crate::live::Sandbox;
use crate::store::{Store, StoreError};

/// Changes waiting to be written. At a thousand creates a second, several seconds of a stuck disk.
const QUEUE: usize = 8192;
/// Changes written in one transaction.
const BATCH: usize = 256;
/// With the longest wait between them, several minutes of a database that is away.
const TRIES: u32 = 60;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(5);

/// One thing to remember.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// A run began.
    Started(Arc<Sandbox>),
    /// Its end was moved.
    EndMoved {
        /// The run.
        execution: ExecutionId,
        /// Its new end.
        end_at: UnixMillis,
    },
    /// It ended.
    Ended {
        /// The run.
        execution: ExecutionId,
        /// When this was learned.
        at: UnixMillis,
        /// Why: a word of the node protocol, or `lost`.
        reason: &'static str,
    },
    /// Its run ended with a pause; this is the sandbox as it is paused.
    Paused(Arc<Sandbox>),
    /// It was lost, and its sandbox is again what it was resumed from.
    Lapsed {
        /// The run.
        execution: ExecutionId,
        /// When this was learned.
        at: UnixMillis,
        /// Why: `lost` or `shutdown`.
        reason: &'static str,
    },
    /// A copy of it was taken for forks, and it goes on.
    Copied {
        /// As it was.
        sandbox: Arc<Sandbox>,
        /// When.
        at: UnixMillis,
        /// The copy.
        snapshot: BuildId,
    },
    /// A paused sandbox is gone for good.
    Discarded {
        /// As it was.
        sandbox: Arc<Sandbox>,
        /// When this was learned.
        at: UnixMillis,
        /// Why: a word of the node protocol, or `lost`.
        reason: &'static str,
    },
}

/// A change and when it was made.
#[derive(Debug, Clone)]
pub(crate) struct Noted {
    pub(crate) at: UnixMillis,
    pub(crate) change: Change,
}

/// Where changes are put. The task ends when the last clone is dropped and the queue is written.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Noted>,
    /// Changes queued so far.
    queued: Arc<AtomicU64>,
    /// Changes that are through the queue, written or given up.
    through: watch::Receiver<u64>,
    /// Changes that were dropped.
    lost: watch::Sender<u64>,
}

impl Writer {
    /// Starts the task in `scope`. It ignores cancellation, so that what was queued is written;
    /// its end is the end of the queue.
    pub(crate) fn start(store: Store, scope: &Scope) -> Writer {
        let (queue, changes) = mpsc::channel(QUEUE);
        let (progress, through) = watch::channel(0);
        let lost = watch::channel(0).0;
        let losses = lost.clone();
        scope.spawn_shielded("store writer", OnError::Log, async move {
            run(&store, changes, &progress, &losses).await;
            Ok::<(), Infallible>(())
        });
        Writer { queue, queued: Arc::default(), through, lost }
    }

    /// Queues a change; never waits.
    pub(crate) fn push(&self, change: Change) {
        match self.queue.try_send(Noted { at: clock::now(), change }) {
            Ok(()) => {
                self.queued.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) => {
                self.lost.send_modify(|lost| *lost += 1);
                warn!(error = %e, "a change was not queued; the reconciler writes it later");
            }
        }
    }

    /// Waits until what this process has queued so far is through, at most `patience`: who has
    /// changed something and then asks the store finds it there. Answers whether it is; a store that
    /// is stuck answers as far as it got. Cancel-safe.
    pub(crate) async fn settled(&self, patience: Duration) -> bool {
        let target = self.queued.load(Ordering::Relaxed);
        let mut through = self.through.clone();
        let settled = through.wait_for(|through| *through >= target);
        tokio::time::timeout(patience, settled).await.is_ok()
    }

    /// Changes that wait to be written.
    pub(crate) fn depth(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Changes that were dropped since the start, and left to the reconciler.
    pub(crate) fn lost(&self) -> u64 {
        *self.lost.borrow()
    }

    /// Tells whenever [`Writer::lost`] grows.
    pub(crate) fn losses(&self) -> watch::Receiver<u64> {
        self.lost.subscribe()
    }
}

async fn run(
    store: &Store,
    mut changes: mpsc::Receiver<Noted>,
    through: &watch::Sender<u64>,
    lost: &watch::Sender<u64>,
) {
    let mut batch = Vec::with_capacity(BATCH);
    while changes.recv_many(&mut batch, BATCH).await > 0 {
        reach(Point::StoreBeforeWrite);
        if let Err((changes, e)) = apply(store, &batch).await {
            lost.send_modify(|lost| *lost += changes);
            let reason = std::error::Error::source(&e).map(ToString::to_string);
            warn!(
                error = %e,
                reason,
                changes,
                "changes were not written; the reconciler writes them later"
            );
        }
        reach(Point::StoreWritten);
        through.send_modify(|through| *through += batch.len() as u64);
        batch.clear();
    }
}

/// Writes what can be written; answers how many changes could not, and why the last of them.
async fn apply(store: &Store, batch: &[Noted]) -> Result<(), (u64, StoreError)> {
    match apply_patiently(store, batch).await {
        Ok(()) => Ok(()),
        Err(e) if e.is_of_the_data() && batch.len() > 1 => {
            // One of them is at fault, and the others are other teams'.
            let mut failed = None;
            for change in batch {
                if let Err(e) = apply_patiently(store, std::slice::from_ref(change)).await {
                    let count = failed.map_or(0, |(count, _)| count);
                    failed = Some((count + 1, e));
                }
            }
            failed.map_or(Ok(()), Err)
        }
        Err(e) => Err((batch.len() as u64, e)),
    }
}

/// A database that is away is waited for: the queue bounds what waits with it.
async fn apply_patiently(store: &Store, batch: &[Noted]) -> Result<(), StoreError> {
    let mut wait = FIRST_RETRY;
    for _ in 1..TRIES {
        match store.apply(batch).await {
            Ok(()) => return Ok(()),
            Err(e) if e.is_of_the_data() => return Err(e),
            Err(e) => debug!(error = %e, "changes were not written yet"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(MAX_RETRY);
    }
    store.apply(batch).await
}
