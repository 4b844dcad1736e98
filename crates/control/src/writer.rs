//! Writes behind the live table: a bounded queue and one task, so that no request waits for disk.
//!
//! A change that cannot be queued or written is logged and dropped: the reconciler compares the
//! store with the live table and writes again what is missing.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{OnError, Scope};
use belljar_domain::{ExecutionId, UnixMillis};
use tokio::sync::mpsc;
use tracing::warn;

use crate::live::Sandbox;
use crate::store::{Store, StoreError};

/// Changes waiting to be written. At a thousand creates a second, several seconds of a stuck disk.
const QUEUE: usize = 8192;
/// Changes written in one transaction.
const BATCH: usize = 256;
const TRIES: u32 = 3;
const FIRST_RETRY: Duration = Duration::from_millis(100);

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
}

/// Where changes are put. The task ends when the last clone is dropped and the queue is written.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Change>,
}

impl Writer {
    /// Starts the task in `scope`. It ignores cancellation, so that what was queued is written;
    /// its end is the end of the queue.
    pub(crate) fn start(store: Store, scope: &Scope) -> Writer {
        let (queue, changes) = mpsc::channel(QUEUE);
        scope.spawn_shielded("store writer", OnError::Log, async move {
            run(&store, changes).await;
            Ok::<(), Infallible>(())
        });
        Writer { queue }
    }

    /// Queues a change; never waits.
    pub(crate) fn push(&self, change: Change) {
        if let Err(e) = self.queue.try_send(change) {
            warn!(error = %e, "a change was not queued; the reconciler writes it later");
        }
    }
}

async fn run(store: &Store, mut changes: mpsc::Receiver<Change>) {
    let mut batch = Vec::with_capacity(BATCH);
    while changes.recv_many(&mut batch, BATCH).await > 0 {
        reach(Point::StoreBeforeWrite);
        if let Err(e) = apply(store, &batch).await {
            let reason = std::error::Error::source(&e).map(ToString::to_string);
            warn!(
                error = %e,
                reason,
                changes = batch.len(),
                "changes were not written; the reconciler writes them later"
            );
        }
        reach(Point::StoreWritten);
        batch.clear();
    }
}

async fn apply(store: &Store, batch: &[Change]) -> Result<(), StoreError> {
    let mut wait = FIRST_RETRY;
    for _ in 1..TRIES {
        if store.apply(batch).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
    store.apply(batch).await
}
