//! What teams used: a sample every few seconds, thinned out after a day, gone after a month.

use belljar_domain::UnixMillis;

use super::{Store, StoreError, during, on_pool, on_tx};
use crate::team::TeamId;

/// Samples written in one transaction.
const BATCH: usize = 256;
/// What thinning makes of the samples of this long.
pub(crate) const COARSE_MS: i64 = 300_000;

/// What one team used at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UsageSample {
    pub(crate) team: TeamId,
    pub(crate) at: UnixMillis,
    /// Sandboxes that ran.
    pub(crate) concurrent: u32,
    /// Sandboxes started in the time before `at` that the sample stands for.
    pub(crate) started: u32,
    pub(crate) span_ms: i64,
}

/// What a team used in one step of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UsageStep {
    /// Steps since 1970.
    pub(crate) index: i64,
    /// Most at the same time.
    pub(crate) concurrent: i64,
    pub(crate) started: i64,
}

/// What can be at its highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UsagePeak {
    /// Sandboxes running at the same time.
    Concurrent,
    /// Sandboxes started a second.
    StartRate,
}

impl Store {
    /// Adds samples and takes out of `samples` what is written: after a failure the rest is left. Two of
    /// one team and moment become one, so that several control planes count together. Samples of
    /// teams that are gone are passed over. Cancel-safe but for the batch under way, of which nobody
    /// knows.
    pub(crate) async fn add_usage(&self, samples: &mut Vec<UsageSample>) -> Result<(), StoreError> {
        while !samples.is_empty() {
            let batch = &samples[..samples.len().min(BATCH)];
            let mut tx = self.begin("write what teams use").await?;
            for sample in batch {
                on_tx!(&mut tx, connection => {
                    sqlx::query(
                        "INSERT INTO usage_samples (team_id, at_ms, concurrent, started, span_ms) \
                         SELECT id, $2, $3, $4, $5 FROM teams WHERE id = $1 \
                         ON CONFLICT (team_id, at_ms) DO UPDATE SET \
                         started = usage_samples.started + excluded.started, \
                         concurrent = CASE WHEN excluded.concurrent > usage_samples.concurrent \
                         THEN excluded.concurrent ELSE usage_samples.concurrent END, \
                         span_ms = CASE WHEN excluded.span_ms > usage_samples.span_ms \
                         THEN excluded.span_ms ELSE usage_samples.span_ms END",
                    )
                    .bind(sample.team.to_string())
                    .bind(sample.at.0)
                    .bind(i64::from(sample.concurrent))
                    .bind(i64::from(sample.started))
                    .bind(sample.span_ms)
                    .execute(connection)
                    .await
                    .map_err(during("write what a team uses"))?;
                });
            }
            tx.commit("write what teams use").await?;
            let written = batch.len();
            samples.drain(..written);
        }
        Ok(())
    }

    /// What `team` used from `start` to before `end`, in steps of `step_ms`, oldest first. Steps
    /// without a sample are left out.
    pub(crate) async fn usage(
        &self,
        team: &TeamId,
        start: UnixMillis,
        end: UnixMillis,
        step_ms: i64,
    ) -> Result<Vec<UsageStep>, StoreError> {
        let rows: Vec<(i64, i64, i64)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT CAST(at_ms / $4 AS BIGINT), CAST(MAX(concurrent) AS BIGINT), \
                 CAST(SUM(started) AS BIGINT) FROM usage_samples \
                 WHERE team_id = $1 AND at_ms >= $2 AND at_ms < $3 GROUP BY 1 ORDER BY 1",
            )
            .bind(team.to_string())
            .bind(start.0)
            .bind(end.0)
            .bind(step_ms)
            .fetch_all(pool)
            .await
            .map_err(during("read what a team used"))?
        });
        let step = |(index, concurrent, started)| UsageStep { index, concurrent, started };
        Ok(rows.into_iter().map(step).collect())
    }

    /// When a metric of `team` was last at its highest from `start` to before `end`, and how high.
    pub(crate) async fn usage_peak(
        &self,
        team: &TeamId,
        peak: UsagePeak,
        start: UnixMillis,
        end: UnixMillis,
    ) -> Result<Option<(UnixMillis, f64)>, StoreError> {
        let statement = match peak {
            UsagePeak::Concurrent => {
                "SELECT at_ms, CAST(concurrent AS DOUBLE PRECISION) FROM usage_samples \
                 WHERE team_id = $1 AND at_ms >= $2 AND at_ms < $3 ORDER BY 2 DESC, 1 DESC LIMIT 1"
            }
            UsagePeak::StartRate => {
                "SELECT at_ms, CAST(started AS DOUBLE PRECISION) * 1000 / span_ms \
                 FROM usage_samples \
                 WHERE team_id = $1 AND at_ms >= $2 AND at_ms < $3 ORDER BY 2 DESC, 1 DESC LIMIT 1"
            }
        };
        let found: Option<(i64, f64)> = on_pool!(self, pool => {
            sqlx::query_as(statement)
                .bind(team.to_string())
                .bind(start.0)
                .bind(end.0)
                .fetch_optional(pool)
                .await
                .map_err(during("find what a team used most"))?
        });
        Ok(found.map(|(at, value)| (UnixMillis(at), value)))
    }

    /// Makes one sample of each team and five minutes of all that are older than `before`, at most
    /// those of one hour. False when there was nothing to do.
    pub(crate) async fn thin_usage(&self, before: UnixMillis) -> Result<bool, StoreError> {
        const HOUR_MS: i64 = 3_600_000;
        let before = before.0.div_euclid(COARSE_MS) * COARSE_MS;
        let mut tx = self.begin("thin out what teams used").await?;
        let oldest: Option<i64> = on_tx!(&mut tx, connection => {
            sqlx::query_scalar(
                "SELECT MIN(at_ms) FROM usage_samples WHERE at_ms < $1 AND span_ms < $2",
            )
            .bind(before)
            .bind(COARSE_MS)
            .fetch_one(connection)
            .await
            .map_err(during("find what teams used long ago"))?
        });
        let Some(oldest) = oldest else { return Ok(false) };
        let start = oldest.div_euclid(HOUR_MS) * HOUR_MS;
        let end = before.min(start + HOUR_MS);
        on_tx!(&mut tx, connection => {
            sqlx::query(
                "INSERT INTO usage_samples (team_id, at_ms, concurrent, started, span_ms) \
                 SELECT team_id, CAST(at_ms / $3 AS BIGINT) * $3, MAX(concurrent), \
                 CAST(SUM(started) AS BIGINT), $3 FROM usage_samples \
                 WHERE at_ms >= $1 AND at_ms < $2 GROUP BY 1, 2 \
                 ON CONFLICT (team_id, at_ms) DO UPDATE SET concurrent = excluded.concurrent, \
                 started = excluded.started, span_ms = excluded.span_ms",
            )
            .bind(start)
            .bind(end)
            .bind(COARSE_MS)
            .execute(connection)
            .await
            .map_err(during("thin out what teams used"))?;
        });
        on_tx!(&mut tx, connection => {
            sqlx::query(
                "DELETE FROM usage_samples WHERE at_ms >= $1 AND at_ms < $2 AND span_ms < $3",
            )
            .bind(start)
            .bind(end)
            .bind(COARSE_MS)
            .execute(connection)
            .await
            .map_err(during("thin out what teams used"))?;
        });
        tx.commit("thin out what teams used").await?;
        Ok(true)
    }

    /// Forgets samples older than `before`, an hour's worth at a time. False when there were none.
    pub(crate) async fn forget_usage(&self, before: UnixMillis) -> Result<bool, StoreError> {
        const SLICE_MS: i64 = 3_600_000;
        let removed = on_pool!(self, pool => {
            sqlx::query(
                "DELETE FROM usage_samples WHERE at_ms < $1 AND at_ms < \
                 (SELECT MIN(at_ms) FROM usage_samples) + $2",
            )
            .bind(before.0)
            .bind(SLICE_MS)
            .execute(pool)
            .await
            .map_err(during("forget what teams used"))?
            .rows_affected()
        });
        Ok(removed > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, on_both};
    use super::*;

    const DAY: i64 = 86_400_000;

    fn sample(team: &TeamId, at: i64, concurrent: u32, started: u32) -> UsageSample {
        UsageSample { team: team.clone(), at: UnixMillis(at), concurrent, started, span_ms: 5_000 }
    }

    async fn steps(store: &Store, team: &TeamId, step_ms: i64) -> Vec<(i64, i64, i64)> {
        let (start, end) = (UnixMillis(0), UnixMillis(10 * DAY));
        let steps = store.usage(team, start, end, step_ms).await.expect("its usage");
        steps.iter().map(|step| (step.index, step.concurrent, step.started)).collect()
    }

    #[tokio::test]
    async fn samples_are_added_up_in_steps() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("a").await.expect("a team").id;
            let other = store.ensure_team("b").await.expect("a team").id;
            let gone = TeamId::random();
            let mut many: Vec<_> = (0..600).map(|n| sample(&other, n * 5_000, 1, 0)).collect();
            store.add_usage(&mut many).await.expect("many samples");
            let mut samples = vec![
                sample(&team, 0, 3, 3),
                sample(&team, 5_000, 9, 6),
                sample(&team, 10_000, 2, 0),
                sample(&gone, 0, 7, 7),
            ];
            store.add_usage(&mut samples).await.expect("samples");
            // Another control plane at the same moment.
            store.add_usage(&mut vec![sample(&team, 10_000, 1, 4)]).await.expect("a sample");
            assert_eq!(steps(&store, &team, 5_000).await, [(0, 3, 3), (1, 9, 6), (2, 2, 4)]);
            assert_eq!(steps(&store, &team, 10_000).await, [(0, 9, 9), (1, 2, 4)]);
            assert_eq!(steps(&store, &other, DAY).await, [(0, 1, 0)]);
            assert_eq!(steps(&store, &gone, DAY).await, []);
            let (start, end) = (UnixMillis(5_000), UnixMillis(10_000));
            let some = store.usage(&team, start, end, 5_000).await.expect("its usage");
            assert_eq!(some, [UsageStep { index: 1, concurrent: 9, started: 6 }]);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn what_is_written_before_a_failure_is_not_written_again() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("a").await.expect("a team").id;
            let first = i64::try_from(BATCH).expect("a few hundred");
            let mut samples: Vec<_> = (0..first).map(|n| sample(&team, n, 1, 1)).collect();
            samples.extend([sample(&team, first, 1, 13), sample(&team, first + 1, 1, 13)]);
            // Fails the second batch, on either database.
            store
                .run("CREATE UNIQUE INDEX once ON usage_samples (started) WHERE started = 13")
                .await;
            store.add_usage(&mut samples).await.expect_err("a second 13");
            assert_eq!(samples.len(), 2, "the first batch is through");
            store.run("DROP INDEX once").await;
            store.add_usage(&mut samples).await.expect("the rest");
            assert!(samples.is_empty());
            assert_eq!(steps(&store, &team, DAY).await, [(0, 1, first + 26)]);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn the_highest_of_each_metric_is_found() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("a").await.expect("a team").id;
            let samples = [(0, 3, 1), (5_000, 9, 0), (10_000, 9, 7), (15_000, 0, 7)];
            let samples =
                samples.map(|(at, concurrent, started)| sample(&team, at, concurrent, started));
            store.add_usage(&mut samples.to_vec()).await.expect("samples");
            let peak = async |peak, end| {
                let (start, end) = (UnixMillis(0), UnixMillis(end));
                store.usage_peak(&team, peak, start, end).await.expect("a peak")
            };
            let at = |at, value| Some((UnixMillis(at), value));
            assert_eq!(peak(UsagePeak::Concurrent, DAY).await, at(10_000, 9.0));
            assert_eq!(peak(UsagePeak::Concurrent, 5_000).await, at(0, 3.0));
            assert_eq!(peak(UsagePeak::StartRate, DAY).await, at(15_000, 1.4));
            assert_eq!(peak(UsagePeak::StartRate, 0).await, None);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn old_samples_are_thinned_out_and_older_ones_forgotten() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("a").await.expect("a team").id;
            // Two hours: 5 s apart, each with one start, and a peak in the middle.
            let mut samples: Vec<_> = (0..1440).map(|n| sample(&team, n * 5_000, 2, 1)).collect();
            samples[700].concurrent = 50;
            store.add_usage(&mut samples).await.expect("samples");
            let before = UnixMillis(3_600_000 + COARSE_MS + 1);
            assert!(store.thin_usage(before).await.expect("the first hour"));
            assert!(store.thin_usage(before).await.expect("what is left of it"));
            assert!(!store.thin_usage(before).await.expect("nothing"));
            let thin = steps(&store, &team, 5_000).await;
            assert_eq!(thin.len(), 13 + 1440 - 13 * 60);
            assert_eq!(thin[11], (660, 50, 60));
            let total: i64 = thin.iter().map(|(_, _, started)| started).sum();
            assert_eq!(total, 1440, "no start is lost or counted twice");
            let after = UnixMillis(2 * 3_600_000);
            assert!(store.forget_usage(after).await.expect("the first hour"));
            while store.forget_usage(after).await.expect("the rest") {}
            assert_eq!(steps(&store, &team, 5_000).await, []);
            store.close().await;
        })
        .await;
    }
}
