//! What teams use, as it is sampled: running sandboxes from the live table, starts as they happen.
//!
//! A team that runs nothing costs nothing: after one sample that says so there are no more until it
//! starts something.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::UnixMillis;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::warn;

use crate::app::App;
use crate::store::{Store, StoreError, UsageSample};
use crate::team::TeamId;

/// How long samples are kept as they were taken.
const FINE_MS: i64 = 24 * 3_600_000;
/// How long they are kept at all.
pub(crate) const KEPT_MS: i64 = 30 * 24 * 3_600_000;
/// Pause between two times of tidying up.
const TIDY_EVERY: Duration = Duration::from_secs(600);
/// Slices tidied at a time, so that a long absence is made up for in small pieces.
const TIDY_SLICES: usize = 48;
/// Samples that wait for a database that does not answer. Then the oldest go.
const MAX_WAITING: usize = 10_000;

/// Starts since the last sample.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    started: Mutex<HashMap<TeamId, u32>>,
}

impl Usage {
    /// A sandbox of `team` has started.
    pub(crate) fn started(&self, team: &TeamId) {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        *started.entry(team.clone()).or_default() += 1;
    }

    fn take(&self) -> HashMap<TeamId, u32> {
        std::mem::take(&mut *self.started.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Samples until it is dropped.
pub(crate) async fn sample(app: &App) -> Result<(), Infallible> {
    let interval = app.config.usage_interval;
    let mut ticks = tokio::time::interval_at(Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut tidied) = (Instant::now(), None::<Instant>);
    let (mut active, mut waiting) = (HashSet::new(), Vec::new());
    loop {
        ticks.tick().await;
        let span = std::mem::replace(&mut last, Instant::now()).elapsed();
        let moment = Moment { at: aligned(clock::now(), interval), span };
        let running = app.live.all().into_iter().map(|sandbox| sandbox.team.clone());
        waiting.extend(samples(moment, running, app.usage.take(), &mut active));
        let excess = waiting.len().saturating_sub(MAX_WAITING);
        waiting.drain(..excess);
        if let Err(e) = app.store.add_usage(&mut waiting).await {
            warn!(error = %e, waiting = waiting.len(), "usage was not written yet");
        }
        if tidied.is_none_or(|at| at.elapsed() >= TIDY_EVERY) {
            tidied = Some(Instant::now());
            if let Err(e) = tidy(&app.store, clock::now()).await {
                warn!(error = %e, "old usage was not tidied up");
            }
        }
    }
}

/// Samples of several control planes fall on the same moments, and are counted together.
fn aligned(now: UnixMillis, interval: Duration) -> UnixMillis {
    let interval_ms = i64::try_from(interval.as_millis()).unwrap_or(i64::MAX).max(1);
    UnixMillis(now.0.div_euclid(interval_ms) * interval_ms)
}

/// When a sample is taken, and how long after the one before.
#[derive(Debug, Clone, Copy)]
struct Moment {
    at: UnixMillis,
    span: Duration,
}

/// One sample for each team that runs or started something, or did at the sample before.
fn samples(
    moment: Moment,
    running: impl Iterator<Item = TeamId>,
    mut started: HashMap<TeamId, u32>,
    active: &mut HashSet<TeamId>,
) -> Vec<UsageSample> {
    let mut concurrent: HashMap<TeamId, u32> =
        active.drain().chain(started.keys().cloned()).map(|team| (team, 0)).collect();
    for team in running {
        *concurrent.entry(team).or_default() += 1;
    }
    let span_ms = i64::try_from(moment.span.as_millis()).unwrap_or(i64::MAX).max(1);
    let sample = |(team, concurrent): (TeamId, u32)| {
        let started = started.remove(&team).unwrap_or_default();
        if concurrent > 0 || started > 0 {
            active.insert(team.clone());
        }
        UsageSample { team, at: moment.at, concurrent, started, span_ms }
    };
    concurrent.into_iter().map(sample).collect()
}

async fn tidy(store: &Store, now: UnixMillis) -> Result<(), StoreError> {
    for _ in 0..TIDY_SLICES {
        let forgotten = store.forget_usage(UnixMillis(now.0 - KEPT_MS)).await?;
        let thinned = store.thin_usage(UnixMillis(now.0 - FINE_MS)).await?;
        if !forgotten && !thinned {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_that_stops_is_sampled_once_more() {
        let (first, second) = (TeamId::random(), TeamId::random());
        let moment = Moment { at: UnixMillis(10_000), span: Duration::from_secs(5) };
        let mut active = HashSet::new();
        let usage = Usage::default();
        usage.started(&first);
        usage.started(&first);
        usage.started(&second);
        let mut take = |running: &[&TeamId], usage: &Usage| {
            let running = running.iter().copied().cloned();
            let mut found: Vec<_> = samples(moment, running, usage.take(), &mut active)
                .into_iter()
                .map(|sample| (sample.team, sample.concurrent, sample.started, sample.span_ms))
                .collect();
            found.sort();
            found
        };
        let mut expected = vec![(first.clone(), 3, 2, 5_000), (second.clone(), 0, 1, 5_000)];
        expected.sort();
        assert_eq!(take(&[&first, &first, &first], &usage), expected);
        // The second had started something that is gone: it is told once that nothing runs.
        let mut expected = vec![(first.clone(), 1, 0, 5_000), (second.clone(), 0, 0, 5_000)];
        expected.sort();
        assert_eq!(take(&[&first], &usage), expected);
        assert_eq!(take(&[], &usage), [(first, 0, 0, 5_000)]);
        assert_eq!(take(&[], &usage), []);
    }

    #[test]
    fn moments_are_shared() {
        let interval = Duration::from_secs(5);
        assert_eq!(aligned(UnixMillis(14_999), interval), UnixMillis(10_000));
        assert_eq!(aligned(UnixMillis(15_000), interval), UnixMillis(15_000));
    }
}
