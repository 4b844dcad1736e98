//! `POST /files/compose`: joins parts that were uploaded one by one into one file.
//!
//! The parts are copied into a new file beside the destination, which then takes its place in one
//! step; only after that are the parts removed. Whatever fails before leaves parts and destination
//! as they were. The destination may itself be one of the parts: that appends to it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use serde::Deserialize;

use super::reach::{self, Last, Place};
use super::upload::{self, Written};
use super::{Refusal, metadata, path};
use crate::accounts::User;
use crate::auth;
use crate::http_api::json;
use crate::state::State;
use crate::task;

/// Most parts one call joins: a file of 100 GiB in parts of 10 MiB.
const PARTS_MAX: usize = 10_000;

/// Longest body, bytes: room for that many paths of ordinary length.
pub(crate) const BODY_MAX_BYTES: usize = 4 * 1024 * 1024;

/// The body.
///
/// Source: `contract/e2b-wire.md` section 2.1.
#[derive(Debug, Deserialize)]
pub(super) struct ComposeRequest {
    pub(super) source_paths: Vec<String>,
    pub(super) destination: String,
    #[serde(default)]
    pub(super) username: Option<String>,
}

/// Joins the parts and describes the file.
pub async fn post(
    Shared(state): Shared<Arc<State>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(error) => return Refusal::new(error.status(), error.body_text()).into_response(),
    };
    match compose(&state, &body).await {
        Ok(written) => json(StatusCode::OK, &written),
        Err(refusal) => refusal.into_response(),
    }
}

async fn compose(state: &State, body: &[u8]) -> Result<Written, Refusal> {
    let request = parse(body)?;
    let user = auth::find_user(state, request.username.as_deref())?;
    let workdir = state.default_workdir();
    let resolve = |path: &str| {
        path::resolve(path, &user.home, workdir.as_deref())
            .map_err(|error| Refusal::bad_request(error.to_string()))
    };
    let destination = resolve(&request.destination)?;
    let parts: Vec<PathBuf> =
        request.source_paths.iter().map(|path| resolve(path)).collect::<Result<_, _>>()?;
    task::blocking(move || join(&parts, destination, &user)).await?
}

/// Reads the body, whose size the route has bounded.
pub(super) fn parse(body: &[u8]) -> Result<ComposeRequest, Refusal> {
    let request: ComposeRequest = serde_json::from_slice(body)
        .map_err(|error| Refusal::bad_request(format!("invalid body: {error}")))?;
    let count = request.source_paths.len();
    if count == 0 || count > PARTS_MAX {
        let message = format!("source_paths has {count} paths; 1 to {PARTS_MAX} can be joined");
        return Err(Refusal::bad_request(message));
    }
    if request.destination.is_empty() || request.source_paths.iter().any(String::is_empty) {
        return Err(Refusal::bad_request("source_paths and destination must not be empty paths"));
    }
    Ok(request)
}

/// One part, checked but not held open: there may be more of them than descriptors.
struct Part {
    place: Place,
    stat: Stat,
}

fn join(parts: &[PathBuf], destination: PathBuf, user: &User) -> Result<Written, Refusal> {
    let mut found = Vec::with_capacity(parts.len());
    let mut total_bytes = 0_u64;
    for part in parts {
        let part = find_part(part, user)?;
        total_bytes = total_bytes.saturating_add(u64::try_from(part.stat.st_size).unwrap_or(0));
        found.push(part);
    }
    let mut ids: Vec<_> = found.iter().map(|part| (part.stat.st_dev, part.stat.st_ino)).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Refusal::bad_request("source_paths names a file more than once"));
    }
    let refused = |error: io::Error| upload::refuse(&destination, &error);
    let mut place = reach::reach(&destination, user, Last::Follow).map_err(refused)?;
    let old = place.stat().map_err(|error| refused(error.into()))?;
    if let Some(old) = &old {
        check_kind(old, &destination)?;
    }
    if let Some(parent) = destination.parent() {
        upload::check_space(parent, Some(total_bytes))?;
    }
    place.make_missing(user).map_err(refused)?;
    let (file, name) = temporary(&place).map_err(refused)?;
    let outcome = fill(&file, &found, old.as_ref()).and_then(|()| {
        place.give(&file, user).map_err(|error| refused(error.into()))?;
        place
            .act(|| rustix::fs::renameat(&place.dir, &name, &place.dir, &place.name))
            .map_err(|error| refused(place.explain(error)))
    });
    if let Err(refusal) = outcome {
        // Its name is random and was made here, so it can be nobody else's.
        let _ = place.act(|| rustix::fs::unlinkat(&place.dir, &name, AtFlags::empty()));
        return Err(refusal);
    }
    remove_parts(&found, &place, &destination)?;
    Ok(Written::new(&destination, metadata::read(&File::from(file))))
}

fn find_part(path: &std::path::Path, user: &User) -> Result<Part, Refusal> {
    let missing =
        || Refusal::new(StatusCode::NOT_FOUND, format!("path '{}' does not exist", path.display()));
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => missing(),
        _ => upload::refuse(path, &error),
    };
    let place = reach::reach(path, user, Last::Keep).map_err(failed)?;
    let stat = place.stat().map_err(|error| failed(error.into()))?.ok_or_else(missing)?;
    check_kind(&stat, path)?;
    // Asked now, as the part is removed only when everything else is done.
    place
        .act(|| rustix::fs::accessat(&place.dir, ".", Access::WRITE_OK, AtFlags::EACCESS))
        .map_err(|error| failed(place.explain(error)))?;
    Ok(Part { place, stat })
}

fn check_kind(stat: &Stat, path: &std::path::Path) -> Result<(), Refusal> {
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "is a directory",
        _ => "is not a regular file",
    };
    Err(Refusal::bad_request(format!("path '{}' {what}", path.display())))
}

/// A new file in the destination's directory, under a name nobody can foresee.
fn temporary(place: &Place) -> io::Result<(OwnedFd, OsString)> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o666);
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = OsString::from(format!(".compose-{}", hex::encode(random)));
    let file = place
        .act(|| rustix::fs::openat(&place.dir, &name, flags, mode))
        .map_err(|error| place.explain(error))?;
    Ok((file, name))
}

/// Copies the parts, by the kernel where it can, and takes on the mode of the file to be replaced.
fn fill(file: &OwnedFd, parts: &[Part], old: Option<&Stat>) -> Result<(), Refusal> {
    let mut out =
        File::from(file.try_clone().map_err(|error| Refusal::internal(error.to_string()))?);
    for Part { place, stat } in parts {
        let failed = |error: io::Error| upload::refuse(&place.path, &error);
        let part = place.open(OFlags::RDONLY | OFlags::NONBLOCK);
        let part = File::from(part.map_err(|error| failed(place.explain(error)))?);
        let now = rustix::fs::fstat(&part).map_err(|error| failed(error.into()))?;
        let changed =
            (now.st_dev, now.st_ino, now.st_size) != (stat.st_dev, stat.st_ino, stat.st_size);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let copied =
            if changed { 0 } else { io::copy(&mut part.take(size), &mut out).map_err(failed)? };
        if changed || copied != size {
            let message = format!("path '{}' changed while it was read", place.path.display());
            return Err(Refusal::new(StatusCode::CONFLICT, message));
        }
    }
    if let Some(old) = old {
        let mode = Mode::from_raw_mode(old.st_mode & 0o777);
        rustix::fs::fchmod(file, mode).map_err(|error| Refusal::internal(error.to_string()))?;
    }
    Ok(())
}

/// Removes the parts, but not what is now the destination.
fn remove_parts(
    parts: &[Part],
    destination: &Place,
    shown: &std::path::Path,
) -> Result<(), Refusal> {
    let mut left = None;
    for Part { place, stat } in parts {
        if place.is_same(destination) {
            continue;
        }
        // A name that means another file by now is not ours to remove.
        let mine = place
            .stat()
            .ok()
            .flatten()
            .is_some_and(|now| (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino));
        let removed = match mine {
            true => place.act(|| rustix::fs::unlinkat(&place.dir, &place.name, AtFlags::empty())),
            false => Ok(()),
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => left = Some((place.path.clone(), place.explain(error))),
        }
    }
    match left {
        None => Ok(()),
        Some((part, error)) => Err(Refusal::internal(format!(
            "'{}' is complete, but failed to remove its part '{}': {error}",
            shown.display(),
            part.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_body_is_read_within_limits_or_refused() {
        crate::fuzz::run("compose", &["\"source_paths\":[", "\"a\",", "null"], |input| {
            let Ok(request) = parse(input) else { return 0 };
            assert!((1..=PARTS_MAX).contains(&request.source_paths.len()));
            assert!(!request.destination.is_empty());
            crate::fuzz::outcome((request.source_paths.len(), request.username.is_some()))
        });
    }
}
