//! Forgetting runs that ended long ago, but not how often their templates were used.

use std::collections::BTreeMap;

use belljar_domain::UnixMillis;

use super::{Store, StoreError, during, on_tx};

impl Store {
    /// Removes at most `limit` runs that ended before `before`, those that ended first, and answers
    /// how many those were. Each is counted once, whoever else prunes at the same time.
    pub(crate) async fn prune_runs(
        &self,
        before: UnixMillis,
        limit: u32,
    ) -> Result<usize, StoreError> {
        let mut tx = self.begin("begin to prune runs").await?;
        let removed: Vec<(String, i64)> = on_tx!(&mut tx, connection => {
            sqlx::query_as(
                "DELETE FROM sandboxes WHERE execution_id IN (SELECT execution_id FROM sandboxes \
                 WHERE ended_at_ms < $1 ORDER BY ended_at_ms LIMIT $2) \
                 RETURNING template_id, started_at_ms",
            )
            .bind(before.0)
            .bind(i64::from(limit))
            .fetch_all(connection)
            .await
            .map_err(during("prune runs"))?
        });
        let mut spawns: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
        for (template, started_at_ms) in &removed {
            let (count, last) = spawns.entry(template).or_insert((0, *started_at_ms));
            *count += 1;
            *last = (*last).max(*started_at_ms);
        }
        for (template, (count, last)) in spawns {
            on_tx!(&mut tx, connection => {
                sqlx::query(
                    "INSERT INTO template_spawns (template_id, spawn_count, last_ms) \
                     VALUES ($1, $2, $3) ON CONFLICT (template_id) DO UPDATE SET \
                     spawn_count = template_spawns.spawn_count + excluded.spawn_count, \
                     last_ms = CASE WHEN excluded.last_ms > template_spawns.last_ms \
                     THEN excluded.last_ms ELSE template_spawns.last_ms END",
                )
                .bind(template)
                .bind(count)
                .bind(last)
                .execute(connection)
                .await
                .map_err(during("keep how often a template was used"))?;
            });
        }
        tx.commit("finish pruning runs").await?;
        Ok(removed.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{Bench, on_both};
    use super::*;
    use crate::live::Sandbox;
    use crate::live::tests::sandbox_at;
    use crate::writer::{Change, Noted};

    const LATER: UnixMillis = UnixMillis(9_000);

    #[tokio::test]
    async fn runs_go_oldest_first_and_their_spawns_stay_counted() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team");
            let first = sandbox_at(&team.id, UnixMillis(1), LATER);
            let mut changes = Vec::new();
            for start in 1..=6 {
                let sandbox = Arc::new(Sandbox {
                    template: first.template.clone(),
                    ..(*sandbox_at(&team.id, UnixMillis(start), LATER)).clone()
                });
                let execution = sandbox.execution.clone();
                let at = UnixMillis(start);
                changes.push(Noted { at, change: Change::Started(sandbox) });
                // The last one still runs.
                if start < 6 {
                    let at = UnixMillis(start * 100);
                    let change = Change::Ended { execution, at, reason: "killed" };
                    changes.push(Noted { at, change });
                }
            }
            store.apply(&changes).await.expect("they are written");
            let spawned = async || {
                let spawned = store.spawned().await.expect("counts");
                let of = spawned[first.template.as_str()];
                (of.count, of.last)
            };
            assert_eq!(spawned().await, (6, UnixMillis(6)));
            for (before, limit, removed) in [(300, 1, 1), (300, 9, 1), (300, 9, 0), (9_000, 9, 3)] {
                let pruned = store.prune_runs(UnixMillis(before), limit).await.expect("it prunes");
                assert_eq!(pruned, removed, "before {before}, at most {limit}");
                assert_eq!(spawned().await, (6, UnixMillis(6)));
            }
            assert_eq!(store.running().await.expect("rows").len(), 1);
            store.close().await;
        })
        .await;
    }
}
