//! The file service: RPC requests in, tree operations and watches out.
//!
//! Source of behaviour and codes: `contract/e2b-wire.md` section 2.4.

use std::path::PathBuf;
use std::sync::Arc;

use belljar_wire::rpc::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, Filesystem, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse,
    MoveRequest, MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest,
    RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};
use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};

use super::path;
use super::tree::{self, TreeError};
use super::watch::{self, Wanted, WatchError, Watchers};
use crate::accounts::User;
use crate::process::service::{caller, keepalive};
use crate::state::State;
use crate::task;

/// Answers the RPCs.
pub(crate) struct FileService {
    state: Arc<State>,
    watchers: Arc<Watchers>,
}

impl FileService {
    /// Serves this machine's files.
    pub(crate) fn new(state: Arc<State>) -> FileService {
        FileService { state, watchers: Arc::default() }
    }

    fn resolve(&self, ctx: &RequestContext, path: &str) -> Result<(User, PathBuf), ConnectError> {
        let user = caller(ctx)?;
        let path = path::resolve(path, &user.home, self.state.default_workdir().as_deref())
            .map_err(|error| ConnectError::invalid_argument(error.to_string()))?;
        Ok((user, path))
    }
}

#[expect(refining_impl_trait, reason = "nobody else names these return types")]
impl Filesystem for FileService {
    async fn stat(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<StatResponse> {
        let (_, path) = self.resolve(&ctx, request.path)?;
        let entry = run(move || tree::stat(&path)).await?;
        Response::ok(StatResponse { entry: Some(entry).into(), ..StatResponse::default() })
    }

    async fn make_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let (user, path) = self.resolve(&ctx, request.path)?;
        let entry = run(move || tree::make_dir(&path, &user)).await?;
        Response::ok(MakeDirResponse { entry: Some(entry).into(), ..MakeDirResponse::default() })
    }

    async fn r#move(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<MoveResponse> {
        let (user, from) = self.resolve(&ctx, request.source)?;
        let (_, to) = self.resolve(&ctx, request.destination)?;
        let entry = run(move || tree::rename(&from, &to, &user)).await?;
        Response::ok(MoveResponse { entry: Some(entry).into(), ..MoveResponse::default() })
    }

    async fn list_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let depth = request.depth;
        let (_, path) = self.resolve(&ctx, request.path)?;
        let entries = run(move || tree::list(&path, depth)).await?;
        Response::ok(ListDirResponse { entries, ..ListDirResponse::default() })
    }

    async fn remove(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<RemoveResponse> {
        let (user, path) = self.resolve(&ctx, request.path)?;
        run(move || tree::remove(&path, &user)).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let (_, path) = self.resolve(&ctx, request.path)?;
        let wanted = Wanted {
            path,
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watching = self.watchers.open(&self.state.tasks, wanted).await;
        let watching = watching.map_err(watch_refusal)?;
        Response::stream_ok(watch::stream(watching, keepalive(&ctx)))
    }

    async fn create_watcher(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        let (_, path) = self.resolve(&ctx, request.path)?;
        let wanted = Wanted {
            path,
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watcher_id = self.watchers.add(&self.state.tasks, wanted).await;
        let watcher_id = watcher_id.map_err(watch_refusal)?;
        Response::ok(CreateWatcherResponse { watcher_id, ..CreateWatcherResponse::default() })
    }

    async fn get_watcher_events(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        let events = self.watchers.take_events(request.watcher_id).map_err(watch_refusal)?;
        Response::ok(GetWatcherEventsResponse { events, ..GetWatcherEventsResponse::default() })
    }

    async fn remove_watcher(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        self.watchers.remove(request.watcher_id).map_err(watch_refusal)?;
        Response::ok(RemoveWatcherResponse::default())
    }
}

async fn run<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, TreeError> + Send + 'static,
) -> Result<T, ConnectError> {
    let outcome = task::blocking(job).await;
    outcome.map_err(|lost| ConnectError::internal(lost.to_string()))?.map_err(tree_refusal)
}

fn tree_refusal(error: TreeError) -> ConnectError {
    match &error {
        TreeError::NotFound(_) => ConnectError::not_found(error.to_string()),
        TreeError::Exists(_) | TreeError::NotEmpty(_) => {
            ConnectError::already_exists(error.to_string())
        }
        TreeError::NotADirectory(_)
        | TreeError::IsADirectory(_)
        | TreeError::IntoItself(_)
        | TreeError::Mounted { .. } => ConnectError::invalid_argument(error.to_string()),
        TreeError::TooMany(_) => ConnectError::resource_exhausted(error.to_string()),
        TreeError::Io { source, .. } => {
            use std::io::ErrorKind as Kind;
            let message = format!("failed to {error}: {source}");
            match source.kind() {
                Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
                    ConnectError::permission_denied(message)
                }
                Kind::StorageFull | Kind::QuotaExceeded => {
                    ConnectError::resource_exhausted(message)
                }
                Kind::InvalidInput | Kind::InvalidFilename => {
                    ConnectError::invalid_argument(message)
                }
                _ if source.raw_os_error() == Some(libc::ELOOP) => {
                    ConnectError::invalid_argument(message)
                }
                _ => ConnectError::internal(message),
            }
        }
    }
}

fn watch_refusal(error: WatchError) -> ConnectError {
    let message = error.to_string();
    match &error {
        WatchError::NotFound(_) | WatchError::NoWatcher(_) => ConnectError::not_found(message),
        WatchError::NotADirectory(_) | WatchError::NetworkMount(_) => {
            ConnectError::invalid_argument(message)
        }
        WatchError::TooMany | WatchError::TooLarge(_) => ConnectError::resource_exhausted(message),
        WatchError::Lost(_) => ConnectError::data_loss(message),
        WatchError::JobLost(_) => ConnectError::internal(message),
        WatchError::Io { source, .. } => {
            let message = format!("failed to {message}: {source}");
            match source.kind() {
                std::io::ErrorKind::PermissionDenied => ConnectError::permission_denied(message),
                _ => ConnectError::internal(message),
            }
        }
    }
}
