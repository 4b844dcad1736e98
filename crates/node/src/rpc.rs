//! The node service, call by call.
#![expect(
    refining_impl_trait_internal,
    reason = "answers are owned messages; nobody outside this crate names the service type"
)]

use belljar_daemon::{Scope, clock};
use belljar_domain::{BuildId, Kind, SandboxId, UnixMillis};
use belljar_sandbox::metrics::MetricsQuery;
use belljar_sandbox::{
    CreateError, DeleteSnapshotError, KeepError, KeepSandbox, SandboxNotFound, Sandboxes,
};
use belljar_wire::refusal::Refusal;
use belljar_wire::rpc::belljar::node::v1 as pb;
use connectrpc::{
    ConnectError, ErrorCode, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::{StreamExt as _, stream};
use tokio_stream::wrappers::BroadcastStream;
use tracing::error;

use crate::Config;
use crate::convert::{
    bad_id, capacity, code, create_request, ended, ids, load, log_entry, log_query, refusal,
    samples, sandbox_info, sandbox_page, snapshot_info, snapshot_page, starting, status,
    template_info, untold, wanted_status,
};
use crate::host::Host;

/// The service behind the node's socket.
pub(crate) struct Node {
    config: Config,
    instance_id: String,
    started_at: UnixMillis,
    host: Host,
    sandboxes: Sandboxes,
    scope: Scope,
}

impl Node {
    pub(crate) fn new(config: Config, sandboxes: Sandboxes, scope: Scope) -> Node {
        let host = Host::new(sandboxes.folders());
        let instance_id = format!("{:032x}", rand::random::<u128>());
        Node { config, instance_id, started_at: clock::now(), host, sandboxes, scope }
    }
}

impl pb::NodeService for Node {
    async fn describe(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::DescribeRequest>,
    ) -> ServiceResult<pb::DescribeResponse> {
        let usage = self.sandboxes.usage();
        let (status_now, status_since) = usage.status;
        Response::ok(pb::DescribeResponse {
            commit: self.config.commit.clone(),
            service_instance_id: self.instance_id.clone(),
            machine: self.host.machine().into(),
            status: status(status_now).into(),
            status_changed_at_unix_ms: status_since.0,
            started_at_unix_ms: self.started_at.0,
            load: load(&usage, self.host.load()).into(),
            capacity: capacity(&usage).into(),
            node_id: self.config.node_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            tier: self.config.tier.as_str().to_owned(),
            tier_reason: self.config.tier_reason.clone(),
            reclaimed_sandboxes: self.config.reclaimed_sandboxes,
            ..pb::DescribeResponse::default()
        })
    }

    async fn set_node_status(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::SetNodeStatusRequest>,
    ) -> ServiceResult<pb::SetNodeStatusResponse> {
        self.sandboxes.set_status(wanted_status(request.to_owned_message().status.as_known())?);
        Response::ok(pb::SetNodeStatusResponse::default())
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
        request: ServiceRequest<'_, pb::ListSandboxesRequest>,
    ) -> ServiceResult<pb::ListSandboxesResponse> {
        let after = request.to_owned_message().after_sandbox_id;
        let after = (!after.is_empty()).then(|| after.parse()).transpose();
        let after: Option<SandboxId> = after.map_err(|e| bad_id(&e))?;
        // Starting ones first: one that gets ready meanwhile is then in both, not in neither.
        let starts = if after.is_none() { self.sandboxes.starting() } else { Vec::new() };
        let (sandboxes, next) = sandbox_page(&self.sandboxes.list(after.as_ref()));
        Response::ok(pb::ListSandboxesResponse {
            sandboxes,
            next_after_sandbox_id: next,
            starting: starting(starts),
            ..pb::ListSandboxesResponse::default()
        })
    }

    async fn list_reclaimed(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::ListReclaimedRequest>,
    ) -> ServiceResult<pb::ListReclaimedResponse> {
        let ends = self.sandboxes.untold().await.map_err(|e| folder_failed(&e))?;
        Response::ok(pb::ListReclaimedResponse {
            sandboxes: ends.into_iter().map(untold).collect(),
            ..pb::ListReclaimedResponse::default()
        })
    }

    async fn forget_reclaimed(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::ForgetReclaimedRequest>,
    ) -> ServiceResult<pb::ForgetReclaimedResponse> {
        let executions = ids(&request.to_owned_message().execution_ids)?;
        self.sandboxes.forget_untold(executions).await.map_err(|e| folder_failed(&e))?;
        Response::ok(pb::ForgetReclaimedResponse::default())
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

    async fn sandbox_metrics(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::SandboxMetricsRequest>,
    ) -> ServiceResult<pb::SandboxMetricsResponse> {
        let request = request.to_owned_message();
        let wanted: Vec<SandboxId> = ids(&request.sandbox_ids)?;
        let query = MetricsQuery {
            start: request.start_unix_ms.map(UnixMillis),
            end: request.end_unix_ms.map(UnixMillis),
            latest_only: request.latest_only,
        };
        if wanted.len() != 1 && !query.latest_only {
            let message = "`latest_only` must be set when more than one sandbox is asked for";
            return Err(ConnectError::new(code(Kind::Invalid), message));
        }
        let found = if wanted.is_empty() {
            self.sandboxes.metrics_of_all(query)
        } else {
            let metrics = |id: SandboxId| Some((self.sandboxes.metrics(&id, query).ok()?, id));
            wanted.into_iter().filter_map(metrics).map(|(found, id)| (id, found)).collect()
        };
        Response::ok(pb::SandboxMetricsResponse {
            sandboxes: found.iter().map(|(id, found)| samples(id, found)).collect(),
            ..pb::SandboxMetricsResponse::default()
        })
    }

    async fn pause_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::PauseSandboxRequest>,
    ) -> ServiceResult<pb::PauseSandboxResponse> {
        let request = request.to_owned_message();
        let id: SandboxId = request.sandbox_id.parse().map_err(|e| bad_id(&e))?;
        let order = KeepSandbox {
            snapshot_id: request.snapshot_id.parse().map_err(|e| bad_id(&e))?,
            filesystem_only: request.filesystem_only,
            require_healthy_guest: request.require_healthy_guest,
        };
        let snapshot = self.sandboxes.pause(&id, order).await.map_err(|e| not_kept(&e))?;
        Response::ok(pb::PauseSandboxResponse {
            snapshot: snapshot_info(&snapshot).into(),
            ..pb::PauseSandboxResponse::default()
        })
    }

    async fn snapshot_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::SnapshotSandboxRequest>,
    ) -> ServiceResult<pb::SnapshotSandboxResponse> {
        let request = request.to_owned_message();
        let id: SandboxId = request.sandbox_id.parse().map_err(|e| bad_id(&e))?;
        let order = KeepSandbox {
            snapshot_id: request.snapshot_id.parse().map_err(|e| bad_id(&e))?,
            filesystem_only: request.filesystem_only,
            require_healthy_guest: false,
        };
        let snapshot = self.sandboxes.snapshot(&id, order).await.map_err(|e| not_kept(&e))?;
        Response::ok(pb::SnapshotSandboxResponse {
            snapshot: snapshot_info(&snapshot).into(),
            ..pb::SnapshotSandboxResponse::default()
        })
    }

    async fn list_snapshots(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::ListSnapshotsRequest>,
    ) -> ServiceResult<pb::ListSnapshotsResponse> {
        let after = request.to_owned_message().after_snapshot_id;
        let after = (!after.is_empty()).then(|| after.parse()).transpose();
        let after: Option<BuildId> = after.map_err(|e| bad_id(&e))?;
        let metas = self.sandboxes.snapshots(after.as_ref());
        let (snapshots, next) = snapshot_page(&metas, |id| self.sandboxes.is_uploaded(id));
        Response::ok(pb::ListSnapshotsResponse {
            snapshots,
            next_after_snapshot_id: next,
            ..pb::ListSnapshotsResponse::default()
        })
    }

    async fn delete_snapshot(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::DeleteSnapshotRequest>,
    ) -> ServiceResult<pb::DeleteSnapshotResponse> {
        let id: BuildId = request.to_owned_message().snapshot_id.parse().map_err(|e| bad_id(&e))?;
        self.sandboxes.delete_snapshot(&id).await.map_err(|e| not_deleted(&e))?;
        Response::ok(pb::DeleteSnapshotResponse::default())
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

/// A create that failed, in public words. The owner has logged the whole chain where it stopped.
fn not_created(error: &CreateError) -> ConnectError {
    let refusal = refusal(error);
    let message = match (error, refusal) {
        (_, Some(Refusal::NetworkSlots)) => "this node has no free network slot".to_owned(),
        (CreateError::Io { .. } | CreateError::Fetch { .. }, Some(Refusal::Disk)) => {
            error!("the disk under the data folder is full: no sandbox can start");
            "this node's disk is full".to_owned()
        }
        // What is damaged has a name, and only who keeps the store can mend it.
        (CreateError::Fetch { source, .. }, None) => format!("failed to {}", chain(&**source)),
        (CreateError::Exists { .. } | CreateError::Killed { .. }, _) | (_, Some(_)) => {
            format!("failed to {error}")
        }
        (_, None) => "failed to start the sandbox on this node".to_owned(),
    };
    let code = match error {
        CreateError::Killed { .. } => ErrorCode::Aborted,
        other => code(other.kind()),
    };
    let answer = ConnectError::new(code, message);
    match refusal {
        Some(refusal) => refusal.mark(answer),
        None => answer,
    }
}

/// The folder of ends cannot be used. Nobody else logs it.
fn folder_failed(error: &std::io::Error) -> ConnectError {
    error!(%error, "the ends nobody was told of cannot be read or removed");
    ConnectError::new(code(Kind::Internal), "failed to use the record of ends on this node")
}

/// A sandbox that was not kept, in public words. Its owner has logged the whole chain.
fn not_kept(error: &KeepError) -> ConnectError {
    match error {
        KeepError::NotFound { .. } | KeepError::Unhealthy { .. } => {
            ConnectError::new(code(error.kind()), format!("failed to {error}"))
        }
        KeepError::Exists { .. } => {
            ConnectError::new(ErrorCode::AlreadyExists, format!("failed to {error}"))
        }
        _ if error.kind() == Kind::Quota => {
            error!("the disk under the data folder is full: no sandbox can be paused");
            ConnectError::new(code(Kind::Quota), "this node's disk is full")
        }
        _ => ConnectError::new(code(error.kind()), "failed to keep the sandbox on this node"),
    }
}

fn not_deleted(error: &DeleteSnapshotError) -> ConnectError {
    match error {
        DeleteSnapshotError::NotFound(missing) => {
            ConnectError::new(code(Kind::NotFound), format!("failed to {missing}"))
        }
        DeleteSnapshotError::Note { source, .. } => {
            error!(%error, cause = %source, "a snapshot is not deleted");
            ConnectError::new(code(Kind::Internal), "failed to delete the snapshot on this node")
        }
        DeleteSnapshotError::Folder { source, .. } => {
            error!(%error, cause = %source, "a snapshot's folder stays until the next start");
            ConnectError::new(code(Kind::Internal), "failed to delete the snapshot on this node")
        }
    }
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn missing(error: &SandboxNotFound) -> ConnectError {
    ConnectError::new(code(Kind::NotFound), format!("failed to {error}"))
}
