//! The life of one sandbox as a pure, total function.
//!
//! ```text
//!             Started            End(reason)            Gone
//!  Starting ───────────► Running ──────────► Ending ─────────► Ended
//!      │                                       ▲
//!      └──────────────── End(reason) ──────────┘
//! ```
//!
//! Pausing and resuming join this table with the snapshot engine. The owner task of a sandbox is
//! the only caller; it applies the [`Effect`] and feeds the outcome back as the next event.

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
}

impl EndReason {
    /// The word used in the ledger, on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Killed => "killed",
            EndReason::Expired => "expired",
            EndReason::Crashed => "crashed",
            EndReason::Shutdown => "shutdown",
        }
    }
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
    /// It still holds resources.
    NotEnding,
}

/// The next state and what to do, or why not.
///
/// # Errors
/// [`Denied`] when the event is not legal in `state`; the state is then unchanged.
pub fn next(state: State, event: Event) -> Result<(State, Effect), Denied> {
    match (state, event) {
        (State::Starting { end_at }, Event::Started) => {
            Ok((State::Running { end_at }, Effect::Arm(end_at)))
        }
        (State::Starting { .. }, Event::SetEnd(end_at)) => {
            Ok((State::Starting { end_at }, Effect::None))
        }
        (State::Running { .. }, Event::SetEnd(end_at)) => {
            Ok((State::Running { end_at }, Effect::Arm(end_at)))
        }
        (State::Running { .. }, Event::Started) => Err(Denied::AlreadyRunning),
        (State::Starting { .. } | State::Running { .. }, Event::End(reason)) => {
            Ok((State::Ending { reason }, Effect::Teardown))
        }
        (State::Ending { reason }, Event::Gone) => Ok((State::Ended { reason }, Effect::None)),
        (State::Starting { .. } | State::Running { .. }, Event::Gone) => Err(Denied::NotEnding),
        (
            State::Ending { .. } | State::Ended { .. },
            Event::Started | Event::SetEnd(_) | Event::End(_),
        )
        | (State::Ended { .. }, Event::Gone) => Err(Denied::AlreadyEnding),
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
        for event in [Event::Started, Event::SetEnd(END), Event::End(EndReason::Expired)] {
            assert_eq!(next(ending, event), Err(Denied::AlreadyEnding));
        }
    }

    #[test]
    fn nothing_is_gone_before_it_was_torn_down() {
        assert_eq!(next(State::Running { end_at: END }, Event::Gone), Err(Denied::NotEnding));
    }
}
