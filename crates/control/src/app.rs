//! What every request and every background task works with.

use std::sync::Arc;

use belljar_daemon::Scope;
use belljar_domain::Secret;

use crate::access::Access;
use crate::config::Config;
use crate::idempotency;
use crate::live::{Live, Sandbox};
use crate::metrics::Metrics;
use crate::node::report::Reports;
use crate::nodes::{Member, Nodes};
use crate::oidc::Verifier;
use crate::rates::Limits;
use crate::route::{Route, RouteSink};
use crate::snapshots::Snapshots;
use crate::store::Store;
use crate::templates::Templates;
use crate::token::TokenSeed;
use crate::unsettled::Unsettled;
use crate::usage::Usage;
use crate::writer::Writer;

/// The running control plane.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) store: Store,
    pub(crate) live: Arc<Live>,
    pub(crate) nodes: Nodes,
    /// What each of them said last.
    pub(crate) reports: Reports,
    /// Which creates were asked for before.
    pub(crate) repeats: Arc<idempotency::Keys>,
    /// Creates nobody knows the outcome of.
    pub(crate) unsettled: Unsettled,
    pub(crate) templates: Templates,
    /// Where snapshots are.
    pub(crate) snapshots: Snapshots,
    pub(crate) writer: Writer,
    /// Where state changes run, so that a caller who leaves cannot stop one half way.
    pub(crate) scope: Scope,
    pub(crate) routes: Arc<dyn RouteSink>,
    pub(crate) tokens: TokenSeed,
    pub(crate) access: Arc<Access>,
    pub(crate) oidc: Verifier,
    pub(crate) limits: Limits,
    pub(crate) usage: Usage,
    pub(crate) metrics: Metrics,
}

impl App {
    /// The token the guest daemon of `sandbox` asks for, if it asks.
    pub(crate) fn token_of(&self, sandbox: &Sandbox) -> Option<Secret<String>> {
        sandbox.secure.then(|| self.tokens.envd_access_token(&sandbox.id))
    }

    /// The node `sandbox` runs on.
    pub(crate) fn node_of(&self, sandbox: &Sandbox) -> &Member {
        self.nodes.get(sandbox.node)
    }

    /// Makes `sandbox` reachable.
    pub(crate) fn publish(&self, sandbox: &Sandbox) {
        let route = Route {
            execution_id: sandbox.execution.clone(),
            ip: sandbox.ip,
            envd_access_token: self.token_of(sandbox),
        };
        self.routes.publish(&sandbox.id, route);
    }
}
