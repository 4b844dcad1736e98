//! Breaking a fake machine on purpose, at a named step.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Where a fake machine can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// [`crate::Runtime::boot`].
    Boot,
    /// [`crate::Runtime::restore`].
    Restore,
    /// [`crate::Runtime::reclaim`].
    Reclaim,
    /// [`crate::Machine::freeze`].
    Freeze,
    /// [`crate::Machine::thaw`].
    Thaw,
    /// [`crate::Machine::save`].
    Save,
    /// [`crate::Machine::snapshot`], when the folder is taken and nothing is passed on.
    Snapshot,
    /// [`crate::Machine::kill`].
    Kill,
    /// The guest is about to say that it booted.
    GuestBoot,
    /// The guest got its identity and is about to say that it is ready.
    GuestInit,
    /// The guest is about to say that it is prepared for a snapshot.
    GuestPrepare,
    /// The guest is about to say that it goes on after a snapshot.
    GuestContinue,
    /// The guest got a request on its HTTP port.
    GuestHttp,
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The step answers with an error.
    Fail,
    /// The step never answers.
    Hang,
    /// The machine ends as if its process had died; the step finds it gone.
    Crash,
}

/// The faults to come. Shared with the test that sets them.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    planned: HashMap<Step, Plan>,
    reached: HashMap<Step, u32>,
}

#[derive(Debug, Clone, Copy)]
struct Plan {
    fault: Fault,
    /// `None` is for ever.
    times_left: Option<u32>,
}

impl Faults {
    /// No faults yet.
    pub fn new() -> Faults {
        Faults::default()
    }

    /// From now on `step` has this fault, every time.
    pub fn always(&self, step: Step, fault: Fault) {
        self.plan(step, Plan { fault, times_left: None });
    }

    /// The next time, and only then, `step` has this fault.
    pub fn once(&self, step: Step, fault: Fault) {
        self.plan(step, Plan { fault, times_left: Some(1) });
    }

    /// Nothing is broken any more.
    pub fn clear(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).planned.clear();
    }

    /// How often `step` was reached.
    pub fn reached(&self, step: Step) -> u32 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.reached.get(&step).copied().unwrap_or(0)
    }

    fn plan(&self, step: Step, plan: Plan) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).planned.insert(step, plan);
    }

    /// Counts `step` and takes its fault. A yield first: a real step is never instantaneous, so
    /// a caller that forgets about cancellation is caught here.
    pub(super) async fn reach(&self, step: Step) -> Option<Fault> {
        tokio::task::yield_now().await;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state.reached.entry(step).or_default() += 1;
        let plan = state.planned.get_mut(&step)?;
        let fault = plan.fault;
        if let Some(left) = &mut plan.times_left {
            *left -= 1;
            if *left == 0 {
                state.planned.remove(&step);
            }
        }
        Some(fault)
    }
}
