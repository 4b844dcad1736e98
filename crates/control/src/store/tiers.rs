//! Tiers: named sets of limits.

use belljar_domain::{Kind, MiB, Vcpus};

use super::{Store, StoreError, corrupt, during, on_pool, on_tx};
use crate::limits::{DEFAULT_TIER, LOCAL_TIER, Limits};

/// A tier with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TierRecord {
    pub(crate) id: String,
    pub(crate) limits: Limits,
}

/// Why a tier was not removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TierError {
    #[error("there is no such tier")]
    NotFound,
    #[error("the tier is one every server has")]
    BuiltIn,
    #[error("the tier has teams: give them another one first")]
    HasTeams,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TierError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            TierError::NotFound => Kind::NotFound,
            TierError::BuiltIn | TierError::HasTeams => Kind::Conflict,
            TierError::Store(e) => e.kind(),
        }
    }
}

/// The columns of [`StoredLimits`], of the table `tiers`.
macro_rules! limit_columns {
    () => {
        "tiers.max_concurrent_sandboxes, tiers.max_length_seconds, tiers.max_vcpus, \
         tiers.max_memory_mib, tiers.max_disk_mib, tiers.creates_per_second, \
         tiers.max_concurrent_builds, tiers.events_ttl_days"
    };
}
pub(super) use limit_columns;

/// A tier's limits as stored.
#[derive(sqlx::FromRow)]
pub(super) struct StoredLimits {
    max_concurrent_sandboxes: i64,
    max_length_seconds: i64,
    max_vcpus: i64,
    max_memory_mib: i64,
    max_disk_mib: i64,
    creates_per_second: i64,
    max_concurrent_builds: i64,
    events_ttl_days: i64,
}

#[derive(sqlx::FromRow)]
struct StoredTier {
    id: String,
    #[sqlx(flatten)]
    limits: StoredLimits,
}

impl StoredLimits {
    pub(super) fn limits(&self) -> Result<Limits, StoreError> {
        let count = |value: i64| {
            u32::try_from(value).map_err(|_| corrupt("a tier's limit", &value.to_string()))
        };
        Ok(Limits {
            max_concurrent_sandboxes: count(self.max_concurrent_sandboxes)?,
            max_length_seconds: count(self.max_length_seconds)?,
            max_vcpus: Vcpus(count(self.max_vcpus)?),
            max_memory: MiB(count(self.max_memory_mib)?),
            max_disk: MiB(count(self.max_disk_mib)?),
            creates_per_second: count(self.creates_per_second)?,
            max_concurrent_builds: count(self.max_concurrent_builds)?,
            events_ttl_days: count(self.events_ttl_days)?,
        })
    }
}

impl TryFrom<StoredTier> for TierRecord {
    type Error = StoreError;

    fn try_from(row: StoredTier) -> Result<Self, StoreError> {
        Ok(TierRecord { limits: row.limits.limits()?, id: row.id })
    }
}

impl Store {
    /// Every tier, by name.
    pub(crate) async fn tiers(&self) -> Result<Vec<TierRecord>, StoreError> {
        let rows: Vec<StoredTier> = on_pool!(self, pool => {
            sqlx::query_as(concat!("SELECT tiers.id, ", limit_columns!(), " FROM tiers ORDER BY id"))
                .fetch_all(pool)
                .await
                .map_err(during("list tiers"))?
        });
        rows.into_iter().map(TierRecord::try_from).collect()
    }

    pub(crate) async fn tier(&self, id: &str) -> Result<Option<TierRecord>, StoreError> {
        let row: Option<StoredTier> = on_pool!(self, pool => {
            sqlx::query_as(concat!(
                "SELECT tiers.id, ", limit_columns!(), " FROM tiers WHERE id = $1",
            ))
            .bind(id)
            .fetch_optional(pool)
            .await
            .map_err(during("find a tier"))?
        });
        row.map(TierRecord::try_from).transpose()
    }

    /// Makes the tier, or gives it these limits.
    pub(crate) async fn put_tier(&self, tier: &TierRecord) -> Result<(), StoreError> {
        let limits = &tier.limits;
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO tiers (id, max_concurrent_sandboxes, max_length_seconds, max_vcpus, \
                 max_memory_mib, max_disk_mib, creates_per_second, max_concurrent_builds, \
                 events_ttl_days) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) \
                 ON CONFLICT (id) DO UPDATE SET \
                 max_concurrent_sandboxes = excluded.max_concurrent_sandboxes, \
                 max_length_seconds = excluded.max_length_seconds, \
                 max_vcpus = excluded.max_vcpus, max_memory_mib = excluded.max_memory_mib, \
                 max_disk_mib = excluded.max_disk_mib, \
                 creates_per_second = excluded.creates_per_second, \
                 max_concurrent_builds = excluded.max_concurrent_builds, \
                 events_ttl_days = excluded.events_ttl_days",
            )
            .bind(&tier.id)
            .bind(i64::from(limits.max_concurrent_sandboxes))
            .bind(i64::from(limits.max_length_seconds))
            .bind(i64::from(limits.max_vcpus.0))
            .bind(i64::from(limits.max_memory.0))
            .bind(i64::from(limits.max_disk.0))
            .bind(i64::from(limits.creates_per_second))
            .bind(i64::from(limits.max_concurrent_builds))
            .bind(i64::from(limits.events_ttl_days))
            .execute(pool)
            .await
            .map_err(during("write a tier"))?;
        });
        Ok(())
    }

    /// Gives the tier `local` what this server was started with.
    pub(crate) async fn set_local_tier(
        &self,
        max_concurrent_sandboxes: u32,
        max_length_seconds: u64,
    ) -> Result<(), StoreError> {
        on_pool!(self, pool => {
            sqlx::query(
                "UPDATE tiers SET max_concurrent_sandboxes = $2, max_length_seconds = $3 \
                 WHERE id = $1",
            )
            .bind(LOCAL_TIER)
            .bind(i64::from(max_concurrent_sandboxes))
            .bind(i64::from(u32::try_from(max_length_seconds).unwrap_or(u32::MAX)))
            .execute(pool)
            .await
            .map_err(during("write a tier"))?;
        });
        Ok(())
    }

    pub(crate) async fn delete_tier(&self, id: &str) -> Result<(), TierError> {
        const WHAT: &str = "remove a tier";
        if [DEFAULT_TIER, LOCAL_TIER].contains(&id) {
            return Err(TierError::BuiltIn);
        }
        let mut tx = self.begin(WHAT).await?;
        let (teams, removed): (i64, u64) = on_tx!(&mut tx, connection => {
            let teams = sqlx::query_scalar("SELECT COUNT(*) FROM teams WHERE tier_id = $1")
                .bind(id)
                .fetch_one(&mut *connection)
                .await
                .map_err(during(WHAT))?;
            let removed = sqlx::query("DELETE FROM tiers WHERE id = $1")
                .bind(id)
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?;
            (teams, removed.rows_affected())
        });
        if teams > 0 {
            return Err(TierError::HasTeams);
        }
        tx.commit(WHAT).await?;
        if removed == 0 { Err(TierError::NotFound) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, on_both};
    use super::*;

    #[tokio::test]
    async fn tiers_are_listed_written_and_removed() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let names = async || -> Vec<String> {
                store.tiers().await.expect("a list").into_iter().map(|tier| tier.id).collect()
            };
            assert_eq!(names().await, ["base", "local", "pro"]);
            let pro = store.tier("pro").await.expect("a lookup").expect("it is there");
            let gold = TierRecord { id: "gold".to_owned(), ..pro };
            store.put_tier(&gold).await.expect("made");
            let big = Limits { max_concurrent_sandboxes: 7000, ..gold.limits };
            let gold = TierRecord { limits: big, ..gold };
            store.put_tier(&gold).await.expect("changed");
            assert_eq!(store.tier("gold").await.expect("a lookup"), Some(gold));
            assert_eq!(names().await.len(), 4);
            store.delete_tier("gold").await.expect("nobody has it");
            assert!(matches!(store.delete_tier("gold").await, Err(TierError::NotFound)));
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_tier_in_use_stays() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team");
            store.set_local_tier(7, 7200).await.expect("written");
            let team_now = store.team(&team.id).await.expect("a lookup").expect("it is there");
            assert_eq!(team_now.tier, "local");
            assert_eq!(team_now.team.limits.max_concurrent_sandboxes, 7);
            assert_eq!(team_now.team.limits.max_length_seconds, 7200);
            assert!(matches!(store.delete_tier("local").await, Err(TierError::BuiltIn)));
            let change =
                super::super::TeamChange { tier: Some("pro".to_owned()), ..Default::default() };
            store.change_team(&team.id, &change).await.expect("another tier");
            assert!(matches!(store.delete_tier("pro").await, Err(TierError::HasTeams)));
            assert!(store.tier("pro").await.expect("a lookup").is_some(), "nothing was removed");
            store.close().await;
        })
        .await;
    }
}
