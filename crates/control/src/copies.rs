//! Copies of a running sandbox: snapshots that others are started from, and forks.
//!
//! Both freeze the sandbox for a moment on its node and let it go on. A snapshot is in the store before
//! it is answered; a fork's is in no store, and goes once its sandboxes run.

use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::{BuildId, Kind, SandboxId, TemplateId};
use futures::StreamExt as _;
use tokio::time::Instant;

use crate::app::App;
use crate::creation::{self, CreateError, CreateSpec};
use crate::event::Run;
use crate::lifecycle::{missing, shielded, take_turn};
use crate::live::{Kept, Lifecycle, Rousing, Sandbox};
use crate::node::NodeCallError;
use crate::pause::wait_until;
use crate::store::{SnapshotName, SnapshotRecord, StoreError};
use crate::team::Team;
use crate::templates::{Placed, Reference, Template};
use crate::writer::Change;

/// How long a copy waits for another change of its sandbox.
const CHANGE_WAIT: Duration = Duration::from_secs(50);
/// Forks started at the same time.
const FORKS_AT_ONCE: usize = 8;
/// The oldest guest daemon that can be copied, major, minor and patch. Source: contract section 1.2.
const ENVD_MIN: [u32; 3] = [0, 5, 0];

/// Why a sandbox was not copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("find the sandbox to copy")]
    NotFound,
    #[error("copy the sandbox: it is paused")]
    Paused,
    #[error("copy the sandbox: other changes of it take too long")]
    Busy,
    #[error("copy the sandbox: its guest daemon {version} is older than 0.5.0")]
    TooOld { version: String },
    #[error("copy the sandbox: its guest does not answer")]
    GuestUnresponsive(#[source] NodeCallError),
    #[error("copy the sandbox: its node has no room for it")]
    NoRoom(#[source] NodeCallError),
    #[error("copy the sandbox")]
    Node(#[from] NodeCallError),
    #[error("copy the sandbox: its team is gone")]
    TeamGone,
    #[error("copy the sandbox with the store")]
    Store(#[from] StoreError),
    #[error("copy the sandbox: the node answered for another one")]
    Mixup,
    #[error("copy the sandbox: its task broke")]
    TaskBroke,
}

/// Takes a snapshot of a running sandbox and waits until it can be started from.
pub(crate) async fn snapshot(
    app: &Arc<App>,
    team: &Arc<Team>,
    id: &SandboxId,
    name: Option<SnapshotName>,
    filesystem_only: bool,
) -> Result<SnapshotRecord, CopyError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move { snapshot_here(&this, &team, &id, name, filesystem_only).await };
    shielded(&app.scope, "snapshot sandbox", work).await.unwrap_or(Err(CopyError::TaskBroke))
}

async fn snapshot_here(
    app: &App,
    team: &Team,
    id: &SandboxId,
    name: Option<SnapshotName>,
    filesystem_only: bool,
) -> Result<SnapshotRecord, CopyError> {
    let build = BuildId::random();
    let _busy = app.snapshots.busy(&build);
    let (sandbox, kept) = copy(app, team, id, &build, filesystem_only).await?;
    let template = TemplateId::random();
    let record = SnapshotRecord { team: team.id.clone(), template, name, kept };
    match app.store.add_snapshot(&record, Run::from(&*sandbox)).await {
        Ok(true) => Ok(record),
        // Nobody can name it.
        Ok(false) => {
            app.snapshots.give_up(&build);
            Err(CopyError::TeamGone)
        }
        Err(e) => {
            app.snapshots.give_up(&build);
            Err(e.into())
        }
    }
}

/// Copies a running sandbox as `build`.
async fn copy(
    app: &App,
    team: &Team,
    id: &SandboxId,
    build: &BuildId,
    filesystem_only: bool,
) -> Result<(Arc<Sandbox>, Kept), CopyError> {
    let deadline = Instant::now() + CHANGE_WAIT;
    let (sandbox, _turn) = loop {
        // A pause, or a move of its end, comes before or after.
        let turn = match app.live.turn(id, &team.id, clock::now()) {
            Some(turn) => Some(take_turn(turn).await.map_err(|_| CopyError::Busy)?),
            None => None,
        };
        match app.live.rouse(id, &team.id, clock::now()) {
            Rousing::Runs(sandbox) => break (sandbox, turn),
            Rousing::Paused(_) => return Err(CopyError::Paused),
            Rousing::Nothing => return Err(CopyError::NotFound),
            Rousing::Busy(over) => {
                drop(turn);
                wait_until(over, deadline).await.ok_or(CopyError::Busy)?;
            }
        }
    };
    if !is_at_least(&sandbox.envd_version, ENVD_MIN) {
        return Err(CopyError::TooOld { version: sandbox.envd_version.to_string() });
    }
    let node = app.node_of(&sandbox);
    match node.rpc.snapshot(id, build, filesystem_only).await {
        Ok(kept) if kept.id == *build && kept.execution == sandbox.execution => {
            app.snapshots.is_on(build, node.ix);
            Ok((sandbox, kept))
        }
        Ok(_) => Err(CopyError::Mixup),
        Err(e) if e.kind() == Kind::NotFound => {
            if app.live.hide_missing(&sandbox.id, &sandbox.execution) {
                missing(app, &sandbox);
            }
            Err(CopyError::NotFound)
        }
        Err(e) if e.is_refused_by_state() => Err(CopyError::GuestUnresponsive(e)),
        Err(e) if e.kind() == Kind::Quota => Err(CopyError::NoRoom(e)),
        // What it may have left all the same, the next reconcile removes.
        Err(e) => Err(e.into()),
    }
}

/// Starts `count` copies of a running sandbox. One that does not start does not stop the others.
pub(crate) async fn fork(
    app: &Arc<App>,
    team: &Arc<Team>,
    id: &SandboxId,
    lifetime: Duration,
    count: usize,
) -> Result<Vec<Result<Arc<Sandbox>, CreateError>>, CopyError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move { fork_here(&this, &team, &id, lifetime, count).await };
    shielded(&app.scope, "fork sandbox", work).await.unwrap_or(Err(CopyError::TaskBroke))
}

async fn fork_here(
    app: &App,
    team: &Team,
    id: &SandboxId,
    lifetime: Duration,
    count: usize,
) -> Result<Vec<Result<Arc<Sandbox>, CreateError>>, CopyError> {
    let build = BuildId::random();
    let _busy = app.snapshots.busy(&build);
    let (source, kept) = copy(app, team, id, &build, false).await?;
    let at = kept.created_at;
    app.writer.push(Change::Copied { sandbox: Arc::clone(&source), at, snapshot: build.clone() });
    let spec = spec(&source, lifetime)?;
    let placed = Placed {
        template: Template {
            id: source.template.clone(),
            build: build.clone(),
            aliases: source.alias.iter().cloned().collect(),
            vcpus: source.vcpus,
            memory: source.memory,
            disk: source.disk,
            envd_version: source.envd_version.clone(),
            created_at: at,
            cold_boot: false,
        },
        nodes: vec![source.node],
    };
    let forks = (0..count).map(|_| start(app, team, &spec, &placed));
    let started = futures::stream::iter(forks).buffered(FORKS_AT_ONCE).collect().await;
    // What runs from it goes on.
    app.snapshots.give_up(&build);
    Ok(started)
}

async fn start(
    app: &App,
    team: &Team,
    spec: &CreateSpec,
    placed: &Placed,
) -> Result<Arc<Sandbox>, CreateError> {
    let slot = creation::reserve(app, team, &placed.template).await?;
    creation::start(app, team, spec, (placed.clone(), slot), None).await
}

/// A fork is created on its source's terms.
fn spec(source: &Sandbox, lifetime: Duration) -> Result<CreateSpec, CopyError> {
    let template: Reference = source.template.as_str().parse().map_err(|_| CopyError::Mixup)?;
    Ok(CreateSpec {
        template,
        lifetime,
        metadata: source.metadata.to_map(),
        env_vars: Arc::clone(&source.env_vars),
        secure: source.secure,
        allow_internet: source.allow_internet,
        lifecycle: Lifecycle { lifetime, ..source.lifecycle },
        key: None,
    })
}

/// Whether the version `text` is `min` or later. What is no version is not.
fn is_at_least(text: &str, min: [u32; 3]) -> bool {
    let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
    let version = [parts.next(), parts.next(), parts.next()].map(Option::flatten);
    match version {
        [Some(major), Some(minor), Some(patch)] => [major, minor, patch] >= min,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        for (text, is) in
            [("0.5.0", true), ("0.10.1", true), ("1.0.0", true), ("0.4.99", false), ("x", false)]
        {
            assert_eq!(is_at_least(text, ENVD_MIN), is, "{text}");
        }
    }
}
