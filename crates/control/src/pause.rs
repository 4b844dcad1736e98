//! Pausing sandboxes, and what becomes of the snapshots that stand for them.
//!
//! A pause that its node has finished is heard of in three ways: from the call that asked for it, from
//! the node's watch stream (a pause at the sandbox's end), and from a reconcile. All of them end in
//! [`heard`], and the first one counts.
//!
//! A snapshot that nobody needs any more is given up ([`crate::snapshots`]), and removed from its
//! node once the store does not hold it either. What is not removed then, the next reconcile finds.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::{BuildId, Kind, SandboxId};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info};

use crate::app::App;
use crate::lifecycle::{EndError, missing, shielded, take_turn};
use crate::live::{Heard, Kept, Pausing, Sandbox};
use crate::node::{NodeCallError, PauseMode};
use crate::nodes::{Contact, Member, NodeIx};
use crate::team::Team;
use crate::writer::Change;

/// How long a pause waits for another change of its sandbox.
const CHANGE_WAIT: Duration = Duration::from_secs(50);
/// How long the store gets to take a change before what it made useless is looked at.
const SETTLE: Duration = Duration::from_secs(5);
/// How often the removal of a snapshot is tried before it is left to a reconcile.
const REMOVAL_TRIES: u32 = 30;
/// Between two of these.
const BETWEEN_REMOVALS: Duration = Duration::from_secs(1);

/// Why a sandbox was not paused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PauseError {
    #[error("find the sandbox to pause")]
    NotFound,
    #[error("pause the sandbox: it is paused")]
    Already,
    #[error("pause the sandbox: other changes of it take too long")]
    Busy,
    #[error("pause the sandbox: its guest does not answer")]
    GuestUnresponsive(#[source] NodeCallError),
    #[error("pause the sandbox: its node has no room for it")]
    NoRoom(#[source] NodeCallError),
    #[error("pause the sandbox")]
    Node(#[from] NodeCallError),
    #[error("pause the sandbox: the node answered for another one")]
    Mixup,
    #[error("pause the sandbox: its task broke")]
    TaskBroke,
}

impl From<EndError> for PauseError {
    /// Of waiting for one's turn.
    fn from(_: EndError) -> Self {
        PauseError::Busy
    }
}

/// Pauses a sandbox and waits until it is safe on its node's disk. It goes on whoever leaves.
pub(crate) async fn pause(
    app: &Arc<App>,
    team: &Arc<Team>,
    id: &SandboxId,
    mode: PauseMode,
) -> Result<(), PauseError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move { pause_here(&this, &team, &id, mode).await };
    shielded(&app.scope, "pause sandbox", work).await.unwrap_or(Err(PauseError::TaskBroke))
}

/// Shows a sandbox as running again unless it was paused.
struct Undo<'a> {
    app: &'a App,
    sandbox: &'a Arc<Sandbox>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // After a pause there is nothing of that run to show.
        self.app.live.abort_pause(self.sandbox);
    }
}

async fn pause_here(
    app: &App,
    team: &Team,
    id: &SandboxId,
    mode: PauseMode,
) -> Result<(), PauseError> {
    let deadline = Instant::now() + CHANGE_WAIT;
    let (sandbox, _turn) = loop {
        // Whatever moves its end, or copies it, comes first.
        let turn = match app.live.turn(id, &team.id, clock::now()) {
            Some(turn) => Some(take_turn(turn).await?),
            None => None,
        };
        match app.live.begin_pause(id, &team.id, clock::now()) {
            Pausing::Mine(sandbox) => break (sandbox, turn),
            Pausing::Already => return Err(PauseError::Already),
            Pausing::Nothing => return Err(PauseError::NotFound),
            Pausing::Busy(over) => {
                drop(turn);
                wait_until(over, deadline).await.ok_or(PauseError::Busy)?;
            }
        }
    };
    let undo = Undo { app, sandbox: &sandbox };
    let snapshot = BuildId::random();
    let _busy = app.snapshots.busy(&snapshot);
    let node = app.node_of(&sandbox);
    let outcome = node.rpc.pause(id, &snapshot, mode).await;
    match outcome {
        Ok(kept) if kept.id == snapshot && kept.execution == sandbox.execution => {
            heard(app, node.ix, &kept);
            Ok(())
        }
        Ok(_) => {
            node.reconcile_soon.notify_one();
            Err(PauseError::Mixup)
        }
        Err(e) => {
            drop(undo);
            Err(failed(app, &sandbox, e))
        }
    }
}

/// Why the node did not pause `sandbox`, which runs on unless the node does not have it.
fn failed(app: &App, sandbox: &Sandbox, error: NodeCallError) -> PauseError {
    match error.kind() {
        Kind::NotFound => {
            if app.live.hide_missing(&sandbox.id, &sandbox.execution) {
                missing(app, sandbox);
            }
            PauseError::NotFound
        }
        Kind::Conflict if error.is_refused_by_state() => PauseError::GuestUnresponsive(error),
        Kind::Quota => PauseError::NoRoom(error),
        _ => {
            // The node may have done it all the same.
            app.node_of(sandbox).reconcile_soon.notify_one();
            PauseError::Node(error)
        }
    }
}

/// Waits for a channel to close; `None` when that takes too long. Cancel-safe.
pub(crate) async fn wait_until(mut over: watch::Receiver<()>, deadline: Instant) -> Option<()> {
    // It carries nothing.
    tokio::time::timeout_at(deadline, over.changed()).await.ok().map(|_closed| ())
}

/// `node` has paused a sandbox as `kept`.
pub(crate) fn heard(app: &App, node: NodeIx, kept: &Kept) {
    app.snapshots.is_on(&kept.id, node);
    match app.live.paused(&kept.sandbox, &kept.execution, kept.saved()) {
        Heard::Paused { was, is } => {
            app.routes.withdraw(&is.id);
            app.nodes.get(node).release(is.need());
            app.writer.push(Change::Paused(is));
            if let Some(before) = &was.saved {
                app.snapshots.give_up(&before.snapshot);
            }
        }
        Heard::Unwanted(sandbox) => {
            let reason = "killed";
            if app.live.discarded(&sandbox.id, &kept.id).is_some() {
                app.routes.withdraw(&sandbox.id);
                app.nodes.get(node).release(sandbox.need());
                let (execution, at) = (sandbox.execution.clone(), clock::now());
                app.writer.push(Change::Ended { execution, at, reason });
            }
            app.snapshots.give_up(&kept.id);
        }
        Heard::NotHere => {}
    }
}

/// Kills a paused sandbox, which is hidden already, and waits until its snapshot is gone.
pub(crate) async fn kill(app: &App, sandbox: &Sandbox) -> Result<(), EndError> {
    let Some(saved) = &sandbox.saved else { return Err(EndError::NotFound) };
    let _busy = app.snapshots.busy(&saved.snapshot);
    let outcome = match app.snapshots.node_of(&saved.snapshot) {
        Some(node) => {
            let removed = remove_all(app.nodes.get(node), &sandbox.id, &saved.snapshot).await;
            if removed.is_ok() && app.snapshots.was_uploaded(&saved.snapshot) {
                remove_copies(app, &saved.snapshot, Some(node)).await;
            }
            removed
        }
        // It is in the blob store alone, and any node of that removes it from there.
        None if app.snapshots.was_uploaded(&saved.snapshot) => {
            remove_copies(app, &saved.snapshot, None).await;
            Ok(())
        }
        None => Err(EndError::NodeAway),
    };
    match outcome {
        Ok(()) => {
            app.snapshots.is_gone(&saved.snapshot);
            discard(app, &sandbox.id, &saved.snapshot, "killed");
            Ok(())
        }
        Err(e) => {
            app.live.abort_end(&sandbox.id, &sandbox.execution);
            Err(e)
        }
    }
}

/// Removes a paused sandbox from its node: its snapshot, and a run that a resume may have left whose
/// answer was lost.
async fn remove_all(node: &Member, id: &SandboxId, snapshot: &BuildId) -> Result<(), EndError> {
    let is_gone = |outcome: Result<(), NodeCallError>| match outcome {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        outcome => outcome,
    };
    is_gone(node.rpc.kill(id).await)?;
    // Somebody may have removed it by hand: it is gone as it should be.
    Ok(is_gone(node.rpc.delete_snapshot(snapshot).await)?)
}

/// Drops a paused sandbox whose `snapshot` is gone from the table and, later, the store.
pub(crate) fn discard(app: &App, id: &SandboxId, snapshot: &BuildId, reason: &'static str) {
    if let Some(sandbox) = app.live.discarded(id, snapshot) {
        app.writer.push(Change::Discarded { sandbox, at: clock::now(), reason });
    }
}

/// Removes what was given up, until dropped.
pub(crate) async fn remove_given_up(app: Arc<App>) -> Result<(), Infallible> {
    loop {
        let given_up = app.snapshots.next_given_up().await;
        // What replaces them, or ends their sandboxes, is recorded first.
        let _in_time = app.writer.settled(SETTLE).await;
        let held = app.store.snapshot_ids().await;
        if let Err(e) = &held {
            debug!(error = %e, "which snapshots are needed is not known now");
        }
        let mut is_done = true;
        for (call, tries) in given_up {
            let is_needed = held.as_ref().map_or(true, |held| held.contains(call.id().as_str()));
            let is_left = is_needed || !remove(&app, call.id()).await;
            if is_left && tries < REMOVAL_TRIES {
                app.snapshots.give_up_after(call.id(), tries + 1);
                is_done = false;
            }
        }
        if !is_done {
            tokio::time::sleep(BETWEEN_REMOVALS).await;
        }
    }
}

/// Removes a snapshot nobody needs from wherever it is. Answers whether no node keeps it any more, as
/// far as is known.
pub(crate) async fn remove(app: &App, id: &BuildId) -> bool {
    let Some(node) = app.snapshots.node_of(id) else { return true };
    let was_uploaded = app.snapshots.was_uploaded(id);
    let is_gone = remove_from(app, app.nodes.get(node), id).await;
    if is_gone && was_uploaded {
        remove_copies(app, id, Some(node)).await;
    }
    is_gone
}

/// Removes what other nodes than `home` have taken of an uploaded snapshot nobody needs, from all that answer now. A
/// reconcile finds what stays.
async fn remove_copies(app: &App, id: &BuildId, home: Option<NodeIx>) {
    let others = app.nodes.iter().filter(|node| Some(node.ix) != home);
    let others = others.filter(|node| node.contact() == Contact::InTouch);
    let removals = others.map(|node| remove_from(app, node, id));
    let _rest_is_met_later = futures::future::join_all(removals).await;
}

/// Removes a snapshot nobody needs from one node, as [`remove`].
pub(crate) async fn remove_from(app: &App, node: &Member, id: &BuildId) -> bool {
    match node.rpc.delete_snapshot(id).await {
        Ok(()) => info!(snapshot = %id, "removed a snapshot nobody needs"),
        Err(e) if e.kind() == Kind::NotFound => {}
        Err(e) => {
            debug!(snapshot = %id, error = %e, "a snapshot is still to be removed");
            return false;
        }
    }
    if app.snapshots.node_of(id) == Some(node.ix) {
        app.snapshots.is_gone(id);
    }
    true
}
