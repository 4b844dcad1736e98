//! Following the nodes: ends as they happen, and the whole picture whenever one may be missed. Each
//! node is followed by a task of its own, and none waits for another.
//!
//! A reconcile of a node takes no input, may run at any time and any number of times, and makes the
//! live table, the routes and the store agree with what the node holds:
//!
//! - here, not on the node: hidden, until the node says why it ended. When the node does not say,
//!   the reason is `lost` (or `expired` when its time was up); one that had been resumed is then paused
//!   again;
//! - on the node, not here: adopted, on the terms the node was given with it, or else those the store
//!   has; killed when there are none, when its team is gone, or when nobody can know its id;
//! - ended with an earlier run of the node: written to the store, then forgotten on the node;
//! - starting on the node for an earlier life of this process: its idempotency key is in doubt
//!   until the sandbox runs or is gone;
//! - its snapshots: see [`kept`];
//! - the store differs from the table: written again.
//!
//! A sandbox of a node that is away stays in the table until the node says otherwise. The store
//! does not know where a sandbox ran, so a row that no node holds is ended once every node has
//! answered since this process started.

mod kept;

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::{ExecutionId, Kind, SandboxId, UnixMillis};
use futures::{Stream, StreamExt as _};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use crate::app::App;
use crate::lifecycle::{end, forget};
use crate::live::{Marks, NOTICE_WAIT, Observed, Sandbox};
use crate::node::{Ended, Holds, NodeCallError, Watch};
use crate::nodes::{Contact, Member, NodeIx};
use crate::pause::heard;
use crate::store::{RunRow, StoreError};
use crate::team::TeamId;
use crate::terms::{self, Written};
use crate::unsettled::Claim;
use crate::writer::{Change, Noted};

const FIRST_RETRY: Duration = Duration::from_millis(50);
const MAX_RETRY: Duration = Duration::from_secs(5);
/// How long after a failed reconcile the next one runs: the store is back within this. Also how long
/// after one that found sandboxes missing, whose notice has come by then or never will.
const RETRY: Duration = NOTICE_WAIT;
/// How long the store gets to take what is queued before it is believed.
const SETTLE: Duration = Duration::from_secs(2);
/// How often a node is asked how busy it is.
const LOAD_INTERVAL: Duration = Duration::from_secs(5);
/// Strangers killed at the same time.
const KILLS_AT_ONCE: usize = 8;

/// A reconcile did not go through; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error("follow the node")]
    Node(#[from] NodeCallError),
    #[error("follow the node with the store")]
    Store(#[from] StoreError),
    #[error("the store has not taken what was known before")]
    Behind,
}

/// Whether a reconcile left nothing to look at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settled {
    /// It did.
    Yes,
    /// Sandboxes are missing on the node, and it may still say why; or an earlier life of this
    /// process began some there, and somebody may ask for them by a key.
    NotYet,
}

pub(crate) use kept::load;

/// Connects to a node and brings everything up to date; tries again until `deadline`.
pub(crate) async fn attach(
    app: &App,
    node: &Member,
    deadline: Option<Instant>,
) -> Result<Watch, ReconcileError> {
    let mut wait = FIRST_RETRY;
    loop {
        let error = match attach_once(app, node).await {
            Ok(watch) => return Ok(watch),
            Err(e) => e,
        };
        if deadline.is_some_and(|deadline| Instant::now() + wait > deadline) {
            return Err(error);
        }
        debug!(node = %node.socket.display(), error = %error, "the node does not answer yet");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(MAX_RETRY);
    }
}

async fn attach_once(app: &App, node: &Member) -> Result<Watch, ReconcileError> {
    // Watching comes first, so that no end falls between the picture and the stream.
    let watch = node.rpc.watch().await?;
    record_reclaimed(app, node).await?;
    reconcile(app, node).await?;
    node.is_back();
    Ok(watch)
}

/// Follows a node, from an open watch on if there is one, until dropped.
pub(crate) async fn follow(
    app: Arc<App>,
    ix: NodeIx,
    attached: Option<Watch>,
) -> Result<(), Infallible> {
    let node = app.nodes.get(ix);
    let mut attached = attached;
    loop {
        let watch = match attached.take() {
            Some(watch) => watch,
            None => {
                let Ok(watch) = attach(&app, node, None).await else { continue };
                info!(node = %node.socket.display(), "the node is back");
                watch
            }
        };
        let lost = follow_stream(&app, node, watch).await;
        node.is_lost();
        warn!(
            node = %node.socket.display(),
            error = %lost,
            reason = lost.message(),
            "lost the node; connecting again"
        );
    }
}

/// Applies ends until the stream breaks; reconciles, and asks how busy the node is, now and then.
async fn follow_stream(app: &App, node: &Member, watch: Watch) -> NodeCallError {
    let mut ends = Box::pin(ends(watch));
    let (mut due, mut load_due) = (every(app.config.reconcile_interval), every(LOAD_INTERVAL));
    let (mut losses, mut retry) = (app.writer.losses(), every(RETRY));
    // The reconcile before this watch was followed may have found some missing.
    let mut again = true;
    loop {
        tokio::select! {
            end = ends.next() => {
                match end.expect("the stream goes on for as long as it is asked") {
                    Ok(ended) => {
                        debug!(sandbox = %ended.id, reason = ended.reason, "sandbox ended");
                        match (ended.reason, &ended.kept) {
                            ("paused", Some(kept)) => heard(app, node.ix, kept),
                            // What it has left is listed.
                            ("paused", None) => node.reconcile_soon.notify_one(),
                            _ => forget(app, &ended.id, &ended.execution, ended.reason),
                        }
                        continue;
                    }
                    Err(lost) => return lost,
                }
            }
            _ = load_due.tick() => {
                match node.rpc.describe().await {
                    Ok(description) => node.describe(description),
                    Err(e) => debug!(error = %e, "the node did not say how busy it is"),
                }
                continue;
            }
            _ = retry.tick(), if again => {}
            // The sender lives as long as the application does.
            _ = losses.changed() => {
                // Not at once: what the store could not take now, it cannot take now.
                again = true;
                retry.reset();
                continue;
            }
            _ = due.tick() => {}
            () = node.reconcile_soon.notified() => {}
        }
        let outcome = reconcile(app, node).await;
        if let Err(e) = &outcome {
            debug!(error = %e, "reconcile failed; it runs again");
        }
        again = !matches!(outcome, Ok(Settled::Yes));
        retry.reset();
    }
}

/// Ticks that begin one `period` from now.
fn every(period: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    ticks
}

/// A watch as a stream, because waiting for its next item may be given up without losing one.
fn ends(watch: Watch) -> impl Stream<Item = Result<Ended, NodeCallError>> {
    futures::stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) })
}

/// Makes this process and its store agree with a node. See the module's own words.
async fn reconcile(app: &App, node: &Member) -> Result<Settled, ReconcileError> {
    // The order matters: what is known must be older than the node's answer (see `Live::observe`).
    let before = app.live.marks(node.ix);
    let (astray, mark) = (app.unsettled.on(node.ix), app.snapshots.mark());
    let rows = app.store.running().await?;
    // Sandboxes before snapshots: one that is paused in between is in both, and not in neither.
    let Holds { running: seen, starting } = node.rpc.list().await?;
    let snapshots = node.rpc.snapshots().await?;
    app.templates.replace(node.ix, node.rpc.templates().await?);
    node.describe(node.rpc.describe().await?);

    let on_node: HashSet<ExecutionId> = seen.iter().map(|o| o.execution.clone()).collect();
    let starts = starting.iter().map(|(id, _)| id.clone());
    let held: HashSet<SandboxId> = seen.iter().map(|o| o.id.clone()).chain(starts).collect();
    // First what was paused, so that it is not taken for gone.
    kept::follow(app, node, mark, &snapshots).await?;
    let difference = app.live.observe(node.ix, &before, seen, Instant::now());
    let now = clock::now();
    for sandbox in &difference.missing {
        debug!(sandbox = %sandbox.id, "a sandbox is missing on its node");
        app.routes.withdraw(&sandbox.id);
    }
    for sandbox in &difference.gone {
        info!(sandbox = %sandbox.id, "a sandbox is gone from its node");
        // Its node would have paused it at its end: then it is lost, and not expired.
        let is_over = sandbox.end_at <= now && !sandbox.pauses_at_end();
        let reason = if is_over { "expired" } else { "lost" };
        forget(app, &sandbox.id, &sandbox.execution, reason);
    }
    for sandbox in &difference.moved {
        let (execution, end_at) = (sandbox.execution.clone(), sandbox.end_at);
        app.writer.push(Change::EndMoved { execution, end_at });
    }
    let rows: HashMap<ExecutionId, RunRow> =
        rows.into_iter().map(|row| (row.execution.clone(), row)).collect();
    let awaited = await_starting(app, node, &before, starting);
    let nothing_open = difference.missing.is_empty() && !awaited;
    let settled = if nothing_open { Settled::Yes } else { Settled::NotYet };
    let strangers = adopt(app, node, difference.unknown, &rows).await?;
    for id in astray.iter().filter(|id| !held.contains(id)) {
        // It is not there: whoever asks again with its key gets another one.
        app.unsettled.forget(id);
    }
    write_what_is_missing(app, node, &before, &rows);
    if others_have_answered(app, node) {
        end_what_no_node_holds(app, &rows, &on_node, now);
    }
    kill_strangers(node, strangers).await;
    Ok(settled)
}

fn end_reason(end_at: UnixMillis, now: UnixMillis) -> &'static str {
    if end_at <= now { "expired" } else { "lost" }
}

/// Takes over sandboxes that somebody may still ask for; returns the others.
async fn adopt(
    app: &App,
    node: &Member,
    unknown: Vec<Observed>,
    rows: &HashMap<ExecutionId, RunRow>,
) -> Result<Vec<Observed>, ReconcileError> {
    let (mut strangers, mut teams) = (Vec::new(), Teams::default());
    for observed in unknown {
        let row = rows.get(&observed.execution).filter(|row| row.id == observed.id);
        let stored = || row.map(|row| Written { terms: row.terms.clone(), key: None });
        let written = terms::read(&observed.terms).or_else(stored);
        let written = match written {
            Some(written) if teams.exists(app, &written.terms.team).await? => written,
            _ => {
                strangers.push(observed);
                continue;
            }
        };
        let claim = app.unsettled.take(&observed.id);
        if matches!(claim, Some(Claim::Nobody)) || !app.live.takes(&observed.id) {
            strangers.push(observed);
            continue;
        }
        let sandbox = Sandbox::new(node.ix, observed, written.terms);
        app.publish(&sandbox);
        let Some(sandbox) = app.live.adopt(sandbox) else { continue };
        info!(sandbox = %sandbox.id, "adopted a sandbox");
        app.writer.push(Change::Started(Arc::clone(&sandbox)));
        match (claim, written.key) {
            (Some(Claim::Key(ticket)), _) => ticket.done(&sandbox),
            (_, Some(key)) => app.repeats.learn(key, &sandbox),
            _ => {}
        }
    }
    Ok(strangers)
}

/// Claims sandboxes that start on `node` and were begun by an earlier life of this process, for
/// whoever asks again with their key: otherwise that would begin another one. True when there are
/// some to look at again.
fn await_starting(
    app: &App,
    node: &Member,
    before: &Marks,
    starting: Vec<(SandboxId, String)>,
) -> bool {
    let mut awaited = false;
    for (id, terms) in starting {
        if before.contains_key(&id) || app.live.contains(&id) {
            continue;
        }
        let Some(Written { terms, key: Some(key) }) = terms::read(&terms) else { continue };
        awaited = true;
        // None when it is claimed already.
        if let Some(ticket) = app.repeats.learn_unknown(&terms.team, key) {
            app.unsettled.add(&id, node.ix);
            app.unsettled.claim(&id, ticket);
        }
    }
    awaited
}

/// Which teams there are, as far as was asked.
#[derive(Default)]
struct Teams {
    known: HashMap<TeamId, bool>,
}

impl Teams {
    async fn exists(&mut self, app: &App, team: &TeamId) -> Result<bool, StoreError> {
        if let Some(exists) = self.known.get(team) {
            return Ok(*exists);
        }
        let exists = app.store.team_exists(team).await?;
        self.known.insert(team.clone(), exists);
        Ok(exists)
    }
}

/// Writes the ends of sandboxes that ended with an earlier run of the node, and lets the node forget
/// them. The store has them for good before the node has not.
async fn record_reclaimed(app: &App, node: &Member) -> Result<(), ReconcileError> {
    let (mut teams, mut before) = (Teams::default(), Vec::new());
    loop {
        let (reclaimed, all) = node.rpc.reclaimed().await?;
        // What a node does not forget is recorded, and recording it again changes nothing.
        if all.is_empty() || all == before {
            return Ok(());
        }
        // These ends go past the queue: what was known of their runs before must not come after them.
        if !app.writer.settled(SETTLE).await {
            return Err(ReconcileError::Behind);
        }
        let mut changes = Vec::with_capacity(2 * reclaimed.len());
        for ended in reclaimed {
            let Some(Written { terms, .. }) = terms::read(&ended.was.terms) else { continue };
            if !teams.exists(app, &terms.team).await? {
                continue;
            }
            let execution = ended.was.execution.clone();
            // Most have a row already; this is for those that have none.
            let sandbox = Arc::new(Sandbox::new(node.ix, ended.was, terms));
            let (at, reason) = (ended.at, ended.reason);
            let end = end(app, &sandbox.id, &execution, at, reason);
            changes.push(Noted { at, change: Change::Started(sandbox) });
            let change = end.unwrap_or(Change::Ended { execution, at, reason });
            changes.push(Noted { at, change });
        }
        app.store.apply(&changes).await?;
        info!(sandboxes = all.len(), "recorded sandboxes that ended with their node");
        node.rpc.forget_reclaimed(all.clone()).await?;
        before = all;
    }
}

/// Writes again what the store does not have right of a node's sandboxes, whyever it was not
/// written.
fn write_what_is_missing(
    app: &App,
    node: &Member,
    before: &Marks,
    rows: &HashMap<ExecutionId, RunRow>,
) {
    for sandbox in app.live.all().iter().filter(|sandbox| sandbox.node == node.ix) {
        match rows.get(&sandbox.execution) {
            Some(row) if row.end_at != sandbox.end_at => {
                let (execution, end_at) = (sandbox.execution.clone(), sandbox.end_at);
                app.writer.push(Change::EndMoved { execution, end_at });
            }
            None if before.contains_key(&sandbox.id) => {
                app.writer.push(Change::Started(Arc::clone(sandbox)));
            }
            _ => {}
        }
    }
}

fn others_have_answered(app: &App, node: &Member) -> bool {
    let mut others = app.nodes.iter().filter(|other| other.ix != node.ix);
    others.all(|other| other.contact() != Contact::Never)
}

/// Ends rows that neither a node nor the table holds.
fn end_what_no_node_holds(
    app: &App,
    rows: &HashMap<ExecutionId, RunRow>,
    on_node: &HashSet<ExecutionId>,
    now: UnixMillis,
) {
    let live = app.live.all();
    let live: HashSet<&ExecutionId> = live.iter().map(|sandbox| &sandbox.execution).collect();
    for row in rows.values() {
        if !on_node.contains(&row.execution) && !live.contains(&row.execution) {
            let reason = match app.live.was_to_pause(&row.id) {
                // Its node would have paused it at its end.
                true => "lost",
                false => end_reason(row.end_at, now),
            };
            let execution = row.execution.clone();
            let change = end(app, &row.id, &execution, now, reason);
            app.writer.push(change.unwrap_or(Change::Ended { execution, at: now, reason }));
        }
    }
}

async fn kill_strangers(node: &Member, strangers: Vec<Observed>) {
    let kills = futures::stream::iter(strangers).for_each_concurrent(
        KILLS_AT_ONCE,
        |stranger| async move {
            match node.rpc.kill(&stranger.id).await {
                Ok(()) => info!(sandbox = %stranger.id, "killed a sandbox nobody knows"),
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) => warn!(
                    sandbox = %stranger.id,
                    error = %e,
                    reason = e.message(),
                    "a sandbox nobody knows was not killed; the next reconcile tries again"
                ),
            }
        },
    );
    kills.await;
}
