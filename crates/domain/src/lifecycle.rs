//! The life of one run of a sandbox on a host as a pure, total function.
//!
//! ```text
//!              Started              End(reason)            Gone
//!  Starting ────────────► Running ──────────────► Ending ─────────► Ended
//!      │                   │   ▲                   ▲  ▲
//!      │     Freeze(goal)  │   │ Kept (a copy),    │  │
//!      │                   ▼   │ NotKept           │  │
//!      │                  Freezing ────────────────┘  │
//!      │                      Kept (a pause), End     │
//!      └────────────────── End(reason) ───────────────┘
//! ```
//!
//! A paused sandbox is no state of a run: the run has ended with [`EndReason::Paused`], and what it
//! left is a snapshot. A resume is a new run, and starts like any other. A failed one ends as
//! crashed.
//!
//! While it freezes, the owner task of a sandbox does nothing else, so what callers ask meanwhile
//! waits its turn; only what the machine does by itself can come between. That task is the only
//! caller of this table; it applies the [`Effect`] and feeds the outcome back as the next event.

use crate::UnixMillis;

/// Why a sandbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// A caller asked for it.
    Killed,
    /// Its end time came.
    Expired,
    /// Its machine died by itself, or never became ready.
    Crashed,
    /// The node is stopping.
    Shutdown,
    /// A snapshot of it was kept, from which it can go on.
    Paused,
}

impl EndReason {
    /// The word used in the ledger, on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Killed => "killed",
            EndReason::Expired => "expired",
            EndReason::Crashed => "crashed",
            EndReason::Shutdown => "shutdown",
            EndReason::Paused => "paused",
        }
    }
}

/// What a sandbox is frozen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// To be given up; its snapshot stands for it.
    Pause,
    /// To be copied; it goes on.
    Copy,
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its machine is being restored.
    Starting {
        /// When it will end.
        end_at: UnixMillis,
    },
    /// Its guest has said it is ready.
    Running {
        /// When it will end.
        end_at: UnixMillis,
    },
    /// Its machine stands still, and its memory and disk are being kept.
    Freezing {
        /// When it will end, if it goes on.
        end_at: UnixMillis,
        /// What for.
        goal: Goal,
    },
    /// Its resources are being given back.
    Ending {
        /// Why.
        reason: EndReason,
    },
    /// Nothing of it is left on this host.
    Ended {
        /// Why.
        reason: EndReason,
    },
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The guest is ready.
    Started,
    /// The end time moves.
    SetEnd(UnixMillis),
    /// It is to be kept.
    Freeze(Goal),
    /// Its snapshot is on stable storage.
    Kept,
    /// There is no snapshot, and it can go on.
    NotKept,
    /// It must go.
    End(EndReason),
    /// Teardown is through.
    Gone,
}

/// What the owner must do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Set the expiry timer to this time.
    Arm(UnixMillis),
    /// Freeze the machine and keep it.
    Keep(Goal),
    /// Give everything back, in reverse order.
    Teardown,
}

/// The event is not legal in this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// It is on its way out, or out.
    AlreadyEnding,
    /// It is already running.
    AlreadyRunning,
    /// It does not run yet.
    NotRunning,
    /// It is being frozen: ask again when that is over.
    Freezing,
    /// It is not being frozen.
    NotFreezing,
    /// It still holds resources.
    NotEnding,
}

/// The next state and what to do, or why not.
///
/// # Errors
/// [`Denied`] when the event is not legal in `state`; the state is then unchanged.
pub fn next(state: State, event: Event) -> Result<(State, Effect), Denied> {
    match state {
        State::Starting { end_at } => while_starting(end_at, event),
        State::Running { end_at } => while_running(end_at, event),
        State::Freezing { end_at, goal } => while_freezing(end_at, goal, event),
        State::Ending { reason } => match event {
            Event::Gone => Ok((State::Ended { reason }, Effect::None)),
            _ => Err(Denied::AlreadyEnding),
        },
        State::Ended { .. } => Err(Denied::AlreadyEnding),
    }
}

fn while_starting(end_at: UnixMillis, event: Event) -> Result<(State, Effect), Denied> {
    match event {
        Event::Started => Ok((State::Running { end_at }, Effect::Arm(end_at))),
        Event::SetEnd(end_at) => Ok((State::Starting { end_at }, Effect::None)),
        Event::End(reason) => Ok((State::Ending { reason }, Effect::Teardown)),
        Event::Freeze(_) => Err(Denied::NotRunning),
        Event::Kept | Event::NotKept => Err(Denied::NotFreezing),
        Event::Gone => Err(Denied::NotEnding),
    }
}

fn while_running(end_at: UnixMillis, event: Event) -> Result<(State, Effect), Denied> {
    match event {
        Event::SetEnd(end_at) => Ok((State::Running { end_at }, Effect::Arm(end_at))),
        Event::Freeze(goal) => Ok((State::Freezing { end_at, goal }, Effect::Keep(goal))),
        Event::End(reason) => Ok((State::Ending { reason }, Effect::Teardown)),
        Event::Started => Err(Denied::AlreadyRunning),
        Event::Kept | Event::NotKept => Err(Denied::NotFreezing),
        Event::Gone => Err(Denied::NotEnding),
    }
}

fn while_freezing(end_at: UnixMillis, goal: Goal, event: Event) -> Result<(State, Effect), Denied> {
    match (event, goal) {
        (Event::Kept, Goal::Pause) => {
            Ok((State::Ending { reason: EndReason::Paused }, Effect::Teardown))
        }
        (Event::Kept, Goal::Copy) | (Event::NotKept, _) => {
            Ok((State::Running { end_at }, Effect::Arm(end_at)))
        }
        (Event::End(reason), _) => Ok((State::Ending { reason }, Effect::Teardown)),
        (Event::SetEnd(_) | Event::Freeze(_), _) => Err(Denied::Freezing),
        (Event::Started, _) => Err(Denied::AlreadyRunning),
        (Event::Gone, _) => Err(Denied::NotEnding),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: UnixMillis = UnixMillis(1_000);

    #[test]
    fn a_life_runs_to_its_end() {
        let (running, effect) =
            next(State::Starting { end_at: END }, Event::Started).expect("legal");
        assert_eq!(effect, Effect::Arm(END));
        let (ending, effect) = next(running, Event::End(EndReason::Expired)).expect("legal");
        assert_eq!(effect, Effect::Teardown);
        let (ended, _) = next(ending, Event::Gone).expect("legal");
        assert_eq!(ended, State::Ended { reason: EndReason::Expired });
    }

    #[test]
    fn an_ending_sandbox_takes_no_orders() {
        let ending = State::Ending { reason: EndReason::Killed };
        for event in [
            Event::Started,
            Event::SetEnd(END),
            Event::End(EndReason::Expired),
            Event::Freeze(Goal::Pause),
            Event::Kept,
        ] {
            assert_eq!(next(ending, event), Err(Denied::AlreadyEnding));
        }
    }

    #[test]
    fn a_pause_ends_the_run_and_a_copy_does_not() {
        let running = State::Running { end_at: END };
        for (goal, after) in
            [(Goal::Pause, State::Ending { reason: EndReason::Paused }), (Goal::Copy, running)]
        {
            let (freezing, effect) = next(running, Event::Freeze(goal)).expect("legal");
            assert_eq!(effect, Effect::Keep(goal));
            assert_eq!(next(freezing, Event::Kept).expect("legal").0, after);
            // What was not kept runs on, whatever it was for.
            let (back, effect) = next(freezing, Event::NotKept).expect("legal");
            assert_eq!((back, effect), (running, Effect::Arm(END)));
        }
    }

    #[test]
    fn a_frozen_sandbox_can_only_be_ended() {
        let freezing = State::Freezing { end_at: END, goal: Goal::Copy };
        for event in [Event::SetEnd(END), Event::Freeze(Goal::Pause)] {
            assert_eq!(next(freezing, event), Err(Denied::Freezing));
        }
        let (ending, _) = next(freezing, Event::End(EndReason::Crashed)).expect("legal");
        assert_eq!(ending, State::Ending { reason: EndReason::Crashed });
    }

    #[test]
    fn only_what_runs_is_frozen() {
        let starting = State::Starting { end_at: END };
        assert_eq!(next(starting, Event::Freeze(Goal::Copy)), Err(Denied::NotRunning));
        assert_eq!(next(State::Running { end_at: END }, Event::Kept), Err(Denied::NotFreezing));
    }

    #[test]
    fn nothing_is_gone_before_it_was_torn_down() {
        assert_eq!(next(State::Running { end_at: END }, Event::Gone), Err(Denied::NotEnding));
    }
}
