//! Snapshots: paused sandboxes, and those that others are started from.
//!
//! Pauses are written behind the live table with the run they end ([`super::sandboxes`]); snapshots
//! before they are answered, because nothing else knows their names.

use std::collections::HashSet;

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, UnixMillis, Vcpus};
use tracing::warn;

use super::events::Recorder;
use super::{Store, StoreError, Tx, corrupt, during, on_pool, on_tx};
use crate::event::{Event, Run};
use crate::live::{Kept, Sandbox};
use crate::team::TeamId;
use crate::terms;

const PAUSED: &str = "paused";
const SNAPSHOT: &str = "snapshot";
/// The tag of what was given none. Source: contract section 1.3.
pub(crate) const DEFAULT_TAG: &str = "default";

/// What a team calls a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotName {
    pub(crate) name: String,
    pub(crate) tag: String,
}

/// A snapshot sandboxes can be started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotRecord {
    pub(crate) team: TeamId,
    /// Its own: what it is named by as a template.
    pub(crate) template: TemplateId,
    pub(crate) name: Option<SnapshotName>,
    pub(crate) kept: Kept,
}

/// A paused sandbox as the store has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PausedRow {
    pub(crate) team: TeamId,
    pub(crate) kept: Kept,
    /// Whether a run of it is not over as far as the store knows.
    pub(crate) runs: bool,
}

/// Which of a team's snapshots are wanted, newest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct SnapshotsWanted {
    pub(crate) sandbox: Option<SandboxId>,
    /// Their name, or the template id they are known by.
    pub(crate) name: Option<String>,
    pub(crate) tag: Option<String>,
    /// Only those after this one.
    pub(crate) after: Option<(UnixMillis, String)>,
    pub(crate) limit: u32,
}

/// How a snapshot is looked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SnapshotKey<'a> {
    Template(&'a str),
    Name { name: &'a str, tag: &'a str },
}

/// The columns of a row.
#[derive(sqlx::FromRow)]
struct Stored {
    id: String,
    kind: String,
    team_id: String,
    template_id: String,
    name: Option<String>,
    tag: String,
    sandbox_id: String,
    execution_id: String,
    source_template_id: String,
    source_build_id: String,
    filesystem_only: bool,
    guest_unresponsive: bool,
    vcpus: i64,
    memory_mib: i64,
    disk_mib: i64,
    own_bytes: i64,
    envd_version: String,
    terms: String,
    started_at_ms: i64,
    created_at_ms: i64,
}

impl Stored {
    fn team(&self) -> Result<TeamId, StoreError> {
        TeamId::parse(&self.team_id).ok_or_else(|| corrupt("a team id", &self.team_id))
    }

    fn kept(self) -> Result<Kept, StoreError> {
        let parsed = |text: &str| corrupt("an id of a snapshot", text);
        Ok(Kept {
            id: self.id.parse().map_err(|_| parsed(&self.id))?,
            sandbox: self.sandbox_id.parse().map_err(|_| parsed(&self.sandbox_id))?,
            execution: self.execution_id.parse().map_err(|_| parsed(&self.execution_id))?,
            template: self
                .source_template_id
                .parse()
                .map_err(|_| parsed(&self.source_template_id))?,
            build: self.source_build_id.parse().map_err(|_| parsed(&self.source_build_id))?,
            is_pause: self.kind == PAUSED,
            filesystem_only: self.filesystem_only,
            guest_unresponsive: self.guest_unresponsive,
            vcpus: Vcpus(u32::try_from(self.vcpus).unwrap_or_default()),
            memory: MiB(u32::try_from(self.memory_mib).unwrap_or_default()),
            disk: MiB(u32::try_from(self.disk_mib).unwrap_or_default()),
            envd_version: self.envd_version.into(),
            terms: self.terms,
            started_at: UnixMillis(self.started_at_ms),
            created_at: UnixMillis(self.created_at_ms),
            own_bytes: u64::try_from(self.own_bytes).unwrap_or_default(),
            uploaded: false,
        })
    }

    fn record(mut self) -> Result<SnapshotRecord, StoreError> {
        let name = self.name.take();
        let tag = std::mem::take(&mut self.tag);
        Ok(SnapshotRecord {
            team: self.team()?,
            template: self
                .template_id
                .parse()
                .map_err(|_| corrupt("a template id", &self.template_id))?,
            name: name.map(|name| SnapshotName { name, tag }),
            kept: self.kept()?,
        })
    }
}

impl Store {
    /// Every paused sandbox, and what running ones were resumed from.
    pub(crate) async fn paused(&self) -> Result<Vec<PausedRow>, StoreError> {
        const WHAT: &str = "list paused sandboxes";
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as("SELECT * FROM snapshots WHERE kind = 'paused'")
                .fetch_all(pool)
                .await
                .map_err(during(WHAT))?
        });
        let running: Vec<(String,)> = on_pool!(self, pool => {
            sqlx::query_as("SELECT sandbox_id FROM sandboxes WHERE ended_at_ms IS NULL")
                .fetch_all(pool)
                .await
                .map_err(during(WHAT))?
        });
        let running: HashSet<String> = running.into_iter().map(|(id,)| id).collect();
        // One damaged row must not keep all the others from being shown.
        let readable = rows.into_iter().filter_map(|row| {
            let (team, runs) = (row.team(), running.contains(&row.sandbox_id));
            team.and_then(|team| Ok(PausedRow { team, kept: row.kept()?, runs }))
                .inspect_err(|e| warn!(error = %e, "a stored snapshot is passed over"))
                .ok()
        });
        Ok(readable.collect())
    }

    /// The ids of all snapshots, of paused sandboxes and others.
    pub(crate) async fn snapshot_ids(&self) -> Result<HashSet<String>, StoreError> {
        let rows: Vec<(String,)> = on_pool!(self, pool => {
            sqlx::query_as("SELECT id FROM snapshots")
                .fetch_all(pool)
                .await
                .map_err(during("list the ids of snapshots"))?
        });
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// Why the run `execution` ended: `None` when it is not there, `Some(None)` when it has not.
    pub(crate) async fn end_of(
        &self,
        execution: &ExecutionId,
    ) -> Result<Option<Option<String>>, StoreError> {
        on_pool!(self, pool => {
            sqlx::query_scalar("SELECT end_reason FROM sandboxes WHERE execution_id = $1")
                .bind(execution.as_str())
                .fetch_optional(pool)
                .await
                .map_err(during("look for the end of a run"))
        })
    }

    /// Writes a snapshot with its event; one that has its name loses it. False when its team is gone.
    pub(crate) async fn add_snapshot(
        &self,
        record: &SnapshotRecord,
        run: Run,
    ) -> Result<bool, StoreError> {
        const WHAT: &str = "write a snapshot";
        let mut tx = self.begin(WHAT).await?;
        if let Some(SnapshotName { name, tag }) = &record.name {
            on_tx!(&mut tx, connection => {
                sqlx::query(
                    "UPDATE snapshots SET name = NULL WHERE team_id = $1 AND name = $2 AND tag = $3",
                )
                .bind(record.team.to_string())
                .bind(name)
                .bind(tag)
                .execute(connection)
                .await
                .map_err(during(WHAT))?;
            });
        }
        let row = NewRow {
            kind: SNAPSHOT,
            team: &record.team,
            template: &record.template,
            name: record.name.as_ref(),
            kept: &record.kept,
        };
        if !insert(&mut tx, row).await.map_err(during(WHAT))? {
            return Ok(false);
        }
        let event = Event::checkpointed(run, record.kept.created_at, &record.kept.id);
        let mut recorder = Recorder::default();
        recorder.record(&mut tx, &event).await.map_err(during("write an event"))?;
        tx.commit(WHAT).await?;
        if recorder.has_deliveries() {
            self.deliveries_due().notify_one();
        }
        Ok(true)
    }

    /// The snapshot `key` means for `team`.
    pub(crate) async fn snapshot(
        &self,
        team: &TeamId,
        key: SnapshotKey<'_>,
    ) -> Result<Option<SnapshotRecord>, StoreError> {
        let (template, name, tag) = match key {
            SnapshotKey::Template(id) => (Some(id), None, None),
            SnapshotKey::Name { name, tag } => (None, Some(name), Some(tag)),
        };
        let row: Option<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT * FROM snapshots WHERE kind = 'snapshot' AND team_id = $1 \
                 AND (template_id = $2 OR (name = $3 AND tag = $4))",
            )
            .bind(team.to_string())
            .bind(template)
            .bind(name)
            .bind(tag)
            .fetch_optional(pool)
            .await
            .map_err(during("look a snapshot up"))?
        });
        row.map(Stored::record).transpose()
    }

    /// The snapshots of `team` that are wanted, newest first.
    pub(crate) async fn snapshots(
        &self,
        team: &TeamId,
        wanted: &SnapshotsWanted,
    ) -> Result<Vec<SnapshotRecord>, StoreError> {
        let (at, id) = match &wanted.after {
            Some((at, id)) => (at.0, id.as_str()),
            None => (i64::MAX, ""),
        };
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT * FROM snapshots WHERE kind = 'snapshot' AND team_id = $1 \
                 AND (created_at_ms < $2 OR (created_at_ms = $2 AND id < $3)) \
                 AND (CAST($4 AS TEXT) IS NULL OR sandbox_id = $4) \
                 AND (CAST($5 AS TEXT) IS NULL OR name = $5 OR template_id = $5) \
                 AND (CAST($6 AS TEXT) IS NULL OR tag = $6) \
                 ORDER BY created_at_ms DESC, id DESC LIMIT $7",
            )
            .bind(team.to_string())
            .bind(at)
            .bind(id)
            .bind(wanted.sandbox.as_ref().map(SandboxId::as_str))
            .bind(wanted.name.as_deref())
            .bind(wanted.tag.as_deref())
            .bind(i64::from(wanted.limit))
            .fetch_all(pool)
            .await
            .map_err(during("list snapshots"))?
        });
        rows.into_iter().map(Stored::record).collect()
    }

    /// Forgets a snapshot. False when it was not there.
    pub(crate) async fn delete_snapshot(&self, id: &BuildId) -> Result<bool, StoreError> {
        on_pool!(self, pool => {
            sqlx::query("DELETE FROM snapshots WHERE id = $1 AND kind = 'snapshot'")
                .bind(id.as_str())
                .execute(pool)
                .await
                .map(|done| done.rows_affected() > 0)
                .map_err(during("remove a snapshot"))
        })
    }
}

/// A row to be written.
struct NewRow<'a> {
    kind: &'static str,
    team: &'a TeamId,
    template: &'a TemplateId,
    name: Option<&'a SnapshotName>,
    kept: &'a Kept,
}

/// False when it is there, or its team is gone.
async fn insert(tx: &mut Tx, row: NewRow<'_>) -> Result<bool, sqlx::Error> {
    let kept = row.kept;
    on_tx!(tx, connection => {
        sqlx::query(
            "INSERT INTO snapshots (id, kind, team_id, template_id, name, tag, sandbox_id, \
             execution_id, source_template_id, source_build_id, filesystem_only, \
             guest_unresponsive, vcpus, memory_mib, disk_mib, own_bytes, envd_version, terms, \
             started_at_ms, created_at_ms) \
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, \
             $18, $19, $20 WHERE EXISTS (SELECT 1 FROM teams WHERE id = $3) \
             ON CONFLICT (id) DO NOTHING",
        )
        .bind(kept.id.as_str())
        .bind(row.kind)
        .bind(row.team.to_string())
        .bind(row.template.as_str())
        .bind(row.name.map(|name| name.name.as_str()))
        .bind(row.name.map_or(DEFAULT_TAG, |name| name.tag.as_str()))
        .bind(kept.sandbox.as_str())
        .bind(kept.execution.as_str())
        .bind(kept.template.as_str())
        .bind(kept.build.as_str())
        .bind(kept.filesystem_only)
        .bind(kept.guest_unresponsive)
        .bind(i64::from(kept.vcpus.0))
        .bind(i64::from(kept.memory.0))
        .bind(i64::from(kept.disk.0))
        .bind(i64::try_from(kept.own_bytes).unwrap_or(i64::MAX))
        .bind(&*kept.envd_version)
        .bind(kept.terms.as_str())
        .bind(kept.started_at.0)
        .bind(kept.created_at.0)
        .execute(connection)
        .await
        .map(|done| done.rows_affected() > 0)
    })
}

/// Writes what stands for the paused `sandbox`, in place of what did before.
pub(super) async fn write_pause(tx: &mut Tx, sandbox: &Sandbox) -> Result<(), sqlx::Error> {
    let Some(saved) = &sandbox.saved else { return Ok(()) };
    on_tx!(&mut *tx, connection => {
        sqlx::query("DELETE FROM snapshots WHERE kind = 'paused' AND sandbox_id = $1 AND id <> $2")
            .bind(sandbox.id.as_str())
            .bind(saved.snapshot.as_str())
            .execute(connection)
            .await?;
    });
    let kept = Kept {
        id: saved.snapshot.clone(),
        sandbox: sandbox.id.clone(),
        execution: sandbox.execution.clone(),
        template: sandbox.template.clone(),
        build: sandbox.build.clone(),
        is_pause: true,
        filesystem_only: saved.filesystem_only,
        guest_unresponsive: saved.guest_unresponsive,
        vcpus: sandbox.vcpus,
        memory: sandbox.memory,
        disk: sandbox.disk,
        envd_version: sandbox.envd_version.clone(),
        terms: terms::write(&sandbox.terms(), None),
        started_at: sandbox.started_at,
        created_at: saved.at,
        own_bytes: saved.own_bytes,
        uploaded: false,
    };
    let (team, template) = (&sandbox.team, &sandbox.template);
    insert(tx, NewRow { kind: PAUSED, team, template, name: None, kept: &kept }).await.map(drop)
}

/// Forgets what stands, or stood, for the sandbox `id`. False when nothing did.
pub(super) async fn forget_pause(tx: &mut Tx, id: &str) -> Result<bool, sqlx::Error> {
    on_tx!(tx, connection => {
        sqlx::query("DELETE FROM snapshots WHERE kind = 'paused' AND sandbox_id = $1")
            .bind(id)
            .execute(connection)
            .await
            .map(|done| done.rows_affected() > 0)
    })
}

#[cfg(test)]
mod tests;
