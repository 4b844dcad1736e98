//! The one place that spawns: every task and every blocking job belongs to a group that ends.

use std::future::Future;

use hyper::rt::Executor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that live and end together. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Group {
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// A blocking job ended by a panic; the panic itself was printed where it happened.
#[derive(Debug, thiserror::Error)]
#[error("finish a blocking job")]
pub struct JobLost;

impl Group {
    /// Spawns a task that is dropped at its next wait when the group stops.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.spawn_shielded(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Spawns a task that watches [`Group::stopped`] itself.
    #[expect(clippy::disallowed_methods, reason = "this is the place the ban points at")]
    pub fn spawn_shielded(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(tokio::spawn(self.tasks.track_future(task)));
    }

    /// Ends when the group was told to stop. Cancel-safe.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }

    /// Tells every task to stop, without waiting.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// A token that is cancelled with the group.
    pub fn token(&self) -> CancellationToken {
        self.stop.child_token()
    }

    /// Stops the group and waits for its tasks, at most `grace`. Says whether all ended.
    pub async fn close(&self, grace: std::time::Duration) -> bool {
        self.stop.cancel();
        self.tasks.close();
        tokio::time::timeout(grace, self.tasks.wait()).await.is_ok()
    }
}

/// Streams of HTTP/2, and the rests of request bodies.
impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Group {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

/// Runs file system or process work on a thread that may block. Not cancel-safe: the job runs to
/// its end even when the caller stops waiting.
///
/// # Errors
/// [`JobLost`] when the job panicked.
pub async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JobLost> {
    tokio::task::spawn_blocking(job).await.map_err(|_| JobLost)
}
