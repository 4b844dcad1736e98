//! A node that keeps a map instead of machines, behind the real node RPC on a unix socket.

mod state;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use belljar_daemon::{OnError, Scope};
use belljar_wire::refusal::Refusal;
use belljar_wire::rpc::belljar::node::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DeleteSnapshotRequest, DeleteSnapshotResponse,
    DescribeRequest, DescribeResponse, ForgetReclaimedRequest, ForgetReclaimedResponse,
    KillSandboxRequest, KillSandboxResponse, ListReclaimedRequest, ListReclaimedResponse,
    ListSandboxesRequest, ListSandboxesResponse, ListSnapshotsRequest, ListSnapshotsResponse,
    ListTemplatesRequest, ListTemplatesResponse, MetricsSample, NodeService, NodeServiceExt as _,
    PauseSandboxRequest, PauseSandboxResponse, SandboxInfo, SandboxLogsRequest,
    SandboxLogsResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxSamples,
    SetNodeStatusRequest, SetNodeStatusResponse, SetSandboxEndRequest, SetSandboxEndResponse,
    SnapshotSandboxRequest, SnapshotSandboxResponse, WatchSandboxesRequest, WatchSandboxesResponse,
    watch_sandboxes_response,
};
use connectrpc::{
    ConnectError, ConnectRpcService, RequestContext, Response, Router, ServiceRequest,
    ServiceResult, ServiceStream,
};
use futures::StreamExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;

use super::PATIENCE;
use state::ended;
pub(crate) use state::{BUILD_ID, State, TEMPLATE_ID, sandbox_info, template};

/// Sandboxes of one answer.
const PAGE: usize = 3;

pub(crate) struct FakeNode {
    pub(crate) state: Arc<State>,
    socket: PathBuf,
    scope: Scope,
}

impl FakeNode {
    pub(crate) async fn start(socket: &Path) -> FakeNode {
        let state = Arc::new(State::empty());
        FakeNode::serve(socket, state).await
    }

    /// A node that has what `state` says.
    pub(crate) async fn serve(socket: &Path, state: Arc<State>) -> FakeNode {
        let scope = Scope::root("fake node");
        let listener = UnixListener::bind(socket).expect("a socket");
        let router = Arc::new(Service(state.clone())).register(Router::new());
        let service = TowerToHyperService::new(ConnectRpcService::new(router));
        let connections = scope.clone();
        scope.spawn("accept", OnError::Log, async move {
            loop {
                let (stream, _) = listener.accept().await?;
                let service = service.clone();
                connections.spawn("connection", OnError::Log, async move {
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // How the peer left is the test's business, not this connection's.
                    let _end = builder.serve_connection(TokioIo::new(stream), service).await;
                    Ok::<(), Infallible>(())
                });
            }
            #[expect(unreachable_code, reason = "names the type of the error above")]
            Ok::<(), std::io::Error>(())
        });
        FakeNode { state, socket: socket.to_owned(), scope }
    }

    pub(crate) async fn stop(self) {
        assert!(self.scope.close(PATIENCE).await, "the fake node did not stop");
        std::fs::remove_file(&self.socket).expect("its socket");
    }

    /// Stops this node and starts one that has forgotten everything.
    pub(crate) async fn restart_empty(self) -> FakeNode {
        let socket = self.socket.clone();
        self.stop().await;
        FakeNode::start(&socket).await
    }

    /// Drops every connection but keeps its sandboxes.
    pub(crate) async fn reconnect(self) -> FakeNode {
        let (socket, state) = (self.socket.clone(), self.state.clone());
        self.stop().await;
        FakeNode::serve(&socket, state).await
    }
}

struct Service(Arc<State>);

#[expect(refining_impl_trait, reason = "each answer has one type, and naming it is clearer")]
impl NodeService for Service {
    async fn describe(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, DescribeRequest>,
    ) -> ServiceResult<DescribeResponse> {
        let mut answer = self.0.description.lock().expect("no panic holds it").clone();
        answer.status = (*self.0.status.lock().expect("no panic holds it")).into();
        let count = self.0.sandboxes.lock().expect("no panic holds it").len();
        let load = answer.load.get_or_insert_default();
        load.sandbox_count = u32::try_from(count).expect("a test's few sandboxes");
        Response::ok(answer)
    }

    async fn set_node_status(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SetNodeStatusRequest>,
    ) -> ServiceResult<SetNodeStatusResponse> {
        let wanted = request.to_owned_message().status.as_known();
        let wanted = wanted.ok_or_else(|| ConnectError::invalid_argument("no such status"))?;
        *self.0.status.lock().expect("no panic holds it") = wanted;
        Response::ok(SetNodeStatusResponse::default())
    }

    async fn create_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<CreateSandboxResponse> {
        let request = request.to_owned_message();
        self.0.creates.lock().expect("no panic holds it").push(request.clone());
        let mut held = self.0.hold_creates.subscribe();
        held.wait_for(|held| !held).await.expect("the node outlives its calls");
        if let Some(error) = self.0.next_create.lock().expect("no panic holds it").take() {
            return Err(error);
        }
        if self.0.holds(&request.sandbox_id) {
            return Err(ConnectError::already_exists("it runs here"));
        }
        if !self.0.has_build(&request.build_id) {
            let error = ConnectError::not_found("there is no such build");
            return Err(Refusal::NoTemplate.mark(error));
        }
        let mut info =
            sandbox_info(&request.sandbox_id, &request.execution_id, request.end_at_unix_ms);
        info.terms = request.terms;
        info.build_id = request.build_id;
        info.template_id = request.template_id;
        if let Some(auto_pause) = request.auto_pause.into_option() {
            let mut auto_pauses = self.0.auto_pauses.lock().expect("no panic holds it");
            auto_pauses.insert(request.sandbox_id.clone(), auto_pause);
        }
        if *self.0.end_at_once.lock().expect("no panic holds it") {
            self.0.report(&info, "crashed");
        } else {
            let mut sandboxes = self.0.sandboxes.lock().expect("no panic holds it");
            sandboxes.insert(request.sandbox_id, info.clone());
        }
        Response::ok(CreateSandboxResponse { sandbox: info.into(), ..Default::default() })
    }

    async fn list_sandboxes(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<ListSandboxesResponse> {
        let after = request.to_owned_message().after_sandbox_id;
        self.0.lists.send_modify(|lists| *lists += 1);
        let sandboxes = self.0.sandboxes.lock().expect("no panic holds it");
        let mut sandboxes: Vec<SandboxInfo> =
            sandboxes.values().filter(|info| info.sandbox_id > after).cloned().collect();
        sandboxes.sort_by(|a, b| a.sandbox_id.cmp(&b.sandbox_id));
        // Small pages, so that every test with more sandboxes than this goes through several.
        let more = sandboxes.len() > PAGE;
        sandboxes.truncate(PAGE);
        let next = sandboxes.last().filter(|_| more).map(|last| last.sandbox_id.clone());
        Response::ok(ListSandboxesResponse {
            sandboxes,
            next_after_sandbox_id: next.unwrap_or_default(),
            starting: self.0.starting.lock().expect("no panic holds it").clone(),
            ..Default::default()
        })
    }

    async fn pause_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<PauseSandboxResponse> {
        let request = request.to_owned_message();
        self.0.pauses.lock().expect("no panic holds it").push(request.clone());
        let of = self.0.save(&request.sandbox_id, request.require_healthy_guest).await?;
        let kept = self.0.keep(&of, &request.snapshot_id, true, request.filesystem_only);
        self.0.end_silently(&request.sandbox_id);
        let _listeners = self.0.ended.send(watch_sandboxes_response::Ended {
            snapshot: kept.clone().into(),
            ..ended(&of, "paused")
        });
        Response::ok(PauseSandboxResponse { snapshot: kept.into(), ..Default::default() })
    }

    async fn snapshot_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SnapshotSandboxRequest>,
    ) -> ServiceResult<SnapshotSandboxResponse> {
        let request = request.to_owned_message();
        let of = self.0.save(&request.sandbox_id, true).await?;
        let kept = self.0.keep(&of, &request.snapshot_id, false, request.filesystem_only);
        Response::ok(SnapshotSandboxResponse { snapshot: kept.into(), ..Default::default() })
    }

    async fn list_snapshots(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, ListSnapshotsRequest>,
    ) -> ServiceResult<ListSnapshotsResponse> {
        let after = request.to_owned_message().after_snapshot_id;
        let snapshots = self.0.snapshots.lock().expect("no panic holds it");
        let mut rest = snapshots.values().filter(|kept| kept.snapshot_id > after);
        let snapshots: Vec<_> = rest.by_ref().take(PAGE).cloned().collect();
        let last = snapshots.last().filter(|_| rest.next().is_some());
        let next_after_snapshot_id = last.map_or_else(String::new, |kept| kept.snapshot_id.clone());
        Response::ok(ListSnapshotsResponse {
            snapshots,
            next_after_snapshot_id,
            ..Default::default()
        })
    }

    async fn delete_snapshot(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<DeleteSnapshotResponse> {
        let id = request.to_owned_message().snapshot_id;
        let gone = self.0.snapshots.lock().expect("no panic holds it").remove(&id);
        gone.ok_or_else(|| ConnectError::not_found("it is not kept here"))?;
        Response::ok(DeleteSnapshotResponse::default())
    }

    async fn list_reclaimed(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, ListReclaimedRequest>,
    ) -> ServiceResult<ListReclaimedResponse> {
        let reclaimed = self.0.reclaimed.lock().expect("no panic holds it");
        let sandboxes = reclaimed.iter().take(PAGE).cloned().collect();
        Response::ok(ListReclaimedResponse { sandboxes, ..Default::default() })
    }

    async fn forget_reclaimed(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, ForgetReclaimedRequest>,
    ) -> ServiceResult<ForgetReclaimedResponse> {
        let known = request.to_owned_message().execution_ids;
        let mut reclaimed = self.0.reclaimed.lock().expect("no panic holds it");
        reclaimed.retain(|end| !known.contains(&end.execution_id));
        Response::ok(ForgetReclaimedResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SandboxMetricsRequest>,
    ) -> ServiceResult<SandboxMetricsResponse> {
        let request = request.to_owned_message();
        let wanted =
            |id: &String| request.sandbox_ids.is_empty() || request.sandbox_ids.contains(id);
        let sandboxes = self.0.sandboxes.lock().expect("no panic holds it");
        let samples = self.0.samples.lock().expect("no panic holds it");
        let in_time = |sample: &&MetricsSample| {
            request.start_unix_ms.is_none_or(|start| sample.at_unix_ms >= start)
                && request.end_unix_ms.is_none_or(|end| sample.at_unix_ms <= end)
        };
        let found = sandboxes.keys().filter(|id| wanted(id)).map(|id| {
            let all = samples.get(id).map(Vec::as_slice).unwrap_or_default();
            let mut samples: Vec<_> = all.iter().filter(in_time).cloned().collect();
            if request.latest_only {
                samples = samples.split_off(samples.len().saturating_sub(1));
            }
            SandboxSamples { sandbox_id: id.clone(), samples, ..Default::default() }
        });
        let sandboxes = found.collect();
        Response::ok(SandboxMetricsResponse { sandboxes, ..Default::default() })
    }

    async fn set_sandbox_end(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SetSandboxEndRequest>,
    ) -> ServiceResult<SetSandboxEndResponse> {
        let request = request.to_owned_message();
        {
            let mut sandboxes = self.0.sandboxes.lock().expect("no panic holds it");
            let info = sandboxes
                .get_mut(&request.sandbox_id)
                .ok_or_else(|| ConnectError::not_found("it does not run here"))?;
            info.end_at_unix_ms = request.end_at_unix_ms;
        }
        let set = (request.sandbox_id, request.end_at_unix_ms);
        self.0.ends_set.lock().expect("no panic holds it").push(set);
        let mut held = self.0.hold_end_moves.subscribe();
        held.wait_for(|held| !held).await.expect("the node outlives its calls");
        Response::ok(SetSandboxEndResponse::default())
    }

    async fn kill_sandbox(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, KillSandboxRequest>,
    ) -> ServiceResult<KillSandboxResponse> {
        let id = request.to_owned_message().sandbox_id;
        let gone = self.0.sandboxes.lock().expect("no panic holds it").remove(&id);
        let gone = gone.ok_or_else(|| ConnectError::not_found("it does not run here"))?;
        self.0.report(&gone, "killed");
        Response::ok(KillSandboxResponse::default())
    }

    async fn sandbox_logs(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SandboxLogsRequest>,
    ) -> ServiceResult<SandboxLogsResponse> {
        let request = request.to_owned_message();
        if !self.0.holds(&request.sandbox_id) {
            return Err(ConnectError::not_found("it does not run here"));
        }
        self.0.log_requests.lock().expect("no panic holds it").push(request);
        let entries = self.0.log.lock().expect("no panic holds it").clone();
        Response::ok(SandboxLogsResponse { entries, ..Default::default() })
    }

    async fn list_templates(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, ListTemplatesRequest>,
    ) -> ServiceResult<ListTemplatesResponse> {
        let mut templates = vec![template(TEMPLATE_ID, BUILD_ID, &["base", "debian"], 1_000)];
        templates.extend(self.0.more_templates.lock().expect("no panic holds it").clone());
        Response::ok(ListTemplatesResponse { templates, ..Default::default() })
    }

    async fn watch_sandboxes(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, WatchSandboxesRequest>,
    ) -> ServiceResult<ServiceStream<WatchSandboxesResponse>> {
        let ended = self.0.ended.subscribe();
        let first = futures::stream::iter([Ok(WatchSandboxesResponse::default())]);
        let ends = futures::stream::unfold(ended, |mut ended| async move {
            let end = ended.recv().await.ok()?;
            let message = WatchSandboxesResponse { ended: end.into(), ..Default::default() };
            Some((Ok(message), ended))
        });
        Response::ok(first.chain(ends).boxed())
    }
}
