//! Undo stacks: what was acquired is given back in reverse order, once, whatever happens.
//!
//! Push the undo before the thing can be lost:
//!
//! ```text
//! let slot = pool.lease().await?;
//! undo.push("network slot", async move { pool.release(slot).await });
//! ```
//!
//! A stack that is dropped unrun runs itself on a task of its scope, so a cancelled caller cannot
//! leak; that path is logged, because it means somebody forgot.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tracing::warn;

use crate::fault::{Point, reach};
use crate::scope::{OnError, Scope};

type Undo = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

struct Step {
    what: &'static str,
    undo: Undo,
    only_if_clean: bool,
}

/// A last-in, first-out stack of undo steps.
pub struct Teardown {
    scope: Scope,
    step_deadline: Duration,
    steps: Vec<Step>,
    leaks: Vec<Leak>,
}

/// One undo step that failed or ran out of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// What may be left behind.
    pub what: &'static str,
    /// Why.
    pub reason: String,
}

impl Teardown {
    /// An empty stack. Each step gets at most `step_deadline`.
    pub fn new(scope: &Scope, step_deadline: Duration) -> Teardown {
        Teardown { scope: scope.clone(), step_deadline, steps: Vec::new(), leaks: Vec::new() }
    }

    /// Registers how to give `what` back. The future does nothing until teardown polls it.
    pub fn push<F>(&mut self, what: &'static str, undo: F)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.steps.push(Step { what, undo: Box::pin(undo), only_if_clean: false });
    }

    /// As [`Teardown::push`], for what records the others: it is given back only if every step
    /// before it was, and stays otherwise, so that a later start finds what is left.
    pub fn push_if_clean<F>(&mut self, what: &'static str, undo: F)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.steps.push(Step { what, undo: Box::pin(undo), only_if_clean: true });
    }

    /// Says that something outside this stack may be left, as if a step had failed.
    pub fn note_leak(&mut self, what: &'static str, reason: String) {
        warn!(what, reason, "something may be left behind");
        self.leaks.push(Leak { what, reason });
    }

    /// Runs every step, last first, and reports those that failed.
    ///
    /// Not cancel-safe by itself: call it from a shielded task, as the drop path does.
    pub async fn run(mut self) -> Vec<Leak> {
        let leaks = std::mem::take(&mut self.leaks);
        run_steps(std::mem::take(&mut self.steps), self.step_deadline, leaks).await
    }
}

async fn run_steps(mut steps: Vec<Step>, deadline: Duration, mut leaks: Vec<Leak>) -> Vec<Leak> {
    while let Some(step) = steps.pop() {
        if step.only_if_clean && !leaks.is_empty() {
            leaks.push(Leak { what: step.what, reason: "kept: it names what is left".to_owned() });
            continue;
        }
        let reason = match tokio::time::timeout(deadline, step.undo).await {
            Ok(Ok(())) => {
                reach(Point::TeardownStepUndone);
                continue;
            }
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {} ms", deadline.as_millis()),
        };
        warn!(what = step.what, reason, "teardown step failed");
        leaks.push(Leak { what: step.what, reason });
    }
    leaks
}

impl Drop for Teardown {
    fn drop(&mut self) {
        if self.steps.is_empty() {
            return;
        }
        let steps = std::mem::take(&mut self.steps);
        let deadline = self.step_deadline;
        let leaks = std::mem::take(&mut self.leaks);
        if tokio::runtime::Handle::try_current().is_err() {
            warn!(steps = steps.len(), "teardown dropped outside a runtime; start-up reclaims it");
            return;
        }
        self.scope.spawn_shielded("dropped teardown", OnError::Log, async move {
            let leaks = run_steps(steps, deadline, leaks).await;
            if leaks.is_empty() { Ok(()) } else { Err(format!("leaked {leaks:?}")) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn recorder() -> (Arc<Mutex<Vec<u32>>>, impl Fn(u32) -> Undo) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let handle = seen.clone();
        let step = move |n: u32| -> Undo {
            let seen = seen.clone();
            Box::pin(async move {
                seen.lock().expect("no panic holds this lock").push(n);
                Ok(())
            })
        };
        (handle, step)
    }

    #[tokio::test]
    async fn steps_run_last_first_and_a_failure_stops_nothing() {
        let scope = Scope::root("test");
        let (seen, step) = recorder();
        let mut undo = Teardown::new(&scope, Duration::from_millis(50));
        undo.push("one", step(1));
        undo.push("broken", async { Err("no".to_owned()) });
        undo.push("stuck", std::future::pending());
        undo.push("two", step(2));
        let leaks = undo.run().await;
        assert_eq!(*seen.lock().expect("no panic holds this lock"), [2, 1]);
        assert_eq!(leaks.iter().map(|l| l.what).collect::<Vec<_>>(), ["stuck", "broken"]);
    }

    #[tokio::test]
    async fn the_record_of_a_leak_is_kept() {
        let scope = Scope::root("test");
        let (seen, step) = recorder();
        let mut undo = Teardown::new(&scope, Duration::from_secs(1));
        undo.push_if_clean("record", step(1));
        undo.push("two", step(2));
        undo.note_leak("machine", "busy".to_owned());
        let leaks = undo.run().await;
        assert_eq!(*seen.lock().expect("no panic holds this lock"), [2]);
        assert_eq!(leaks.iter().map(|l| l.what).collect::<Vec<_>>(), ["machine", "record"]);
    }

    #[tokio::test]
    async fn a_dropped_stack_still_runs() {
        let scope = Scope::root("test");
        let (seen, step) = recorder();
        let mut undo = Teardown::new(&scope, Duration::from_secs(1));
        undo.push("one", step(1));
        drop(undo);
        assert!(scope.close(Duration::from_secs(5)).await);
        assert_eq!(*seen.lock().expect("no panic holds this lock"), [1]);
    }
}
