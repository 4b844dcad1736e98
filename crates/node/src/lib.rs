//! A node: sandboxes on one host, offered to control by RPC.
//!
//! The RPC is `belljar.node.v1.NodeService` over a unix socket that only the server's user may
//! open. The all-in-one server uses the same socket: there is no second, in-process path.
#![forbid(unsafe_code)]

mod convert;
mod host;
mod listen;
mod rpc;

use std::path::PathBuf;
use std::sync::Arc;

use belljar_daemon::Scope;
use belljar_domain::Tier;
use belljar_sandbox::Sandboxes;
use belljar_wire::rpc::belljar::node::v1::NodeServiceExt as _;
use connectrpc::{CompressionPolicy, ConnectRpcService, Router};

pub use listen::ServeError;

/// What a node is told about itself.
#[derive(Debug, Clone)]
pub struct Config {
    /// The commit this program was built from; empty when that was not recorded.
    pub commit: String,
    /// This node's name among nodes.
    pub node_id: String,
    /// The unix socket it serves on; made with mode 0600, replaced if it is left over.
    pub socket: PathBuf,
    /// What isolates its sandboxes.
    pub tier: Tier,
    /// One sentence: why this tier.
    pub tier_reason: String,
    /// Sandboxes of an earlier run that were reclaimed at start.
    pub reclaimed_sandboxes: u32,
}

/// Serves the node RPC until the scope is cancelled. `ready` is called once calls are answered.
///
/// # Errors
/// [`ServeError`] when the socket cannot be made.
pub async fn serve(
    config: Config,
    sandboxes: Sandboxes,
    scope: Scope,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    let socket = config.socket.clone();
    let service = Arc::new(rpc::Node::new(config, sandboxes, scope.clone()));
    // Both ends are on one host: squeezing answers costs more than carrying them.
    let service = ConnectRpcService::new(service.register(Router::new()))
        .with_compression_policy(CompressionPolicy::disabled());
    listen::serve(&socket, service, &scope, ready).await
}
