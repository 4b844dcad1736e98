//! A step on the way to or from a slot that failed, and threads to run such steps on.

use std::fmt::Display;

use tokio::sync::oneshot;

/// What failed, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {reason}")]
pub(crate) struct StepFailed {
    /// A verb phrase.
    pub(crate) step: &'static str,
    /// The system's words.
    pub(crate) reason: String,
}

/// Names the step an error came from.
pub(crate) trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, StepFailed>;
}

impl<T, E: Display> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, StepFailed> {
        self.map_err(|e| StepFailed { step, reason: e.to_string() })
    }
}

/// Runs `work` on a thread of its own, which ends with it.
///
/// Threads that change their network namespace must not come from a pool: whatever ran on such a
/// thread next would run in the wrong namespace. Not cancel-safe in effect: when the caller
/// leaves, the work still runs to its end.
///
/// # Errors
/// [`StepFailed`] when no thread could be started, or it panicked.
pub(crate) async fn on_own_thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StepFailed> {
    let (answer, answered) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        // A caller that left is no reason to do anything here.
        .spawn(move || drop(answer.send(work())))
        .step("start a thread")?;
    answered.await.map_err(|_| StepFailed {
        step: "run a thread to its end",
        reason: format!("{name} panicked"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_call_gets_a_thread_of_its_own() {
        let here = std::thread::current().id();
        let there = on_own_thread("test", || std::thread::current().id()).await.expect("it runs");
        assert_ne!(here, there);
    }
}
