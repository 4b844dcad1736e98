//! The snapshots of a node: which of them are somebody's.
//!
//! - a pause of a run that is in the table: that sandbox is paused;
//! - a pause nobody ever recorded, of a run that did not end otherwise: adopted by its terms;
//! - one the table or the store knows, or that a call is about: left alone;
//! - any other: removed.
//!
//! A paused sandbox whose snapshot is gone from its node is gone, unless it was uploaded: then any node can
//! start it. So several nodes may have one snapshot, and each is told by itself when nobody needs it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use belljar_domain::{BuildId, SandboxId};
use tracing::{info, warn};

use super::{ReconcileError, SETTLE, Teams};
use crate::app::App;
use crate::live::{Kept, Sandbox, Standing};
use crate::nodes::Member;
use crate::pause::{discard, heard, remove_from};
use crate::snapshots::Mark;
use crate::terms;
use crate::writer::Change;

/// What is to be done about a snapshot nobody knows.
enum Fate {
    /// It is somebody's now.
    Taken,
    /// It is decided elsewhere, or another time.
    Left,
    /// It is nobody's.
    Removed,
}

/// Follows everything `node` keeps, as asked for after `mark`.
pub(super) async fn follow(
    app: &App,
    node: &Member,
    mark: Mark,
    kept: &[Kept],
) -> Result<(), ReconcileError> {
    kept.iter().filter(|kept| kept.uploaded).for_each(|kept| app.snapshots.is_uploaded(&kept.id));
    let vanished = app.snapshots.observe(node.ix, mark, kept.iter().map(|kept| &kept.id));
    let known: HashMap<BuildId, SandboxId> = app.live.saved().into_iter().collect();
    for id in vanished.iter().filter_map(|id| known.get_key_value(id)) {
        if app.snapshots.was_uploaded(id.0) {
            info!(sandbox = %id.1, snapshot = %id.0, "a paused sandbox is in the blob store only");
            continue;
        }
        warn!(sandbox = %id.1, snapshot = %id.0, "a paused sandbox is gone from its node");
        discard(app, id.1, id.0, "lost");
    }
    let is_news = |kept: &&Kept| !known.contains_key(&kept.id) && !app.snapshots.is_busy(&kept.id);
    let news: Vec<_> = kept.iter().filter(is_news).collect();
    if !news.is_empty() {
        let _in_time = app.writer.settled(SETTLE).await;
    }
    let stored = app.store.snapshot_ids().await?;
    let mut teams = Teams::default();
    for kept in news.into_iter().filter(|kept| !stored.contains(kept.id.as_str())) {
        if let Fate::Removed = settle(app, node, kept, &mut teams).await? {
            let _call = app.snapshots.busy(&kept.id);
            // What stays is met by the next reconcile.
            let _is_gone = remove_from(app, node, &kept.id).await;
        }
    }
    write_what_is_missing(app, &stored);
    Ok(())
}

async fn settle(
    app: &App,
    node: &Member,
    kept: &Kept,
    teams: &mut Teams,
) -> Result<Fate, ReconcileError> {
    if app.snapshots.is_busy(&kept.id) {
        return Ok(Fate::Left);
    }
    if !kept.is_pause {
        return Ok(Fate::Removed);
    }
    match app.live.standing(&kept.sandbox) {
        Standing::Changing => return Ok(Fate::Left),
        Standing::Runs(execution) if execution == kept.execution => {
            heard(app, node.ix, kept);
            return Ok(Fate::Taken);
        }
        // A later run of the sandbox is what counts.
        Standing::Runs(_) => return Ok(Fate::Removed),
        Standing::Paused(at) if kept.created_at <= at => return Ok(Fate::Removed),
        Standing::Paused(_) => {}
        Standing::Unknown => {
            let end = app.store.end_of(&kept.execution).await?;
            let is_over = end.flatten().is_some_and(|reason| is_for_good(&reason));
            if is_over {
                return Ok(Fate::Removed);
            }
        }
    }
    let written = terms::read(&kept.terms);
    let written = match written {
        Some(written) if teams.exists(app, &written.terms.team).await? => written,
        _ => return Ok(Fate::Removed),
    };
    let sandbox = Arc::new(Sandbox::paused(node.ix, kept, written.terms));
    let before = app.live.adopt_paused(Arc::clone(&sandbox));
    let Ok(before) = before else { return Ok(Fate::Left) };
    info!(sandbox = %sandbox.id, "adopted a paused sandbox");
    // Most have a row of their run already; this is for those that have none.
    let run = Sandbox { saved: before.clone(), asleep_since: None, ..(*sandbox).clone() };
    app.writer.push(Change::Started(Arc::new(run)));
    app.writer.push(Change::Paused(sandbox));
    if let Some(before) = before {
        app.snapshots.give_up(&before.snapshot);
    }
    Ok(Fate::Taken)
}

/// Whether what is left of a run that ended so is nobody's: its sandbox was killed, or paused once more
/// or killed after that pause.
fn is_for_good(reason: &str) -> bool {
    matches!(reason, "killed" | "expired" | "crashed" | "paused")
}

/// Writes again what the store does not have of the paused, whyever it was not written.
fn write_what_is_missing(app: &App, stored: &HashSet<String>) {
    for sandbox in app.live.all_paused() {
        let is_missing = |id: &BuildId| !stored.contains(id.as_str());
        if sandbox.pause().is_some_and(|saved| is_missing(&saved.snapshot)) {
            app.writer.push(Change::Paused(sandbox));
        }
    }
}

/// Shows the paused sandboxes of the store, before any node is asked.
pub(crate) async fn load(app: &App) -> Result<(), crate::store::StoreError> {
    let first = crate::nodes::NodeIx(0);
    for row in app.store.paused().await? {
        let Some(written) = terms::read(&row.kept.terms) else {
            warn!(sandbox = %row.kept.sandbox, "a paused sandbox has no readable terms");
            continue;
        };
        let sandbox = Arc::new(Sandbox::paused(first, &row.kept, written.terms));
        if row.runs {
            app.live.remember_resumed(sandbox);
        } else {
            // Nothing else is in the table yet.
            let _new = app.live.adopt_paused(sandbox).is_ok();
        }
    }
    Ok(())
}
