//! Task lifetimes: every task is born in a scope, has a name, and says what its error means.
//!
//! A scope ends when it is cancelled and all its tasks have ended. Nothing outlives its scope.

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio_util::future::FutureExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, error, info_span, warn};

/// What the end of a task with an error does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Log it; the others go on.
    Log,
    /// Log it and cancel the whole scope.
    FailScope,
}

/// A handle to a group of tasks that live and end together. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Scope {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: &'static str,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Scope {
    /// A scope nobody else can cancel.
    pub fn root(name: &'static str) -> Scope {
        Scope::with_token(name, CancellationToken::new())
    }

    /// A scope that is cancelled when this one is, and can be closed by itself.
    ///
    /// The parent does not wait for it: whoever makes a child closes it.
    pub fn child(&self, name: &'static str) -> Scope {
        Scope::with_token(name, self.inner.cancel.child_token())
    }

    fn with_token(name: &'static str, cancel: CancellationToken) -> Scope {
        Scope { inner: Arc::new(Inner { name, cancel, tasks: TaskTracker::new() }) }
    }

    /// Spawns a task that is dropped at its next wait when the scope is cancelled.
    pub fn spawn<F, E>(&self, name: &'static str, on_error: OnError, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let cancel = self.inner.cancel.clone();
        let task = self.heard(name, on_error, task).with_cancellation_token_owned(cancel);
        self.launch(name, task);
    }

    /// Spawns a task that runs to its end even when the scope is cancelled: state changes and
    /// teardown. It must be bounded in time and watch [`Scope::cancelled`] itself where it waits.
    pub fn spawn_shielded<F, E>(&self, name: &'static str, on_error: OnError, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        self.launch(name, self.heard(name, on_error, task));
    }

    /// The task with its error heard. It and what else is put around a task holds it in place: one
    /// async block in another would lay it out once more each, and there are many tasks.
    fn heard<F, E>(
        &self,
        name: &'static str,
        on_error: OnError,
        task: F,
    ) -> impl Future<Output = ()> + Send + 'static
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let scope = self.clone();
        task.map(move |outcome| {
            let Err(e) = outcome else { return };
            match on_error {
                OnError::Log => warn!(task = name, error = %e, "task failed"),
                OnError::FailScope => {
                    error!(task = name, error = %e, "task failed; its scope ends");
                    scope.inner.cancel.cancel();
                }
            }
        })
    }

    #[expect(clippy::disallowed_methods, reason = "this is the place the ban points at")]
    fn launch<T: Send + 'static>(
        &self,
        name: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) {
        let tracked = self.inner.tasks.track_future(task.map(drop));
        drop(tokio::spawn(tracked.instrument(info_span!("task", name))));
    }

    /// Ends when the scope is cancelled. Cancel-safe.
    pub async fn cancelled(&self) {
        self.inner.cancel.cancelled().await;
    }

    /// Whether the scope has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.inner.cancel.is_cancelled()
    }

    /// Tells every task to stop, without waiting.
    pub fn cancel(&self) {
        self.inner.cancel.cancel();
    }

    /// Cancels the scope and waits for its tasks, at most `grace`. Says whether all ended.
    pub async fn close(&self, grace: Duration) -> bool {
        self.inner.cancel.cancel();
        self.inner.tasks.close();
        let ended = tokio::time::timeout(grace, self.inner.tasks.wait()).await.is_ok();
        if !ended {
            warn!(
                scope = self.inner.name,
                tasks = self.inner.tasks.len(),
                grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
                "scope still has tasks after its grace"
            );
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[tokio::test]
    async fn closing_a_scope_ends_its_tasks() {
        let scope = Scope::root("test");
        scope.spawn("forever", OnError::Log, async {
            std::future::pending::<()>().await;
            Ok::<(), Infallible>(())
        });
        assert!(scope.close(Duration::from_secs(5)).await);
    }

    #[tokio::test]
    async fn a_fatal_task_cancels_its_scope() {
        let scope = Scope::root("test");
        scope.spawn("fails", OnError::FailScope, async { Err("broken") });
        scope.cancelled().await;
        assert!(scope.close(Duration::from_secs(5)).await);
    }
}
