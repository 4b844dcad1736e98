//! Which slot is where: the pool's bookkeeping, without any I/O.
//!
//! ```text
//!          refill            lease             release
//!   free ─────────► making ─────────► leased ─────────► ending ──► free
//!     ▲               │  └► ready ───────┘ ▲               ▲  │
//!     └── not made ───┘       └── close ───┼───────────────┘  └──► lost
//! ```
//!
//! Every index is in exactly one place. `lost` is where an index stays when something of its slot
//! may be left: giving it out again would fail, or worse. The next process reclaims it.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use belljar_domain::stock::{Demand, Levels, Stock};

use crate::step::StepFailed;

/// Slots made in one go. Ready ones are handed out one by one meanwhile.
const BATCH: usize = 8;

/// The answer to a lease.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// This one.
    Slot(u32),
    /// None is ready, but one may be soon.
    Wait,
    /// Every slot is leased or lost.
    Exhausted,
    /// The pool is closed.
    Closed,
}

/// A slot that could not be made.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// Counts failures, so that a waiting lease sees a new one.
    pub(crate) number: u64,
    /// The slot.
    pub(crate) index: u32,
    /// Why.
    pub(crate) error: StepFailed,
}

#[derive(Debug)]
pub(crate) struct State {
    /// First in, first out: an index rests as long as possible before it is used again.
    free: VecDeque<u32>,
    making: BTreeSet<u32>,
    ready: VecDeque<u32>,
    leased: BTreeSet<u32>,
    ending: BTreeSet<u32>,
    lost: BTreeSet<u32>,
    levels: Levels,
    demand: Demand,
    waiting: usize,
    refilling: bool,
    closed: bool,
    last_failure: Option<Failure>,
}

impl State {
    /// With fewer than `low` ready ones more are made, up to `high`; and sooner the more were taken
    /// lately. Low is at most high.
    pub(crate) fn new(capacity: u32, low: u32, high: u32) -> State {
        let at_once = u32::try_from(BATCH).unwrap_or(u32::MAX);
        State {
            free: (0..capacity).collect(),
            making: BTreeSet::new(),
            ready: VecDeque::new(),
            leased: BTreeSet::new(),
            ending: BTreeSet::new(),
            lost: BTreeSet::new(),
            levels: Levels::new(low, high, at_once).expect("the plan was checked"),
            demand: Demand::default(),
            waiting: 0,
            refilling: false,
            closed: false,
            last_failure: None,
        }
    }

    /// Takes a ready slot at `now`, a time since any start.
    pub(crate) fn take(&mut self, now: Duration) -> Taken {
        if self.closed {
            return Taken::Closed;
        }
        if let Some(index) = self.ready.pop_front() {
            self.leased.insert(index);
            self.demand.took(now);
            return Taken::Slot(index);
        }
        if self.free.is_empty() && self.making.is_empty() && self.ending.is_empty() {
            return Taken::Exhausted;
        }
        Taken::Wait
    }

    /// One more lease waits, until [`State::stop_waiting`].
    pub(crate) fn start_waiting(&mut self) {
        self.waiting += 1;
    }

    /// It has a slot, or left.
    pub(crate) fn stop_waiting(&mut self) {
        self.waiting -= 1;
    }

    /// Whether somebody must start refilling; that somebody must then call [`State::next_batch`]
    /// until it is empty.
    pub(crate) fn start_refill(&mut self, now: Duration) -> bool {
        let start = !self.refilling && !self.closed && self.to_make(now) > 0;
        self.refilling |= start;
        start
    }

    /// The next slots to make; none when there are enough, and then refilling is over.
    pub(crate) fn next_batch(&mut self, now: Duration) -> Vec<u32> {
        let count = if self.closed { 0 } else { self.to_make(now) };
        let batch: Vec<u32> = self.free.drain(..count).collect();
        self.making.extend(&batch);
        self.refilling = !batch.is_empty();
        batch
    }

    /// At most as many as are free.
    fn to_make(&self, now: Duration) -> usize {
        let count = |of: usize| u32::try_from(of).unwrap_or(u32::MAX);
        let stock = Stock {
            ready: count(self.ready.len()),
            making: count(self.making.len()),
            waiting: count(self.waiting),
            room: count(self.free.len()),
        };
        self.levels.to_make(stock, self.demand.lately(now), self.refilling) as usize
    }

    /// Ends refilling early. What the batch did not account for is lost.
    pub(crate) fn stop_refill(&mut self) {
        self.refilling = false;
        self.lost.append(&mut self.making);
    }

    pub(crate) fn made(&mut self, index: u32) {
        if self.making.remove(&index) {
            self.ready.push_back(index);
        }
    }

    /// A slot was not made; `left` says that something of it is still there.
    pub(crate) fn not_made(&mut self, index: u32, error: StepFailed, left: bool) {
        self.making.remove(&index);
        if left {
            self.lost.insert(index);
        } else {
            self.free.push_back(index);
        }
        let number = self.failures() + 1;
        self.last_failure = Some(Failure { number, index, error });
    }

    /// How many slots could not be made so far.
    pub(crate) fn failures(&self) -> u64 {
        self.last_failure.as_ref().map_or(0, |failure| failure.number)
    }

    /// The last failure, if there was one after the first `seen`.
    pub(crate) fn failure_after(&self, seen: u64) -> Option<Failure> {
        self.last_failure.clone().filter(|failure| failure.number > seen)
    }

    /// A leased slot is to be taken apart. False if it is not leased.
    pub(crate) fn start_end(&mut self, index: u32) -> bool {
        let leased = self.leased.remove(&index);
        if leased {
            self.ending.insert(index);
        }
        leased
    }

    /// A slot was taken apart, or not.
    pub(crate) fn ended(&mut self, index: u32, gone: bool) {
        self.ending.remove(&index);
        if gone {
            self.free.push_back(index);
        } else {
            self.lost.insert(index);
        }
    }

    /// No lease from here on.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// The ready slots of a closed pool, which are to be taken apart now.
    pub(crate) fn end_ready(&mut self) -> Vec<u32> {
        let ready: Vec<u32> = self.ready.drain(..).collect();
        self.ending.extend(&ready);
        ready
    }

    /// Whether slots are being made.
    pub(crate) fn is_refilling(&self) -> bool {
        self.refilling
    }

    /// Whether the pool is closed and no slot is there any more.
    pub(crate) fn is_over(&self) -> bool {
        self.closed
            && !self.refilling
            && self.making.is_empty()
            && self.ready.is_empty()
            && self.leased.is_empty()
            && self.ending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(state: &mut State) {
        fill_at(state, Duration::ZERO);
    }

    fn fill_at(state: &mut State, now: Duration) {
        if !state.start_refill(now) {
            return;
        }
        loop {
            let batch = state.next_batch(now);
            if batch.is_empty() {
                break;
            }
            batch.into_iter().for_each(|index| state.made(index));
        }
    }

    fn failed() -> StepFailed {
        StepFailed { step: "make", reason: "no".to_owned() }
    }

    #[test]
    fn refill_starts_below_low_and_stops_at_high() {
        let mut state = State::new(100, 2, 20);
        fill(&mut state);
        assert_eq!(state.ready.len(), 20);
        let slowly = |taken: u64| Duration::from_secs(taken * 1000);
        for taken in 0..18 {
            assert!(matches!(state.take(slowly(taken)), Taken::Slot(_)));
            assert!(!state.start_refill(slowly(taken)));
        }
        assert!(matches!(state.take(slowly(18)), Taken::Slot(_)));
        assert!(state.start_refill(slowly(18)));
        assert!(!state.start_refill(slowly(18)), "one refill at a time");
    }

    #[test]
    fn a_burst_is_refilled_before_it_is_over() {
        let mut state = State::new(100, 2, 20);
        fill(&mut state);
        let taken = (1..20).find(|_| {
            assert!(matches!(state.take(Duration::ZERO), Taken::Slot(_)));
            state.start_refill(Duration::ZERO)
        });
        assert_eq!(taken, Some(11), "fewer are left than were taken");
        // A minute later all is as it was.
        let later = Duration::from_secs(100);
        state.refilling = false;
        fill_at(&mut state, later);
        assert_eq!(state.ready.len(), 9);
    }

    #[test]
    fn waiting_leases_raise_the_target() {
        let mut state = State::new(100, 0, 0);
        assert!(!state.start_refill(Duration::ZERO));
        (0..30).for_each(|_| state.start_waiting());
        fill(&mut state);
        assert_eq!(state.ready.len(), 30);
    }

    #[test]
    fn exhausted_means_every_slot_is_leased_or_lost() {
        let mut state = State::new(2, 1, 1);
        fill(&mut state);
        let Taken::Slot(first) = state.take(Duration::ZERO) else { panic!("one is ready") };
        assert_eq!(state.take(Duration::ZERO), Taken::Wait, "one is free");
        fill(&mut state);
        let Taken::Slot(second) = state.take(Duration::ZERO) else { panic!("one is ready") };
        assert_eq!(state.take(Duration::ZERO), Taken::Exhausted);
        assert!(state.start_end(first));
        assert!(!state.start_end(first), "no slot ends twice");
        assert_eq!(state.take(Duration::ZERO), Taken::Wait, "one will be free");
        state.ended(first, false);
        assert_eq!(state.take(Duration::ZERO), Taken::Exhausted, "it was lost");
        assert!(state.start_end(second));
        state.ended(second, true);
        fill(&mut state);
        assert_eq!(state.take(Duration::ZERO), Taken::Slot(second));
    }

    #[test]
    fn a_freed_index_goes_to_the_back() {
        let mut state = State::new(3, 1, 1);
        fill(&mut state);
        assert_eq!(state.take(Duration::ZERO), Taken::Slot(0));
        assert!(state.start_end(0));
        state.ended(0, true);
        fill(&mut state);
        assert_eq!(state.take(Duration::ZERO), Taken::Slot(1));
    }

    #[test]
    fn a_failure_is_seen_once_and_a_broken_batch_is_lost() {
        let mut state = State::new(4, 1, 4);
        assert!(state.start_refill(Duration::ZERO));
        let batch = state.next_batch(Duration::ZERO);
        let seen = state.failures();
        state.not_made(batch[0], failed(), false);
        assert_eq!(state.failure_after(seen).map(|f| f.index), Some(batch[0]));
        assert!(state.failure_after(state.failures()).is_none());
        state.stop_refill();
        assert_eq!(state.lost.len(), 3);
        assert_eq!(state.free, [batch[0]]);
    }

    #[test]
    fn a_closed_pool_is_over_when_the_last_slot_is_gone() {
        let mut state = State::new(3, 1, 2);
        fill(&mut state);
        let Taken::Slot(leased) = state.take(Duration::ZERO) else { panic!("one is ready") };
        state.close();
        assert_eq!(state.take(Duration::ZERO), Taken::Closed);
        assert!(!state.start_refill(Duration::ZERO));
        for index in state.end_ready() {
            state.ended(index, true);
        }
        assert!(!state.is_over());
        assert!(state.start_end(leased));
        state.ended(leased, true);
        assert!(state.is_over());
    }
}
