//! What one sandbox used over the last day, in memory until it ends.
//!
//! Every sample is the guest's word but for its time, which is this host's.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_domain::UnixMillis;

/// How often a sandbox is sampled.
///
/// Source: `contract/e2b-wire.md` section 9.
pub const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// Samples kept as they are: an hour of them.
const RECENT_MAX: usize = 720;
/// Older ones kept, one of each minute: 23 hours of them. Both together take 120 KB.
const OLDER_MAX: usize = 23 * 60;
const MINUTE_MS: i64 = 60_000;

/// What a guest used at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When it was asked.
    pub at: UnixMillis,
    /// What it said.
    pub figures: Figures,
}

/// What a guest says it uses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Figures {
    /// Its processors.
    pub cpu_count: u32,
    /// How busy all of them together are, 0 to 100.
    pub cpu_used_pct: f32,
    /// Memory in use, bytes, without the page cache.
    pub mem_used_bytes: u64,
    /// All of its memory, bytes.
    pub mem_total_bytes: u64,
    /// Page cache, bytes.
    pub mem_cache_bytes: u64,
    /// Used of its root disk, bytes.
    pub disk_used_bytes: u64,
    /// Size of its root disk, bytes.
    pub disk_total_bytes: u64,
}

/// Which samples are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MetricsQuery {
    /// At this time and later.
    pub start: Option<UnixMillis>,
    /// At this time and earlier.
    pub end: Option<UnixMillis>,
    /// Only the newest of them.
    pub latest_only: bool,
}

impl MetricsQuery {
    fn wants(&self, at: UnixMillis) -> bool {
        self.start.is_none_or(|start| at >= start) && self.end.is_none_or(|end| at <= end)
    }
}

/// The samples of one sandbox. Takes no room until the first one.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    // Held to add or read, never across a wait.
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    /// One a minute, before the recent ones.
    older: VecDeque<Sample>,
    recent: VecDeque<Sample>,
}

impl Samples {
    /// Adds the newest sample; the oldest make room.
    pub(crate) fn add(&self, sample: Sample) {
        let mut ring = self.ring();
        ring.recent.push_back(sample);
        if ring.recent.len() <= RECENT_MAX {
            return;
        }
        let Some(oldest) = ring.recent.pop_front() else { return };
        let minute = |sample: &Sample| sample.at.0.div_euclid(MINUTE_MS);
        if ring.older.back().is_none_or(|last| minute(last) != minute(&oldest)) {
            ring.older.push_back(oldest);
        }
        if ring.older.len() > OLDER_MAX {
            ring.older.pop_front();
        }
    }

    /// The wanted samples, oldest first.
    pub(crate) fn read(&self, query: MetricsQuery) -> Vec<Sample> {
        let ring = self.ring();
        let all = ring.older.iter().chain(&ring.recent);
        let mut wanted = all.filter(|sample| query.wants(sample.at)).copied();
        if query.latest_only { wanted.next_back().into_iter().collect() } else { wanted.collect() }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // A panic while it was held may at worst have lost samples.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Samples of a guest that always says the same, for runtimes whose guests have nothing to say: as
/// if it had been asked since `started_at`, every [`SAMPLE_EVERY`], and kept like real ones. Made when
/// they are asked for, so that a sandbox costs nothing.
pub(crate) fn made(
    figures: Figures,
    started_at: UnixMillis,
    now: UnixMillis,
    query: MetricsQuery,
) -> Vec<Sample> {
    let every_ms = i64::try_from(SAMPLE_EVERY.as_millis()).unwrap_or(i64::MAX);
    let newest = now.0.saturating_sub(started_at.0).div_euclid(every_ms);
    let kept = i64::try_from(RECENT_MAX).unwrap_or(i64::MAX);
    let oldest = newest.saturating_sub(kept - 1).max(0);
    let mut wanted = (oldest..=newest)
        .map(|n| UnixMillis(started_at.0.saturating_add(n.saturating_mul(every_ms))))
        .filter(|at| query.wants(*at))
        .map(|at| Sample { at, figures });
    if query.latest_only { wanted.next_back().into_iter().collect() } else { wanted.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: i64) -> Sample {
        Sample { at: UnixMillis(at_ms), figures: Figures { cpu_count: 2, ..Figures::default() } }
    }

    fn all() -> MetricsQuery {
        MetricsQuery::default()
    }

    #[test]
    fn samples_are_found_by_time() {
        let samples = Samples::default();
        (1..=4).for_each(|n| samples.add(sample(n * 5000)));
        let times = |query| -> Vec<i64> { samples.read(query).iter().map(|s| s.at.0).collect() };
        assert_eq!(times(all()), [5000, 10_000, 15_000, 20_000]);
        let (start, end) = (Some(UnixMillis(10_000)), Some(UnixMillis(15_000)));
        assert_eq!(times(MetricsQuery { start, end, ..all() }), [10_000, 15_000]);
        assert_eq!(times(MetricsQuery { end, latest_only: true, ..all() }), [15_000]);
        let later = Some(UnixMillis(20_001));
        assert_eq!(times(MetricsQuery { start: later, latest_only: true, ..all() }), [0; 0]);
    }

    #[test]
    fn a_day_is_kept_and_thins_out_after_an_hour() {
        let samples = Samples::default();
        let two_days = 2 * 24 * 3600 / 5;
        (0..two_days).for_each(|n| samples.add(sample(n * 5000)));
        let kept = samples.read(all());
        assert_eq!(kept.len(), RECENT_MAX + OLDER_MAX);
        assert!(kept.is_sorted_by_key(|s| s.at.0));
        let span_ms = kept.last().expect("samples").at.0 - kept[0].at.0;
        assert!((86_000_000..=86_400_000).contains(&span_ms), "{span_ms} ms");
        let gaps: Vec<i64> = kept.windows(2).map(|pair| pair[1].at.0 - pair[0].at.0).collect();
        assert!(gaps[..OLDER_MAX - 1].iter().all(|gap| *gap == 60_000));
        assert!(gaps[OLDER_MAX..].iter().all(|gap| *gap == 5000));
    }

    #[test]
    fn made_samples_come_every_five_seconds_from_the_start() {
        let figures = sample(0).figures;
        let times = |now, query| -> Vec<i64> {
            let made = made(figures, UnixMillis(1000), UnixMillis(now), query);
            made.iter().map(|s| s.at.0).collect()
        };
        assert_eq!(times(1000, all()), [1000]);
        assert_eq!(times(12_345, all()), [1000, 6000, 11_000]);
        assert_eq!(times(12_345, MetricsQuery { latest_only: true, ..all() }), [11_000]);
        assert_eq!(times(0, all()), [0; 0], "a clock that went back");
        assert_eq!(times(100_000_000, all()).len(), RECENT_MAX);
    }
}
