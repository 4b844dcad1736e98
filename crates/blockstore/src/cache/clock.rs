//! A bounded table that forgets what was used least: the clock algorithm. A hand goes round; what
//! was used since it last passed stays for another round.

use std::collections::HashMap;
use std::hash::Hash;

struct Slot<K, V> {
    key: K,
    value: V,
    weight: u64,
    was_used: bool,
}

/// Values with weights, together at most as heavy as the limit.
pub(super) struct Clock<K, V> {
    limit: u64,
    weight: u64,
    slots: Vec<Option<Slot<K, V>>>,
    free: Vec<usize>,
    places: HashMap<K, usize>,
    hand: usize,
}

impl<K: Eq + Hash + Clone, V: Clone> Clock<K, V> {
    pub(super) fn new(limit: u64) -> Clock<K, V> {
        Clock {
            limit,
            weight: 0,
            slots: Vec::new(),
            free: Vec::new(),
            places: HashMap::new(),
            hand: 0,
        }
    }

    /// The weight of all values.
    pub(super) fn weight(&self) -> u64 {
        self.weight
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn contains(&self, key: &K) -> bool {
        self.places.contains_key(key)
    }

    /// The value, which counts as used.
    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let slot = self.slots[*self.places.get(key)?].as_mut()?;
        slot.was_used = true;
        Some(slot.value.clone())
    }

    /// Takes a value in, and tells which were put out for it. One that alone is over the limit is
    /// not taken in.
    pub(super) fn insert(&mut self, key: K, value: V, weight: u64) -> Vec<K> {
        self.remove(&key);
        if weight > self.limit {
            return vec![key];
        }
        let evicted = self.shrink_to(self.limit - weight);
        let slot = Slot { key: key.clone(), value, weight, was_used: false };
        let place = match self.free.pop() {
            Some(place) => {
                self.slots[place] = Some(slot);
                place
            }
            None => {
                self.slots.push(Some(slot));
                self.slots.len() - 1
            }
        };
        self.places.insert(key, place);
        self.weight += weight;
        evicted
    }

    /// Puts values out until the rest weighs at most `weight`.
    pub(super) fn shrink_to(&mut self, weight: u64) -> Vec<K> {
        let mut evicted = Vec::new();
        // Twice round at most: the first time clears every mark.
        while self.weight > weight && !self.places.is_empty() {
            let place = self.hand % self.slots.len();
            self.hand = place + 1;
            match &mut self.slots[place] {
                None => {}
                Some(slot) if slot.was_used => slot.was_used = false,
                Some(slot) => {
                    let key = slot.key.clone();
                    self.remove(&key);
                    evicted.push(key);
                }
            }
        }
        evicted
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let place = self.places.remove(key)?;
        let slot = self.slots[place].take()?;
        self.free.push(place);
        self.weight -= slot.weight;
        Some(slot.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_weight_is_bounded() {
        let mut clock = Clock::new(30);
        for key in 0..3 {
            assert!(clock.insert(key, key, 10).is_empty());
        }
        assert_eq!(clock.get(&0), Some(0));
        assert_eq!(clock.insert(3, 3, 10), [1], "0 was used, 1 is next");
        assert_eq!(clock.get(&1), None);
        assert_eq!(clock.insert(4, 4, 25), [2, 0, 3]);
        assert_eq!((clock.weight(), clock.len()), (25, 1));
        assert_eq!(clock.insert(5, 5, 31), [5], "too heavy by itself");
        assert_eq!(clock.get(&4), Some(4));
        clock.insert(4, 40, 5);
        assert_eq!((clock.get(&4), clock.weight()), (Some(40), 5));
        assert_eq!(clock.remove(&4), Some(40));
        assert!(clock.weight() == 0 && clock.shrink_to(0).is_empty());
    }

    #[test]
    fn a_table_in_full_use_still_takes_things_in() {
        let mut clock = Clock::new(100);
        for key in 0..1000 {
            clock.insert(key, (), 1);
            clock.get(&key);
            assert!(clock.weight() <= 100 && clock.slots.len() <= 101);
        }
        assert!(clock.contains(&999));
    }
}
