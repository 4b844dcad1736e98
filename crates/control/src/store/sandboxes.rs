//! Runs of sandboxes: written behind the live table, read to adopt what still runs after a restart.

use std::collections::HashMap;

use belljar_domain::{ExecutionId, SandboxId, UnixMillis};

use super::{Store, StoreError, Tx, corrupt, during, on_pool, on_tx};
use crate::live::{Sandbox, Terms};
use crate::team::TeamId;
use crate::writer::Change;

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
                metadata: serde_json::from_str(&row.metadata)
                    .map_err(|_| corrupt("a sandbox's metadata", &row.metadata))?,
                secure: row.secure,
                allow_internet: row.allow_internet,
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
        rows.into_iter().map(RunRow::try_from).collect()
    }

    /// How often each template was used, by template id.
    pub(crate) async fn spawned(&self) -> Result<HashMap<String, Spawned>, StoreError> {
        let rows: Vec<(String, i64, i64)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT template_id, COUNT(*), MAX(started_at_ms) FROM sandboxes \
                 GROUP BY template_id",
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

    /// Writes `changes` in order, all or none. Writing the same change again changes nothing.
    pub(crate) async fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut tx = self.begin("begin to write sandboxes").await?;
        for change in changes {
            write(&mut tx, change).await.map_err(during("write a sandbox"))?;
        }
        tx.commit("finish writing sandboxes").await
    }
}

async fn write(tx: &mut Tx, change: &Change) -> Result<(), sqlx::Error> {
    match change {
        Change::Started(sandbox) => write_start(tx, sandbox).await,
        Change::EndMoved { execution, end_at } => on_tx!(tx, connection => {
            sqlx::query(
                "UPDATE sandboxes SET end_at_ms = $1 \
                 WHERE execution_id = $2 AND ended_at_ms IS NULL",
            )
            .bind(end_at.0)
            .bind(execution.as_str())
            .execute(connection)
            .await
            .map(drop)
        }),
        Change::Ended { execution, at, reason } => on_tx!(tx, connection => {
            sqlx::query(
                "UPDATE sandboxes SET ended_at_ms = $1, end_reason = $2 \
                 WHERE execution_id = $3 AND ended_at_ms IS NULL",
            )
            .bind(at.0)
            .bind(*reason)
            .bind(execution.as_str())
            .execute(connection)
            .await
            .map(drop)
        }),
    }
}

async fn write_start(tx: &mut Tx, sandbox: &Sandbox) -> Result<(), sqlx::Error> {
    let metadata =
        serde_json::to_string(&sandbox.metadata).expect("a map of strings has a JSON form");
    on_tx!(tx, connection => {
        sqlx::query(
            "INSERT INTO sandboxes (execution_id, sandbox_id, team_id, template_id, build_id, \
             alias, metadata, secure, allow_internet, started_at_ms, end_at_ms, vcpus, \
             memory_mib, disk_mib) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) \
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
        .map(drop)
    })
}
