//! `POST /files`: writes the body, or each file of a multipart body, to disk as it arrives.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest as _, Multipart, Query, Request, State as Shared};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{FilesQuery, Refusal, authorise, entry, gzip, metadata, path, tree};
use crate::accounts::User;
use crate::auth::Operation;
use crate::http_api::json;
use crate::state::State;
use crate::task;

/// Pieces on their way from the network to the disk.
const QUEUE_PIECES: usize = 8;

/// How long a client may send nothing before its upload is cut.
const STALL_LIMIT: Duration = Duration::from_secs(120);

/// Name of the multipart fields that are files; others are skipped.
///
/// Source: `contract/e2b-wire.md` section 2.1.
const FILE_FIELD: &str = "file";

type Pieces = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// One written file, as the answer lists it.
#[derive(Debug, Serialize)]
struct Written {
    path: String,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

/// Where and for whom to write.
#[derive(Debug, Clone)]
struct Target {
    user: User,
    workdir: Option<String>,
    metadata: BTreeMap<String, String>,
    /// Bytes announced for the whole request; a hint.
    announced: Option<u64>,
}

/// Writes what the body holds and lists it.
pub async fn post(
    Shared(state): Shared<Arc<State>>,
    query: Result<Query<FilesQuery>, QueryRejection>,
    request: Request,
) -> Response {
    let query = match query {
        Ok(Query(query)) => query,
        Err(error) => return Refusal::bad_request(error.body_text()).into_response(),
    };
    match upload(&state, &query, request).await {
        Ok(written) => json(StatusCode::OK, &written),
        Err(refusal) => refusal.into_response(),
    }
}

async fn upload(
    state: &State,
    query: &FilesQuery,
    request: Request,
) -> Result<Vec<Written>, Refusal> {
    let headers = request.headers();
    let user = authorise(state, headers, Operation::Write, query)?;
    let metadata =
        metadata::from_headers(headers).map_err(|error| Refusal::bad_request(error.to_string()))?;
    let encoded = is_gzip(headers)?;
    let announced = match encoded {
        true => None,
        false => number(headers),
    };
    let target = Target { user, workdir: state.default_workdir(), metadata, announced };
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    let requested = query.path.as_deref().filter(|path| !path.is_empty());
    match kind.as_str() {
        "multipart/form-data" => {
            let request = request.map(|body| match encoded {
                true => Body::from_stream(pieces(body, true)),
                false => body,
            });
            multipart(&target, requested, request).await
        }
        "application/octet-stream" => {
            let Some(requested) = requested else {
                return Err(Refusal::bad_request("the query must name a path"));
            };
            let body = pieces(request.into_body(), encoded);
            Ok(vec![write(&target, requested, body).await?])
        }
        other => Err(Refusal::bad_request(format!(
            "unsupported content type '{other}': send multipart/form-data or \
             application/octet-stream"
        ))),
    }
}

fn is_gzip(headers: &HeaderMap) -> Result<bool, Refusal> {
    let Some(value) = headers.get(CONTENT_ENCODING) else { return Ok(false) };
    match value.to_str().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "" | "identity" => Ok(false),
        "gzip" => Ok(true),
        other => {
            Err(Refusal::bad_request(format!("unsupported content encoding '{other}': send gzip")))
        }
    }
}

fn number(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn pieces(body: Body, encoded: bool) -> Pieces {
    let pieces: Pieces =
        Box::pin(body.into_data_stream().map(|piece| piece.map_err(io::Error::other)));
    if encoded { gzip::decode(pieces) } else { pieces }
}

async fn multipart(
    target: &Target,
    requested: Option<&str>,
    request: Request,
) -> Result<Vec<Written>, Refusal> {
    let mut parts = Multipart::from_request(request, &())
        .await
        .map_err(|error| Refusal::bad_request(error.body_text()))?;
    let mut seen = HashSet::new();
    let mut written = Vec::new();
    loop {
        let next = tokio::time::timeout(STALL_LIMIT, parts.next_field()).await;
        let next = next.map_err(|_| stalled())?;
        let Some(field) = next.map_err(|error| Refusal::bad_request(error.body_text()))? else {
            return Ok(written);
        };
        if field.name() != Some(FILE_FIELD) {
            continue;
        }
        let named = requested.or(field.file_name()).filter(|path| !path.is_empty());
        let Some(named) = named.map(str::to_owned) else {
            return Err(Refusal::bad_request("a file of the form has no name"));
        };
        if !seen.insert(named.clone()) {
            let message = format!("the form has more than one file for path '{named}'");
            return Err(Refusal::bad_request(message));
        }
        // The pieces borrow the form, so they are carried over by hand.
        let (sender, job) = begin(target, &named)?;
        let body = stream::unfold(field, |mut field| async move {
            let piece = field.chunk().await.map_err(io::Error::other).transpose()?;
            Some((piece, field))
        });
        written.push(carry(Box::pin(body), sender, job).await?);
    }
}

async fn write(target: &Target, requested: &str, body: Pieces) -> Result<Written, Refusal> {
    let (sender, job) = begin(target, requested)?;
    carry(body, sender, job).await
}

/// What travels to the thread that writes. Without `End` the upload was cut off.
enum Piece {
    Data(Bytes),
    End,
}

type Job = Pin<Box<dyn Future<Output = Result<Result<Written, Refusal>, task::JobLost>> + Send>>;

fn begin(target: &Target, requested: &str) -> Result<(mpsc::Sender<Piece>, Job), Refusal> {
    let path = path::resolve(requested, &target.user.home, target.workdir.as_deref())
        .map_err(|error| Refusal::bad_request(error.to_string()))?;
    let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
    let target = target.clone();
    let job = task::blocking(move || write_blocking(&path, &target, receiver));
    Ok((sender, Box::pin(job)))
}

async fn carry(
    mut body: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send + '_>>,
    sender: mpsc::Sender<Piece>,
    job: Job,
) -> Result<Written, Refusal> {
    let feed = async move {
        loop {
            let piece = match tokio::time::timeout(STALL_LIMIT, body.next()).await {
                Err(_) => return Err(stalled()),
                Ok(None) => Piece::End,
                Ok(Some(Ok(bytes))) => Piece::Data(bytes),
                Ok(Some(Err(error))) => {
                    return Err(Refusal::bad_request(format!("failed to read the body: {error}")));
                }
            };
            let last = matches!(piece, Piece::End);
            // A closed queue means that writing failed; its own error says why.
            if sender.send(piece).await.is_err() || last {
                return Ok(());
            }
        }
    };
    let (fed, written) = tokio::join!(feed, job);
    fed?;
    written?
}

fn stalled() -> Refusal {
    Refusal::new(StatusCode::REQUEST_TIMEOUT, "the upload stalled")
}

fn write_blocking(
    path: &Path,
    target: &Target,
    pieces: mpsc::Receiver<Piece>,
) -> Result<Written, Refusal> {
    if path.is_dir() {
        return Err(Refusal::bad_request(format!("path '{}' is a directory", path.display())));
    }
    if let Some(parent) = path.parent() {
        check_space(parent, target.announced)?;
        tree::make_dirs(parent, &target.user).map_err(|(at, error)| refuse(&at, &error))?;
    }
    let is_new = !path.exists();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        // Opening a pipe nobody reads would wait for ever; it is refused below instead.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| refuse(path, &error))?;
    let filled = fill(file, path, target, pieces);
    if filled.is_err() && is_new {
        // Half a new file would look like a whole one, and keep a full disk full.
        let _ = std::fs::remove_file(path);
    }
    filled
}

fn fill(
    mut file: File,
    path: &Path,
    target: &Target,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<Written, Refusal> {
    let refused = |error: io::Error| refuse(path, &error);
    // Devices are fine to write to; a pipe would take as much as its reader likes.
    if file.metadata().map_err(refused)?.file_type().is_fifo() {
        let message = format!("path '{}' is not a regular file", path.display());
        return Err(Refusal::bad_request(message));
    }
    tree::give(path, &target.user).map_err(refused)?;
    loop {
        match pieces.blocking_recv() {
            Some(Piece::Data(bytes)) => file.write_all(&bytes).map_err(refused)?,
            Some(Piece::End) => break,
            None => return Err(Refusal::bad_request("the upload was cut off")),
        }
    }
    file.flush().map_err(refused)?;
    metadata::replace(path, &target.metadata).map_err(|error| {
        Refusal::internal(format!("failed to set the metadata of '{}': {error}", path.display()))
    })?;
    Ok(Written {
        path: path.to_string_lossy().into_owned(),
        name: entry::name(path),
        r#type: "file",
        metadata: target.metadata.clone(),
    })
}

/// Refuses an upload that cannot fit before it fills the disk.
fn check_space(parent: &Path, announced: Option<u64>) -> Result<(), Refusal> {
    let Some(announced) = announced else { return Ok(()) };
    let Some(existing) = parent.ancestors().find(|above| above.exists()) else { return Ok(()) };
    let Ok(disk) = rustix::fs::statvfs(existing) else { return Ok(()) };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if announced > free {
        let message =
            format!("not enough disk space: {announced} bytes to write, {free} bytes free");
        return Err(Refusal::new(StatusCode::INSUFFICIENT_STORAGE, message));
    }
    Ok(())
}

fn refuse(path: &Path, error: &io::Error) -> Refusal {
    let shown = PathBuf::from(path);
    let shown = shown.display();
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::new(
            StatusCode::INSUFFICIENT_STORAGE,
            format!("not enough disk space to write '{shown}'"),
        ),
        io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::InvalidFilename => {
            Refusal::bad_request(format!("cannot write '{shown}': {error}"))
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Refusal::new(StatusCode::FORBIDDEN, format!("cannot write '{shown}': {error}"))
        }
        // A pipe without a reader, or a device without a driver.
        _ if error.raw_os_error() == Some(libc::ENXIO) => {
            Refusal::bad_request(format!("path '{shown}' is not a regular file"))
        }
        _ => Refusal::internal(format!("failed to write '{shown}': {error}")),
    }
}
