//! Joins control's route announcements to the proxy's table, and the proxy's paused sandboxes to
//! control: two services that may not know each other.

use std::sync::Arc;

use belljar_control::{Route, RouteSink, WakeCaller};
use belljar_domain::SandboxId;
use belljar_proxy::{Asleep, MemoryCatalog, Target, Visitor, Wake, Waking};

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

/// Asks control to resume what traffic comes for.
pub(crate) struct Waker(pub(crate) WakeCaller);

impl Wake for Waker {
    fn wake<'a>(&'a self, id: &'a SandboxId, visitor: Visitor) -> Waking<'a> {
        use belljar_control::Asleep as Why;
        Box::pin(async move {
            let outcome = self.0.wake(id, visitor.for_daemon, visitor.access_token).await;
            outcome.map_err(|why| match why {
                Why::NotFound => Asleep::NotFound,
                Why::NotPermitted => Asleep::NotPermitted,
                Why::Changing => Asleep::Changing,
                Why::AtLimit { limit } => Asleep::AtLimit { limit },
                Why::Unavailable => Asleep::Unavailable,
            })
        })
    }
}
