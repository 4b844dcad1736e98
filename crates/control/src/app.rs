//! What every request and every background task works with.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use belljar_daemon::Scope;
use belljar_domain::Secret;

use crate::config::Config;
use crate::idempotency;
use crate::keys::{ApiKey, KeyHash};
use crate::live::{Live, Sandbox};
use crate::nodes::{Member, Nodes};
use crate::oidc::Verifier;
use crate::rates::Limits;
use crate::route::{Route, RouteSink};
use crate::store::{Store, StoreError};
use crate::team::Team;
use crate::templates::Templates;
use crate::token::TokenSeed;
use crate::unsettled::Unsettled;
use crate::writer::Writer;

/// How long a key that was found is believed without asking the store again.
const KEY_MEMORY: Duration = Duration::from_secs(10);

/// The running control plane.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) store: Store,
    pub(crate) live: Arc<Live>,
    pub(crate) nodes: Nodes,
    /// Which creates were asked for before.
    pub(crate) repeats: Arc<idempotency::Keys>,
    /// Creates nobody knows the outcome of.
    pub(crate) unsettled: Unsettled,
    pub(crate) templates: Templates,
    pub(crate) writer: Writer,
    /// Where state changes run, so that a caller who leaves cannot stop one half way.
    pub(crate) scope: Scope,
    pub(crate) routes: Arc<dyn RouteSink>,
    pub(crate) tokens: TokenSeed,
    pub(crate) keys: KeyMemory,
    #[expect(dead_code, reason = "asked once users and memberships exist")]
    pub(crate) oidc: Verifier,
    pub(crate) limits: Limits,
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

    /// The team `key` acts for.
    pub(crate) async fn team_of(&self, key: &ApiKey) -> Result<Option<Arc<Team>>, StoreError> {
        let hash = key.hash();
        if let Some(team) = self.keys.recall(&hash) {
            return Ok(Some(team));
        }
        let found = self.store.team_of_key(&hash).await?.map(Arc::new);
        if let Some(team) = &found {
            self.keys.remember(hash, Arc::clone(team));
        }
        Ok(found)
    }
}

/// Keys found lately. Only keys that exist are kept, so callers cannot fill it.
#[derive(Debug, Default)]
pub(crate) struct KeyMemory {
    found: Mutex<HashMap<KeyHash, (Arc<Team>, Instant)>>,
}

impl KeyMemory {
    fn recall(&self, hash: &KeyHash) -> Option<Arc<Team>> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let (team, since) = found.get(hash)?;
        (since.elapsed() < KEY_MEMORY).then(|| Arc::clone(team))
    }

    fn remember(&self, hash: KeyHash, team: Arc<Team>) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.insert(hash, (team, Instant::now()));
    }
}
