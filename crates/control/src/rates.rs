//! How many requests a team and an address may send.
//!
//! A generic cell rate (GCRA): who was idle may send as many at once as the rate gives in its whole
//! period, and after that as they come free. What is kept is one number for each key, and keys whose
//! number says nothing any more are dropped, so memory is bounded whoever knocks.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::StateStore;
use governor::state::keyed::ShrinkableKeyedStateStore;
use governor::{Quota, RateLimiter};

use crate::team::TeamId;

/// Keys with a number of their own. More than this share one.
const MAX_KEYS: usize = 65_536;
/// From this many keys on, stale ones are looked for.
const SWEEP_FROM: usize = MAX_KEYS / 4;
/// Pause between two such looks, which cost about a millisecond.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
/// Longest period of a rate.
const MAX_PERIOD_SECONDS: u32 = 3600;

/// So many requests in a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    requests: NonZeroU32,
    period_seconds: NonZeroU32,
}

/// The text is no rate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read a rate: it must be REQUESTS/SECONDSs, such as 20000/30s (at most 3600 s)")]
pub struct RateError;

impl Rate {
    /// `None` when either is zero, the period is longer than an hour, or there are more than a
    /// million requests to the millisecond.
    pub const fn new(requests: u32, period_seconds: u32) -> Option<Rate> {
        match (NonZeroU32::new(requests), NonZeroU32::new(period_seconds)) {
            (Some(requests), Some(period)) if period.get() <= MAX_PERIOD_SECONDS => {
                Some(Rate { requests, period_seconds: period })
            }
            _ => None,
        }
    }

    fn quota(self) -> Quota {
        let period = Duration::from_secs(u64::from(self.period_seconds.get()));
        let each = (period / self.requests.get()).max(Duration::from_nanos(1));
        let quota = Quota::with_period(each).expect("the period is more than nothing");
        quota.allow_burst(self.requests)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}s", self.requests, self.period_seconds)
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Rate, RateError> {
        let (requests, period) = text.split_once('/').ok_or(RateError)?;
        let seconds = period.strip_suffix('s').ok_or(RateError)?;
        let requests = requests.parse().map_err(|_| RateError)?;
        Rate::new(requests, seconds.parse().map_err(|_| RateError)?).ok_or(RateError)
    }
}

/// The request rates of a server; `None` means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Requests of one team, whichever of its keys they carry.
    pub per_team: Option<Rate>,
    /// Requests from one IPv4 address or one IPv6 /64, with or without a valid key.
    pub per_address: Option<Rate>,
}

impl Default for Rates {
    /// 20,000 in 30 s for a team. Source: contract section 9. An address has twice that, because
    /// several teams may share one.
    fn default() -> Self {
        Rates { per_team: Rate::new(20_000, 30), per_address: Rate::new(40_000, 30) }
    }
}

/// What a request must wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("take the request: more than {rate}")]
pub(crate) struct TooMany {
    pub(crate) rate: Rate,
    pub(crate) wait: Duration,
}

impl TooMany {
    /// Whole seconds to wait, at least one: clients read no fractions.
    pub(crate) fn wait_seconds(&self) -> u32 {
        let seconds = self.wait.as_secs() + u64::from(self.wait.subsec_nanos() > 0);
        u32::try_from(seconds).unwrap_or(u32::MAX).max(1)
    }
}

/// Addresses that are one sender: an IPv4 address, or the /64 a network hands to one subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Block {
    V4(u32),
    V6(u64),
}

impl From<IpAddr> for Block {
    fn from(address: IpAddr) -> Block {
        match address.to_canonical() {
            IpAddr::V4(address) => Block::V4(address.to_bits()),
            // The upper half, so nothing is cut off.
            IpAddr::V6(address) => Block::V6((address.to_bits() >> 64) as u64),
        }
    }
}

/// Both limits of a server.
pub(crate) struct Limits {
    teams: Option<Limiter<TeamId>>,
    addresses: Option<Limiter<Block>>,
}

impl Limits {
    pub(crate) fn new(rates: Rates) -> Limits {
        Limits {
            teams: rates.per_team.map(|rate| Limiter::new(rate, DefaultClock::default())),
            addresses: rates.per_address.map(|rate| Limiter::new(rate, DefaultClock::default())),
        }
    }

    /// Counts one request of `team`.
    ///
    /// # Errors
    /// [`TooMany`]; then nothing is counted.
    pub(crate) fn of_team(&self, team: &TeamId) -> Result<(), TooMany> {
        self.teams.as_ref().map_or(Ok(()), |limiter| limiter.take(team))
    }

    /// Counts one request from `address`.
    ///
    /// # Errors
    /// [`TooMany`]; then nothing is counted.
    pub(crate) fn of_address(&self, address: IpAddr) -> Result<(), TooMany> {
        self.addresses.as_ref().map_or(Ok(()), |limiter| limiter.take(&address.into()))
    }
}

/// One rate for each key.
struct Limiter<K: Eq + Hash + Clone, C: Clock = DefaultClock> {
    rate: Rate,
    cells: RateLimiter<K, Cells<K>, C, NoOpMiddleware<C::Instant>>,
    clock: C,
    swept: Mutex<Option<C::Instant>>,
}

impl<K: Eq + Hash + Clone, C: Clock + Clone> Limiter<K, C> {
    fn new(rate: Rate, clock: C) -> Self {
        let cells = RateLimiter::new(rate.quota(), Cells::default(), clock.clone());
        Limiter { rate, cells, clock, swept: Mutex::new(None) }
    }

    fn take(&self, key: &K) -> Result<(), TooMany> {
        if self.cells.len() >= SWEEP_FROM {
            self.sweep();
        }
        self.cells.check_key(key).map_err(|until| TooMany {
            rate: self.rate,
            wait: until.wait_time_from(self.clock.now()),
        })
    }

    /// Drops keys that have all their requests free again, unless that was done just now.
    fn sweep(&self) {
        use governor::clock::Reference as _;
        let now = self.clock.now();
        let mut swept = lock(&self.swept);
        let is_due = swept.is_none_or(|at| now.duration_since(at) >= SWEEP_PAUSE.into());
        if is_due {
            *swept = Some(now);
            drop(swept);
            self.cells.retain_recent();
        }
    }
}

/// One number for each key, for a bounded number of keys; the others share one number, so that a
/// flood from many networks is slowed down as a whole and costs no memory.
struct Cells<K>(Mutex<(HashMap<K, Nanos>, Option<Nanos>)>);

impl<K> Default for Cells<K> {
    fn default() -> Self {
        Cells(Mutex::new((HashMap::new(), None)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Eq + Hash + Clone> StateStore for Cells<K> {
    type Key = K;

    fn measure_and_replace<T, F, E>(&self, key: &K, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut cells = lock(&self.0);
        let (own, shared) = &mut *cells;
        if let Some(cell) = own.get_mut(key) {
            let (outcome, next) = decide(Some(*cell))?;
            *cell = next;
            return Ok(outcome);
        }
        if own.len() >= MAX_KEYS {
            let (outcome, next) = decide(*shared)?;
            *shared = Some(next);
            return Ok(outcome);
        }
        let (outcome, next) = decide(None)?;
        own.insert(key.clone(), next);
        Ok(outcome)
    }
}

impl<K: Eq + Hash + Clone> ShrinkableKeyedStateStore<K> for Cells<K> {
    fn retain_recent(&self, drop_below: Nanos) {
        lock(&self.0).0.retain(|_, cell| *cell > drop_below);
    }

    fn len(&self) -> usize {
        lock(&self.0).0.len()
    }

    fn is_empty(&self) -> bool {
        lock(&self.0).0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use governor::clock::FakeRelativeClock;

    fn rate(text: &str) -> Rate {
        text.parse().expect("a rate")
    }

    fn limiter(text: &str) -> (Limiter<u32, FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (Limiter::new(rate(text), clock.clone()), clock)
    }

    #[test]
    fn rates_are_written_as_they_are_read() {
        for text in ["1/1s", "20000/30s", "4294967295/3600s"] {
            assert_eq!(rate(text).to_string(), text);
        }
        for text in ["", "1", "1/1", "0/1s", "1/0s", "-1/1s", "1/3601s", "1/1m", "off", "1.5/1s"] {
            assert_eq!(text.parse::<Rate>(), Err(RateError), "{text:?}");
        }
    }

    #[test]
    fn a_burst_is_spent_and_comes_back_bit_by_bit() {
        let (limiter, clock) = limiter("3/30s");
        for _ in 0..3 {
            limiter.take(&1).expect("within the burst");
        }
        let refused = limiter.take(&1).expect_err("one too many");
        assert_eq!(refused, TooMany { rate: rate("3/30s"), wait: Duration::from_secs(10) });
        limiter.take(&2).expect("another key has its own");
        clock.advance(Duration::from_millis(9_500));
        let refused = limiter.take(&1).expect_err("not yet");
        assert_eq!((refused.wait, refused.wait_seconds()), (Duration::from_millis(500), 1));
        clock.advance(Duration::from_millis(500));
        limiter.take(&1).expect("one came free");
        limiter.take(&1).expect_err("only one");
    }

    #[test]
    fn waits_are_whole_seconds_and_never_none() {
        let wait = |nanos| TooMany { rate: rate("1/1s"), wait: Duration::from_nanos(nanos) };
        assert_eq!(wait(0).wait_seconds(), 1);
        assert_eq!(wait(1_000_000_000).wait_seconds(), 1);
        assert_eq!(wait(1_000_000_001).wait_seconds(), 2);
    }

    #[test]
    fn keys_are_forgotten_when_they_are_idle() {
        let (limiter, clock) = limiter("10/1s");
        for key in 0..20_000 {
            limiter.take(&key).expect("each has its own");
        }
        assert_eq!(limiter.cells.len(), 20_000);
        clock.advance(Duration::from_secs(5));
        limiter.take(&7).expect("it is free again");
        assert_eq!(limiter.cells.len(), 1, "only the one that just asked is known");
    }

    #[test]
    fn a_flood_of_keys_is_bounded_and_shares_one_rate() {
        let (limiter, clock) = limiter("2/3600s");
        let keys = u32::try_from(MAX_KEYS).expect("it fits");
        for key in 0..keys {
            limiter.take(&key).expect("each has its own");
        }
        limiter.take(&keys).expect("the first of the others");
        limiter.take(&(keys + 1)).expect("the second");
        limiter.take(&(keys + 2)).expect_err("the others share one rate");
        limiter.take(&5).expect("who was there before keeps what is its own");
        assert_eq!(limiter.cells.len(), MAX_KEYS);
        clock.advance(Duration::from_secs(7200));
        limiter.take(&(keys + 3)).expect("there is room again");
        assert_eq!(limiter.cells.len(), 1);
    }

    #[test]
    fn a_network_of_ipv6_is_one_sender() {
        let block = |text: &str| Block::from(text.parse::<IpAddr>().expect("an address"));
        assert_eq!(block("2001:db8:1:2::1"), block("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(block("2001:db8:1:2::1"), block("2001:db8:1:3::1"));
        assert_ne!(block("192.0.2.1"), block("192.0.2.2"));
        assert_eq!(block("::ffff:192.0.2.1"), block("192.0.2.1"));
        assert_ne!(block("::1"), block("0.0.0.1"));
    }

    #[test]
    fn without_a_rate_nothing_is_refused() {
        let limits = Limits::new(Rates { per_team: None, per_address: None });
        for _ in 0..100_000 {
            limits.of_address(IpAddr::from([127, 0, 0, 1])).expect("there is no limit");
        }
    }
}
