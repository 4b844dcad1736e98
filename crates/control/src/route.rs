//! Where traffic of a live sandbox goes: the door to the proxy's catalog.

use std::net::IpAddr;

use belljar_domain::{ExecutionId, SandboxId, Secret};

/// How to reach one live sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The run the address belongs to: a new one makes connections to the old one worthless.
    pub execution_id: ExecutionId,
    /// Address of the sandbox, any port.
    pub ip: IpAddr,
    /// Token its guest daemon asks for; `None` on an open sandbox. Signed file URLs carry no
    /// sandbox id, so the proxy finds the sandbox by whose token made the signature.
    /// Source: contract section 3.2, point 3.
    pub envd_access_token: Option<Secret<String>>,
}

/// Takes routes as sandboxes come and go. Calls must not block.
pub trait RouteSink: Send + Sync {
    /// `id` is reachable by `route` from now on; replaces what was known.
    fn publish(&self, id: &SandboxId, route: Route);

    /// `id` is gone. Unknown ids are fine.
    fn withdraw(&self, id: &SandboxId);
}
