//! How fast teams may begin sandboxes: an average a second, with some to spare after a pause.
//!
//! A generic cell rate: each team has a moment up to which its creations are paid for. One creation
//! moves it on by `1 / rate`; one that would move it further ahead than the burst is refused, with
//! how long to wait. Nothing is counted for one that is refused.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::team::TeamId;

/// A team that was idle may begin as many at once as its rate gives in this time.
const BURST: Duration = Duration::from_secs(10);
/// Entries after which those that mean nothing any more are dropped.
const SWEEP_AT: usize = 1024;

/// The team begins sandboxes faster than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("begin a sandbox: more than {per_second} a second")]
pub(crate) struct TooFast {
    pub(crate) per_second: u32,
    /// When the next one may begin.
    pub(crate) wait: Duration,
}

/// See the module's own words.
#[derive(Debug, Default)]
pub(crate) struct CreationRate {
    paid_until: Mutex<HashMap<TeamId, Instant>>,
}

impl CreationRate {
    /// Counts one creation of `team` at `now`.
    ///
    /// # Errors
    /// [`TooFast`] when it has begun as many as it may; then nothing is counted.
    pub(crate) fn take(&self, team: &TeamId, per_second: u32, now: Instant) -> Result<(), TooFast> {
        let Some(rate) = NonZeroU32::new(per_second) else {
            return Err(TooFast { per_second, wait: BURST });
        };
        let each = Duration::from_secs(1) / rate.get();
        let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        if paid_until.len() >= SWEEP_AT {
            paid_until.retain(|_, until| *until > now);
        }
        let until = paid_until.get(team).copied().unwrap_or(now).max(now) + each;
        // Room for the burst and for the creation itself.
        let latest = now + BURST.max(each);
        if until > latest {
            return Err(TooFast { per_second, wait: until - latest });
        }
        paid_until.insert(team.clone(), until);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let (creations, team, start) = (CreationRate::default(), TeamId::random(), Instant::now());
        for n in 0..20 {
            assert_eq!(creations.take(&team, 2, start), Ok(()), "creation {n} of the burst");
        }
        let refused = creations.take(&team, 2, start).expect_err("the burst is used");
        assert_eq!(refused, TooFast { per_second: 2, wait: Duration::from_millis(500) });
        assert_eq!(creations.take(&team, 2, start), Err(refused), "a refusal costs nothing");
        assert_eq!(creations.take(&TeamId::random(), 2, start), Ok(()), "another team");
        let later = start + refused.wait;
        assert_eq!(creations.take(&team, 2, later), Ok(()));
        assert!(creations.take(&team, 2, later).is_err());
        let idle = start + Duration::from_secs(3600);
        assert_eq!((0..50).filter(|_| creations.take(&team, 2, idle).is_ok()).count(), 20);
    }

    #[test]
    fn no_rate_is_no_creation() {
        let creations = CreationRate::default();
        assert!(creations.take(&TeamId::random(), 0, Instant::now()).is_err());
    }

    #[test]
    fn idle_teams_are_forgotten() {
        let (creations, start) = (CreationRate::default(), Instant::now());
        for _ in 0..SWEEP_AT {
            creations.take(&TeamId::random(), 1, start).expect("its first");
        }
        let later = start + Duration::from_secs(2);
        creations.take(&TeamId::random(), 1, later).expect("its first");
        assert_eq!(creations.paid_until.lock().expect("no panic holds it").len(), 1);
    }
}
