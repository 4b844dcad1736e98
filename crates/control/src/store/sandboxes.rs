//! Runs of sandboxes: written behind the live table, read to adopt what still runs after a restart.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use belljar_domain::{ExecutionId, MiB, SandboxId, UnixMillis, Vcpus};

use tracing::warn;

use super::events::Recorder;
use super::snapshots::{forget_pause, write_pause};
use super::{Store, StoreError, Tx, corrupt, during, on_pool, on_tx};
use crate::event::{Event, Run};
use crate::live::{Sandbox, Terms};
use crate::team::TeamId;
use crate::terms::plain_lifecycle;
use crate::writer::{Change, Noted};

/// What the store remembers of a run that a node cannot tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunRow {
    pub(crate) execution: ExecutionId,
    pub(crate) id: SandboxId,
    pub(crate) terms: Terms,
    pub(crate) end_at: UnixMillis,
}

/// How often a template was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spawned {
    pub(crate) count: i64,
    pub(crate) last: UnixMillis,
}

/// The columns of [`RunRow`] as stored.
#[derive(sqlx::FromRow)]
struct Stored {
    execution_id: String,
    sandbox_id: String,
    team_id: String,
    alias: Option<String>,
    metadata: String,
    secure: bool,
    allow_internet: bool,
    end_at_ms: i64,
}

impl TryFrom<Stored> for RunRow {
    type Error = StoreError;

    fn try_from(row: Stored) -> Result<Self, StoreError> {
        Ok(RunRow {
            execution: row
                .execution_id
                .parse()
                .map_err(|_| corrupt("an execution id", &row.execution_id))?,
            id: row.sandbox_id.parse().map_err(|_| corrupt("a sandbox id", &row.sandbox_id))?,
            terms: Terms {
                team: TeamId::parse(&row.team_id)
                    .ok_or_else(|| corrupt("a team id", &row.team_id))?,
                alias: row.alias,
                metadata: serde_json::from_str::<BTreeMap<_, _>>(&row.metadata)
                    .map_err(|_| corrupt("a sandbox's metadata", &row.metadata))?
                    .into(),
                secure: row.secure,
                allow_internet: row.allow_internet,
                // The node keeps the rest; a run of a time before that had neither.
                lifecycle: plain_lifecycle(),
                env_vars: Arc::default(),
            },
            end_at: UnixMillis(row.end_at_ms),
        })
    }
}

impl Store {
    /// Every run not known to have ended.
    pub(crate) async fn running(&self) -> Result<Vec<RunRow>, StoreError> {
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT execution_id, sandbox_id, team_id, alias, metadata, secure, \
                 allow_internet, end_at_ms FROM sandboxes WHERE ended_at_ms IS NULL",
            )
            .fetch_all(pool)
            .await
            .map_err(during("list running sandboxes"))?
        });
        // One damaged row must not keep all the others from being followed.
        let readable = rows.into_iter().filter_map(|row| {
            RunRow::try_from(row)
                .inspect_err(|e| warn!(error = %e, "a stored run is passed over"))
                .ok()
        });
        Ok(readable.collect())
    }

    /// How often each template was used, by template id, runs that were pruned included.
    pub(crate) async fn spawned(&self) -> Result<HashMap<String, Spawned>, StoreError> {
        let rows: Vec<(String, i64, i64)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT template_id, CAST(SUM(count) AS BIGINT), MAX(last_ms) FROM (\
                 SELECT template_id, COUNT(*) AS count, MAX(started_at_ms) AS last_ms \
                 FROM sandboxes GROUP BY template_id \
                 UNION ALL SELECT template_id, spawn_count, last_ms FROM template_spawns\
                 ) AS spawns GROUP BY template_id",
            )
            .fetch_all(pool)
            .await
            .map_err(during("count sandboxes by template"))?
        });
        Ok(rows
            .into_iter()
            .map(|(id, count, last_ms)| (id, Spawned { count, last: UnixMillis(last_ms) }))
            .collect())
    }

    /// Writes `changes` in order with the events they make, all or none. Writing the same change
    /// again changes nothing and makes no event.
    pub(crate) async fn apply(&self, changes: &[Noted]) -> Result<(), StoreError> {
        let mut tx = self.begin("begin to write sandboxes").await?;
        let mut recorder = Recorder::default();
        for change in changes {
            if let Some(event) = write(&mut tx, change).await? {
                let recorded = recorder.record(&mut tx, &event).await;
                recorded.map_err(during("write an event"))?;
            }
        }
        tx.commit("finish writing sandboxes").await?;
        if recorder.has_deliveries() {
            self.deliveries_due().notify_one();
        }
        Ok(())
    }
}

/// Writes one change; the event it makes if it changed anything.
async fn write(tx: &mut Tx, noted: &Noted) -> Result<Option<Event>, StoreError> {
    const WHAT: &str = "write a sandbox";
    Ok(match &noted.change {
        Change::Started(sandbox) => {
            let is_new = write_start(tx, sandbox).await.map_err(during(WHAT))?;
            let run = is_new.then(|| Run::from(&**sandbox));
            run.map(|run| match sandbox.saved {
                Some(_) => Event::resumed(run),
                None => Event::created(run),
            })
        }
        Change::EndMoved { execution, end_at } => {
            let row = write_move(tx, execution, *end_at).await.map_err(during(WHAT))?;
            let run = row.map(Run::try_from).transpose()?;
            run.map(|run| Event::updated(run, noted.at, *end_at))
        }
        Change::Ended { execution, at, reason } => {
            let row = write_end(tx, execution, *at, reason).await.map_err(during(WHAT))?;
            if let Some(row) = &row {
                forget_pause(tx, &row.sandbox_id).await.map_err(during(WHAT))?;
            }
            let run = row.map(Run::try_from).transpose()?;
            run.map(|run| Event::killed(run, *at, reason))
        }
        Change::Paused(sandbox) => {
            let at = sandbox.saved.as_ref().map_or(noted.at, |saved| saved.at);
            let row = write_end(tx, &sandbox.execution, at, "paused").await;
            let row = row.map_err(during(WHAT))?;
            write_pause(tx, sandbox).await.map_err(during(WHAT))?;
            let run = row.map(Run::try_from).transpose()?;
            run.map(|run| Event::paused(run, at))
        }
        Change::Lapsed { execution, at, reason } => {
            let row = write_end(tx, execution, *at, reason).await.map_err(during(WHAT))?;
            let run = row.map(Run::try_from).transpose()?;
            run.map(|run| Event::paused(run, *at))
        }
        Change::Copied { sandbox, at, snapshot } => {
            Some(Event::checkpointed(Run::from(&**sandbox), *at, snapshot))
        }
        Change::Discarded { sandbox, at, reason } => {
            let forgotten = forget_pause(tx, sandbox.id.as_str()).await.map_err(during(WHAT))?;
            forgotten.then(|| Event::discarded(Run::from(&**sandbox), *at, reason))
        }
    })
}

/// What a changed row tells an event.
#[derive(sqlx::FromRow)]
struct StoredRun {
    execution_id: String,
    sandbox_id: String,
    team_id: String,
    template_id: String,
    build_id: String,
    metadata: String,
    started_at_ms: i64,
    vcpus: i64,
    memory_mib: i64,
}

impl TryFrom<StoredRun> for Run {
    type Error = StoreError;

    fn try_from(row: StoredRun) -> Result<Self, StoreError> {
        let team = TeamId::parse(&row.team_id).ok_or_else(|| corrupt("a team id", &row.team_id));
        let template = row.template_id.parse();
        let execution = row.execution_id.parse();
        Ok(Run {
            team: team?,
            sandbox: row
                .sandbox_id
                .parse()
                .map_err(|_| corrupt("a sandbox id", &row.sandbox_id))?,
            execution: execution.map_err(|_| corrupt("an execution id", &row.execution_id))?,
            template: template.map_err(|_| corrupt("a template id", &row.template_id))?,
            build: row.build_id.parse().map_err(|_| corrupt("a build id", &row.build_id))?,
            metadata: serde_json::from_str(&row.metadata)
                .map_err(|_| corrupt("a sandbox's metadata", &row.metadata))?,
            started_at: UnixMillis(row.started_at_ms),
            vcpus: Vcpus(u32::try_from(row.vcpus).unwrap_or_default()),
            memory: MiB(u32::try_from(row.memory_mib).unwrap_or_default()),
        })
    }
}

async fn write_move(
    tx: &mut Tx,
    execution: &ExecutionId,
    end_at: UnixMillis,
) -> Result<Option<StoredRun>, sqlx::Error> {
    on_tx!(tx, connection => {
        sqlx::query_as(
            "UPDATE sandboxes SET end_at_ms = $1 \
             WHERE execution_id = $2 AND ended_at_ms IS NULL AND end_at_ms <> $1 \
             RETURNING execution_id, sandbox_id, team_id, template_id, build_id, metadata, \
             started_at_ms, vcpus, memory_mib",
        )
        .bind(end_at.0)
        .bind(execution.as_str())
        .fetch_optional(connection)
        .await
    })
}

async fn write_end(
    tx: &mut Tx,
    execution: &ExecutionId,
    at: UnixMillis,
    reason: &'static str,
) -> Result<Option<StoredRun>, sqlx::Error> {
    on_tx!(tx, connection => {
        sqlx::query_as(
            "UPDATE sandboxes SET ended_at_ms = $1, end_reason = $2 \
             WHERE execution_id = $3 AND ended_at_ms IS NULL \
             RETURNING execution_id, sandbox_id, team_id, template_id, build_id, metadata, \
             started_at_ms, vcpus, memory_mib",
        )
        .bind(at.0)
        .bind(reason)
        .bind(execution.as_str())
        .fetch_optional(connection)
        .await
    })
}

/// Says whether the run was not there. One whose team is gone is not written: a row that cannot be
/// would take the changes of other teams with it that are written together.
async fn write_start(tx: &mut Tx, sandbox: &Sandbox) -> Result<bool, sqlx::Error> {
    let metadata = serde_json::to_string(&sandbox.metadata.to_map())
        .expect("a map of strings has a JSON form");
    on_tx!(tx, connection => {
        sqlx::query(
            "INSERT INTO sandboxes (execution_id, sandbox_id, team_id, template_id, build_id, \
             alias, metadata, secure, allow_internet, started_at_ms, end_at_ms, vcpus, \
             memory_mib, disk_mib) \
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14 \
             WHERE EXISTS (SELECT 1 FROM teams WHERE id = $3) \
             ON CONFLICT (execution_id) DO NOTHING",
        )
        .bind(sandbox.execution.as_str())
        .bind(sandbox.id.as_str())
        .bind(sandbox.team.to_string())
        .bind(sandbox.template.as_str())
        .bind(sandbox.build.as_str())
        .bind(sandbox.alias.as_deref())
        .bind(metadata)
        .bind(sandbox.secure)
        .bind(sandbox.allow_internet)
        .bind(sandbox.started_at.0)
        .bind(sandbox.end_at.0)
        .bind(i64::from(sandbox.vcpus.0))
        .bind(i64::from(sandbox.memory.0))
        .bind(i64::from(sandbox.disk.0))
        .execute(connection)
        .await
        .map(|done| done.rows_affected() > 0)
    })
}
