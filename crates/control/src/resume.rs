//! Making a sandbox run: one that runs is extended, one that is paused is started from its snapshot
//! under its own id, as another run.
//!
//! Of several callers at once one resumes it; the others wait and then find it running. A resume takes
//! a place under its team's limit, as a create does. It runs on a shielded task.

use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::{ExecutionId, SandboxId};
use belljar_wire::refusal::Refusal;
use tokio::time::Instant;
use tracing::debug;

use crate::app::App;
use crate::creation::{self, CreateError};
use crate::lifecycle::{self, EndError, NewEnd, shielded};
use crate::live::{OnEnd, Rousing, Sandbox, Saved, Slot};
use crate::node::{NodeCallError, Start};
use crate::nodes::{Contact, Member};
use crate::pause::wait_until;
use crate::team::Team;
use crate::templates::Template;
use crate::terms;
use crate::writer::Change;

/// How long a caller waits for changes of the sandbox that are under way. Source: contract 3.6.
const CHANGE_WAIT: Duration = Duration::from_secs(60);
/// How long a node may take to start it: a cold boot on a busy host takes many seconds.
const START_TIME: Duration = Duration::from_secs(60);
/// Nodes asked to start it, at most.
const NODES_TRIED: usize = 3;
/// How often a caller looks again when what it found changed under its hands.
const TRIES: usize = 16;

/// How a sandbox is to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rouse {
    /// From now on, at least.
    pub(crate) lifetime: Duration,
    /// Boot it from its disk.
    pub(crate) cold_boot: bool,
    /// What happens at its end; `None` leaves that as it is.
    pub(crate) on_end: Option<OnEnd>,
    /// What to do with one that runs.
    pub(crate) running: Running,
}

/// What to do with a sandbox that runs already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Running {
    /// Let it live as long as is asked for, at least.
    Extend,
    /// Nothing.
    Leave,
    /// Refuse.
    Refuse,
}

/// What was done.
#[derive(Debug)]
pub(crate) enum Roused {
    /// It ran.
    Ran(Arc<Sandbox>),
    /// It was paused.
    Resumed(Arc<Sandbox>),
}

/// Why a sandbox does not run, or not as it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResumeError {
    #[error("find the sandbox to resume")]
    NotFound,
    #[error("resume the sandbox: it runs")]
    Runs,
    #[error("resume the sandbox: other changes of it take too long")]
    Busy,
    #[error("resume the sandbox: its guest did not answer when it was paused")]
    NeedsColdBoot,
    #[error("resume the sandbox: the node that keeps its snapshot is away")]
    NodeAway,
    #[error("resume the sandbox: its run ended at once")]
    EndedEarly,
    #[error(transparent)]
    Place(CreateError),
    #[error(transparent)]
    Extend(#[from] EndError),
    #[error("resume the sandbox")]
    Node(#[from] NodeCallError),
    #[error("resume the sandbox: the node answered for another one")]
    Mixup,
    #[error("resume the sandbox: its task broke")]
    TaskBroke,
}

/// Makes the sandbox `id` run, and waits until its guest is ready.
pub(crate) async fn rouse(
    app: &Arc<App>,
    team: &Arc<Team>,
    id: &SandboxId,
    how: Rouse,
) -> Result<Roused, ResumeError> {
    let deadline = Instant::now() + CHANGE_WAIT;
    for _ in 0..TRIES {
        match app.live.rouse(id, &team.id, clock::now()) {
            Rousing::Nothing => return Err(ResumeError::NotFound),
            Rousing::Busy(over) => {
                wait_until(over, deadline).await.ok_or(ResumeError::Busy)?;
            }
            Rousing::Runs(sandbox) => match how.running {
                Running::Leave => return Ok(Roused::Ran(sandbox)),
                Running::Refuse => return Err(ResumeError::Runs),
                Running::Extend => {
                    let new_end = NewEnd::NotBefore(how.lifetime);
                    match lifecycle::move_end(app, team, id, new_end).await {
                        // It may have been paused meanwhile.
                        Err(EndError::NotFound) => {}
                        moved => return Ok(Roused::Ran(moved?)),
                    }
                }
            },
            Rousing::Paused(sandbox) => {
                let (this, team) = (Arc::clone(app), Arc::clone(team));
                let work = async move { resume(&this, &team, &sandbox, how).await };
                let done = shielded(&app.scope, "resume sandbox", work).await;
                if let Some(sandbox) = done.unwrap_or(Err(ResumeError::TaskBroke))? {
                    return Ok(Roused::Resumed(sandbox));
                }
            }
        }
    }
    Err(ResumeError::Busy)
}

/// Shows a sandbox as paused again unless it was resumed.
struct Undo<'a> {
    app: &'a App,
    id: Option<&'a SandboxId>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.app.live.abort_resume(id);
        }
    }
}

/// Starts `sandbox` from its snapshot. `None` when it is not what it was any more.
async fn resume(
    app: &App,
    team: &Team,
    sandbox: &Arc<Sandbox>,
    how: Rouse,
) -> Result<Option<Arc<Sandbox>>, ResumeError> {
    let Some(saved) = &sandbox.saved else { return Ok(None) };
    let cold_boot = how.cold_boot || saved.filesystem_only;
    if saved.guest_unresponsive && !cold_boot {
        return Err(ResumeError::NeedsColdBoot);
    }
    let home = app.snapshots.node_of(&saved.snapshot).map(|ix| app.nodes.get(ix));
    let home = home.filter(|node| node.contact() == Contact::InTouch);
    if home.is_none() && app.nodes.iter().all(|node| node.contact() != Contact::InTouch) {
        return Err(ResumeError::NodeAway);
    }
    let _busy = app.snapshots.busy(&saved.snapshot);
    let execution = ExecutionId::random();
    // One of several callers, before any takes a place.
    if !app.live.begin_resume(sandbox, &execution) {
        return Ok(None);
    }
    let undo = Undo { app, id: Some(&sandbox.id) };
    let slot = creation::reserve(app, team, &as_template(sandbox, saved)).await;
    let slot = slot.map_err(ResumeError::Place)?;
    let resumed = place(app, home, sandbox, &execution, Rouse { cold_boot, ..how }).await?;
    finish(app, slot, resumed, undo).map(Some)
}

/// Starts it where its snapshot is; when that node is away, or has no room, on another one that finds the
/// snapshot in its blob store. Only a node that has refused is passed over: of one whose answer is lost nobody
/// knows whether the sandbox runs there.
async fn place(
    app: &App,
    home: Option<&Member>,
    sandbox: &Sandbox,
    execution: &ExecutionId,
    how: Rouse,
) -> Result<Arc<Sandbox>, ResumeError> {
    let all: Vec<_> = app.nodes.iter().map(|node| node.ix).collect();
    let (mut refused, mut first) = (Vec::new(), None);
    while refused.len() < NODES_TRIED {
        let at_home = home.filter(|home| !refused.contains(&home.ix));
        let node = at_home.or_else(|| app.nodes.choose(&all, &refused, sandbox.need()));
        let Some(node) = node else { break };
        let error = match start(app, node, sandbox, execution, how).await {
            Ok(sandbox) => return Ok(sandbox),
            Err(error) => error,
        };
        debug!(sandbox = %sandbox.id, error = %error, "a sandbox was not resumed");
        // The node may have done it all the same, or may not have the snapshot any more.
        node.reconcile_soon.notify_one();
        let refusal = match &error {
            ResumeError::Node(e) => e.refusal(),
            _ => None,
        };
        let Some(refusal) = refusal else { return Err(error) };
        refused.push(node.ix);
        // A node that does not know the snapshot has nothing to say about it, unless it should.
        if refusal != Refusal::NoTemplate || at_home.is_some() {
            first.get_or_insert(error);
        }
    }
    Err(first.unwrap_or(ResumeError::NodeAway))
}

/// What `sandbox` takes, as if it were to be created.
fn as_template(sandbox: &Sandbox, saved: &Saved) -> Template {
    Template {
        id: sandbox.template.clone(),
        build: saved.snapshot.clone(),
        aliases: Vec::new(),
        vcpus: sandbox.vcpus,
        memory: sandbox.memory,
        disk: sandbox.disk,
        envd_version: sandbox.envd_version.clone(),
        created_at: saved.at,
        cold_boot: saved.filesystem_only,
    }
}

async fn start(
    app: &App,
    node: &Member,
    sandbox: &Sandbox,
    execution: &ExecutionId,
    how: Rouse,
) -> Result<Arc<Sandbox>, ResumeError> {
    let Some(saved) = &sandbox.saved else { return Err(ResumeError::NotFound) };
    let claim = node.claim(sandbox.need());
    let mut terms = sandbox.terms();
    terms.lifecycle.on_end = how.on_end.unwrap_or(terms.lifecycle.on_end);
    let token = app.token_of(sandbox);
    let start = Start {
        id: &sandbox.id,
        execution,
        template: &sandbox.template,
        build: &saved.snapshot,
        end_at: clock::now().plus(how.lifetime),
        envd_access_token: token.as_ref(),
        env_vars: sandbox.env_vars.expose(),
        allow_internet: sandbox.allow_internet,
        terms: terms::write(&terms, None),
        auto_pause: creation::auto_pause(terms.lifecycle),
        cold_boot: how.cold_boot,
    };
    let observed = node.rpc.create(start, START_TIME).await?;
    if observed.id != sandbox.id || observed.execution != *execution {
        return Err(ResumeError::Mixup);
    }
    claim.keep();
    // It has taken it over if it did not have it.
    app.snapshots.is_on(&saved.snapshot, node.ix);
    let saved = Some(Arc::clone(saved));
    Ok(Arc::new(Sandbox { saved, ..Sandbox::new(node.ix, observed, terms) }))
}

/// Makes a resumed sandbox visible.
fn finish(
    app: &App,
    slot: Slot,
    sandbox: Arc<Sandbox>,
    mut undo: Undo<'_>,
) -> Result<Arc<Sandbox>, ResumeError> {
    // The route first: once it is in the table, an end withdraws the route.
    app.publish(&sandbox);
    undo.id = None;
    if !app.live.resumed(slot, &sandbox) {
        app.routes.withdraw(&sandbox.id);
        let node = app.node_of(&sandbox);
        node.release(sandbox.need());
        node.reconcile_soon.notify_one();
        return Err(ResumeError::EndedEarly);
    }
    app.writer.push(Change::Started(Arc::clone(&sandbox)));
    Ok(sandbox)
}
