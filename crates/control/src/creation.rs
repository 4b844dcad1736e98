//! Creating a sandbox: a place under the team's limit, a node, and what to do when that node does
//! not start it.
//!
//! It runs on a shielded task: a caller who leaves cannot stop it half way, and the sandbox whose
//! creator left stays until its end time.
//!
//! Each attempt has ids of its own, so that one which went astray can never be taken for another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_daemon::fault::{Point, reach};
use belljar_domain::{ExecutionId, Kind, SandboxId};
use tokio::time::Instant;
use tracing::debug;

use crate::app::App;
use crate::lifecycle::shielded;
use crate::live::{AtLimit, EndedEarly, Sandbox, Slot, Terms};
use crate::node::{NodeCallError, Start};
use crate::nodes::{Contact, Member};
use crate::team::Team;
use crate::templates::{Placed, Reference, ResolveError, Template};
use crate::writer::Change;

/// Nodes asked for one sandbox.
const ATTEMPTS: usize = 3;
/// All attempts together. A cold start on a busy host takes seconds; the SDKs give up after 60.
const CREATE_TIME: Duration = Duration::from_secs(60);

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
    #[error("create the sandbox: no node that has its template takes sandboxes now")]
    NoNode,
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
            CreateError::EndedEarly(_) | CreateError::NoNode => Kind::Unavailable,
            CreateError::Node(e) => e.kind(),
            CreateError::Mixup | CreateError::TaskBroke => Kind::Internal,
        }
    }

    /// Whether another node may do what this one did not.
    fn is_the_nodes_own(&self) -> bool {
        match self {
            CreateError::Node(e) => {
                !matches!(e.kind(), Kind::Invalid | Kind::NotFound | Kind::Timeout)
            }
            CreateError::Mixup | CreateError::EndedEarly(_) => true,
            CreateError::Template(_)
            | CreateError::AtLimit(_)
            | CreateError::NoNode
            | CreateError::TaskBroke => false,
        }
    }
}

/// Creates a sandbox for `team` and waits until its guest is ready.
pub(crate) async fn create(
    app: &Arc<App>,
    team: &Arc<Team>,
    spec: CreateSpec,
) -> Result<Arc<Sandbox>, CreateError> {
    let (this, team) = (Arc::clone(app), Arc::clone(team));
    let work = async move { create_here(&this, &team, &spec).await };
    shielded(&app.scope, "create sandbox", work).await.unwrap_or(Err(CreateError::TaskBroke))
}

async fn create_here(
    app: &App,
    team: &Team,
    spec: &CreateSpec,
) -> Result<Arc<Sandbox>, CreateError> {
    let placed = resolve(app, &spec.template, team).await?;
    let limit = app.config.max_concurrent_sandboxes;
    let mut slot = app.live.reserve(&team.id, limit, clock::now())?;
    reach(Point::CreateReserved);
    let sandbox = place(app, team, spec, &placed, &mut slot).await?;
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

/// Asks one node after the other until one starts the sandbox.
async fn place(
    app: &App,
    team: &Team,
    spec: &CreateSpec,
    placed: &Placed,
    slot: &mut Slot,
) -> Result<Arc<Sandbox>, CreateError> {
    let deadline = Instant::now() + CREATE_TIME;
    let (mut refused, mut error) = (Vec::new(), CreateError::NoNode);
    for _ in 0..ATTEMPTS {
        let need = placed.template.need();
        let Some(node) = app.nodes.choose(&placed.nodes, &refused, need) else { break };
        let time = deadline.saturating_duration_since(Instant::now());
        match attempt(app, team, spec, &placed.template, node, slot, time).await {
            Ok(sandbox) => return Ok(Arc::new(sandbox)),
            Err(e) if e.is_the_nodes_own() => {
                debug!(error = %e, "a node did not create a sandbox; asking another");
                refused.push(node.ix);
                error = e;
            }
            Err(e) => return Err(e),
        }
    }
    Err(error)
}

/// Asks one node to start the sandbox within `time`.
async fn attempt(
    app: &App,
    team: &Team,
    spec: &CreateSpec,
    template: &Template,
    node: &Member,
    slot: &mut Slot,
    time: Duration,
) -> Result<Sandbox, CreateError> {
    let (id, execution) = (SandboxId::random(), ExecutionId::random());
    slot.attempt(&id, node.ix);
    let claim = node.claim(template.need());
    let token = spec.secure.then(|| app.tokens.envd_access_token(&id));
    let start = Start {
        id: &id,
        execution: &execution,
        template: &template.id,
        build: &template.build,
        end_at: clock::now().plus(spec.lifetime),
        envd_access_token: token.as_ref(),
        env_vars: &spec.env_vars,
        allow_internet: spec.allow_internet,
    };
    let observed = match node.rpc.create(start, time).await {
        Ok(observed) => {
            reach(Point::CreateNodeAnswered);
            observed
        }
        Err(e) if e.kind() == Kind::NotFound => {
            return Err(ResolveError::Unknown { name: spec.template.to_string() }.into());
        }
        Err(e) => {
            // It may run all the same; the reconciler kills what nobody here knows.
            node.reconcile_soon.notify_one();
            return Err(e.into());
        }
    };
    if observed.id != id || observed.execution != execution {
        node.reconcile_soon.notify_one();
        return Err(CreateError::Mixup);
    }
    claim.keep();
    let terms = Terms {
        team: team.id.clone(),
        alias: template.aliases.first().cloned(),
        metadata: spec.metadata.clone(),
        secure: spec.secure,
        allow_internet: spec.allow_internet,
    };
    Ok(Sandbox::new(node.ix, observed, terms))
}

/// Finds a template; asks the nodes again when it is not known here yet.
async fn resolve(app: &App, reference: &Reference, team: &Team) -> Result<Placed, CreateError> {
    match app.templates.resolve(reference, team) {
        Err(ResolveError::Unknown { .. }) => {}
        known => return Ok(known?),
    }
    let in_touch = app.nodes.iter().filter(|node| node.contact() == Contact::InTouch);
    let ask = in_touch.map(|node| async move {
        match node.rpc.templates().await {
            Ok(templates) => app.templates.replace(node.ix, templates),
            // What a node cannot say now is answered from what it said last.
            Err(e) => debug!(error = %e, "templates were not refreshed"),
        }
    });
    futures::future::join_all(ask).await;
    Ok(app.templates.resolve(reference, team)?)
}
