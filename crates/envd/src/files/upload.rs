//! `POST /files`: writes the body, or each file of a multipart body, to disk as it arrives.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest as _, Multipart, Query, Request, State as Shared};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use http::header::{CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};

use super::form::{self, Allowance, PARTS_MAX, Paced};
use super::reach::{self, Opened};
use super::{FilesQuery, Refusal, authorise, entry, gzip, metadata, path};
use crate::accounts::User;
use crate::auth::Operation;
use crate::http_api::json;
use crate::state::State;
use crate::task;

/// Pieces on their way from the network to the disk.
const QUEUE_PIECES: usize = 8;

/// Uploads at a time: each holds a thread while its client sends, of those that do all file work.
const UPLOADS_MAX: usize = 128;

/// How long one more waits for its turn.
const TURN_LIMIT: Duration = Duration::from_secs(30);

/// Received before the old file is touched, bytes; each upload may hold that much, and one piece.
const HELD_BACK_BYTES: usize = 128 * 1024;

/// Written between two looks at how much the disk still takes, bytes.
const SPACE_CHECK_BYTES: u64 = 16 * 1024 * 1024;

/// What an upload of unknown size leaves free on a large disk, bytes; on a small one a sixteenth.
/// A compressed body of a few megabytes can be gigabytes, and programs inside need room to work.
const RESERVE_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Name of the multipart fields that are files; others are skipped.
///
/// Source: `contract/e2b-wire.md` section 2.1.
const FILE_FIELD: &str = "file";

type Pieces = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// One written file, as the answer lists it.
#[derive(Debug, Serialize)]
pub(super) struct Written {
    path: String,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

impl Written {
    /// The regular file at `path`.
    pub(super) fn new(path: &Path, metadata: BTreeMap<String, String>) -> Written {
        let (path, name) = (path.to_string_lossy().into_owned(), entry::name(path));
        Written { path, name, r#type: "file", metadata }
    }
}

/// Where and for whom to write.
#[derive(Debug, Clone)]
struct Target {
    user: User,
    workdir: Option<String>,
    metadata: BTreeMap<String, String>,
    /// Bytes announced for the whole request; a hint.
    announced: Option<u64>,
    /// How long the client may send nothing before the upload is cut.
    stall_limit: Duration,
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
    static TURNS: Semaphore = Semaphore::const_new(UPLOADS_MAX);
    let turn = tokio::time::timeout(TURN_LIMIT, TURNS.acquire()).await;
    let Ok(Ok(_turn)) = turn else {
        let message = format!("too many uploads at once, of at most {UPLOADS_MAX}: try again");
        return Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, message));
    };
    let (workdir, stall_limit) = (state.default_workdir(), state.settings().upload_stall_limit);
    let target = Target { user, workdir, metadata, announced, stall_limit };
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    let requested = query.path.as_deref().filter(|path| !path.is_empty());
    match kind.as_str() {
        "multipart/form-data" => {
            let allowance = Allowance::default();
            let request = request.map(|body| {
                Body::from_stream(Paced::new(pieces(body, encoded), allowance.clone()))
            });
            multipart(&target, requested, request, &allowance).await
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
    allowance: &Allowance,
) -> Result<Vec<Written>, Refusal> {
    let mut parts = Multipart::from_request(request, &())
        .await
        .map_err(|error| Refusal::bad_request(error.body_text()))?;
    let mut seen = HashSet::new();
    let mut written = Vec::new();
    for _ in 0..PARTS_MAX {
        allowance.renew();
        let next = tokio::time::timeout(target.stall_limit, parts.next_field()).await;
        let next = next.map_err(|_| stalled())?;
        let Some(mut field) = next.map_err(|error| unreadable(&error))? else {
            return Ok(written);
        };
        if field.name() != Some(FILE_FIELD) {
            skip(&mut field, target.stall_limit, allowance).await?;
            continue;
        }
        let named = field.headers().get(CONTENT_DISPOSITION);
        let named = named.and_then(|value| form::file_name(value.as_bytes()));
        let named = requested.map(str::to_owned).or(named).filter(|path| !path.is_empty());
        let Some(named) = named else {
            return Err(Refusal::bad_request("a file of the form has no name"));
        };
        if !seen.insert(named.clone()) {
            let message = format!("the form has more than one file for path '{named}'");
            return Err(Refusal::bad_request(message));
        }
        // The pieces borrow the form, so they are carried over by hand.
        let (sender, job) = begin(target, &named)?;
        let body = stream::unfold(field, |mut field| async move {
            allowance.renew();
            let piece = field.chunk().await.map_err(io::Error::other).transpose()?;
            Some((piece, field))
        });
        written.push(carry(Box::pin(body), sender, job, target.stall_limit).await?);
    }
    let message = format!("the form has more than {PARTS_MAX} parts: send several forms");
    Err(Refusal::bad_request(message))
}

/// Reads a field that is no file to its end.
async fn skip(
    field: &mut Field<'_>,
    stall_limit: Duration,
    allowance: &Allowance,
) -> Result<(), Refusal> {
    loop {
        allowance.renew();
        let piece = tokio::time::timeout(stall_limit, field.chunk()).await;
        let piece = piece.map_err(|_| stalled())?;
        if piece.map_err(|error| unreadable(&error))?.is_none() {
            return Ok(());
        }
    }
}

/// The whole chain: the parser's own text does not say what was wrong with the body.
fn unreadable(error: &MultipartError) -> Refusal {
    let mut message = error.body_text();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        message = error.to_string();
        source = error.source();
    }
    Refusal::bad_request(format!("failed to read the form: {message}"))
}

async fn write(target: &Target, requested: &str, body: Pieces) -> Result<Written, Refusal> {
    let (sender, job) = begin(target, requested)?;
    carry(body, sender, job, target.stall_limit).await
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
    stall_limit: Duration,
) -> Result<Written, Refusal> {
    let feed = async move {
        loop {
            let piece = match tokio::time::timeout(stall_limit, body.next()).await {
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
    }
    let (early, pieces) = hold_back(pieces)?;
    let Opened { mut file, place, is_new } =
        reach::open_to_write(path, &target.user).map_err(|error| refuse(path, &error))?;
    let filled = fill(&mut file, path, target, early, pieces);
    if filled.is_err() {
        // Half of a file would look like a whole one, and keep a full disk full.
        if is_new {
            place.unlink_if(&file);
        } else {
            let _ = file.set_len(0);
        }
    }
    filled
}

/// Takes what comes first. An upload that ends within that, as most do, has come whole before it
/// touches what is there: when it is cut off or damaged, the old file stays. A longer one replaces
/// the old file as it comes; one file beside the other would lose what others hold of it, its
/// links, watchers and readers, and need the disk twice.
fn hold_back(
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<(Vec<Bytes>, Option<mpsc::Receiver<Piece>>), Refusal> {
    let (mut early, mut held_bytes) = (Vec::new(), 0);
    while held_bytes < HELD_BACK_BYTES {
        match pieces.blocking_recv() {
            Some(Piece::Data(bytes)) => {
                held_bytes += bytes.len();
                early.push(bytes);
            }
            Some(Piece::End) => return Ok((early, None)),
            None => return Err(cut_off()),
        }
    }
    Ok((early, Some(pieces)))
}

fn cut_off() -> Refusal {
    Refusal::bad_request("the upload was cut off")
}

fn fill(
    file: &mut File,
    path: &Path,
    target: &Target,
    early: Vec<Bytes>,
    mut pieces: Option<mpsc::Receiver<Piece>>,
) -> Result<Written, Refusal> {
    let refused = |error: io::Error| refuse(path, &error);
    let kind = file.metadata().map_err(refused)?.file_type();
    // Devices are fine to write to; a pipe would take as much as its reader likes.
    if kind.is_fifo() {
        let message = format!("path '{}' is not a regular file", path.display());
        return Err(Refusal::bad_request(message));
    }
    for bytes in early {
        file.write_all(&bytes).map_err(refused)?;
    }
    let mut unchecked_bytes = 0;
    while let Some(pieces) = &mut pieces {
        match pieces.blocking_recv() {
            Some(Piece::Data(bytes)) => {
                file.write_all(&bytes).map_err(refused)?;
                unchecked_bytes += bytes.len() as u64;
                if unchecked_bytes >= SPACE_CHECK_BYTES && kind.is_file() {
                    unchecked_bytes = 0;
                    check_reserve(file, target.announced).map_err(refused)?;
                }
            }
            Some(Piece::End) => break,
            None => return Err(cut_off()),
        }
    }
    file.flush().map_err(refused)?;
    if kind.is_file() {
        metadata::replace(file, &target.metadata).map_err(|error| {
            let shown = path.display();
            Refusal::internal(format!("failed to set the metadata of '{shown}': {error}"))
        })?;
    }
    Ok(Written::new(path, target.metadata.clone()))
}

/// Refuses an upload that cannot fit before it fills the disk.
pub(super) fn check_space(parent: &Path, announced: Option<u64>) -> Result<(), Refusal> {
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

/// Stops an upload of unknown size before it fills the disk to the last byte.
fn check_reserve(file: &File, announced: Option<u64>) -> io::Result<()> {
    if announced.is_some() {
        return Ok(());
    }
    let disk = rustix::fs::fstatvfs(file)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let reserve = RESERVE_MAX_BYTES.min(disk.f_blocks.saturating_mul(disk.f_frsize) / 16);
    if free < reserve { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
}

/// What a failure to write is to the client.
pub(super) fn refuse(path: &Path, error: &io::Error) -> Refusal {
    let shown = path.display();
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
        _ if error.raw_os_error() == Some(libc::ELOOP) => {
            Refusal::bad_request(format!("cannot write '{shown}': {error}"))
        }
        // A pipe without a reader, or a device without a driver.
        _ if error.raw_os_error() == Some(libc::ENXIO) => {
            Refusal::bad_request(format!("path '{shown}' is not a regular file"))
        }
        _ => Refusal::internal(format!("failed to write '{shown}': {error}")),
    }
}
