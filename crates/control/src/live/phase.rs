//! Where one sandbox stands in the live table, as a pure, total function.
//!
//! ```text
//!             Answered              EndAsked              EndHeard
//!  Starting ───────────► Running ───────────► Ending ─────────────► (gone)
//!     │  │                │   ▲    EndFailed    │
//!     │  │                │   └─────────────────┘
//!     │  │ EndHeard       └── EndHeard ──► (gone)
//!     │  └─────────► Doomed ── Answered, Failed ──► (gone)
//!     └── Failed ──► (gone)
//! ```
//!
//! This is what control believes; `belljar_domain::lifecycle` is what the node does.

/// What control believes of one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// A node was asked to start it and has not answered.
    Starting,
    /// The node said that it ended, before it answered the call that started it.
    Doomed,
    /// It can be seen and used.
    Running,
    /// Nobody sees it any more, and the node has not said yet that it is gone.
    Ending,
}

/// What happened to one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The node answered that it runs.
    Answered,
    /// The node did not start it, or nobody knows whether it did.
    Failed,
    /// Its end was asked for, or a call found that the node does not have it.
    EndAsked,
    /// The node did not end it.
    EndFailed,
    /// The node said that it ended.
    EndHeard,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// It stays, in this phase.
    In(Phase),
    /// It leaves the table.
    Gone,
}

/// The event means nothing in this phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// Its start has not been answered: wait for that.
    StillStarting,
    /// Its start has been answered before.
    AlreadyStarted,
    /// Somebody else asked for its end.
    AlreadyEnding,
    /// Nobody asked for its end.
    NotEnding,
}

/// What follows `event` in `phase`.
///
/// # Errors
/// [`Denied`] when the event means nothing there; the phase is then unchanged.
pub(crate) fn next(phase: Phase, event: Event) -> Result<Next, Denied> {
    match (phase, event) {
        (Phase::Starting, Event::Answered) => Ok(Next::In(Phase::Running)),
        (Phase::Starting | Phase::Doomed, Event::EndHeard) => Ok(Next::In(Phase::Doomed)),
        (Phase::Starting, Event::Failed)
        | (Phase::Doomed, Event::Answered | Event::Failed)
        | (Phase::Running | Phase::Ending, Event::EndHeard) => Ok(Next::Gone),
        (Phase::Starting | Phase::Doomed, Event::EndAsked) => Err(Denied::StillStarting),
        (Phase::Running | Phase::Ending, Event::Answered | Event::Failed) => {
            Err(Denied::AlreadyStarted)
        }
        (Phase::Running, Event::EndAsked) => Ok(Next::In(Phase::Ending)),
        (Phase::Ending, Event::EndAsked) => Err(Denied::AlreadyEnding),
        (Phase::Ending, Event::EndFailed) => Ok(Next::In(Phase::Running)),
        (Phase::Starting | Phase::Doomed | Phase::Running, Event::EndFailed) => {
            Err(Denied::NotEnding)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 4] = [Phase::Starting, Phase::Doomed, Phase::Running, Phase::Ending];
    const EVENTS: [Event; 5] =
        [Event::Answered, Event::Failed, Event::EndAsked, Event::EndFailed, Event::EndHeard];

    /// Follows `events`; what is denied changes nothing. `None` once it is gone.
    fn follow(events: &[Event]) -> Option<Phase> {
        let mut phase = Phase::Starting;
        for event in events {
            match next(phase, *event) {
                Ok(Next::In(after)) => phase = after,
                Ok(Next::Gone) => return None,
                Err(_) => {}
            }
        }
        Some(phase)
    }

    #[test]
    fn a_sandbox_starts_runs_and_ends() {
        assert_eq!(follow(&[Event::Answered]), Some(Phase::Running));
        assert_eq!(follow(&[Event::Answered, Event::EndAsked]), Some(Phase::Ending));
        assert_eq!(follow(&[Event::Answered, Event::EndAsked, Event::EndHeard]), None);
        assert_eq!(follow(&[Event::Answered, Event::EndHeard]), None);
    }

    #[test]
    fn an_end_that_failed_can_be_asked_for_again() {
        let failed = [Event::Answered, Event::EndAsked, Event::EndFailed];
        assert_eq!(follow(&failed), Some(Phase::Running));
        assert_eq!(next(Phase::Ending, Event::EndAsked), Err(Denied::AlreadyEnding));
    }

    #[test]
    fn an_end_heard_before_the_start_wins() {
        assert_eq!(follow(&[Event::EndHeard]), Some(Phase::Doomed));
        assert_eq!(follow(&[Event::EndHeard, Event::EndHeard, Event::Answered]), None);
    }

    #[test]
    fn every_phase_can_be_left_for_good_and_nothing_starts_twice() {
        for phase in PHASES {
            let leaves = EVENTS.iter().any(|event| next(phase, *event) == Ok(Next::Gone));
            assert!(leaves, "{phase:?} cannot be left");
            for event in EVENTS {
                if let Ok(Next::In(after)) = next(phase, event) {
                    assert_ne!(after, Phase::Starting, "{phase:?} {event:?}");
                }
            }
        }
    }
}
