//! One fetch at a time for each thing: who comes second waits for the first one's result.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longer than a store takes with all its repetitions. Who waited this long fetches by itself.
const WAIT_MAX: Duration = Duration::from_secs(300);

struct Flight<T> {
    outcome: Mutex<Outcome<T>>,
    ended: Condvar,
}

#[derive(Clone)]
enum Outcome<T> {
    Flying,
    Landed(T),
    /// Whoever fetched it gave up without a result.
    Abandoned,
}

/// Fetches that are under way.
pub(super) struct Flights<K: Eq + Hash + Clone, T: Clone> {
    flying: Mutex<HashMap<K, Arc<Flight<T>>>>,
}

/// What a caller is to do.
pub(super) enum Turn<'a, K: Eq + Hash + Clone, T: Clone> {
    /// Fetch it, and say what came.
    Fetch(Ticket<'a, K, T>),
    /// Another caller has fetched it meanwhile.
    Result(T),
}

/// The right, and the duty, to fetch one thing. Dropped without a result, the next caller fetches.
pub(super) struct Ticket<'a, K: Eq + Hash + Clone, T: Clone> {
    flights: &'a Flights<K, T>,
    key: K,
    flight: Arc<Flight<T>>,
}

impl<K: Eq + Hash + Clone, T: Clone> Flights<K, T> {
    pub(super) fn new() -> Flights<K, T> {
        Flights { flying: Mutex::new(HashMap::new()) }
    }

    fn flying(&self) -> MutexGuard<'_, HashMap<K, Arc<Flight<T>>>> {
        // Inserts and removals are single steps: the table is whole after a panic elsewhere.
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to fetch `key` unless somebody has it.
    pub(super) fn try_begin(&self, key: &K) -> Option<Ticket<'_, K, T>> {
        self.begin(key).ok()
    }

    fn begin(&self, key: &K) -> Result<Ticket<'_, K, T>, Arc<Flight<T>>> {
        match self.flying().entry(key.clone()) {
            Entry::Occupied(entry) => Err(Arc::clone(entry.get())),
            Entry::Vacant(entry) => {
                let flight = Flight { outcome: Mutex::new(Outcome::Flying), ended: Condvar::new() };
                let flight = Arc::clone(entry.insert(Arc::new(flight)));
                Ok(Ticket { flights: self, key: key.clone(), flight })
            }
        }
    }

    /// Fetch `key`, or wait for whoever does.
    pub(super) fn turn(&self, key: &K) -> Turn<'_, K, T> {
        loop {
            let flight = match self.begin(key) {
                Ok(ticket) => return Turn::Fetch(ticket),
                Err(flight) => flight,
            };
            let outcome = flight.outcome.lock().unwrap_or_else(PoisonError::into_inner);
            let is_flying = |outcome: &mut Outcome<T>| matches!(outcome, Outcome::Flying);
            let (outcome, waited) = flight
                .ended
                .wait_timeout_while(outcome, WAIT_MAX, is_flying)
                .unwrap_or_else(PoisonError::into_inner);
            match &*outcome {
                Outcome::Landed(result) => return Turn::Result(result.clone()),
                // Our own fetch then, which nobody waits for.
                Outcome::Flying if waited.timed_out() => {
                    return Turn::Fetch(Ticket {
                        flights: self,
                        key: key.clone(),
                        flight: Arc::new(Flight {
                            outcome: Mutex::new(Outcome::Flying),
                            ended: Condvar::new(),
                        }),
                    });
                }
                Outcome::Flying | Outcome::Abandoned => {}
            }
        }
    }
}

impl<K: Eq + Hash + Clone, T: Clone> Ticket<'_, K, T> {
    pub(super) fn key(&self) -> &K {
        &self.key
    }

    /// Gives the result to all who wait.
    pub(super) fn land(self, result: &T) {
        self.end(Outcome::Landed(result.clone()));
    }

    fn end(&self, outcome: Outcome<T>) {
        let mut flying = self.flights.flying();
        if flying.get(&self.key).is_some_and(|each| Arc::ptr_eq(each, &self.flight)) {
            flying.remove(&self.key);
        }
        drop(flying);
        let mut now = self.flight.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*now, Outcome::Flying) {
            *now = outcome;
        }
        drop(now);
        self.flight.ended.notify_all();
    }
}

impl<K: Eq + Hash + Clone, T: Clone> Drop for Ticket<'_, K, T> {
    fn drop(&mut self) {
        // Nothing after a landing: the outcome is set only once.
        self.end(Outcome::Abandoned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_gets_the_firsts_result() {
        let flights: Flights<u8, u32> = Flights::new();
        let Turn::Fetch(ticket) = flights.turn(&1) else { panic!("nobody else is here") };
        assert!(flights.try_begin(&1).is_none() && flights.try_begin(&2).is_some());
        std::thread::scope(|threads| {
            let waiting = threads.spawn(|| match flights.turn(&1) {
                Turn::Result(result) => result,
                // It came after the landing: then it would fetch by itself.
                Turn::Fetch(_) => 7,
            });
            ticket.land(&7);
            assert_eq!(waiting.join().expect("no panic"), 7);
        });
        assert!(flights.try_begin(&1).is_some());
    }

    #[test]
    fn a_fetch_that_is_given_up_is_taken_over() {
        let flights: Flights<u8, u32> = Flights::new();
        let Turn::Fetch(ticket) = flights.turn(&1) else { panic!("nobody else is here") };
        std::thread::scope(|threads| {
            let next = threads.spawn(|| matches!(flights.turn(&1), Turn::Fetch(_)));
            drop(ticket);
            assert!(next.join().expect("no panic"));
        });
    }
}
