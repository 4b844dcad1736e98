//! Killing and extending sandboxes: the changes behind the REST API. Creating one is in
//! [`crate::creation`], pausing in [`crate::pause`] and resuming in [`crate::resume`].
//!
//! Each runs on a shielded task: a caller who leaves cannot stop one half way.
//!
//! Changes of one sandbox's end take turns, so that the table, its node and the store see them in
//! one order. A kill waits for nobody's turn: it hides the sandbox at once, and whoever's turn comes
//! after it finds nothing. A kill of a sandbox that is still starting waits for that start.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{OnError, Scope, clock};
use belljar_domain::{ExecutionId, Kind, SandboxId, UnixMillis};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;
use tracing::info;

use crate::app::App;
use crate::live::{Ended, Ending, Sandbox};
use crate::node::NodeCallError;
use crate::pause;
use crate::team::Team;
use crate::writer::Change;

/// How long a kill waits for a start: longer than any start may take.
const START_WAIT: Duration = Duration::from_secs(70);
/// How long a change waits for those before it.
const TURN_WAIT: Duration = Duration::from_secs(15);
/// Changes of one sandbox that wait or are under way; more are told to come back.
const TURNS_MAX: usize = 64;

/// Why a sandbox was not killed, or its end not moved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    #[error("find the sandbox")]
    NotFound,
    #[error("change the sandbox: other changes of it take too long")]
    Busy,
    #[error("end the sandbox: it is still starting, or being paused or resumed")]
    StillChanging,
    #[error("end the sandbox: the node that keeps its snapshot is away")]
    NodeAway,
    #[error("change the sandbox")]
    Node(#[from] NodeCallError),
    #[error("change the sandbox: its task broke")]
    TaskBroke,
}

impl EndError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            EndError::NotFound => Kind::NotFound,
            EndError::Busy | EndError::StillChanging | EndError::NodeAway => Kind::Unavailable,
            EndError::Node(e) => e.kind(),
            EndError::TaskBroke => Kind::Internal,
        }
    }
}

/// How to move an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewEnd {
    /// To this long from now; may shorten.
    In(Duration),
    /// To this long from now unless it is later already.
    NotBefore(Duration),
}

/// Runs `work` to its end even if the caller goes away. `None` when it panicked.
pub(crate) async fn shielded<T, F>(scope: &Scope, name: &'static str, work: F) -> Option<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (answer, wait) = oneshot::channel();
    scope.spawn_shielded(name, OnError::Log, async move {
        // The caller may be gone; what was done stays done.
        let _gone = answer.send(work.await);
        Ok::<(), Infallible>(())
    });
    wait.await.ok()
}

/// Kills a sandbox and waits until nothing of it is left. Of several callers one succeeds.
pub(crate) async fn kill(app: &Arc<App>, team: &Arc<Team>, id: &SandboxId) -> Result<(), EndError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move { kill_here(&this, &team, &id).await };
    shielded(&app.scope, "kill sandbox", work).await.unwrap_or(Err(EndError::TaskBroke))
}

async fn kill_here(app: &App, team: &Team, id: &SandboxId) -> Result<(), EndError> {
    let deadline = Instant::now() + START_WAIT;
    let sandbox = loop {
        match app.live.begin_end(id, &team.id, clock::now()) {
            Ending::Mine(sandbox) => break sandbox,
            Ending::Nothing => return Err(EndError::NotFound),
            // It closes when that is over, however it went.
            Ending::Busy(over) => {
                pause::wait_until(over, deadline).await.ok_or(EndError::StillChanging)?;
            }
        }
    };
    if sandbox.asleep_since.is_some() {
        return pause::kill(app, &sandbox).await;
    }
    let node = app.node_of(&sandbox);
    reach(Point::KillBegun);
    match node.rpc.kill(id).await {
        Ok(()) => {
            reach(Point::KillNodeAnswered);
            forget(app, id, &sandbox.execution, "killed");
            reach(Point::KillBeforeAnswer);
            Ok(())
        }
        Err(e) if e.kind() == Kind::NotFound => {
            missing(app, &sandbox);
            Err(EndError::NotFound)
        }
        Err(e) => {
            app.live.abort_end(id, &sandbox.execution);
            node.reconcile_soon.notify_one();
            Err(e.into())
        }
    }
}

/// Moves the end of a sandbox, and says what it then is.
pub(crate) async fn move_end(
    app: &Arc<App>,
    team: &Arc<Team>,
    id: &SandboxId,
    new_end: NewEnd,
) -> Result<Arc<Sandbox>, EndError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move { move_end_here(&this, &team, &id, new_end).await };
    shielded(&app.scope, "move sandbox end", work).await.unwrap_or(Err(EndError::TaskBroke))
}

async fn move_end_here(
    app: &App,
    team: &Team,
    id: &SandboxId,
    new_end: NewEnd,
) -> Result<Arc<Sandbox>, EndError> {
    let turn = app.live.turn(id, &team.id, clock::now()).ok_or(EndError::NotFound)?;
    let _mine = take_turn(turn).await?;
    // What it was before the wait does not count.
    let now = clock::now();
    let sandbox = app.live.find_running(id, &team.id, now).ok_or(EndError::NotFound)?;
    let end_at = match new_end {
        NewEnd::In(lifetime) => now.plus(lifetime),
        NewEnd::NotBefore(lifetime) if now.plus(lifetime) <= sandbox.end_at => {
            return Ok(sandbox);
        }
        NewEnd::NotBefore(lifetime) => now.plus(lifetime),
    };
    let node = app.node_of(&sandbox);
    reach(Point::EndMoveBegun);
    match node.rpc.set_end(id, end_at).await {
        Ok(()) => {
            reach(Point::EndMoveNodeAnswered);
            let execution = sandbox.execution.clone();
            let moved = app.live.move_end(id, &execution, end_at).ok_or(EndError::NotFound)?;
            reach(Point::EndMoveInTable);
            app.writer.push(Change::EndMoved { execution, end_at });
            reach(Point::EndMoveBeforeAnswer);
            Ok(moved)
        }
        Err(e) if e.kind() == Kind::NotFound => {
            if app.live.hide_missing(id, &sandbox.execution) {
                missing(app, &sandbox);
            }
            Err(EndError::NotFound)
        }
        Err(e) => {
            // The node may have done it all the same.
            node.reconcile_soon.notify_one();
            Err(e.into())
        }
    }
}

pub(crate) async fn take_turn(turn: Arc<Semaphore>) -> Result<OwnedSemaphorePermit, EndError> {
    // The table holds one reference, and so does everybody in the queue.
    if Arc::strong_count(&turn) > TURNS_MAX {
        return Err(EndError::Busy);
    }
    let waited = tokio::time::timeout(TURN_WAIT, turn.acquire_owned()).await;
    Ok(waited.map_err(|_| EndError::Busy)?.expect("it is never closed"))
}

/// The node does not have a sandbox that is hidden here. Why it ended, the node has said or will
/// say on its watch stream; a reconcile makes sure that it does not stay.
pub(crate) fn missing(app: &App, sandbox: &Sandbox) {
    app.routes.withdraw(&sandbox.id);
    app.node_of(sandbox).reconcile_soon.notify_one();
}

/// Drops a run that has ended from the table, the routes and, later, the store's running ones; one
/// that was lost with its node becomes what it was resumed from, if it was.
/// Nothing happens when somebody did it before.
pub(crate) fn forget(app: &App, id: &SandboxId, execution: &ExecutionId, reason: &'static str) {
    let at = clock::now();
    if let Some(change) = end(app, id, execution, at, reason) {
        app.writer.push(change);
    }
}

/// As [`forget`], and answers what there is to write.
pub(crate) fn end(
    app: &App,
    id: &SandboxId,
    execution: &ExecutionId,
    at: UnixMillis,
    reason: &'static str,
) -> Option<Change> {
    let may_lapse = matches!(reason, "lost" | "shutdown");
    let (sandbox, change) = match app.live.ended(id, execution, may_lapse) {
        Ended::NotHere => return None,
        Ended::Paused(sandbox) => {
            info!(sandbox = %id, reason, "a run is lost; its sandbox is paused as it was before");
            (sandbox, Change::Lapsed { execution: execution.clone(), at, reason })
        }
        Ended::Gone(sandbox) => {
            if let Some(saved) = &sandbox.saved {
                app.snapshots.give_up(&saved.snapshot);
            }
            (sandbox, Change::Ended { execution: execution.clone(), at, reason })
        }
    };
    app.routes.withdraw(id);
    app.node_of(&sandbox).release(sandbox.need());
    Some(change)
}
