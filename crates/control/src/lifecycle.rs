//! Creating, killing and extending sandboxes: the state changes behind the REST API.
//!
//! Each runs on a shielded task: a caller who leaves cannot stop one half way. A sandbox whose
//! creator left stays until its end time.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{OnError, Scope, clock};
use belljar_domain::{ExecutionId, Kind, SandboxId};
use tokio::sync::oneshot;
use tracing::debug;

use crate::app::App;
use crate::live::{AtLimit, EndedEarly, Sandbox, Terms};
use crate::node::{NodeCallError, Start};
use crate::team::Team;
use crate::templates::{Reference, ResolveError, Template};
use crate::writer::Change;

/// What a caller wants started.
#[derive(Debug)]
pub(crate) struct CreateSpec {
    pub(crate) template: Reference,
    pub(crate) lifetime: Duration,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) env_vars: BTreeMap<String, String>,
    /// Whether its guest daemon asks for a token.
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
}

/// Why no sandbox was created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Template(#[from] ResolveError),
    #[error(transparent)]
    AtLimit(#[from] AtLimit),
    #[error(transparent)]
    EndedEarly(#[from] EndedEarly),
    #[error("create the sandbox")]
    Node(#[from] NodeCallError),
    #[error("create the sandbox: the node answered for another one")]
    Mixup,
    #[error("create the sandbox: its task broke")]
    TaskBroke,
}

impl CreateError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            CreateError::Template(e) => e.kind(),
            CreateError::AtLimit(_) => Kind::Quota,
            CreateError::EndedEarly(_) => Kind::Unavailable,
            CreateError::Node(e) => e.kind(),
            CreateError::Mixup | CreateError::TaskBroke => Kind::Internal,
        }
    }
}

/// Why a sandbox was not killed, or its end not moved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    #[error("find the sandbox")]
    NotFound,
    #[error("change the sandbox")]
    Node(#[from] NodeCallError),
    #[error("change the sandbox: its task broke")]
    TaskBroke,
}

impl EndError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            EndError::NotFound => Kind::NotFound,
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
async fn shielded<T, F>(scope: &Scope, name: &'static str, work: F) -> Option<T>
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

/// Creates a sandbox for `team` and waits until its guest is ready.
pub(crate) async fn create(
    app: &Arc<App>,
    team: &Arc<Team>,
    spec: CreateSpec,
) -> Result<Arc<Sandbox>, CreateError> {
    let (this, team) = (Arc::clone(app), Arc::clone(team));
    let work = async move { create_here(&this, &team, spec).await };
    shielded(&app.scope, "create sandbox", work).await.unwrap_or(Err(CreateError::TaskBroke))
}

async fn create_here(
    app: &Arc<App>,
    team: &Team,
    spec: CreateSpec,
) -> Result<Arc<Sandbox>, CreateError> {
    let template = resolve(app, &spec.template, team).await?;
    let id = SandboxId::random();
    let execution = ExecutionId::random();
    let limit = app.config.max_concurrent_sandboxes;
    let slot = app.live.reserve(&id, &team.id, limit, clock::now())?;
    let token = spec.secure.then(|| app.tokens.envd_access_token(&id));
    let start = Start {
        id: &id,
        execution: &execution,
        template: &template.id,
        build: &template.build,
        end_at: clock::now().plus(spec.lifetime),
        envd_access_token: token.as_ref(),
        env_vars: spec.env_vars,
        allow_internet: spec.allow_internet,
    };
    reach(Point::CreateReserved);
    let observed = match app.node.create(start).await {
        Ok(observed) => observed,
        Err(e) if e.kind() == Kind::NotFound => {
            return Err(ResolveError::Unknown { name: spec.template.to_string() }.into());
        }
        Err(e) => {
            // It may run all the same; the reconciler kills what nobody here knows.
            app.reconcile_soon.notify_one();
            return Err(e.into());
        }
    };
    if observed.id != id || observed.execution != execution {
        app.reconcile_soon.notify_one();
        return Err(CreateError::Mixup);
    }
    reach(Point::CreateNodeAnswered);
    let terms = Terms {
        team: team.id.clone(),
        alias: template.aliases.first().cloned(),
        metadata: spec.metadata,
        secure: spec.secure,
        allow_internet: spec.allow_internet,
    };
    let sandbox = Arc::new(Sandbox::new(observed, terms));
    // The route first: once it is in the table, an end withdraws the route.
    app.publish(&sandbox);
    if let Err(e) = slot.commit(Arc::clone(&sandbox)) {
        app.routes.withdraw(&sandbox.id);
        return Err(e.into());
    }
    reach(Point::CreateInTable);
    app.writer.push(Change::Started(Arc::clone(&sandbox)));
    reach(Point::CreateBeforeAnswer);
    Ok(sandbox)
}

/// Finds a template; asks the node again when it is not known here yet.
async fn resolve(app: &App, reference: &Reference, team: &Team) -> Result<Template, CreateError> {
    match app.templates.resolve(reference, team) {
        Err(ResolveError::Unknown { .. }) => {}
        known => return Ok(known?),
    }
    match app.node.templates().await {
        Ok(templates) => app.templates.replace(templates),
        // What the node cannot say now is answered from what it said last.
        Err(e) => debug!(error = %e, "templates were not refreshed"),
    }
    Ok(app.templates.resolve(reference, team)?)
}

/// Kills a sandbox and waits until nothing of it is left. Of several callers one succeeds.
pub(crate) async fn kill(app: &Arc<App>, team: &Arc<Team>, id: &SandboxId) -> Result<(), EndError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move {
        let sandbox = this.live.begin_end(&id, &team.id, clock::now()).ok_or(EndError::NotFound)?;
        reach(Point::KillBegun);
        match this.node.kill(&id).await {
            Ok(()) => {
                reach(Point::KillNodeAnswered);
                forget(&this, &id, &sandbox.execution, "killed");
                reach(Point::KillBeforeAnswer);
                Ok(())
            }
            Err(e) if e.kind() == Kind::NotFound => {
                forget(&this, &id, &sandbox.execution, "lost");
                Err(EndError::NotFound)
            }
            Err(e) => {
                this.live.abort_end(&id, &sandbox.execution);
                Err(e.into())
            }
        }
    };
    shielded(&app.scope, "kill sandbox", work).await.unwrap_or(Err(EndError::TaskBroke))
}

/// Moves the end of a sandbox, and says what it then is.
pub(crate) async fn move_end(
    app: &Arc<App>,
    team: &Arc<Team>,
    id: &SandboxId,
    new_end: NewEnd,
) -> Result<Arc<Sandbox>, EndError> {
    let (this, team, id) = (Arc::clone(app), Arc::clone(team), id.clone());
    let work = async move {
        let now = clock::now();
        let sandbox = this.live.find(&id, &team.id, now).ok_or(EndError::NotFound)?;
        let end_at = match new_end {
            NewEnd::In(lifetime) => now.plus(lifetime),
            NewEnd::NotBefore(lifetime) if now.plus(lifetime) <= sandbox.end_at => {
                return Ok(sandbox);
            }
            NewEnd::NotBefore(lifetime) => now.plus(lifetime),
        };
        reach(Point::EndMoveBegun);
        match this.node.set_end(&id, end_at).await {
            Ok(()) => {
                reach(Point::EndMoveNodeAnswered);
                let execution = sandbox.execution.clone();
                this.live.move_end(&id, &execution, end_at);
                reach(Point::EndMoveInTable);
                this.writer.push(Change::EndMoved { execution, end_at });
                reach(Point::EndMoveBeforeAnswer);
                Ok(Arc::new(Sandbox { end_at, ..(*sandbox).clone() }))
            }
            Err(e) if e.kind() == Kind::NotFound => {
                forget(&this, &id, &sandbox.execution, "lost");
                Err(EndError::NotFound)
            }
            Err(e) => Err(e.into()),
        }
    };
    shielded(&app.scope, "move sandbox end", work).await.unwrap_or(Err(EndError::TaskBroke))
}

/// Drops a run that has ended from the table, the routes and, later, the store's running ones.
/// Nothing happens when somebody did it before.
pub(crate) fn forget(app: &App, id: &SandboxId, execution: &ExecutionId, reason: &'static str) {
    if app.live.remove(id, execution).is_some() {
        app.routes.withdraw(id);
        let at = clock::now();
        app.writer.push(Change::Ended { execution: execution.clone(), at, reason });
    }
}
