//! Joins control's route announcements to the proxy's table: two services that may not know each other.

use std::sync::Arc;

use belljar_control::{Route, RouteSink};
use belljar_domain::SandboxId;
use belljar_proxy::{MemoryCatalog, Target};

/// Hands what control announces to the proxy's in-memory catalog.
pub(crate) struct Announcer(pub(crate) Arc<MemoryCatalog>);

impl RouteSink for Announcer {
    fn publish(&self, id: &SandboxId, route: Route) {
        let target = Target {
            execution_id: route.execution_id,
            ip: route.ip,
            envd_access_token: route.envd_access_token,
        };
        self.0.publish(id, target);
    }

    fn withdraw(&self, id: &SandboxId) {
        self.0.withdraw(id);
    }
}
