//! Where is a sandbox? The catalog of live ones, and what the proxy keeps for each.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use belljar_domain::{ExecutionId, SandboxId, Secret};
use tokio_util::sync::CancellationToken;

use crate::signature::SignedUrl;
use crate::upstream::Pool;

/// Finds live sandboxes. Asked once a request, so it must answer from memory.
pub trait Routes: Send + Sync + 'static {
    /// The route to a live sandbox.
    fn find(&self, id: &SandboxId) -> Option<Route>;

    /// The route to the live sandbox whose token made the signature of `url`.
    fn find_signed(&self, url: &SignedUrl) -> Option<Route>;
}

/// Where one run of a sandbox is, as its owner publishes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The run. A resumed sandbox is a new run: connections to the old one are dropped.
    pub execution_id: ExecutionId,
    /// Where the host reaches the guest, any port.
    pub ip: IpAddr,
    /// The token of the guest daemon, with which file URLs are signed; `None` for a sandbox
    /// without one.
    pub envd_access_token: Option<Secret<String>>,
}

/// A live route: the target and the connections open to it. Cheap to clone.
#[derive(Clone)]
pub struct Route {
    live: Arc<Live>,
}

struct Live {
    id: SandboxId,
    target: Target,
    /// Cancelled when the route ends; every connection of it watches this.
    ended: CancellationToken,
    /// Requests and tunnels in flight.
    in_flight: AtomicUsize,
    pool: Pool,
}

impl Route {
    /// A route with no connection yet.
    pub fn new(id: SandboxId, target: Target) -> Route {
        Route {
            live: Arc::new(Live {
                id,
                target,
                ended: CancellationToken::new(),
                in_flight: AtomicUsize::new(0),
                pool: Pool::default(),
            }),
        }
    }

    /// The sandbox.
    pub fn id(&self) -> &SandboxId {
        &self.live.id
    }

    /// Where it is.
    pub fn target(&self) -> &Target {
        &self.live.target
    }

    /// Ends the route: every connection to the sandbox, idle or busy, is closed.
    pub fn end(&self) {
        self.live.ended.cancel();
        self.live.pool.clear();
    }

    /// Resolves when the route has ended. Cancel-safe.
    pub(crate) async fn ended(&self) {
        self.live.ended.cancelled().await;
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.live.ended.is_cancelled()
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.live.pool
    }

    /// Counts one more request in; `None` when `limit` are in flight.
    pub(crate) fn enter(&self, limit: usize) -> Option<InFlight> {
        let enter = |n: usize| (n < limit).then_some(n + 1);
        self.live
            .in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, enter)
            .ok()
            .map(|_| InFlight(self.clone()))
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route")
            .field("id", &self.live.id)
            .field("target", &self.live.target)
            .finish()
    }
}

/// One request in flight to a sandbox, until dropped.
pub(crate) struct InFlight(Route);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.live.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The catalog of one process: what is published here is found here.
///
/// The lock is held for a look-up or one change, never over a wait.
#[derive(Debug, Default)]
pub struct MemoryCatalog {
    routes: RwLock<HashMap<SandboxId, Route>>,
}

impl MemoryCatalog {
    /// An empty catalog.
    pub fn new() -> MemoryCatalog {
        MemoryCatalog::default()
    }

    /// Makes a sandbox reachable. Publishing what is already published changes nothing; another
    /// run or place of the same sandbox replaces the route and closes the old connections.
    pub fn publish(&self, id: &SandboxId, target: Target) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        if routes.get(id).is_some_and(|route| *route.target() == target) {
            return;
        }
        if let Some(old) = routes.insert(id.clone(), Route::new(id.clone(), target)) {
            old.end();
        }
    }

    /// Makes a sandbox unreachable and closes every connection to it.
    pub fn withdraw(&self, id: &SandboxId) {
        let route = self.routes.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        if let Some(route) = route {
            route.end();
        }
    }
}

impl Routes for MemoryCatalog {
    fn find(&self, id: &SandboxId) -> Option<Route> {
        self.routes.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    fn find_signed(&self, url: &SignedUrl) -> Option<Route> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let signed = |route: &&Route| {
            route.target().envd_access_token.as_ref().is_some_and(|token| url.is_signed_with(token))
        };
        routes.values().find(signed).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(ip: [u8; 4]) -> Target {
        Target {
            execution_id: ExecutionId::random(),
            ip: IpAddr::from(ip),
            envd_access_token: None,
        }
    }

    #[test]
    fn publishing_again_keeps_connections_and_a_new_run_drops_them() {
        let catalog = MemoryCatalog::new();
        let id = SandboxId::random();
        let first = target([127, 0, 0, 1]);
        catalog.publish(&id, first.clone());
        let route = catalog.find(&id).expect("published");
        catalog.publish(&id, first);
        assert!(!route.has_ended());
        catalog.publish(&id, target([127, 0, 0, 1]));
        assert!(route.has_ended());
        let resumed = catalog.find(&id).expect("published");
        catalog.withdraw(&id);
        assert!(resumed.has_ended());
        assert!(catalog.find(&id).is_none());
        catalog.withdraw(&id);
    }

    #[test]
    fn in_flight_requests_are_counted_and_limited() {
        let route = Route::new(SandboxId::random(), target([127, 0, 0, 1]));
        let first = route.enter(2).expect("room for two");
        let _second = route.enter(2).expect("room for two");
        assert!(route.enter(2).is_none());
        drop(first);
        assert!(route.enter(2).is_some());
    }
}
