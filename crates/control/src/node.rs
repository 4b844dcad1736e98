//! The node, as this process talks to it: node RPC over a unix socket, a deadline on every call.
//!
//! Answers are checked and turned into domain types here; nothing else sees the wire's shapes.

mod answers;
mod metrics;
pub(crate) mod report;
mod snapshots;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use belljar_domain::{BuildId, ExecutionId, Kind, SandboxId, Secret, TemplateId, UnixMillis};
use belljar_wire::refusal::Refusal;
use belljar_wire::rest::LogLevel;
use belljar_wire::rpc::belljar::node::v1::{
    self as pb, CreateSandboxRequest, DescribeRequest, ForgetReclaimedRequest, KillSandboxRequest,
    ListReclaimedRequest, ListSandboxesRequest, ListTemplatesRequest, NodeServiceClient,
    SandboxLogsRequest, SetSandboxEndRequest, WatchSandboxesRequest, WatchSandboxesResponse,
};
use connectrpc::client::{
    CallOptions, ClientConfig, Http2Connection, ServerStream, SharedHttp2Connection,
};
use connectrpc::{ConnectError, ErrorCode};
use http::Uri;
use hyper::body::Incoming;
use tracing::warn;

pub(crate) use metrics::{Sample, Span};
pub(crate) use snapshots::PauseMode;

use crate::live::{Kept, Observed};
use crate::placement::Taken;
use crate::templates::Template;

/// A kill answers once nothing is left of the sandbox.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// Everything else only reads or writes memory of the node.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// A node that stops answering pings for this long is taken for gone, and its streams end.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls waiting for the connection; more than this wait for a place in the queue.
const MAX_WAITING_CALLS: usize = 1024;

/// A call to the node failed.
#[derive(Debug, thiserror::Error)]
#[error("{what} on the node")]
pub struct NodeCallError {
    /// What was asked for.
    what: &'static str,
    /// Why it was not done.
    #[source]
    source: ConnectError,
}

impl NodeCallError {
    /// What a caller should do about it.
    pub fn kind(&self) -> Kind {
        match self.source.code {
            ErrorCode::InvalidArgument | ErrorCode::OutOfRange => Kind::Invalid,
            ErrorCode::Unauthenticated => Kind::Unauthenticated,
            ErrorCode::PermissionDenied => Kind::Forbidden,
            ErrorCode::NotFound => Kind::NotFound,
            ErrorCode::AlreadyExists | ErrorCode::FailedPrecondition | ErrorCode::Aborted => {
                Kind::Conflict
            }
            ErrorCode::ResourceExhausted => Kind::Quota,
            ErrorCode::Unavailable => Kind::Unavailable,
            ErrorCode::DeadlineExceeded => Kind::Timeout,
            ErrorCode::Canceled => Kind::Cancelled,
            // The enum may grow; what is not known here is a defect until somebody decides.
            _ => Kind::Internal,
        }
    }

    /// Which of the node's limits a create has met; nothing was made then.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        Refusal::of(&self.source)
    }

    /// Whether the state of what was asked about did not allow it.
    pub(crate) fn is_refused_by_state(&self) -> bool {
        self.source.code == ErrorCode::FailedPrecondition
    }

    /// Whether the node certainly did not do what it was asked: it said so itself.
    pub(crate) fn is_certain(&self) -> bool {
        self.refusal().is_some()
            || matches!(
                self.kind(),
                Kind::Invalid
                    | Kind::Unauthenticated
                    | Kind::Forbidden
                    | Kind::NotFound
                    | Kind::Conflict
                    | Kind::Quota
            )
    }

    /// The node's own words, meant for the caller when the request was at fault.
    pub(crate) fn message(&self) -> &str {
        self.source.message.as_deref().unwrap_or("the node gave no reason")
    }
}

/// What to start.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    pub(crate) id: &'a SandboxId,
    pub(crate) execution: &'a ExecutionId,
    pub(crate) template: &'a TemplateId,
    pub(crate) build: &'a BuildId,
    pub(crate) end_at: UnixMillis,
    pub(crate) envd_access_token: Option<&'a Secret<String>>,
    pub(crate) env_vars: &'a BTreeMap<String, String>,
    pub(crate) allow_internet: bool,
    /// What the node keeps for us beside the sandbox.
    pub(crate) terms: String,
    /// The snapshot it becomes at its end; `None` is killed then.
    pub(crate) auto_pause: Option<AutoPause>,
    /// Without the memory of what it is started from.
    pub(crate) cold_boot: bool,
}

/// How a sandbox is paused at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AutoPause {
    pub(crate) snapshot: BuildId,
    pub(crate) filesystem_only: bool,
}

/// What a node says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) takes_sandboxes: bool,
    /// What its sandboxes take, starting ones included.
    pub(crate) taken: Taken,
    /// What they may take together; 0 is unknown or not counted.
    pub(crate) capacity: Taken,
}

/// Everything a node holds.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    pub(crate) running: Vec<Observed>,
    /// Those whose guest is not ready yet, with their terms where the node sent them.
    pub(crate) starting: Vec<(SandboxId, String)>,
}

/// A sandbox that ended with its node, before anybody was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reclaimed {
    /// As it was; its address is nobody's any more.
    pub(crate) was: Observed,
    /// When it was found to have ended.
    pub(crate) at: UnixMillis,
    /// `lost`, or `shutdown` when the node stopped in order.
    pub(crate) reason: &'static str,
}

/// Which lines of a sandbox's log are wanted.
#[derive(Debug)]
pub(crate) struct LogsWanted {
    /// Forward: at this time and later. Backward: before it. `None` is the end one reads from.
    pub(crate) cursor: Option<UnixMillis>,
    pub(crate) limit: u32,
    pub(crate) backward: bool,
    pub(crate) min_level: Option<LogLevel>,
    /// Empty is everything.
    pub(crate) search: String,
}

/// One line of a sandbox's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogEntry {
    pub(crate) at: UnixMillis,
    pub(crate) level: LogLevel,
    pub(crate) event: String,
    /// 0 when it is about no process.
    pub(crate) pid: u32,
    pub(crate) command: String,
    pub(crate) text: String,
    /// Whether it goes on in the next entry.
    pub(crate) cut: bool,
}

/// One run that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) id: SandboxId,
    pub(crate) execution: ExecutionId,
    pub(crate) reason: &'static str,
    /// What a paused one has left.
    pub(crate) kept: Option<Kept>,
}

/// A client of one node. Reconnects by itself.
#[derive(Clone)]
pub(crate) struct Node {
    client: NodeServiceClient<SharedHttp2Connection>,
}

impl Node {
    /// A client of the node at `socket`. Connects at the first call. Needs a runtime.
    pub(crate) fn at(socket: &Path) -> Node {
        let authority = Uri::from_static("http://node");
        let connection = Http2Connection::builder()
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .lazy_unix(socket, authority.clone())
            .shared(MAX_WAITING_CALLS);
        Node { client: NodeServiceClient::new(connection, ClientConfig::new(authority).proto()) }
    }

    /// Starts a sandbox and waits until its guest is ready, `time` at most.
    pub(crate) async fn create(
        &self,
        start: Start<'_>,
        time: Duration,
    ) -> Result<Observed, NodeCallError> {
        const WHAT: &str = "create a sandbox";
        let request = CreateSandboxRequest {
            sandbox_id: start.id.to_string(),
            execution_id: start.execution.to_string(),
            build_id: start.build.to_string(),
            template_id: start.template.to_string(),
            end_at_unix_ms: start.end_at.0,
            envd_access_token: start
                .envd_access_token
                .map_or_else(String::new, |token| token.expose().clone()),
            env_vars: start.env_vars.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            allow_internet_access: start.allow_internet,
            terms: start.terms,
            auto_pause: start.auto_pause.map(auto_pause).into(),
            cold_boot: start.cold_boot,
            ..Default::default()
        };
        let answer = self
            .client
            .create_sandbox_with_options(request, within(time))
            .await
            .map_err(|source| NodeCallError { what: WHAT, source })?
            .into_owned();
        let info = answer.sandbox.into_option().unwrap_or_default();
        answers::observed(&info).map_err(|reason| malformed(WHAT, &reason))
    }

    /// What the node says of itself.
    pub(crate) async fn describe(&self) -> Result<Description, NodeCallError> {
        let answer = self
            .client
            .describe_with_options(DescribeRequest::default(), within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "describe the node", source })?
            .into_owned();
        Ok(answers::description(&answer))
    }

    /// Everything the node holds. A sandbox this process cannot read is left out, with a warning.
    pub(crate) async fn list(&self) -> Result<Holds, NodeCallError> {
        const LIST: &str = "list sandboxes";
        let mut holds = Holds::default();
        let mut after = String::new();
        loop {
            let request =
                ListSandboxesRequest { after_sandbox_id: after.clone(), ..Default::default() };
            let page = self
                .client
                .list_sandboxes_with_options(request, within(CALL_DEADLINE))
                .await
                .map_err(|source| NodeCallError { what: LIST, source })?
                .into_owned();
            holds.running.extend(page.sandboxes.iter().filter_map(answers::readable));
            let starting = page.starting.into_iter();
            holds
                .starting
                .extend(starting.filter_map(|s| Some((s.sandbox_id.parse().ok()?, s.terms))));
            if page.next_after_sandbox_id.is_empty() {
                return Ok(holds);
            }
            // Ids only grow from page to page, or this would never end.
            if page.next_after_sandbox_id <= after {
                return Err(malformed(LIST, "its pages do not go on"));
            }
            after = page.next_after_sandbox_id;
        }
    }

    /// Sandboxes that ended with an earlier run of the node, as many as fit one answer. Those this
    /// process cannot read are left out; the second list is all of them, to be forgotten.
    pub(crate) async fn reclaimed(&self) -> Result<(Vec<Reclaimed>, Vec<String>), NodeCallError> {
        let answer = self
            .client
            .list_reclaimed_with_options(ListReclaimedRequest::default(), within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "list reclaimed sandboxes", source })?
            .into_owned();
        let all = answer.sandboxes.iter().map(|sandbox| sandbox.execution_id.clone()).collect();
        let readable = answer.sandboxes.iter().filter_map(|sandbox| {
            answers::reclaimed(sandbox)
                .inspect_err(|reason| {
                    warn!(sandbox = sandbox.sandbox_id, reason, "unreadable reclaimed sandbox")
                })
                .ok()
        });
        Ok((readable.collect(), all))
    }

    /// The ends of these runs are recorded.
    pub(crate) async fn forget_reclaimed(
        &self,
        execution_ids: Vec<String>,
    ) -> Result<(), NodeCallError> {
        let request = ForgetReclaimedRequest { execution_ids, ..Default::default() };
        self.client
            .forget_reclaimed_with_options(request, within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "forget reclaimed sandboxes", source })?;
        Ok(())
    }

    /// Moves the end of a sandbox.
    pub(crate) async fn set_end(
        &self,
        id: &SandboxId,
        end_at: UnixMillis,
    ) -> Result<(), NodeCallError> {
        let request = SetSandboxEndRequest {
            sandbox_id: id.to_string(),
            end_at_unix_ms: end_at.0,
            ..Default::default()
        };
        self.client
            .set_sandbox_end_with_options(request, within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "move a sandbox's end", source })?;
        Ok(())
    }

    /// Kills a sandbox and waits until nothing of it is left.
    pub(crate) async fn kill(&self, id: &SandboxId) -> Result<(), NodeCallError> {
        let request = KillSandboxRequest { sandbox_id: id.to_string(), ..Default::default() };
        self.client
            .kill_sandbox_with_options(request, within(KILL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "kill a sandbox", source })?;
        Ok(())
    }

    /// What the processes of a sandbox said, as far as the node keeps it.
    pub(crate) async fn logs(
        &self,
        id: &SandboxId,
        wanted: LogsWanted,
    ) -> Result<Vec<LogEntry>, NodeCallError> {
        let request = SandboxLogsRequest {
            sandbox_id: id.to_string(),
            cursor_unix_ms: wanted.cursor.map(|at| at.0),
            limit: wanted.limit,
            backward: wanted.backward,
            min_level: wanted.min_level.map_or("", LogLevel::as_str).to_owned(),
            search: wanted.search,
            ..Default::default()
        };
        let answer = self
            .client
            .sandbox_logs_with_options(request, within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "read a sandbox's log", source })?
            .into_owned();
        Ok(answer.entries.into_iter().map(answers::log_entry).collect())
    }

    /// What the node can start sandboxes from. Unreadable ones are left out, with a warning.
    pub(crate) async fn templates(&self) -> Result<Vec<Template>, NodeCallError> {
        let answer = self
            .client
            .list_templates_with_options(ListTemplatesRequest::default(), within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "list templates", source })?
            .into_owned();
        let readable = answer.templates.into_iter().filter_map(|info| {
            let id = info.template_id.clone();
            answers::template(info)
                .inspect_err(|reason| warn!(template = id, reason, "unreadable template"))
                .ok()
        });
        Ok(readable.collect())
    }

    /// Starts to watch for ends. When this returns, no later end is missed.
    pub(crate) async fn watch(&self) -> Result<Watch, NodeCallError> {
        let open = async {
            // No deadline on the stream itself: pings tell when the node is gone.
            let mut stream = self.client.watch_sandboxes(WatchSandboxesRequest::default()).await?;
            stream.message::<WatchSandboxesResponse>().await?.ok_or_else(stream_ended)?;
            Ok(Watch { stream })
        };
        tokio::time::timeout(CALL_DEADLINE, open)
            .await
            .unwrap_or_else(|_| Err(ConnectError::deadline_exceeded("no first message in time")))
            .map_err(watch_failed)
    }
}

/// An open stream of ends.
pub(crate) struct Watch {
    stream: ServerStream<
        Incoming,
        belljar_wire::rpc::belljar::node::v1::WatchSandboxesResponseView<'static>,
    >,
}

impl Watch {
    /// The next end; an error when the stream is over. Not cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Ended, NodeCallError> {
        loop {
            let message = self.stream.message::<WatchSandboxesResponse>().await;
            let message = message.and_then(|m| m.ok_or_else(stream_ended)).map_err(watch_failed)?;
            let Some(ended) = message.to_owned_message().ended.into_option() else { continue };
            match (ended.sandbox_id.parse(), ended.execution_id.parse()) {
                (Ok(id), Ok(execution)) => {
                    let reason = answers::reason(&ended.reason);
                    let kept = ended.snapshot.as_option().and_then(answers::readable_snapshot);
                    return Ok(Ended { id, execution, reason, kept });
                }
                _ => warn!(sandbox = ended.sandbox_id, "the node reported an unreadable end"),
            }
        }
    }
}

fn auto_pause(pause: AutoPause) -> pb::AutoPause {
    pb::AutoPause {
        snapshot_id: pause.snapshot.to_string(),
        filesystem_only: pause.filesystem_only,
        ..Default::default()
    }
}

fn watch_failed(source: ConnectError) -> NodeCallError {
    NodeCallError { what: "watch sandboxes", source }
}

fn stream_ended() -> ConnectError {
    ConnectError::unavailable("the node closed the stream")
}

fn within(deadline: Duration) -> CallOptions {
    CallOptions::default().with_timeout(deadline)
}

fn malformed(what: &'static str, reason: &str) -> NodeCallError {
    NodeCallError { what, source: ConnectError::internal(format!("its answer is wrong: {reason}")) }
}
