//! Creating a sandbox: a place under the team's limit, a node, and what to do when that node does
//! not start it.
//!
//! It runs on a shielded task: a caller who leaves cannot stop it half way, and the sandbox whose
//! creator left stays until its end time.
//!
//! Each attempt has ids of its own, so that one which went astray can never be taken for another.
//! What became of such a one, the next reconcile of its node finds out ([`crate::unsettled`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_daemon::fault::{Point, reach};
use belljar_domain::{BuildId, ExecutionId, Kind, SandboxId, TemplateId};
use tokio::time::Instant;
use tracing::debug;

use crate::app::App;
use crate::creation_rate::TooFast;
use crate::idempotency::{Begin, Key, KeyTaken, Ticket};
use crate::lifecycle::shielded;
use crate::limits::TooBig;
use crate::live::{AtLimit, EndedEarly, EnvVars, Lifecycle, Observed, OnEnd, Sandbox, Slot, Terms};
use crate::node::{AutoPause, NodeCallError, Start};
use crate::nodes::{Contact, Member, NodeIx};
use crate::store::{DEFAULT_TAG, SnapshotKey, SnapshotRecord, StoreError};
use crate::team::Team;
use crate::templates::{Placed, Reference, ResolveError, Template};
use crate::terms;
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
    pub(crate) env_vars: EnvVars,
    /// Whether its guest daemon asks for a token.
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
    pub(crate) lifecycle: Lifecycle,
    /// Under which the same create may be asked for again.
    pub(crate) key: Option<Key>,
}

/// Why no sandbox was created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Key(#[from] KeyTaken),
    #[error(transparent)]
    Template(#[from] ResolveError),
    #[error("look the team up again")]
    Store(#[from] StoreError),
    #[error("create the sandbox: its team is gone, or was blocked meanwhile")]
    TeamClosed,
    #[error(transparent)]
    AtLimit(#[from] AtLimit),
    #[error(transparent)]
    TooBig(#[from] TooBig),
    #[error(transparent)]
    TooFast(#[from] TooFast),
    #[error(transparent)]
    EndedEarly(#[from] EndedEarly),
    #[error("create the sandbox: no node that has its template takes sandboxes now")]
    NoNode,
    #[error("create the sandbox: no node that takes sandboxes can run its template")]
    NoCompatibleNode,
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
            CreateError::Key(KeyTaken::Mismatch) => Kind::Invalid,
            CreateError::Key(_) => Kind::Conflict,
            CreateError::Template(e) => e.kind(),
            CreateError::Store(e) => e.kind(),
            CreateError::TeamClosed => Kind::Forbidden,
            CreateError::AtLimit(_) | CreateError::TooFast(_) => Kind::Quota,
            CreateError::TooBig(e) => e.kind(),
            CreateError::EndedEarly(_) | CreateError::NoNode | CreateError::NoCompatibleNode => {
                Kind::Unavailable
            }
            CreateError::Node(e) => e.kind(),
            CreateError::Mixup | CreateError::TaskBroke => Kind::Internal,
        }
    }

    /// Whether another node may do what this one did not.
    fn is_the_nodes_own(&self) -> bool {
        match self {
            CreateError::Node(e) => {
                e.refusal().is_some() || !matches!(e.kind(), Kind::Invalid | Kind::Timeout)
            }
            CreateError::Mixup | CreateError::EndedEarly(_) => true,
            CreateError::Key(_)
            | CreateError::Template(_)
            | CreateError::Store(_)
            | CreateError::TeamClosed
            | CreateError::AtLimit(_)
            | CreateError::TooBig(_)
            | CreateError::TooFast(_)
            | CreateError::NoNode
            | CreateError::NoCompatibleNode
            | CreateError::TaskBroke => false,
        }
    }
}

/// No node did it.
struct NotPlaced {
    error: CreateError,
    /// The last attempt nobody knows the outcome of.
    astray: Option<SandboxId>,
}

/// Creates a sandbox for `team` and waits until its guest is ready; or answers the one that was
/// created under the same key.
pub(crate) async fn create(
    app: &Arc<App>,
    team: &Arc<Team>,
    spec: CreateSpec,
) -> Result<Arc<Sandbox>, CreateError> {
    let mut ticket = None;
    if let Some(key) = spec.key {
        let lives = |sandbox: &Sandbox| app.live.contains(&sandbox.id);
        match app.repeats.begin(&team.id, key, clock::now(), lives)? {
            Begin::Same(sandbox) => return Ok(sandbox),
            Begin::Fresh(fresh) => ticket = Some(fresh),
        }
    }
    let (this, team) = (Arc::clone(app), Arc::clone(team));
    let work = async move { create_here(&this, &team, &spec, ticket).await };
    shielded(&app.scope, "create sandbox", work).await.unwrap_or(Err(CreateError::TaskBroke))
}

/// A `ticket` that is dropped on the way makes its key vacant.
async fn create_here(
    app: &App,
    team: &Team,
    spec: &CreateSpec,
    ticket: Option<Ticket>,
) -> Result<Arc<Sandbox>, CreateError> {
    let placed = resolve(app, &spec.template, team).await?;
    let slot = reserve(app, team, &placed.template).await?;
    let (now, limits) = (Instant::now().into_std(), &team.limits);
    app.access.creation_rate.take(&team.id, limits.creates_per_second, now)?;
    start(app, team, spec, (placed, slot), ticket).await
}

/// Takes a place under the team's limits for a sandbox of `template`.
pub(crate) async fn reserve(
    app: &App,
    team: &Team,
    template: &Template,
) -> Result<Slot, CreateError> {
    let limits = &team.limits;
    limits.allow_size(template.vcpus, template.memory, template.disk)?;
    let slot = app.live.reserve(&team.id, limits.max_concurrent_sandboxes, clock::now())?;
    // The team was let in before the body came, which may be long ago. Whoever closes it looks for
    // reserved places after that.
    match app.access.team(&team.id).await? {
        Some(now) if now.blocked.is_none() || team.blocked.is_some() => Ok(slot),
        _ => Err(CreateError::TeamClosed),
    }
}

/// Starts a sandbox in a reserved place.
pub(crate) async fn start(
    app: &App,
    team: &Team,
    spec: &CreateSpec,
    (placed, mut slot): (Placed, Slot),
    ticket: Option<Ticket>,
) -> Result<Arc<Sandbox>, CreateError> {
    reach(Point::CreateReserved);
    let sandbox = match place(app, team, spec, &placed, &mut slot).await {
        Ok(sandbox) => sandbox,
        Err(NotPlaced { error, astray }) => {
            return Err(match (astray, ticket) {
                (Some(id), Some(ticket)) => {
                    app.unsettled.claim(&id, ticket);
                    KeyTaken::OutcomeUnknown.into()
                }
                _ => error,
            });
        }
    };
    // The route first: once it is in the table, an end withdraws the route.
    app.publish(&sandbox);
    if let Err(e) = slot.commit(Arc::clone(&sandbox)) {
        app.routes.withdraw(&sandbox.id);
        return Err(e.into());
    }
    reach(Point::CreateInTable);
    if let Some(ticket) = ticket {
        ticket.done(&sandbox);
    }
    app.writer.push(Change::Started(Arc::clone(&sandbox)));
    app.usage.started(&sandbox.team);
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
) -> Result<Arc<Sandbox>, NotPlaced> {
    let deadline = Instant::now() + CREATE_TIME;
    let terms = Terms {
        team: team.id.clone(),
        alias: placed.template.aliases.first().cloned(),
        metadata: spec.metadata.clone().into(),
        secure: spec.secure,
        allow_internet: spec.allow_internet,
        lifecycle: spec.lifecycle,
        env_vars: Arc::clone(&spec.env_vars),
    };
    let mut refused = Vec::new();
    let mut failed = NotPlaced { error: CreateError::NoNode, astray: None };
    for _ in 0..ATTEMPTS {
        let need = placed.template.need();
        let Some(node) = app.nodes.choose(&placed.nodes, &refused, need) else { break };
        let id = SandboxId::random();
        slot.attempt(&id, node.ix);
        let time = deadline.saturating_duration_since(Instant::now());
        let error = match attempt(app, spec, &placed.template, node, &id, &terms, time).await {
            Ok(sandbox) => return Ok(Arc::new(sandbox)),
            Err(error) => error,
        };
        if is_astray(&error) {
            app.unsettled.add(&id, node.ix);
            node.reconcile_soon.notify_one();
            failed.astray = Some(id);
        }
        let goes_on = error.is_the_nodes_own();
        debug!(error = %error, goes_on, "a node did not create a sandbox");
        failed.error = worse(failed.error, error);
        if !goes_on {
            break;
        }
        refused.push(node.ix);
    }
    Err(failed)
}

/// Whether a sandbox may be there although its creation failed.
fn is_astray(error: &CreateError) -> bool {
    match error {
        CreateError::Node(e) => !e.is_certain(),
        CreateError::Mixup => true,
        CreateError::Key(_)
        | CreateError::Template(_)
        | CreateError::Store(_)
        | CreateError::TeamClosed
        | CreateError::AtLimit(_)
        | CreateError::TooBig(_)
        | CreateError::TooFast(_)
        | CreateError::EndedEarly(_)
        | CreateError::NoNode
        | CreateError::NoCompatibleNode
        | CreateError::TaskBroke => false,
    }
}

/// Which of two failures the caller hears of: a lack of room, which passes, rather than a node that
/// can never run the template; otherwise the later one.
fn worse(before: CreateError, error: CreateError) -> CreateError {
    let refusal = match &error {
        CreateError::Node(e) => e.refusal(),
        _ => None,
    };
    match refusal {
        Some(refusal) if !refusal.may_pass() => match before {
            CreateError::NoNode => CreateError::NoCompatibleNode,
            before => before,
        },
        _ => error,
    }
}

/// Asks one node to start the sandbox `id` within `time`.
async fn attempt(
    app: &App,
    spec: &CreateSpec,
    template: &Template,
    node: &Member,
    id: &SandboxId,
    terms: &Terms,
    time: Duration,
) -> Result<Sandbox, CreateError> {
    let execution = ExecutionId::random();
    let claim = node.claim(template.need());
    let token = spec.secure.then(|| app.tokens.envd_access_token(id));
    let start = Start {
        id,
        execution: &execution,
        template: &template.id,
        build: &template.build,
        end_at: clock::now().plus(spec.lifetime),
        envd_access_token: token.as_ref(),
        env_vars: spec.env_vars.expose(),
        allow_internet: spec.allow_internet,
        terms: terms::write(terms, spec.key.as_ref()),
        auto_pause: auto_pause(spec.lifecycle),
        cold_boot: template.cold_boot,
    };
    let observed = match node.rpc.create(start, time).await {
        Ok(observed) => observed,
        Err(e) if e.kind() == Kind::NotFound && e.refusal().is_none() => {
            return Err(ResolveError::Unknown { name: spec.template.to_string() }.into());
        }
        Err(e) => return Err(e.into()),
    };
    reach(Point::CreateNodeAnswered);
    if observed.id != *id || observed.execution != execution {
        return Err(CreateError::Mixup);
    }
    claim.keep();
    // Our own ids, not equal ones: the tables of this process share them.
    let observed = Observed { id: id.clone(), execution, ..observed }.sharing(template);
    Ok(Sandbox::new(node.ix, observed, terms.clone()))
}

/// The pause a run is to end with, under an id of its own.
pub(crate) fn auto_pause(lifecycle: Lifecycle) -> Option<AutoPause> {
    match lifecycle.on_end {
        OnEnd::Kill => None,
        OnEnd::Pause { filesystem_only } => {
            Some(AutoPause { snapshot: BuildId::random(), filesystem_only })
        }
    }
}

/// Finds a template or a snapshot; asks the nodes again when it is not known here yet.
async fn resolve(app: &App, reference: &Reference, team: &Team) -> Result<Placed, CreateError> {
    match app.templates.resolve(reference, team) {
        Err(ResolveError::Unknown { .. }) => {}
        known => return Ok(known?),
    }
    if let Some(record) = find_snapshot(app, reference, team).await? {
        let template = Template::of_snapshot(&record);
        return Ok(Placed { template, nodes: nodes_for(app, &record.kept.id) });
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

/// Where a snapshot can be started: where it is, or, while that node is away and it was uploaded, on any other.
fn nodes_for(app: &App, id: &BuildId) -> Vec<NodeIx> {
    let home = app.snapshots.node_of(id);
    let is_away = |home: &NodeIx| app.nodes.get(*home).contact() != Contact::InTouch;
    if home.as_ref().is_none_or(is_away) && app.snapshots.was_uploaded(id) {
        return app.nodes.iter().map(|node| node.ix).collect();
    }
    home.into_iter().collect()
}

/// The snapshot of `team` that `reference` means, by its name or else its id.
pub(crate) async fn find_snapshot(
    app: &App,
    reference: &Reference,
    team: &Team,
) -> Result<Option<SnapshotRecord>, StoreError> {
    if reference.namespace().is_some_and(|namespace| namespace != team.slug) {
        return Ok(None);
    }
    let (name, tag) = (reference.name(), reference.tag().unwrap_or(DEFAULT_TAG));
    let named = app.store.snapshot(&team.id, SnapshotKey::Name { name, tag }).await?;
    if named.is_some() || name.parse::<TemplateId>().is_err() {
        return Ok(named);
    }
    let found = app.store.snapshot(&team.id, SnapshotKey::Template(name)).await?;
    // An id has the one tag it is given out with.
    let has_tag = reference.tag().is_none_or(|tag| tag == DEFAULT_TAG);
    Ok(found.filter(|_| has_tag))
}
