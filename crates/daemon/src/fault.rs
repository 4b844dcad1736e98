//! Fault points: named places where a test makes this process die, as `kill -9` would.
//!
//! The list is here, and not spread over the crates that reach the points, so that a test can walk
//! all of them and fail when one is not reached any more. Only builds with debug assertions have
//! them: in an optimised build [`reach`] is nothing, and [`arm`] refuses.
//!
//! One point is armed at a time, by [`arm`] with a text such as
//!
//! ```text
//! control.create.node-answered        die there
//! daemon.teardown.step-undone:3       die there the third time
//! control.store.before-write:hold     whoever comes there waits until the process ends
//! ```

/// Why no fault point was armed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArmError {
    /// This is an optimised build.
    #[error("arm a fault point: this build has none")]
    NotBuiltIn,
    /// No such point.
    #[error("arm a fault point: there is none called {name:?}")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// What follows the name is neither a count from 1 nor `hold`.
    #[error("arm a fault point: {text:?} is neither a count from 1 nor \"hold\"")]
    Action {
        /// What was asked for.
        text: String,
    },
    /// One is armed already.
    #[error("arm a fault point: one is armed already")]
    Twice,
}

macro_rules! points {
    ($($(#[doc = $doc:literal])+ $point:ident = $name:literal,)+) => {
        /// A place where a process can be made to die.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Point {
            $($(#[doc = $doc])+ $point,)+
        }

        impl Point {
            /// Every point there is.
            pub const ALL: &[Point] = &[$(Point::$point,)+];

            /// How it is called in the text [`arm`] reads.
            pub fn name(self) -> &'static str {
                match self {
                    $(Point::$point => $name,)+
                }
            }
        }
    };
}

points! {
    /// Control has a place for the sandbox and calls no node yet.
    CreateReserved = "control.create.reserved",
    /// The node runs the sandbox; control's table does not have it.
    CreateNodeAnswered = "control.create.node-answered",
    /// The table has it; its row is not queued for the store.
    CreateInTable = "control.create.in-table",
    /// All is done but the answer.
    CreateBeforeAnswer = "control.create.before-answer",
    /// An end is to be moved; the node does not know.
    EndMoveBegun = "control.end-move.begun",
    /// The node has moved the end; the table has the old one.
    EndMoveNodeAnswered = "control.end-move.node-answered",
    /// The table has the new end; nothing is queued for the store.
    EndMoveInTable = "control.end-move.in-table",
    /// All is done but the answer.
    EndMoveBeforeAnswer = "control.end-move.before-answer",
    /// A kill is to be done; the node does not know.
    KillBegun = "control.kill.begun",
    /// Nothing is left on the node; the table still has it.
    KillNodeAnswered = "control.kill.node-answered",
    /// All is done but the answer.
    KillBeforeAnswer = "control.kill.before-answer",
    /// Changes have been taken from the queue; the store has none of them.
    StoreBeforeWrite = "control.store.before-write",
    /// The store has committed them.
    StoreWritten = "control.store.written",
    /// The id of a new sandbox is taken on the node; the ledger has no entry.
    BootIdTaken = "sandbox.boot.id-taken",
    /// The ledger has the entry; nothing else exists.
    BootInLedger = "sandbox.boot.in-ledger",
    /// Its run folder exists.
    BootFolderMade = "sandbox.boot.folder-made",
    /// It has a network slot.
    BootSlotLeased = "sandbox.boot.slot-leased",
    /// Its disk is ready for the machine.
    BootDiskReady = "sandbox.boot.disk-ready",
    /// Its machine runs; the guest was told nothing.
    BootMachineStarted = "sandbox.boot.machine-started",
    /// The guest is ready; the node does not show the sandbox.
    BootGuestReady = "sandbox.boot.guest-ready",
    /// The node shows it; the caller has no answer.
    BootBeforeAnswer = "sandbox.boot.before-answer",
    /// The owner has moved the end; the caller has no answer.
    OwnerEndMoved = "sandbox.owner.end-moved",
    /// The owner has decided that the sandbox ends; the machine still runs.
    OwnerEnding = "sandbox.owner.ending",
    /// The machine is dead; everything else is still held.
    OwnerMachineDead = "sandbox.owner.machine-dead",
    /// One step of an undo stack is done; the next is not begun.
    TeardownStepUndone = "daemon.teardown.step-undone",
    /// Nothing is left of the sandbox; nobody was told.
    OwnerBeforeNotice = "sandbox.owner.before-notice",
    /// Its end is announced.
    OwnerNoticeSent = "sandbox.owner.notice-sent",
    /// A snapshot's draft folder exists; the guest knows of nothing.
    KeepDrafted = "sandbox.keep.drafted",
    /// The guest has flushed, or does not answer; the machine runs.
    KeepGuestPrepared = "sandbox.keep.guest-prepared",
    /// The machine stands still; nothing of it is taken.
    KeepMachineStill = "sandbox.keep.machine-still",
    /// Memory and disk are taken; nothing of them is on stable storage.
    KeepTaken = "sandbox.keep.taken",
    /// The snapshot is on stable storage; nobody was told.
    KeepPublished = "sandbox.keep.published",
}

#[cfg(not(debug_assertions))]
mod built {
    use super::{ArmError, Point};

    pub(super) fn arm(_text: &str) -> Result<(), ArmError> {
        Err(ArmError::NotBuiltIn)
    }

    #[inline(always)]
    pub(super) fn reach(_point: Point) {}
}

#[cfg(debug_assertions)]
mod built {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::{ArmError, Point};

    /// The armed point of this process.
    static ARMED: OnceLock<Armed> = OnceLock::new();

    #[derive(Debug)]
    struct Armed {
        point: Point,
        action: Action,
        reached: AtomicU32,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Action {
        /// Die the n-th time, from 1.
        Die { nth: u32 },
        /// Go no further, from the first time on.
        Hold,
    }

    pub(super) fn parse(text: &str) -> Result<(Point, Action), ArmError> {
        let (name, action) = text.split_once(':').unwrap_or((text, "1"));
        let point = Point::ALL.iter().copied().find(|point| point.name() == name);
        let point = point.ok_or_else(|| ArmError::Unknown { name: name.to_owned() })?;
        if action == "hold" {
            return Ok((point, Action::Hold));
        }
        match action.parse() {
            Ok(nth) if nth > 0 => Ok((point, Action::Die { nth })),
            _ => Err(ArmError::Action { text: action.to_owned() }),
        }
    }

    pub(super) fn arm(text: &str) -> Result<(), ArmError> {
        let (point, action) = parse(text)?;
        let armed = Armed { point, action, reached: AtomicU32::new(0) };
        ARMED.set(armed).map_err(|_| ArmError::Twice)
    }

    pub(super) fn reach(point: Point) {
        let Some(armed) = ARMED.get().filter(|armed| armed.point == point) else { return };
        let times = armed.reached.fetch_add(1, Ordering::Relaxed) + 1;
        match armed.action {
            Action::Die { nth } if times == nth => die(point),
            Action::Die { .. } => {}
            Action::Hold => {
                tracing::warn!(point = point.name(), "held at a fault point");
                loop {
                    std::thread::park();
                }
            }
        }
    }

    /// Ends the process without a destructor, a flush or an answer.
    fn die(point: Point) -> ! {
        use rustix::process::{Signal, getpid, kill_process};
        tracing::warn!(point = point.name(), "dies at a fault point");
        kill_process(getpid(), Signal::KILL).expect("a process may end itself");
        // The signal is pending for the whole process: no thread runs far from here.
        loop {
            std::thread::park();
        }
    }
}

/// Arms one point for the life of this process.
///
/// # Errors
/// [`ArmError`] when the text names no point or no action, one is armed already, or this is an
/// optimised build.
pub fn arm(text: &str) -> Result<(), ArmError> {
    built::arm(text)
}

/// Dies, or waits for ever, if this point is armed. Holding blocks the thread, and so whatever
/// else only that thread would run.
#[inline(always)]
pub fn reach(point: Point) {
    built::reach(point);
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::collections::HashSet;

    use super::built::{Action, parse};
    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own_that_is_read_back() {
        let names: HashSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        for point in Point::ALL {
            assert_eq!(parse(point.name()), Ok((*point, Action::Die { nth: 1 })));
        }
    }

    #[test]
    fn the_action_follows_the_name() {
        let name = Point::TeardownStepUndone.name();
        let action = |text: &str| parse(&format!("{name}:{text}")).map(|(_, action)| action);
        assert_eq!(action("3"), Ok(Action::Die { nth: 3 }));
        assert_eq!(action("hold"), Ok(Action::Hold));
        for bad in ["", "0", "-1", "later"] {
            assert_eq!(action(bad), Err(ArmError::Action { text: bad.to_owned() }));
        }
        assert_eq!(parse("nowhere"), Err(ArmError::Unknown { name: "nowhere".to_owned() }));
    }

    #[test]
    fn a_point_that_is_not_armed_is_nothing() {
        for point in Point::ALL {
            reach(*point);
        }
    }
}
