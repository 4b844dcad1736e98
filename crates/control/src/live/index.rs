//! One team's sandboxes in the orders they are asked for, so that a page, a count and a place under
//! the limit cost no walk over all of them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use belljar_domain::{SandboxId, UnixMillis};

use super::Sandbox;

/// Which end of a list comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, utoipa::ToSchema)]
pub(crate) enum Order {
    #[schema(rename = "asc")]
    OldestFirst,
    #[schema(rename = "desc")]
    NewestFirst,
}

/// Where a sandbox stands in its team's list: when it started, then its id.
pub(crate) type Key = (UnixMillis, SandboxId);

/// A part of a team's list.
#[derive(Debug, Clone)]
pub(crate) struct Range {
    pub(crate) order: Order,
    /// Only what comes after this one, in `order`.
    pub(crate) after: Option<Key>,
    /// Only what started at this time or later.
    pub(crate) started_from: Option<UnixMillis>,
}

/// Which sandboxes of a list are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct States {
    pub(crate) running: bool,
    pub(crate) paused: bool,
}

/// What one team has starting, running and paused.
#[derive(Debug, Default)]
pub(super) struct TeamIndex {
    pub(super) starting: usize,
    /// Those seen as paused, by start; those in `overdue` that are being paused at their end too.
    asleep: BTreeMap<Key, Arc<Sandbox>>,
    by_start: BTreeMap<Key, Arc<Sandbox>>,
    /// When those in `by_start` end, and when they started.
    by_end: BTreeMap<Key, UnixMillis>,
    /// Those whose end has passed while the node has not spoken, by end.
    overdue: BTreeMap<Key, Arc<Sandbox>>,
}

fn by_start(sandbox: &Sandbox) -> Key {
    (sandbox.started_at, sandbox.id.clone())
}

fn by_end(sandbox: &Sandbox) -> Key {
    (sandbox.end_at, sandbox.id.clone())
}

/// The id that comes before every other.
fn first_id() -> SandboxId {
    "0".parse().expect("a digit is an id")
}

impl TeamIndex {
    pub(super) fn is_empty(&self) -> bool {
        self.starting == 0
            && self.by_start.is_empty()
            && self.overdue.is_empty()
            && self.asleep.is_empty()
    }

    pub(super) fn insert(&mut self, sandbox: Arc<Sandbox>) {
        if sandbox.asleep_since.is_some() {
            self.asleep.insert(by_start(&sandbox), sandbox);
            return;
        }
        self.by_end.insert(by_end(&sandbox), sandbox.started_at);
        self.by_start.insert(by_start(&sandbox), sandbox);
    }

    pub(super) fn remove(&mut self, sandbox: &Sandbox) {
        let (start, end) = (by_start(sandbox), by_end(sandbox));
        self.by_start.remove(&start);
        self.asleep.remove(&start);
        self.by_end.remove(&end);
        self.overdue.remove(&end);
    }

    /// Sorts out whose end has passed at `now`. Costs what has changed since the last time.
    pub(super) fn settle(&mut self, now: UnixMillis) {
        while let Some(first) = self.by_end.first_entry()
            && first.key().0 <= now
        {
            let (end, started_at) = first.remove_entry();
            let start = (started_at, end.1.clone());
            if let Some(sandbox) = self.by_start.remove(&start) {
                if let Some(asleep) = sandbox.falling_asleep() {
                    self.asleep.insert(start, Arc::new(asleep));
                }
                self.overdue.insert(end, sandbox);
            }
        }
        // Only a clock that was set back makes an end lie ahead again.
        while let Some(last) = self.overdue.last_entry()
            && last.key().0 > now
        {
            let sandbox = last.remove();
            self.asleep.remove(&by_start(&sandbox));
            self.insert(sandbox);
        }
    }

    /// How many run that can be seen, as of the last [`TeamIndex::settle`].
    pub(super) fn visible(&self) -> usize {
        self.by_start.len()
    }

    /// What can be seen of `states` and lies in `range`, in its order. Costs what is taken of it.
    pub(super) fn range(
        &self,
        range: &Range,
        states: States,
    ) -> Box<dyn Iterator<Item = &Arc<Sandbox>> + '_> {
        let Some(bounds) = bounds(range) else { return Box::new(std::iter::empty()) };
        let running = part(states.running, &self.by_start, bounds.clone());
        let paused = part(states.paused, &self.asleep, bounds);
        match range.order {
            Order::OldestFirst => Box::new(merged(running, paused, |a, b| a < b)),
            Order::NewestFirst => Box::new(merged(running.rev(), paused.rev(), |a, b| a > b)),
        }
    }
}

/// What of `map` lies within `bounds`, if any of it is wanted.
fn part(
    wanted: bool,
    map: &BTreeMap<Key, Arc<Sandbox>>,
    bounds: (Bound<Key>, Bound<Key>),
) -> impl DoubleEndedIterator<Item = (&Key, &Arc<Sandbox>)> {
    wanted.then(|| map.range(bounds)).into_iter().flatten()
}

/// The keys a range lets through; `None` when it lets none.
fn bounds(range: &Range) -> Option<(Bound<Key>, Bound<Key>)> {
    let mut low = match range.started_from {
        Some(at) => Bound::Included((at, first_id())),
        None => Bound::Unbounded,
    };
    let mut high = Bound::Unbounded;
    if let Some(after) = range.after.clone() {
        match range.order {
            Order::OldestFirst => match &low {
                Bound::Included(started) if *started > after => {}
                _ => low = Bound::Excluded(after),
            },
            Order::NewestFirst => match &low {
                Bound::Included(started) if *started >= after => return None,
                _ => high = Bound::Excluded(after),
            },
        }
    }
    Some((low, high))
}

/// Two sorted walks as one, where `is_first` says which of two keys comes first.
fn merged<'a>(
    one: impl Iterator<Item = (&'a Key, &'a Arc<Sandbox>)>,
    other: impl Iterator<Item = (&'a Key, &'a Arc<Sandbox>)>,
    is_first: impl Fn(&Key, &Key) -> bool,
) -> impl Iterator<Item = &'a Arc<Sandbox>> {
    let (mut one, mut other) = (one.peekable(), other.peekable());
    std::iter::from_fn(move || {
        let next = match (one.peek(), other.peek()) {
            (Some((a, _)), Some((b, _))) if is_first(b, a) => other.next(),
            (Some(_), _) => one.next(),
            (None, _) => other.next(),
        };
        next.map(|(_, sandbox)| sandbox)
    })
}

#[cfg(test)]
mod tests {
    use super::super::sandbox::{Lifecycle, OnEnd};
    use super::super::tests::{sandbox_at, team};
    use super::*;

    fn index(times: &[(i64, i64)]) -> (TeamIndex, Vec<Arc<Sandbox>>) {
        let (mut index, team) = (TeamIndex::default(), team());
        let sandboxes: Vec<_> = times
            .iter()
            .map(|&(start, end)| sandbox_at(&team, UnixMillis(start), UnixMillis(end)))
            .collect();
        for sandbox in &sandboxes {
            index.insert(Arc::clone(sandbox));
        }
        (index, sandboxes)
    }

    const ALL: States = States { running: true, paused: true };

    fn starts(index: &TeamIndex, range: &Range) -> Vec<i64> {
        index.range(range, ALL).map(|s| s.started_at.0).collect()
    }

    #[test]
    fn ranges_hold_what_lies_in_them_in_either_order() {
        let (index, made) = index(&[(3, 99), (1, 99), (2, 99), (4, 99)]);
        let key = |n: usize| Some(by_start(&made[n]));
        let (oldest, newest) = (Order::OldestFirst, Order::NewestFirst);
        for (order, after, started_from, expected) in [
            (oldest, None, None, vec![1, 2, 3, 4]),
            (newest, None, None, vec![4, 3, 2, 1]),
            (oldest, key(1), None, vec![2, 3, 4]),
            (newest, key(0), None, vec![2, 1]),
            (oldest, None, Some(3), vec![3, 4]),
            (oldest, key(1), Some(3), vec![3, 4]),
            (oldest, key(0), Some(3), vec![4]),
            (newest, key(3), Some(3), vec![3]),
            (newest, key(1), Some(3), vec![]),
            (newest, key(0), Some(3), vec![]),
            (newest, None, Some(i64::MAX), vec![]),
            (oldest, None, Some(i64::MIN), vec![1, 2, 3, 4]),
        ] {
            let range = Range { order, after, started_from: started_from.map(UnixMillis) };
            assert_eq!(starts(&index, &range), expected, "{range:?}");
        }
    }

    #[test]
    fn whose_time_is_up_is_hidden_and_comes_back_when_the_clock_does() {
        let (mut index, made) = index(&[(1, 10), (2, 20), (3, 30)]);
        let all = Range { order: Order::OldestFirst, after: None, started_from: None };
        index.settle(UnixMillis(20));
        assert_eq!((index.visible(), starts(&index, &all)), (1, vec![3]));
        index.settle(UnixMillis(15));
        assert_eq!((index.visible(), starts(&index, &all)), (2, vec![2, 3]));
        for sandbox in &made {
            index.remove(sandbox);
        }
        assert!(index.is_empty());
    }

    #[test]
    fn the_paused_are_listed_in_their_place_and_not_counted() {
        let (mut index, made) = index(&[(1, 99), (3, 99)]);
        let paused = Sandbox { asleep_since: Some(UnixMillis(5)), ..(*made[0]).clone() };
        let paused = Sandbox { id: SandboxId::random(), started_at: UnixMillis(2), ..paused };
        index.insert(Arc::new(paused));
        let all = |order| Range { order, after: None, started_from: None };
        assert_eq!(starts(&index, &all(Order::OldestFirst)), [1, 2, 3]);
        assert_eq!(starts(&index, &all(Order::NewestFirst)), [3, 2, 1]);
        let only = States { running: false, paused: true };
        assert_eq!(index.range(&all(Order::OldestFirst), only).count(), 1);
        assert_eq!(index.visible(), 2);
    }

    #[test]
    fn who_pauses_at_the_end_is_seen_as_paused_from_then_on() {
        let (mut index, team) = (TeamIndex::default(), team());
        let made = sandbox_at(&team, UnixMillis(1), UnixMillis(10));
        let on_end = OnEnd::Pause { filesystem_only: false };
        let lifecycle = Lifecycle { on_end, ..made.lifecycle };
        let made = Sandbox { lifecycle, ..(*made).clone() };
        index.insert(Arc::new(made.clone()));
        let all = Range { order: Order::OldestFirst, after: None, started_from: None };
        for (now, running) in [(9, 1), (10, 0), (9, 1), (10, 0)] {
            index.settle(UnixMillis(now));
            let seen: Vec<_> = index.range(&all, ALL).map(|s| s.asleep_since.is_none()).collect();
            assert_eq!((index.visible(), seen), (running, vec![running == 1]), "at {now}");
        }
        index.remove(&made);
        assert!(index.is_empty());
    }
}
