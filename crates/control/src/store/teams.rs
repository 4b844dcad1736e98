//! Teams: their limits, who may reach them, and whether anybody may act for them.

use belljar_daemon::clock;
use belljar_domain::{Kind, UnixMillis};

use super::tiers::StoredLimits;
use super::{Store, StoreError, corrupt, during, on_pool, on_tx};
use crate::cidr::Cidr;
use crate::limits::LimitOverrides;
use crate::team::{Team, TeamId};

/// A team with what only the operator sees of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TeamRecord {
    pub(crate) team: Team,
    pub(crate) tier: String,
    pub(crate) own_limits: LimitOverrides,
    pub(crate) created_at: UnixMillis,
}

/// What a new team begins with.
#[derive(Debug, Clone)]
pub(crate) struct TeamDraft {
    pub(crate) slug: String,
    pub(crate) name: String,
    pub(crate) tier: String,
    pub(crate) own_limits: LimitOverrides,
    pub(crate) allowed: Vec<Cidr>,
}

/// What becomes different; `None` stays.
#[derive(Debug, Clone, Default)]
pub(crate) struct TeamChange {
    pub(crate) name: Option<String>,
    pub(crate) tier: Option<String>,
    pub(crate) own_limits: Option<LimitOverrides>,
    pub(crate) allowed: Option<Vec<Cidr>>,
    /// The new reason, or the end of one.
    pub(crate) blocked: Option<Option<String>>,
}

/// Why a team was not made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TeamError {
    #[error("there is no such team")]
    NotFound,
    #[error("the slug '{slug}' is another team's")]
    SlugTaken { slug: String },
    #[error("there is no tier '{tier}'")]
    NoTier { tier: String },
    #[error("the team still has {running} running or paused sandboxes: kill them first")]
    HasSandboxes { running: u64 },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TeamError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            TeamError::NotFound => Kind::NotFound,
            TeamError::NoTier { .. } => Kind::Invalid,
            TeamError::SlugTaken { .. } | TeamError::HasSandboxes { .. } => Kind::Conflict,
            TeamError::Store(e) => e.kind(),
        }
    }
}

/// The columns of [`StoredTeam`], of the tables `teams` and `tiers`.
macro_rules! team_columns {
    () => {
        concat!(
            "teams.id AS team_id, teams.slug, teams.name AS team_name, teams.tier_id, ",
            "teams.limits, teams.allowed_addresses, teams.blocked_reason, ",
            "teams.created_at_ms AS team_created_at_ms, ",
            $crate::store::tiers::limit_columns!()
        )
    };
}
pub(super) use team_columns;

/// A team as stored.
#[derive(sqlx::FromRow)]
pub(super) struct StoredTeam {
    team_id: String,
    slug: String,
    team_name: String,
    tier_id: String,
    limits: String,
    allowed_addresses: String,
    blocked_reason: Option<String>,
    team_created_at_ms: i64,
    #[sqlx(flatten)]
    of_tier: StoredLimits,
}

impl TryFrom<StoredTeam> for TeamRecord {
    type Error = StoreError;

    fn try_from(row: StoredTeam) -> Result<Self, StoreError> {
        let own_limits: LimitOverrides = serde_json::from_str(&row.limits)
            .map_err(|_| corrupt("a team's limits", &row.limits))?;
        let not_a_list = || corrupt("a team's addresses", &row.allowed_addresses);
        let allowed: Vec<String> =
            serde_json::from_str(&row.allowed_addresses).map_err(|_| not_a_list())?;
        let allowed = allowed.iter().map(|range| range.parse()).collect::<Result<_, _>>();
        let team = Team {
            id: TeamId::parse(&row.team_id).ok_or_else(|| corrupt("a team id", &row.team_id))?,
            slug: row.slug,
            name: row.team_name,
            limits: row.of_tier.limits()?.with(&own_limits),
            allowed: allowed.map_err(|_| not_a_list())?,
            blocked: row.blocked_reason,
        };
        let created_at = UnixMillis(row.team_created_at_ms);
        Ok(TeamRecord { team, tier: row.tier_id, own_limits, created_at })
    }
}

fn json_of(limits: &LimitOverrides) -> String {
    serde_json::to_string(limits).expect("a struct of numbers has a JSON form")
}

fn json_list(allowed: &[Cidr]) -> String {
    let texts: Vec<String> = allowed.iter().map(Cidr::to_string).collect();
    serde_json::to_string(&texts).expect("a list of texts has a JSON form")
}

impl Store {
    /// The team called `slug`, made in the tier `local` if there is none.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn ensure_team(&self, slug: &str) -> Result<Team, StoreError> {
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO teams (id, slug, name, created_at_ms) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (slug) DO NOTHING",
            )
            .bind(TeamId::random().to_string())
            .bind(slug)
            .bind(slug)
            .bind(clock::now().0)
            .execute(pool)
            .await
            .map_err(during("make a team"))?;
        });
        let row: StoredTeam = on_pool!(self, pool => {
            sqlx::query_as(concat!(
                "SELECT ", team_columns!(),
                " FROM teams JOIN tiers ON tiers.id = teams.tier_id WHERE teams.slug = $1",
            ))
            .bind(slug)
            .fetch_one(pool)
            .await
            .map_err(during("find a team"))?
        });
        Ok(TeamRecord::try_from(row)?.team)
    }

    /// Whether there is a team `id`.
    pub(crate) async fn team_exists(&self, id: &TeamId) -> Result<bool, StoreError> {
        let found: Option<String> = on_pool!(self, pool => {
            sqlx::query_scalar("SELECT id FROM teams WHERE id = $1")
                .bind(id.to_string())
                .fetch_optional(pool)
                .await
                .map_err(during("look for a team"))?
        });
        Ok(found.is_some())
    }

    /// Every team, oldest first.
    pub(crate) async fn teams(&self) -> Result<Vec<TeamRecord>, StoreError> {
        let rows: Vec<StoredTeam> = on_pool!(self, pool => {
            sqlx::query_as(concat!(
                "SELECT ", team_columns!(),
                " FROM teams JOIN tiers ON tiers.id = teams.tier_id ",
                "ORDER BY teams.created_at_ms, teams.id",
            ))
            .fetch_all(pool)
            .await
            .map_err(during("list teams"))?
        });
        rows.into_iter().map(TeamRecord::try_from).collect()
    }

    pub(crate) async fn team(&self, id: &TeamId) -> Result<Option<TeamRecord>, StoreError> {
        let row: Option<StoredTeam> = on_pool!(self, pool => {
            sqlx::query_as(concat!(
                "SELECT ", team_columns!(),
                " FROM teams JOIN tiers ON tiers.id = teams.tier_id WHERE teams.id = $1",
            ))
            .bind(id.to_string())
            .fetch_optional(pool)
            .await
            .map_err(during("find a team"))?
        });
        row.map(TeamRecord::try_from).transpose()
    }

    pub(crate) async fn create_team(&self, draft: &TeamDraft) -> Result<TeamRecord, TeamError> {
        if self.tier(&draft.tier).await?.is_none() {
            return Err(TeamError::NoTier { tier: draft.tier.clone() });
        }
        let id = TeamId::random();
        let made = on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO teams (id, slug, name, tier_id, limits, allowed_addresses, \
                 created_at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (slug) DO NOTHING",
            )
            .bind(id.to_string())
            .bind(&draft.slug)
            .bind(&draft.name)
            .bind(&draft.tier)
            .bind(json_of(&draft.own_limits))
            .bind(json_list(&draft.allowed))
            .bind(clock::now().0)
            .execute(pool)
            .await
            .map_err(during("make a team"))?
            .rows_affected()
        });
        if made == 0 {
            return Err(TeamError::SlugTaken { slug: draft.slug.clone() });
        }
        self.team(&id).await?.ok_or(TeamError::NotFound)
    }

    pub(crate) async fn change_team(
        &self,
        id: &TeamId,
        change: &TeamChange,
    ) -> Result<TeamRecord, TeamError> {
        if let Some(tier) = &change.tier
            && self.tier(tier).await?.is_none()
        {
            return Err(TeamError::NoTier { tier: tier.clone() });
        }
        on_pool!(self, pool => {
            sqlx::query(
                "UPDATE teams SET name = COALESCE($2, name), tier_id = COALESCE($3, tier_id), \
                 limits = COALESCE($4, limits), \
                 allowed_addresses = COALESCE($5, allowed_addresses), \
                 blocked_reason = CASE WHEN $6 THEN $7 ELSE blocked_reason END WHERE id = $1",
            )
            .bind(id.to_string())
            .bind(change.name.as_deref())
            .bind(change.tier.as_deref())
            .bind(change.own_limits.as_ref().map(json_of))
            .bind(change.allowed.as_deref().map(json_list))
            .bind(change.blocked.is_some())
            .bind(change.blocked.as_ref().and_then(Option::as_deref))
            .execute(pool)
            .await
            .map_err(during("change a team"))?;
        });
        self.team(id).await?.ok_or(TeamError::NotFound)
    }

    /// Removes a team and all that is its own: keys, events, webhooks, usage, ended runs, snapshots.
    /// How often templates were used stays.
    pub(crate) async fn delete_team(&self, id: &TeamId) -> Result<(), TeamError> {
        const WHAT: &str = "remove a team";
        let (mut tx, id) = (self.begin(WHAT).await?, id.to_string());
        let running: i64 = on_tx!(&mut tx, connection => {
            sqlx::query_scalar(
                "SELECT (SELECT COUNT(*) FROM sandboxes WHERE team_id = $1 AND ended_at_ms IS NULL) \
                 + (SELECT COUNT(*) FROM snapshots WHERE team_id = $1 AND kind = 'paused')",
            )
            .bind(&id)
            .fetch_one(&mut *connection)
            .await
            .map_err(during(WHAT))?
        });
        if running > 0 {
            return Err(TeamError::HasSandboxes { running: running.unsigned_abs() });
        }
        let removed = on_tx!(&mut tx, connection => {
            sqlx::query(
                "INSERT INTO template_spawns (template_id, spawn_count, last_ms) \
                 SELECT template_id, COUNT(*), MAX(started_at_ms) FROM sandboxes \
                 WHERE team_id = $1 GROUP BY template_id \
                 ON CONFLICT (template_id) DO UPDATE SET \
                 spawn_count = template_spawns.spawn_count + excluded.spawn_count, \
                 last_ms = CASE WHEN excluded.last_ms > template_spawns.last_ms \
                 THEN excluded.last_ms ELSE template_spawns.last_ms END",
            )
            .bind(&id)
            .execute(&mut *connection)
            .await
            .map_err(during(WHAT))?;
            sqlx::query("DELETE FROM sandboxes WHERE team_id = $1")
                .bind(&id)
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?;
            sqlx::query("DELETE FROM teams WHERE id = $1")
                .bind(&id)
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?
                .rows_affected()
        });
        tx.commit(WHAT).await?;
        if removed == 0 { Err(TeamError::NotFound) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, on_both};
    use super::*;

    fn draft(slug: &str) -> TeamDraft {
        TeamDraft {
            slug: slug.to_owned(),
            name: "Research".to_owned(),
            tier: "base".to_owned(),
            own_limits: LimitOverrides { max_vcpus: Some(2), ..LimitOverrides::default() },
            allowed: vec!["10.0.0.0/8".parse().expect("a range")],
        }
    }

    #[tokio::test]
    async fn a_team_is_made_changed_and_removed() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let made = store.create_team(&draft("research")).await.expect("a team");
            let id = made.team.id.clone();
            assert_eq!(made.team.limits.max_vcpus.0, 2, "its own");
            assert_eq!(made.team.limits.max_concurrent_sandboxes, 20, "its tier's");
            assert_eq!(store.team(&id).await.expect("a lookup"), Some(made.clone()));

            let change = TeamChange {
                name: Some("Lab".to_owned()),
                tier: Some("pro".to_owned()),
                own_limits: Some(LimitOverrides::default()),
                allowed: Some(Vec::new()),
                blocked: Some(Some("unpaid".to_owned())),
            };
            let changed = store.change_team(&id, &change).await.expect("a change");
            assert_eq!((changed.team.name.as_str(), changed.tier.as_str()), ("Lab", "pro"));
            assert_eq!(changed.team.limits.max_concurrent_sandboxes, 100);
            assert_eq!(changed.team.blocked.as_deref(), Some("unpaid"));
            assert!(changed.team.allowed.is_empty());
            let same = store.change_team(&id, &TeamChange::default()).await.expect("no change");
            assert_eq!(same, changed);
            let open = TeamChange { blocked: Some(None), ..TeamChange::default() };
            assert_eq!(store.change_team(&id, &open).await.expect("open").team.blocked, None);

            store.delete_team(&id).await.expect("removed");
            assert!(matches!(store.delete_team(&id).await, Err(TeamError::NotFound)));
            assert_eq!(store.team(&id).await.expect("a lookup"), None);
            assert_eq!(store.teams().await.expect("a list"), []);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn what_a_team_cannot_be_is_refused() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let made = store.create_team(&draft("research")).await.expect("a team");
            let taken = store.create_team(&draft("research")).await;
            assert!(matches!(taken, Err(TeamError::SlugTaken { .. })), "{taken:?}");
            let no_tier = TeamDraft { tier: "gold".to_owned(), ..draft("other") };
            let refused = store.create_team(&no_tier).await;
            assert!(matches!(refused, Err(TeamError::NoTier { .. })), "{refused:?}");
            let gold = TeamChange { tier: Some("gold".to_owned()), ..TeamChange::default() };
            let refused = store.change_team(&made.team.id, &gold).await;
            assert!(matches!(refused, Err(TeamError::NoTier { .. })), "{refused:?}");
            let nobody = store.change_team(&TeamId::random(), &TeamChange::default()).await;
            assert!(matches!(nobody, Err(TeamError::NotFound)), "{nobody:?}");
            store.close().await;
        })
        .await;
    }

    /// Writes one run as the first generation's columns have it; the others have defaults.
    async fn add_run(store: &Store, team: &TeamId, execution: &str, ended_at_ms: Option<i64>) {
        on_pool!(store, pool => {
            sqlx::query(
                "INSERT INTO sandboxes (execution_id, sandbox_id, team_id, template_id, build_id, \
                 metadata, secure, allow_internet, started_at_ms, end_at_ms, ended_at_ms) \
                 VALUES ($1, 'i1', $2, 't1', 'b1', '{}', TRUE, TRUE, 5, 9, $3)",
            )
            .bind(execution)
            .bind(team.to_string())
            .bind(ended_at_ms)
            .execute(pool)
            .await
            .expect("a run");
        });
    }

    #[tokio::test]
    async fn a_team_with_running_sandboxes_stays_and_counts_outlive_it() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            for slug in ["first", "second"] {
                let team = store.create_team(&draft(slug)).await.expect("a team").team.id;
                add_run(&store, &team, slug, None).await;
                let refused = store.delete_team(&team).await;
                assert!(
                    matches!(refused, Err(TeamError::HasSandboxes { running: 1 })),
                    "{refused:?}"
                );
                on_pool!(&store, pool => {
                    sqlx::query("UPDATE sandboxes SET ended_at_ms = 8")
                        .execute(pool)
                        .await
                        .expect("its end");
                });
                store.delete_team(&team).await.expect("nothing runs");
            }
            let counted: (i64, i64) = on_pool!(&store, pool => {
                sqlx::query_as(
                    "SELECT spawn_count, last_ms FROM template_spawns WHERE template_id = 't1'",
                )
                .fetch_one(pool)
                .await
                .expect("a count")
            });
            assert_eq!(counted, (2, 5));
            store.close().await;
        })
        .await;
    }
}
