//! The node service, call by call.
#![expect(
    refining_impl_trait_internal,
    reason = "answers are owned messages; nobody outside this crate names the service type"
)]

use belljar_daemon::Scope;
use belljar_domain::{Kind, SandboxId, UnixMillis};
use belljar_sandbox::{CreateError, SandboxNotFound, Sandboxes};
use belljar_wire::rpc::belljar::node::v1 as pb;
use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::{StreamExt as _, stream};
use tokio_stream::wrappers::BroadcastStream;
use tracing::error;

use crate::Config;
use crate::convert::{
    bad_id, code, create_request, ended, log_entry, log_query, sandbox_info, template_info,
};

/// The service behind the node's socket.
pub(crate) struct Node {
    config: Config,
    sandboxes: Sandboxes,
    scope: Scope,
}

impl Node {
    pub(crate) fn new(config: Config, sandboxes: Sandboxes, scope: Scope) -> Node {
        Node { config, sandboxes, scope }
    }
}

impl pb::NodeService for Node {
    async fn describe(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::DescribeRequest>,
    ) -> ServiceResult<pb::DescribeResponse> {
        Response::ok(pb::DescribeResponse {
            node_id: self.config.node_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            tier: self.config.tier.as_str().to_owned(),
            tier_reason: self.config.tier_reason.clone(),
            reclaimed_sandboxes: self.config.reclaimed_sandboxes,
            ..pb::DescribeResponse::default()
        })
    }

    async fn create_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::CreateSandboxRequest>,
    ) -> ServiceResult<pb::CreateSandboxResponse> {
        let request = create_request(request.to_owned_message())?;
        let info = self.sandboxes.create(request).await.map_err(|e| not_created(&e))?;
        Response::ok(pb::CreateSandboxResponse {
            sandbox: sandbox_info(&info).into(),
            ..pb::CreateSandboxResponse::default()
        })
    }

    async fn list_sandboxes(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::ListSandboxesRequest>,
    ) -> ServiceResult<pb::ListSandboxesResponse> {
        Response::ok(pb::ListSandboxesResponse {
            sandboxes: self.sandboxes.list().iter().map(sandbox_info).collect(),
            ..pb::ListSandboxesResponse::default()
        })
    }

    async fn set_sandbox_end(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::SetSandboxEndRequest>,
    ) -> ServiceResult<pb::SetSandboxEndResponse> {
        let request = request.to_owned_message();
        let id: SandboxId = request.sandbox_id.parse().map_err(|e| bad_id(&e))?;
        let end_at = UnixMillis(request.end_at_unix_ms);
        self.sandboxes.set_end(&id, end_at).await.map_err(|e| missing(&e))?;
        Response::ok(pb::SetSandboxEndResponse::default())
    }

    async fn kill_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::KillSandboxRequest>,
    ) -> ServiceResult<pb::KillSandboxResponse> {
        let request = request.to_owned_message();
        let id: SandboxId = request.sandbox_id.parse().map_err(|e| bad_id(&e))?;
        self.sandboxes.kill(&id).await.map_err(|e| missing(&e))?;
        Response::ok(pb::KillSandboxResponse::default())
    }

    async fn sandbox_logs(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::SandboxLogsRequest>,
    ) -> ServiceResult<pb::SandboxLogsResponse> {
        let request = request.to_owned_message();
        let id: SandboxId = request.sandbox_id.parse().map_err(|e| bad_id(&e))?;
        let query = log_query(request)?;
        let entries = self.sandboxes.logs(&id, &query).map_err(|e| missing(&e))?;
        Response::ok(pb::SandboxLogsResponse {
            entries: entries.iter().map(log_entry).collect(),
            ..pb::SandboxLogsResponse::default()
        })
    }

    async fn list_templates(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::ListTemplatesRequest>,
    ) -> ServiceResult<pb::ListTemplatesResponse> {
        Response::ok(pb::ListTemplatesResponse {
            templates: self.sandboxes.templates().iter().map(template_info).collect(),
            ..pb::ListTemplatesResponse::default()
        })
    }

    async fn watch_sandboxes(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::WatchSandboxesRequest>,
    ) -> ServiceResult<ServiceStream<pb::WatchSandboxesResponse>> {
        // Subscribed before the first message goes out: what ends after it is never missed.
        let notices = BroadcastStream::new(self.sandboxes.watch()).map(|notice| match notice {
            Ok(notice) => Ok(ended(&notice)),
            Err(lagged) => Err(ConnectError::aborted(format!(
                "the listener fell behind ({lagged}); list the sandboxes and watch again"
            ))),
        });
        let opening = stream::once(async { Ok(pb::WatchSandboxesResponse::default()) });
        let scope = self.scope.clone();
        let until_stop = async move { scope.cancelled().await };
        Response::stream_ok(opening.chain(notices).take_until(Box::pin(until_stop)))
    }
}

/// A refused create, in public words. The owner has logged the whole chain where it stopped.
fn not_created(refusal: &CreateError) -> ConnectError {
    let kind = refusal.kind();
    match refusal {
        CreateError::NoTemplate { .. }
        | CreateError::Exists { .. }
        | CreateError::NodeFull { .. }
        | CreateError::Closing => ConnectError::new(code(kind), format!("failed to {refusal}")),
        CreateError::Network { .. } if kind == Kind::Quota => {
            ConnectError::new(code(kind), "this node has no free network slot")
        }
        CreateError::Io { .. } if kind == Kind::Quota => {
            error!("the disk under the data folder is full: no sandbox can start");
            ConnectError::new(code(kind), "this node's disk is full")
        }
        CreateError::Network { .. }
        | CreateError::Io { .. }
        | CreateError::Machine { .. }
        | CreateError::Guest { .. } => {
            ConnectError::new(code(kind), "failed to start the sandbox on this node")
        }
    }
}

fn missing(error: &SandboxNotFound) -> ConnectError {
    ConnectError::new(code(Kind::NotFound), format!("failed to {error}"))
}
