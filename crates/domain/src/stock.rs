//! How much of a thing should stand ready, so that whoever wants one does not wait for it to be made.
//!
//! ```text
//!   0 ────── low ────────────── high
//!            │    ◄── trigger ──► │    with less than the trigger, make up to high
//!            nobody takes        many take
//! ```
//!
//! The trigger follows what was taken lately: an idle stock is refilled late and in one go, a busy one
//! at every taking. What is wanted more than `high` is only made for callers that wait.

use std::time::Duration;

/// Demand is halved when this long nothing was taken. Longer than anything here takes to make, so
/// that a burst is still known when its stock has been made again.
const HALF_LIFE: Duration = Duration::from_secs(10);

/// Bounds of a stock. Low is never above high.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Levels {
    low: u32,
    high: u32,
    at_once: u32,
}

/// What is there of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stock {
    /// Ready to be taken.
    pub ready: u32,
    /// Being made.
    pub making: u32,
    /// Callers that wait for one.
    pub waiting: u32,
    /// How many more may exist.
    pub room: u32,
}

impl Levels {
    /// Never more than `high` stand ready, and never fewer than `low` without more being made; at
    /// most `at_once` of them, and at least one, at a time. `None` when `low` is above `high`.
    pub fn new(low: u32, high: u32, at_once: u32) -> Option<Levels> {
        (low <= high).then_some(Levels { low, high, at_once: at_once.max(1) })
    }

    /// With fewer than this, more are made.
    fn trigger(self, demand: u32) -> u32 {
        demand.clamp(self.low, self.high)
    }

    /// How many to begin to make now, of a stock of which `demand` were taken lately.
    ///
    /// `refilling` says that a refill is under way: it goes on up to the high mark.
    pub fn to_make(self, stock: Stock, demand: u32, refilling: bool) -> u32 {
        let Stock { ready, making, waiting, room } = stock;
        let coming = ready.saturating_add(making);
        let trigger = if refilling { self.high } else { self.trigger(demand) };
        if coming >= trigger.saturating_add(waiting) {
            return 0;
        }
        let missing = self.high.saturating_add(waiting) - coming;
        missing.min(room).min(self.at_once.saturating_sub(making))
    }
}

/// How many were taken lately: a count that halves every 10 s.
#[derive(Debug, Clone, Copy, Default)]
pub struct Demand {
    count: f64,
    /// On the caller's clock.
    as_of: Duration,
}

impl Demand {
    /// One was taken at `now`, by a clock that only goes forward, from any start.
    pub fn took(&mut self, now: Duration) {
        self.count = self.left(now) + 1.0;
        self.as_of = self.as_of.max(now);
    }

    /// How many of those taken still count at `now`.
    pub fn lately(&self, now: Duration) -> u32 {
        let count = self.left(now).round();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is bounded"
        )]
        let count = count.clamp(0.0, f64::from(u32::MAX)) as u32;
        count
    }

    fn left(&self, now: Duration) -> f64 {
        let halvings = now.saturating_sub(self.as_of).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.count * (-halvings).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn levels() -> impl Strategy<Value = Levels> {
        (0_u32..50, 0_u32..50, 0_u32..10)
            .prop_map(|(a, b, at_once)| Levels::new(a.min(b), a.max(b), at_once).expect("in order"))
    }

    fn stock() -> impl Strategy<Value = Stock> {
        (0_u32..80, 0_u32..20, 0_u32..40, 0_u32..100)
            .prop_map(|(ready, making, waiting, room)| Stock { ready, making, waiting, room })
    }

    proptest! {
        #[test]
        fn no_more_than_is_wanted_or_fits(levels in levels(), stock in stock(), demand: u32, refilling: bool) {
            let make = levels.to_make(stock, demand, refilling);
            prop_assert!(make <= stock.room);
            prop_assert!(make == 0 || make + stock.making <= levels.at_once);
            let coming = stock.ready + stock.making + make;
            prop_assert!(make == 0 || coming <= levels.high + stock.waiting);
        }

        #[test]
        fn whoever_waits_is_served_and_the_low_mark_held(levels in levels(), stock in stock(), demand: u32) {
            let coming = stock.ready + stock.making;
            let short = coming < stock.waiting + levels.low;
            let possible = stock.room > 0 && stock.making < levels.at_once;
            prop_assert!(!short || !possible || levels.to_make(stock, demand, false) > 0);
        }

        #[test]
        fn more_demand_never_means_less(levels in levels(), stock in stock(), a: u32, b: u32) {
            let of = |demand| levels.to_make(stock, demand, false);
            prop_assert!(of(a.min(b)) <= of(a.max(b)));
        }

        #[test]
        fn a_refill_ends_full_within_the_host(
            levels in levels(), room in 0_u32..100, waiting in 0_u32..40, demand: u32,
        ) {
            let mut stock = Stock { ready: 0, making: 0, waiting, room };
            let mut refilling = false;
            for _ in 0..200 {
                let make = levels.to_make(stock, demand, refilling);
                refilling = make > 0;
                stock.ready += make;
                stock.room -= make;
            }
            prop_assert!(!refilling, "it comes to rest");
            prop_assert!(stock.ready <= levels.high + waiting && stock.ready <= room);
            let wanted = levels.trigger(demand) + waiting;
            prop_assert!(stock.ready >= wanted.min(room));
        }

        #[test]
        fn demand_is_no_more_than_was_taken_and_fades(
            mut times in proptest::collection::vec(0_u64..600_000, 0..50), later in 0_u64..600_000,
        ) {
            times.sort_unstable();
            let mut demand = Demand::default();
            times.iter().for_each(|ms| demand.took(Duration::from_millis(*ms)));
            let end = Duration::from_millis(times.last().copied().unwrap_or(0));
            let now = demand.lately(end);
            prop_assert!(now as usize <= times.len() && (times.is_empty() || now >= 1));
            prop_assert!(demand.lately(end + Duration::from_millis(later)) <= now);
            prop_assert_eq!(demand.lately(end + HALF_LIFE * 10), 0);
        }
    }

    #[test]
    fn a_busy_stock_is_refilled_sooner() {
        let levels = Levels::new(2, 10, 4).expect("in order");
        let five = Stock { ready: 5, room: 100, ..Stock::default() };
        assert_eq!(levels.to_make(five, 0, false), 0);
        assert_eq!(levels.to_make(five, 6, false), 4);
        assert_eq!(levels.to_make(five, 0, true), 4, "a refill goes on to the high mark");
        assert_eq!(Levels::new(3, 2, 1), None);
    }
}
