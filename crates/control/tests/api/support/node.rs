//! A node that keeps a map instead of machines, behind the real node RPC on a unix socket.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use belljar_daemon::{OnError, Scope, clock};
use belljar_wire::rpc::belljar::node::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DescribeRequest, DescribeResponse,
    ForgetReclaimedRequest, ForgetReclaimedResponse, KillSandboxRequest, KillSandboxResponse,
    ListReclaimedRequest, ListReclaimedResponse, ListSandboxesRequest, ListSandboxesResponse,
    ListTemplatesRequest, ListTemplatesResponse, LogEntry, MetricsSample, NodeService,
    NodeServiceExt as _, NodeStatus, ReclaimedSandbox, SandboxInfo, SandboxLogsRequest,
    SandboxLogsResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxSamples,
    SetNodeStatusRequest, SetNodeStatusResponse, SetSandboxEndRequest, SetSandboxEndResponse,
    StartingSandbox, TemplateInfo, WatchSandboxesRequest, WatchSandboxesResponse,
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
use tokio::sync::{broadcast, watch};

use super::PATIENCE;

pub(crate) const TEMPLATE_ID: &str = "basebasebasebasebase";
/// Sandboxes of one answer.
const PAGE: usize = 3;
pub(crate) const BUILD_ID: &str = "6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11";

pub(crate) struct FakeNode {
    pub(crate) state: Arc<State>,
    socket: PathBuf,
    scope: Scope,
}

/// What the node holds, and how it misbehaves.
pub(crate) struct State {
    pub(crate) sandboxes: Mutex<HashMap<String, SandboxInfo>>,
    /// Every create that was asked for.
    pub(crate) creates: Mutex<Vec<CreateSandboxRequest>>,
    /// The answer to the next create, if not the usual one.
    pub(crate) next_create: Mutex<Option<ConnectError>>,
    /// Report a created sandbox as ended before answering the create.
    pub(crate) end_at_once: Mutex<bool>,
    /// While true, creates wait.
    pub(crate) hold_creates: watch::Sender<bool>,
    /// Every end that was set, with whose it was, in order.
    pub(crate) ends_set: Mutex<Vec<(String, i64)>>,
    /// While true, ends are moved and nobody is told.
    pub(crate) hold_end_moves: watch::Sender<bool>,
    /// What it says starts, with the sandboxes.
    pub(crate) starting: Mutex<Vec<StartingSandbox>>,
    /// How often it was asked what it holds.
    pub(crate) lists: watch::Sender<u64>,
    pub(crate) more_templates: Mutex<Vec<TemplateInfo>>,
    /// The log of every sandbox.
    pub(crate) log: Mutex<Vec<LogEntry>>,
    /// Every question for it.
    pub(crate) log_requests: Mutex<Vec<SandboxLogsRequest>>,
    /// Ends of an earlier run that nobody has recorded yet.
    pub(crate) reclaimed: Mutex<Vec<ReclaimedSandbox>>,
    /// What each sandbox used.
    pub(crate) samples: Mutex<HashMap<String, Vec<MetricsSample>>>,
    /// What the node was told to be.
    pub(crate) status: Mutex<NodeStatus>,
    /// What it says of itself but for its status and its sandboxes.
    pub(crate) description: Mutex<DescribeResponse>,
    ended: broadcast::Sender<watch_sandboxes_response::Ended>,
}

impl FakeNode {
    pub(crate) async fn start(socket: &Path) -> FakeNode {
        let state = Arc::new(State {
            sandboxes: Mutex::default(),
            creates: Mutex::default(),
            next_create: Mutex::default(),
            end_at_once: Mutex::default(),
            hold_creates: watch::channel(false).0,
            ends_set: Mutex::default(),
            hold_end_moves: watch::channel(false).0,
            starting: Mutex::default(),
            lists: watch::channel(0).0,
            more_templates: Mutex::default(),
            log: Mutex::default(),
            log_requests: Mutex::default(),
            reclaimed: Mutex::default(),
            samples: Mutex::default(),
            status: Mutex::new(NodeStatus::NODE_STATUS_READY),
            description: Mutex::new(DescribeResponse {
                node_id: "fake".to_owned(),
                tier: "fake".to_owned(),
                ..Default::default()
            }),
            ended: broadcast::channel(64).0,
        });
        FakeNode::serve(socket, state).await
    }

    async fn serve(socket: &Path, state: Arc<State>) -> FakeNode {
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

impl State {
    /// A sandbox ends by itself.
    pub(crate) fn end(&self, id: &str, reason: &str) {
        let gone = self.sandboxes.lock().expect("no panic holds it").remove(id).expect("it runs");
        self.report(&gone, reason);
    }

    /// Ends a sandbox without telling anybody; whoever gets what is answered may tell it later.
    pub(crate) fn end_silently(&self, id: &str) -> SandboxInfo {
        self.sandboxes.lock().expect("no panic holds it").remove(id).expect("it runs")
    }

    /// A sandbox that was asked for runs, whether or not anybody was told.
    pub(crate) fn run(&self, asked: &CreateSandboxRequest) {
        let mut info = sandbox_info(&asked.sandbox_id, &asked.execution_id, asked.end_at_unix_ms);
        info.terms.clone_from(&asked.terms);
        let mut sandboxes = self.sandboxes.lock().expect("no panic holds it");
        sandboxes.insert(asked.sandbox_id.clone(), info);
    }

    pub(crate) fn holds(&self, id: &str) -> bool {
        self.sandboxes.lock().expect("no panic holds it").contains_key(id)
    }

    pub(crate) fn end_of(&self, id: &str) -> i64 {
        self.sandboxes.lock().expect("no panic holds it")[id].end_at_unix_ms
    }

    /// Tells everybody who watches that a sandbox ended.
    pub(crate) fn report(&self, gone: &SandboxInfo, reason: &str) {
        // Nobody listens before the first watch.
        let _listeners = self.ended.send(watch_sandboxes_response::Ended {
            sandbox_id: gone.sandbox_id.clone(),
            execution_id: gone.execution_id.clone(),
            reason: reason.to_owned(),
            ..Default::default()
        });
    }
}

pub(crate) fn template(
    id: &str,
    build: &str,
    aliases: &[&str],
    created_at_ms: i64,
) -> TemplateInfo {
    TemplateInfo {
        template_id: id.to_owned(),
        build_id: build.to_owned(),
        aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
        vcpus: 2,
        memory_mib: 512,
        disk_mib: 1024,
        envd_version: "0.6.13".to_owned(),
        created_at_unix_ms: created_at_ms,
        ..Default::default()
    }
}

pub(crate) fn sandbox_info(id: &str, execution: &str, end_at_ms: i64) -> SandboxInfo {
    SandboxInfo {
        sandbox_id: id.to_owned(),
        execution_id: execution.to_owned(),
        build_id: BUILD_ID.to_owned(),
        template_id: TEMPLATE_ID.to_owned(),
        route_ip: "10.11.0.7".to_owned(),
        started_at_unix_ms: clock::now().0,
        end_at_unix_ms: end_at_ms,
        vcpus: 2,
        memory_mib: 512,
        disk_mib: 1024,
        envd_version: "0.6.13".to_owned(),
        ..Default::default()
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
        let mut info =
            sandbox_info(&request.sandbox_id, &request.execution_id, request.end_at_unix_ms);
        info.terms = request.terms;
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
