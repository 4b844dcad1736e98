//! `GET /files`: the bytes of one file, whole or in part. Conditions go by the time of the last
//! change; there are no entity tags, and conditions on such are left aside, as in the original.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Shared};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH,
    CONTENT_RANGE, CONTENT_TYPE, IF_MODIFIED_SINCE, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED,
    RANGE, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::ranges::{self, Selection};
use super::{FilesQuery, Refusal, authorise, entry, gzip, metadata, path, reach, sending};
use crate::accounts::User;
use crate::auth::Operation;
use crate::state::State;
use crate::task;

/// Read at once, bytes. Files up to this size go out in one piece, without a second hand-over
/// to the thread that reads.
const PIECE_BYTES: usize = 64 * 1024;

/// Answers with the file, or says why not.
pub async fn get(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    query: Result<Query<FilesQuery>, QueryRejection>,
) -> Response {
    let query = match query {
        Ok(Query(query)) => query,
        Err(error) => return Refusal::bad_request(error.body_text()).into_response(),
    };
    download(&state, &headers, &query).await.unwrap_or_else(|refusal| refusal.into_response())
}

async fn download(
    state: &State,
    headers: &HeaderMap,
    query: &FilesQuery,
) -> Result<Response, Refusal> {
    let user = authorise(state, headers, Operation::Read, query)?;
    let requested = query.path.as_deref().unwrap_or_default();
    let path = path::resolve(requested, &user.home, state.default_workdir().as_deref())
        .map_err(|error| Refusal::bad_request(error.to_string()))?;
    let partial = [RANGE, IF_RANGE, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE]
        .iter()
        .any(|name| headers.contains_key(name));
    let compress = wants_gzip(headers.get(ACCEPT_ENCODING), partial)?;
    let range = headers.get(RANGE).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let validators = Validators::of(headers);
    let found = task::blocking(move || open(path, &user, range.as_deref(), &validators)).await??;
    Ok(respond(found, compress))
}

/// Whether the answer is gzip. A client that lists several encodings has its library's defaults
/// and takes identity as well, which costs no processor time; one that lists gzip alone wants it.
fn wants_gzip(header: Option<&HeaderValue>, partial: bool) -> Result<bool, Refusal> {
    let Some(text) = header.and_then(|value| value.to_str().ok()) else { return Ok(false) };
    let mut accepted = Vec::new();
    let mut identity_refused = false;
    for item in text.split(',') {
        let mut parts = item.split(';').map(str::trim);
        let coding = parts.next().unwrap_or_default().to_ascii_lowercase();
        let weight = parts.find_map(|part| part.strip_prefix("q="));
        let refused = weight.is_some_and(|q| q.parse::<f32>().is_ok_and(|q| q <= 0.0));
        match (coding.as_str(), refused) {
            ("", _) => {}
            ("identity" | "*", true) => identity_refused = true,
            (_, true) => {}
            (_, false) => accepted.push(coding),
        }
    }
    if accepted.iter().any(|coding| coding == "identity") {
        identity_refused = false;
    }
    let gzip = accepted.iter().any(|coding| coding == "gzip");
    let only_gzip = gzip && accepted.len() == 1;
    match (identity_refused, gzip, partial) {
        (true, true, false) => Ok(true),
        (true, _, _) => Err(Refusal::new(
            StatusCode::NOT_ACCEPTABLE,
            "no acceptable encoding: this file can be sent as identity or gzip, \
             and its parts as identity only",
        )),
        (false, _, false) => Ok(only_gzip),
        (false, _, true) => Ok(false),
    }
}

/// The request's conditions on the file's time.
struct Validators {
    modified_since: Option<SystemTime>,
    unmodified_since: Option<SystemTime>,
    if_range: Option<Option<SystemTime>>,
}

impl Validators {
    fn of(headers: &HeaderMap) -> Validators {
        let date = |name: HeaderName| {
            let text = headers.get(name)?.to_str().ok()?;
            httpdate::parse_http_date(text).ok()
        };
        let if_range = headers.contains_key(IF_RANGE).then(|| date(IF_RANGE));
        Validators {
            modified_since: date(IF_MODIFIED_SINCE),
            unmodified_since: date(IF_UNMODIFIED_SINCE),
            if_range,
        }
    }
}

/// A file ready to be sent.
struct Found {
    name: String,
    path: PathBuf,
    modified: SystemTime,
    metadata: BTreeMap<String, String>,
    size: u64,
    content: Content,
}

enum Content {
    /// The client has it already.
    NotModified,
    /// It changed behind the client's back.
    PreconditionFailed,
    /// The range lies outside.
    Unsatisfiable,
    /// All of what is asked for, read.
    Ready { bytes: Bytes, part: Option<(u64, u64)> },
    /// To be read on.
    Open { first: Bytes, file: File, rest: u64, part: Option<(u64, u64)> },
    /// As `Open`, of a file that does not know its size, as those under `/proc`.
    Endless { first: Bytes, file: File },
}

fn open(
    path: PathBuf,
    user: &User,
    range: Option<&str>,
    conditions: &Validators,
) -> Result<Found, Refusal> {
    let mut file = reach::open_to_read(&path, user).map_err(|error| refuse_open(&path, &error))?;
    let failed = |error: io::Error| {
        Refusal::internal(format!("failed to read '{}': {error}", path.display()))
    };
    let attributes = file.metadata().map_err(failed)?;
    if attributes.is_dir() {
        return Err(Refusal::bad_request(format!("path '{}' is a directory", path.display())));
    }
    if !attributes.is_file() {
        let message = format!("path '{}' is not a regular file", path.display());
        return Err(Refusal::bad_request(message));
    }
    let modified = attributes.modified().map_err(failed)?;
    let size = attributes.len();
    let content = match check(conditions, modified) {
        Some(content) => content,
        None => {
            let range = range.filter(|_| match conditions.if_range {
                None => true,
                Some(at) => at.is_some_and(|at| seconds(at) == seconds(modified)),
            });
            select(&mut file, range, size).map_err(failed)?
        }
    };
    let metadata = metadata::read(&file);
    Ok(Found { name: entry::name(&path), path, modified, metadata, size, content })
}

fn refuse_open(path: &Path, error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            Refusal::new(StatusCode::NOT_FOUND, format!("path '{}' does not exist", path.display()))
        }
        io::ErrorKind::PermissionDenied => Refusal::new(
            StatusCode::FORBIDDEN,
            format!("failed to read '{}': {error}", path.display()),
        ),
        _ if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENAMETOOLONG)) => {
            Refusal::bad_request(format!("failed to read '{}': {error}", path.display()))
        }
        _ => Refusal::internal(format!("failed to open '{}': {error}", path.display())),
    }
}

/// HTTP dates have whole seconds.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn check(conditions: &Validators, modified: SystemTime) -> Option<Content> {
    let modified = seconds(modified);
    if conditions.unmodified_since.is_some_and(|at| modified > seconds(at)) {
        return Some(Content::PreconditionFailed);
    }
    if conditions.modified_since.is_some_and(|at| modified <= seconds(at)) {
        return Some(Content::NotModified);
    }
    None
}

fn select(file: &mut File, range: Option<&str>, size: u64) -> io::Result<Content> {
    let (start, end, part) = match ranges::select(range, size) {
        Selection::None => return Ok(Content::Unsatisfiable),
        Selection::Whole => (0, size, None),
        Selection::Part { start, end } => (start, end, Some((start, end))),
    };
    if start > 0 {
        file.seek(SeekFrom::Start(start))?;
    }
    let (length, sized) = if size == 0 { (u64::MAX, false) } else { (end - start, true) };
    let mut first = Vec::new();
    file.by_ref().take(length.min(PIECE_BYTES as u64)).read_to_end(&mut first)?;
    let first = Bytes::from(first);
    let read = first.len() as u64;
    let file = file.try_clone()?;
    Ok(match (sized, read < PIECE_BYTES as u64 || read == length) {
        (_, true) => Content::Ready { bytes: first, part },
        (true, false) => Content::Open { first, file, rest: length - read, part },
        (false, false) => Content::Endless { first, file },
    })
}

fn respond(found: Found, compress: bool) -> Response {
    let Found { name, path, modified, metadata, size, content } = found;
    let (status, part, body, length) = match content {
        Content::NotModified => (StatusCode::NOT_MODIFIED, None, Body::empty(), None),
        Content::PreconditionFailed => {
            return Refusal::new(StatusCode::PRECONDITION_FAILED, "the file was modified")
                .into_response();
        }
        Content::Unsatisfiable => {
            let message = format!("the range lies outside the file's {size} bytes");
            let mut response =
                Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, message).into_response();
            set(response.headers_mut(), CONTENT_RANGE, &format!("bytes */{size}"));
            return response;
        }
        Content::Ready { bytes, part } => {
            let length = bytes.len() as u64;
            (StatusCode::OK, part, Body::from(bytes), Some(length))
        }
        Content::Open { first, file, rest, part } => {
            let length = first.len() as u64 + rest;
            (StatusCode::OK, part, stream(first, file, rest), Some(length))
        }
        Content::Endless { first, file } => {
            (StatusCode::OK, None, stream(first, file, u64::MAX), None)
        }
    };
    let compress = compress && status == StatusCode::OK && part.is_none();
    let body = if compress { encode(body) } else { body };
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    set(headers, LAST_MODIFIED, &httpdate::fmt_http_date(modified));
    set(headers, ACCEPT_RANGES, "bytes");
    set(headers, VARY, "Accept-Encoding");
    set(headers, CONTENT_TYPE, content_type(&path));
    set(headers, CONTENT_DISPOSITION, &disposition(&name));
    metadata::to_headers(&metadata, headers);
    match (compress, length) {
        (true, _) => set(headers, CONTENT_ENCODING, "gzip"),
        (false, Some(length)) => set(headers, CONTENT_LENGTH, &length.to_string()),
        (false, None) => {}
    }
    if let Some((start, end)) = part {
        set(headers, CONTENT_RANGE, &format!("bytes {start}-{}/{size}", end - 1));
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    response
}

fn stream(first: Bytes, file: File, rest: u64) -> Body {
    Body::from_stream(sending::pieces(first, file, rest))
}

fn encode(body: Body) -> Body {
    let pieces = body.into_data_stream().map(|piece| piece.map_err(io::Error::other));
    Body::from_stream(gzip::encode(Box::pin(pieces)))
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The file's name for browsers, in the form that carries any text. Source: RFC 6266, RFC 8187.
fn disposition(name: &str) -> String {
    let mut value = String::from("inline; filename*=UTF-8''");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            value.push(char::from(byte));
        } else {
            value.push_str(&format!("%{byte:02X}"));
        }
    }
    value
}

/// What a browser should take the file for, by its name; bytes when in doubt.
fn content_type(path: &Path) -> &'static str {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("txt" | "md" | "log" | "csv" | "py" | "sh" | "rs") => "text/plain; charset=utf-8",
        Some("html" | "htm") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("json") => "application/json",
        Some("xml") => "text/xml; charset=utf-8",
        Some("png") => "image/png",
        Some("jpg" | "jpeg") => "image/jpeg",
        Some("gif") => "image/gif",
        Some("svg") => "image/svg+xml",
        Some("webp") => "image/webp",
        Some("pdf") => "application/pdf",
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_for_those_who_ask_for_nothing_else() {
        let wants = |text: &'static str, partial| {
            let header = HeaderValue::from_static(text);
            wants_gzip(Some(&header), partial).map_err(|refusal| refusal.status.as_u16())
        };
        assert_eq!(wants("gzip", false), Ok(true));
        assert_eq!(wants("gzip", true), Ok(false));
        assert_eq!(wants("gzip, deflate, br", false), Ok(false));
        assert_eq!(wants("identity", false), Ok(false));
        assert_eq!(wants("gzip;q=0", false), Ok(false));
        assert_eq!(wants("identity;q=0, gzip", false), Ok(true));
        assert_eq!(wants("gzip, br, *;q=0", false), Ok(true));
        assert_eq!(wants("identity;q=0, gzip", true), Err(406));
        assert_eq!(wants("br, identity;q=0", false), Err(406));
        assert_eq!(wants("identity, *;q=0", false), Ok(false));
    }

    #[test]
    fn any_name_fits_the_disposition() {
        assert_eq!(disposition("a b\u{e9}.txt"), "inline; filename*=UTF-8''a%20b%C3%A9.txt");
    }

    #[test]
    fn any_list_of_encodings_is_answered() {
        crate::fuzz::run("accept_encoding", &["gzip", ";q=0", "identity", "*", ","], |input| {
            let Ok(header) = HeaderValue::from_bytes(input) else { return 0 };
            let whole = wants_gzip(Some(&header), false).map_err(|refusal| refusal.status.as_u16());
            let part = wants_gzip(Some(&header), true).map_err(|refusal| refusal.status.as_u16());
            assert!(part != Ok(true), "parts are never compressed");
            crate::fuzz::outcome((whole, part))
        });
    }
}
