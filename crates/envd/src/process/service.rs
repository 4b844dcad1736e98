//! The process service: RPC requests in, registry calls out.
//!
//! Source of behaviour and texts: `contract/e2b-wire.md` section 2.3.

use std::sync::Arc;
use std::time::Duration;

use belljar_wire::rpc::process::process_input::Input as WireInput;
use belljar_wire::rpc::process::process_selector::Selector;
use belljar_wire::rpc::process::stream_input_request::Event as InputEvent;
use belljar_wire::rpc::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ListRequest, ListResponse, PTY,
    Process as ProcessRpc, ProcessInput, ProcessSelector, SendInputRequest, SendInputResponse,
    SendSignalRequest, SendSignalResponse, Signal, StartRequest, StreamInputRequest,
    StreamInputResponse, UpdateRequest, UpdateResponse,
};
use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::stream::StreamExt as _;

use super::events::{Message, events, is_overdue};
use super::registry::{Label, Process, Registry};
use super::start::{Program, StartError, Streams};
use crate::accounts::User;
use crate::files::path;
use crate::task;

/// How long a stream may be silent when the client does not say.
///
/// Source: `contract/e2b-wire.md` section 2.2.
const KEEPALIVE_DEFAULT: Duration = Duration::from_secs(90);

/// How long input that could not be written waits for the process to be gone.
const END_WAIT: Duration = Duration::from_millis(500);

/// How long the answer to a kill waits for the process to be gone.
const KILL_ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// Header with the client's wish, seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

/// Answers the RPCs.
pub(crate) struct ProcessService {
    registry: Arc<Registry>,
}

impl ProcessService {
    /// Serves the processes of `registry`.
    pub(crate) fn new(registry: Arc<Registry>) -> ProcessService {
        ProcessService { registry }
    }

    fn find(&self, selector: Option<&ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        match selector.and_then(|selector| selector.selector.as_ref()) {
            Some(Selector::Pid(pid)) => self.registry.by_pid(*pid).ok_or_else(|| {
                ConnectError::not_found(format!("process with pid {pid} not found"))
            }),
            Some(Selector::Tag(tag)) => self.registry.by_tag(tag).ok_or_else(|| {
                ConnectError::not_found(format!("process with tag {tag} not found"))
            }),
            None => Err(ConnectError::invalid_argument("the request selects no process")),
        }
    }

    /// As `find`, without those that have ended.
    fn find_running(
        &self,
        selector: Option<&ProcessSelector>,
    ) -> Result<Arc<Process>, ConnectError> {
        let process = self.find(selector)?;
        if process.has_exited() {
            return Err(ended(&process));
        }
        Ok(process)
    }
}

#[expect(refining_impl_trait, reason = "nobody else names these return types")]
impl ProcessRpc for ProcessService {
    async fn list(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<ListResponse> {
        Response::ok(ListResponse { processes: self.registry.list(), ..ListResponse::default() })
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<Message>> {
        let request = request.to_owned_message();
        let process = self.find(request.process.as_option())?;
        let events = events(process.pid, process.hub.subscribe(), keepalive(&ctx));
        Response::stream_ok(events.map(Ok))
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<Message>> {
        let user = caller(&ctx)?;
        let (program, label) = program(&self.registry, user, request.to_owned_message())?;
        let (registry, deadline) = (Arc::clone(&self.registry), ctx.deadline());
        // Once begun the job runs to its end: a process is either registered or not there, also
        // when the client leaves meanwhile.
        let started = task::blocking(move || registry.start(program, label, deadline)).await;
        let (process, subscription) =
            started.map_err(|lost| ConnectError::internal(lost.to_string()))?.map_err(refusal)?;
        let events = events(process.pid, subscription, keepalive(&ctx));
        Response::stream_ok(events.map(move |message| match is_overdue(&message, deadline) {
            true => Err(ConnectError::deadline_exceeded("the process was killed at its deadline")),
            false => Ok(message),
        }))
    }

    async fn update(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        if let Some(pty) = request.pty.as_option() {
            let (columns, rows) = size(pty);
            let Some(terminal) = &process.terminal else {
                return Err(ConnectError::failed_precondition("process has no terminal"));
            };
            terminal.resize(columns, rows).map_err(|error| {
                ConnectError::internal(format!("failed to resize the terminal: {error}"))
            })?;
        }
        Response::ok(UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _ctx: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<StreamInputResponse> {
        let mut process = None;
        while let Some(request) = requests.next().await {
            match (request?.to_owned_message().event, &process) {
                (Some(InputEvent::Start(start)), None) => {
                    process = Some(self.find_running(start.process.as_option())?);
                }
                (Some(InputEvent::Data(data)), Some(process)) => {
                    feed(process, data.input.into_option()).await?;
                }
                (Some(InputEvent::Keepalive(_)) | None, _) => {}
                (Some(InputEvent::Start(_)), Some(_)) => {
                    let message = "the stream has selected its process already";
                    return Err(ConnectError::invalid_argument(message));
                }
                (Some(InputEvent::Data(_)), None) => {
                    let message = "the stream must select a process before it sends input";
                    return Err(ConnectError::invalid_argument(message));
                }
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        feed(&process, request.input.into_option()).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<SendSignalResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        let signal = match request.signal.as_known() {
            Some(Signal::SIGNAL_SIGKILL) => rustix::process::Signal::KILL,
            Some(Signal::SIGNAL_SIGTERM) => rustix::process::Signal::TERM,
            _ => {
                let message = "the signal must be SIGTERM or SIGKILL";
                return Err(ConnectError::invalid_argument(message));
            }
        };
        if !process.signal(signal) {
            return Err(ended(&process));
        }
        if signal == rustix::process::Signal::KILL {
            // Clients take the answer for the end and ask again at once.
            process.wait_for_exit(KILL_ANSWER_LIMIT).await;
        }
        Response::ok(SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        if process.terminal.is_some() {
            let message = "failed to close stdin: cannot close stdin for PTY process — \
                           send Ctrl+D (0x04) instead";
            return Err(ConnectError::unknown(message));
        }
        // Closing what was never open is done already.
        if let Some(input) = &process.input {
            input.close().await;
        }
        Response::ok(CloseStdinResponse::default())
    }
}

/// The user the route found for this request.
pub(crate) fn caller(ctx: &RequestContext) -> Result<User, ConnectError> {
    let user = ctx.extensions().get::<User>().cloned();
    user.ok_or_else(|| ConnectError::internal("the request was routed without a user"))
}

fn program(
    registry: &Registry,
    user: User,
    request: StartRequest,
) -> Result<(Program, Label), ConnectError> {
    let state = &registry.state;
    let Some(config) = request.process.into_option() else {
        return Err(ConnectError::invalid_argument("the request has no process to start"));
    };
    let requested = config.cwd.as_deref().unwrap_or_default();
    let cwd = path::resolve(requested, &user.home, state.default_workdir().as_deref())
        .map_err(|error| ConnectError::invalid_argument(error.to_string()))?;
    let mut env = std::collections::BTreeMap::from([
        ("PATH".to_owned(), state.settings().search_path.clone()),
        ("HOME".to_owned(), user.home.to_string_lossy().into_owned()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
    ]);
    env.extend(state.global_env());
    env.extend(config.envs.iter().map(|(name, value)| (name.clone(), value.clone())));
    let streams = match request.pty.as_option() {
        Some(pty) => {
            let (columns, rows) = size(pty);
            Streams::Terminal { columns, rows }
        }
        None => Streams::Pipes { stdin: request.stdin.unwrap_or(true) },
    };
    let (cmd, args) = (config.cmd.clone(), config.args.clone());
    let label = Label { config, tag: request.tag };
    Ok((Program { cmd, args, env, cwd, user, streams }, label))
}

/// What the client is told; the cause's text names no more than the client itself asked for.
fn refusal(error: StartError) -> ConnectError {
    use std::error::Error as _;
    match &error {
        StartError::NoDirectory(_) | StartError::NotADirectory(_) => {
            ConnectError::invalid_argument(error.to_string())
        }
        StartError::OtherUser(_) => ConnectError::permission_denied(format!("failed to {error}")),
        StartError::Frozen(_) => ConnectError::unavailable(format!("failed to {error}")),
        StartError::Streams(source) => {
            tracing::warn!(error = %source, "failed to open a process's streams");
            ConnectError::internal(format!("failed to {error}: {source}"))
        }
        StartError::Run { source, .. } if source.raw_os_error() == Some(libc::E2BIG) => {
            ConnectError::invalid_argument(format!(
                "failed to {error}: the kernel takes less than 128 KiB in one argument or \
                 environment variable, and a quarter of the stack limit (commonly 2 MiB) in all; \
                 send more by standard input or as a file"
            ))
        }
        StartError::Run { .. } => {
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            ConnectError::invalid_argument(format!("failed to {error}: {cause}"))
        }
    }
}

async fn feed(process: &Process, input: Option<ProcessInput>) -> Result<(), ConnectError> {
    let bytes = match (input.and_then(|input| input.input), &process.terminal) {
        (Some(WireInput::Stdin(bytes)), None) | (Some(WireInput::Pty(bytes)), Some(_)) => bytes,
        (Some(WireInput::Stdin(_)), Some(_)) => {
            let message = "process has a terminal: send it pty input";
            return Err(ConnectError::failed_precondition(message));
        }
        (Some(WireInput::Pty(_)), None) => {
            let message = "process has no terminal: send it stdin input";
            return Err(ConnectError::failed_precondition(message));
        }
        (None, _) => {
            return Err(ConnectError::invalid_argument("the request has no input"));
        }
    };
    let Some(input) = &process.input else {
        let message = "stdin is not enabled for this process";
        return Err(ConnectError::failed_precondition(message));
    };
    let Err(error) = input.write(bytes).await else { return Ok(()) };
    // A process that ends closes its input a moment before it is known to be gone; clients let go of
    // one that is not found, and take its exit code.
    process.wait_for_exit(END_WAIT).await;
    if process.has_exited() {
        return Err(ended(process));
    }
    Err(ConnectError::failed_precondition(format!("failed to write to stdin: {error}")))
}

/// What is answered for a process that is known and gone.
fn ended(process: &Process) -> ConnectError {
    ConnectError::not_found(format!("process with pid {} not found: it has ended", process.pid))
}

fn size(pty: &PTY) -> (u16, u16) {
    let (columns, rows) = pty.size.as_option().map_or((0, 0), |size| (size.cols, size.rows));
    let clamp = |cells: u32, default: u16| match cells {
        0 => default,
        cells => u16::try_from(cells).unwrap_or(u16::MAX),
    };
    (clamp(columns, 80), clamp(rows, 24))
}

/// How long a stream may be silent before it must say so.
pub(crate) fn keepalive(ctx: &RequestContext) -> Duration {
    let wish = ctx.header(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok());
    match wish.and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(seconds) if seconds > 0 => Duration::from_secs(seconds),
        _ => KEEPALIVE_DEFAULT,
    }
}
