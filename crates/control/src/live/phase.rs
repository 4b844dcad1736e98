//! Where one sandbox stands in the live table, as a pure, total function.
//!
//! ```text
//!             Answered              EndAsked              EndHeard
//!  Starting ───────────► Running ───────────► Ending ─────────────► (gone)
//!     │  │                │   ▲    EndFailed    │ │
//!     │  │                │   └─────────────────┘ └─ PauseHeard ─► Discarding
//!     │  │ EndHeard       └── EndHeard ──► (gone)
//!     │  └─────────► Doomed ── Answered, Failed ──► (gone)
//!     └── Failed ──► (gone)
//!
//!           PauseAsked            PauseHeard          ResumeAsked
//!  Running ────────────► Pausing ────────────► Paused ────────────► Resuming
//!   ▲ │ ▲  PauseFailed    │ │                  ▲ ▲ │ ▲    Failed     │ │ │
//!   │ │ └─────────────────┘ └─ EndHeard: gone  │ │ │ └───────────────┘ │ │
//!   │ └─ PauseHeard, Lapsed ───────────────────┘ │ │                   │ │
//!   │                                            │ │ EndAsked          │ │ EndHeard
//!   └──────────────────────── Answered ──────────┼─┼───────────────────┘ ▼
//!                                                │ ▼      Answered,   Relapsing
//!                        (gone) ◄─ EndHeard ─ Discarding    Failed       │
//!                                                └─ EndFailed ─► Paused ◄┘
//! ```
//!
//! A call that finds that the node does not have a sandbox makes it `Missing`, from `Running`, until the
//! node says why: EndHeard, Lapsed or PauseHeard lead from there as from `Running`, and so does EndAsked.
//!
//! A snapshot in place is no phase: the sandbox runs on, and whoever takes one holds its turn.
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
    /// Its node was asked to pause it and has not answered. Seen as paused.
    Pausing,
    /// It is a snapshot.
    Paused,
    /// A node was asked to start it from its snapshot and has not answered. Seen as paused.
    Resuming,
    /// The node said that the resumed run ended, before it answered the call that started it.
    Relapsing,
    /// Its node does not have it, and has not said yet why.
    Missing,
    /// Nobody sees it any more, and the node has not said yet that it is gone.
    Ending,
    /// It was paused; nobody sees it any more, and its snapshot is to go.
    Discarding,
}

/// What happened to one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The node answered that it runs, or turned out to run it.
    Answered,
    /// The node did not start it, or nobody knows whether it did.
    Failed,
    /// Its end was asked for.
    EndAsked,
    /// A call found that the node does not have it.
    NotThere,
    /// The node did not end it.
    EndFailed,
    /// The node said that it ended; of a paused one, that its snapshot is not there any more.
    EndHeard,
    /// Its pause was asked for.
    PauseAsked,
    /// The node did not pause it.
    PauseFailed,
    /// The node has it as a snapshot.
    PauseHeard,
    /// Its run was lost with its node, and what it had been resumed from is still there.
    Lapsed,
    /// Its resume was asked for.
    ResumeAsked,
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
    /// Its pause or resume has not been answered: wait for that.
    Changing,
    /// It runs.
    Runs,
    /// It is paused.
    IsPaused,
    /// Somebody else asked for its end.
    AlreadyEnding,
}

impl Phase {
    /// Whether its team sees it, running or paused.
    pub(super) fn is_seen(self) -> bool {
        self == Phase::Running || self.is_asleep()
    }

    /// Whether it is seen as paused.
    pub(super) fn is_asleep(self) -> bool {
        matches!(self, Phase::Pausing | Phase::Paused | Phase::Resuming | Phase::Relapsing)
    }

    /// Whether its node holds a run of it, as far as is known.
    pub(super) fn has_run(self) -> bool {
        matches!(self, Phase::Running | Phase::Pausing | Phase::Missing | Phase::Ending)
    }
}

/// What follows `event` in `phase`.
///
/// # Errors
/// [`Denied`] when the event means nothing there; the phase is then unchanged.
pub(crate) fn next(phase: Phase, event: Event) -> Result<Next, Denied> {
    match phase {
        Phase::Starting => starting(event),
        Phase::Doomed => doomed(event),
        Phase::Running => running(event),
        Phase::Pausing => pausing(event),
        Phase::Paused => paused(event),
        Phase::Resuming => resuming(event),
        Phase::Relapsing => relapsing(event),
        Phase::Missing => missing(event),
        Phase::Ending => ending(event),
        Phase::Discarding => discarding(event),
    }
}

fn starting(event: Event) -> Result<Next, Denied> {
    match event {
        Event::Answered => Ok(Next::In(Phase::Running)),
        Event::Failed => Ok(Next::Gone),
        // A reconcile finds what such an early pause has left.
        Event::EndHeard | Event::Lapsed | Event::PauseHeard => Ok(Next::In(Phase::Doomed)),
        Event::EndAsked
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::StillStarting),
    }
}

fn doomed(event: Event) -> Result<Next, Denied> {
    match event {
        Event::Answered | Event::Failed => Ok(Next::Gone),
        Event::EndHeard | Event::Lapsed | Event::PauseHeard => Ok(Next::In(Phase::Doomed)),
        Event::EndAsked
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::StillStarting),
    }
}

fn running(event: Event) -> Result<Next, Denied> {
    match event {
        Event::EndAsked => Ok(Next::In(Phase::Ending)),
        Event::NotThere => Ok(Next::In(Phase::Missing)),
        Event::EndHeard => Ok(Next::Gone),
        Event::PauseAsked => Ok(Next::In(Phase::Pausing)),
        Event::PauseHeard | Event::Lapsed => Ok(Next::In(Phase::Paused)),
        Event::Answered
        | Event::Failed
        | Event::EndFailed
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::Runs),
    }
}

fn pausing(event: Event) -> Result<Next, Denied> {
    match event {
        Event::PauseHeard | Event::Lapsed => Ok(Next::In(Phase::Paused)),
        Event::PauseFailed => Ok(Next::In(Phase::Running)),
        Event::EndHeard => Ok(Next::Gone),
        Event::Answered
        | Event::Failed
        | Event::EndAsked
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::ResumeAsked => Err(Denied::Changing),
    }
}

fn paused(event: Event) -> Result<Next, Denied> {
    match event {
        Event::ResumeAsked => Ok(Next::In(Phase::Resuming)),
        Event::EndAsked => Ok(Next::In(Phase::Discarding)),
        Event::EndHeard => Ok(Next::Gone),
        // A run or a snapshot that nobody was told of.
        Event::Answered => Ok(Next::In(Phase::Running)),
        Event::PauseHeard => Ok(Next::In(Phase::Paused)),
        Event::Failed
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::Lapsed => Err(Denied::IsPaused),
    }
}

fn resuming(event: Event) -> Result<Next, Denied> {
    match event {
        Event::Answered => Ok(Next::In(Phase::Running)),
        Event::Failed => Ok(Next::In(Phase::Paused)),
        Event::EndHeard | Event::PauseHeard | Event::Lapsed => Ok(Next::In(Phase::Relapsing)),
        Event::EndAsked
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::Changing),
    }
}

fn relapsing(event: Event) -> Result<Next, Denied> {
    match event {
        Event::Answered | Event::Failed => Ok(Next::In(Phase::Paused)),
        Event::EndHeard | Event::PauseHeard | Event::Lapsed => Ok(Next::In(Phase::Relapsing)),
        Event::EndAsked
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::Changing),
    }
}

fn missing(event: Event) -> Result<Next, Denied> {
    match event {
        Event::EndAsked => Ok(Next::In(Phase::Ending)),
        Event::EndHeard => Ok(Next::Gone),
        Event::PauseHeard | Event::Lapsed => Ok(Next::In(Phase::Paused)),
        Event::Answered
        | Event::Failed
        | Event::NotThere
        | Event::EndFailed
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::AlreadyEnding),
    }
}

fn ending(event: Event) -> Result<Next, Denied> {
    match event {
        // What was asked for counts, also when the run went another way first.
        Event::EndHeard | Event::Lapsed => Ok(Next::Gone),
        Event::EndFailed => Ok(Next::In(Phase::Running)),
        Event::PauseHeard => Ok(Next::In(Phase::Discarding)),
        Event::Answered
        | Event::Failed
        | Event::EndAsked
        | Event::NotThere
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::ResumeAsked => Err(Denied::AlreadyEnding),
    }
}

fn discarding(event: Event) -> Result<Next, Denied> {
    match event {
        Event::EndHeard => Ok(Next::Gone),
        Event::EndFailed => Ok(Next::In(Phase::Paused)),
        Event::Answered
        | Event::Failed
        | Event::EndAsked
        | Event::NotThere
        | Event::PauseAsked
        | Event::PauseFailed
        | Event::PauseHeard
        | Event::Lapsed
        | Event::ResumeAsked => Err(Denied::AlreadyEnding),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 10] = [
        Phase::Starting,
        Phase::Doomed,
        Phase::Running,
        Phase::Pausing,
        Phase::Paused,
        Phase::Resuming,
        Phase::Relapsing,
        Phase::Missing,
        Phase::Ending,
        Phase::Discarding,
    ];
    const EVENTS: [Event; 11] = [
        Event::Answered,
        Event::Failed,
        Event::EndAsked,
        Event::NotThere,
        Event::EndFailed,
        Event::EndHeard,
        Event::PauseAsked,
        Event::PauseFailed,
        Event::PauseHeard,
        Event::Lapsed,
        Event::ResumeAsked,
    ];

    /// The phase after `events`; `None` once it has left the table.
    fn follow(events: &[Event]) -> Option<Phase> {
        let mut phase = Phase::Starting;
        for event in events {
            match next(phase, *event).expect("a legal event") {
                Next::In(after) => phase = after,
                Next::Gone => return None,
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
        let paused = [Event::Answered, Event::PauseHeard, Event::EndAsked, Event::EndFailed];
        assert_eq!(follow(&paused), Some(Phase::Paused));
    }

    #[test]
    fn an_end_heard_before_the_start_wins() {
        assert_eq!(follow(&[Event::EndHeard]), Some(Phase::Doomed));
        assert_eq!(follow(&[Event::EndHeard, Event::EndHeard, Event::Answered]), None);
    }

    #[test]
    fn a_sandbox_is_paused_and_resumed_and_what_fails_leaves_it_as_it_was() {
        let pausing = [Event::Answered, Event::PauseAsked];
        assert_eq!(follow(&pausing), Some(Phase::Pausing));
        let and = |more: &[Event]| follow(&[&pausing[..], more].concat());
        assert_eq!(and(&[Event::PauseFailed]), Some(Phase::Running));
        assert_eq!(and(&[Event::PauseHeard]), Some(Phase::Paused));
        let resuming = [Event::PauseHeard, Event::ResumeAsked];
        let and = |more: &[Event]| and(&[&resuming[..], more].concat());
        assert_eq!(and(&[Event::Answered]), Some(Phase::Running));
        assert_eq!(and(&[Event::Failed]), Some(Phase::Paused));
        assert_eq!(and(&[Event::EndHeard, Event::Answered]), Some(Phase::Paused));
        assert_eq!(and(&[Event::Answered, Event::Lapsed]), Some(Phase::Paused));
    }

    #[test]
    fn a_kill_wins_over_a_pause_that_was_faster() {
        let early = [Event::Answered, Event::EndAsked, Event::PauseHeard];
        assert_eq!(follow(&early), Some(Phase::Discarding));
        assert_eq!(follow(&[Event::Answered, Event::EndAsked, Event::Lapsed]), None);
    }

    /// It may have been paused at its end just before, and then there is nothing to throw away.
    #[test]
    fn what_is_missing_may_turn_out_to_be_paused() {
        let missing = [Event::Answered, Event::NotThere];
        assert_eq!(follow(&missing), Some(Phase::Missing));
        assert_eq!(follow(&[&missing[..], &[Event::PauseHeard]].concat()), Some(Phase::Paused));
        assert_eq!(follow(&[&missing[..], &[Event::EndHeard]].concat()), None);
    }

    #[test]
    fn one_change_at_a_time() {
        for phase in [Phase::Pausing, Phase::Resuming, Phase::Relapsing] {
            for event in [Event::PauseAsked, Event::ResumeAsked, Event::EndAsked] {
                assert_eq!(next(phase, event), Err(Denied::Changing), "{phase:?} {event:?}");
            }
        }
        assert_eq!(next(Phase::Paused, Event::PauseAsked), Err(Denied::IsPaused));
        assert_eq!(next(Phase::Running, Event::ResumeAsked), Err(Denied::Runs));
    }

    #[test]
    fn every_phase_can_be_left_and_nothing_starts_twice() {
        for phase in PHASES {
            let leaves = EVENTS.iter().any(|event| match next(phase, *event) {
                Ok(Next::Gone) => true,
                Ok(Next::In(after)) => after != phase,
                Err(_) => false,
            });
            assert!(leaves, "{phase:?} cannot be left");
            for event in EVENTS {
                if let Ok(Next::In(after)) = next(phase, event) {
                    assert_ne!(after, Phase::Starting, "{phase:?} {event:?}");
                }
            }
        }
    }
}
