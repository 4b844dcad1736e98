//! Following the node: ends as they happen, and the whole picture whenever one may be missed.
//!
//! A reconcile takes no input, may run at any time and any number of times, and makes the live
//! table, the routes and the store agree with what the node holds:
//!
//! - here, not on the node: it has ended, reason `lost` (or `expired` when its time was up);
//! - on the node, not here, known to the store as running: adopted, with its metadata;
//! - on the node, known to nobody: killed;
//! - the store differs from the table: written again.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::{ExecutionId, Kind, UnixMillis};
use futures::{Stream, StreamExt as _};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use crate::app::App;
use crate::lifecycle::forget;
use crate::live::{Marks, Observed, Sandbox};
use crate::node::{Ended, NodeCallError, Watch};
use crate::store::{RunRow, StoreError};
use crate::writer::Change;

const FIRST_RETRY: Duration = Duration::from_millis(50);
const MAX_RETRY: Duration = Duration::from_secs(5);
/// Strangers killed at the same time.
const KILLS_AT_ONCE: usize = 8;

/// A reconcile did not go through; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error("follow the node")]
    Node(#[from] NodeCallError),
    #[error("follow the node with the store")]
    Store(#[from] StoreError),
}

/// Connects to the node and brings everything up to date; tries again until `deadline`.
pub(crate) async fn attach(app: &App, deadline: Option<Instant>) -> Result<Watch, ReconcileError> {
    let mut wait = FIRST_RETRY;
    loop {
        let error = match attach_once(app).await {
            Ok(watch) => return Ok(watch),
            Err(e) => e,
        };
        if deadline.is_some_and(|deadline| Instant::now() + wait > deadline) {
            return Err(error);
        }
        debug!(error = %error, "the node does not answer yet");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(MAX_RETRY);
    }
}

async fn attach_once(app: &App) -> Result<Watch, ReconcileError> {
    // Watching comes first, so that no end falls between the picture and the stream.
    let watch = app.node.watch().await?;
    reconcile(app).await?;
    Ok(watch)
}

/// Follows the node from an open watch on, until dropped.
pub(crate) async fn follow(app: Arc<App>, mut watch: Watch) -> Result<(), Infallible> {
    loop {
        let lost = follow_stream(&app, watch).await;
        warn!(error = %lost, reason = lost.message(), "lost the node; connecting again");
        watch = loop {
            if let Ok(watch) = attach(&app, None).await {
                break watch;
            }
        };
        info!("the node is back");
    }
}

/// Applies ends until the stream breaks; reconciles now and then.
async fn follow_stream(app: &App, watch: Watch) -> NodeCallError {
    let mut ends = Box::pin(ends(watch));
    let mut due = tokio::time::interval(app.config.reconcile_interval);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    due.reset();
    loop {
        tokio::select! {
            end = ends.next() => {
                match end.expect("the stream goes on for as long as it is asked") {
                    Ok(ended) => {
                        debug!(sandbox = %ended.id, reason = ended.reason, "sandbox ended");
                        forget(app, &ended.id, &ended.execution, ended.reason);
                        continue;
                    }
                    Err(lost) => return lost,
                }
            }
            _ = due.tick() => {}
            () = app.reconcile_soon.notified() => {}
        }
        if let Err(e) = reconcile(app).await {
            debug!(error = %e, "reconcile failed; it runs again");
        }
    }
}

/// A watch as a stream, because waiting for its next item may be given up without losing one.
fn ends(watch: Watch) -> impl Stream<Item = Result<Ended, NodeCallError>> {
    futures::stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) })
}

/// Makes this process and its store agree with the node. See the module's own words.
async fn reconcile(app: &App) -> Result<(), ReconcileError> {
    // The order matters: what is known must be older than the node's answer (see `Live::observe`).
    let before = app.live.marks();
    let rows = app.store.running().await?;
    let seen = app.node.list().await?;
    app.templates.replace(app.node.templates().await?);

    let on_node: HashSet<ExecutionId> = seen.iter().map(|o| o.execution.clone()).collect();
    let difference = app.live.observe(&before, seen);
    let now = clock::now();
    for sandbox in &difference.gone {
        info!(sandbox = %sandbox.id, "a sandbox is gone from its node");
        app.routes.withdraw(&sandbox.id);
        let reason = end_reason(sandbox.end_at, now);
        let execution = sandbox.execution.clone();
        app.writer.push(Change::Ended { execution, at: now, reason });
    }
    for sandbox in &difference.moved {
        let (execution, end_at) = (sandbox.execution.clone(), sandbox.end_at);
        app.writer.push(Change::EndMoved { execution, end_at });
    }
    let rows: HashMap<ExecutionId, RunRow> =
        rows.into_iter().map(|row| (row.execution.clone(), row)).collect();
    let strangers = adopt(app, difference.unknown, &rows);
    write_what_is_missing(app, &before, &rows, &on_node, now);
    kill_strangers(app, strangers).await;
    Ok(())
}

fn end_reason(end_at: UnixMillis, now: UnixMillis) -> &'static str {
    if end_at <= now { "expired" } else { "lost" }
}

/// Takes over sandboxes the store knows as running; returns the others.
fn adopt(app: &App, unknown: Vec<Observed>, rows: &HashMap<ExecutionId, RunRow>) -> Vec<Observed> {
    let mut strangers = Vec::new();
    for observed in unknown {
        match rows.get(&observed.execution) {
            Some(row) if row.id == observed.id => {
                let sandbox = Arc::new(Sandbox::new(observed, row.terms.clone()));
                app.publish(&sandbox);
                app.live.adopt(sandbox);
            }
            _ => strangers.push(observed),
        }
    }
    strangers
}

/// Writes again what the store does not have right, whyever it was not written.
fn write_what_is_missing(
    app: &App,
    before: &Marks,
    rows: &HashMap<ExecutionId, RunRow>,
    on_node: &HashSet<ExecutionId>,
    now: UnixMillis,
) {
    let live = app.live.all();
    for sandbox in &live {
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
    let live: HashSet<&ExecutionId> = live.iter().map(|sandbox| &sandbox.execution).collect();
    for row in rows.values() {
        if !on_node.contains(&row.execution) && !live.contains(&row.execution) {
            let reason = end_reason(row.end_at, now);
            let execution = row.execution.clone();
            app.writer.push(Change::Ended { execution, at: now, reason });
        }
    }
}

async fn kill_strangers(app: &App, strangers: Vec<Observed>) {
    let kills = futures::stream::iter(strangers).for_each_concurrent(
        KILLS_AT_ONCE,
        |stranger| async move {
            match app.node.kill(&stranger.id).await {
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
