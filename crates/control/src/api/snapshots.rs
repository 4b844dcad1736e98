//! Snapshots that sandboxes are started from, and forks. Source: contract section 1.2.

use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_domain::{Kind, SandboxId};
use belljar_wire::rest;
use http::{HeaderMap, StatusCode};

use super::auth::Caller;
use super::body::OptionalJson;
use super::error::ApiError;
use super::list::insert_next_token;
use super::page::{Position, Wanted};
use super::path::Segments;
use super::query::Query;
use super::sandboxes::{DEFAULT_SECONDS_V1, Named};
use super::{create, later, shapes};
use crate::app::App;
use crate::copies;
use crate::creation::find_snapshot;
use crate::store::{DEFAULT_TAG, SnapshotName, SnapshotRecord, SnapshotsWanted};
use crate::team::Team;
use crate::templates::{Reference, ResolveError};

/// Forks of one call. Source: contract section 9.
const MAX_FORKS: i64 = 100;

type Answer = Result<Response, ApiError>;

/// Takes a snapshot of a running sandbox, which goes on. Sandboxes can be created from it.
#[utoipa::path(
    post, path = "/sandboxes/{id}/snapshots", tag = "snapshots", params(Named),
    request_body = Option<rest::NewSnapshot>,
    responses(
        (status = 201, description = "It can be started from", body = rest::SnapshotInfo),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is paused, or changing"),
        (status = 503, description = "Its guest does not answer, or there is no room for it"),
    ),
)]
pub(crate) async fn take(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    OptionalJson(body): OptionalJson<rest::NewSnapshot>,
) -> Answer {
    let body = body.unwrap_or_default();
    let name = body.name.as_deref().map(|text| name(&app, &team, text)).transpose()?;
    let filesystem_only = body.memory == Some(false);
    let record = copies::snapshot(&app, &team, &named.id, name, filesystem_only).await;
    let record =
        record.map_err(|e| ApiError::of_copy(e, &named.text, "no snapshot of it can be taken"))?;
    Ok((StatusCode::CREATED, JsonAnswer(shapes::snapshot(&team, &record))).into_response())
}

/// The name `text` asks for.
fn name(app: &App, team: &Team, text: &str) -> Result<SnapshotName, ApiError> {
    let reference: Reference = text.parse()?;
    if reference.namespace().is_some_and(|namespace| namespace != team.slug) {
        return Err(ResolveError::OtherTeam { name: reference.to_string() }.into());
    }
    let name = reference.name().to_owned();
    // It would stand for the template wherever it is used.
    if app.templates.resolve(&reference, team).err().is_none_or(|e| e.kind() != Kind::NotFound) {
        return Err(ApiError::bad_request(format!(
            "the name '{name}' is that of a template; choose another for the snapshot"
        )));
    }
    let tag = reference.tag().unwrap_or(DEFAULT_TAG).to_owned();
    Ok(SnapshotName { name, tag })
}

/// Lists snapshots, newest first.
#[utoipa::path(
    get, path = "/snapshots", tag = "snapshots",
    params(
        ("sandboxID" = Option<String>, Query, description = "Taken of this sandbox"),
        ("name" = Option<String>, Query, description = "With this name, `[namespace/]name[:tag]`"),
        ("limit" = Option<u32>, Query, description = "Items on a page", minimum = 1, maximum = 100),
        ("nextToken" = Option<String>, Query, description = "Where the last page ended, from its header"),
    ),
    responses((
        status = 200, description = "One page", body = Vec<rest::SnapshotInfo>,
        headers(("X-Next-Token" = String, description = "Token of the next page; absent on the last")),
    )),
)]
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    query: Query,
) -> Answer {
    let page = Wanted::from_query(&query)?;
    let limit = u32::try_from(page.limit()).unwrap_or(u32::MAX);
    let mut wanted = SnapshotsWanted {
        after: page.after().map(|after| (after.at, after.id.clone())),
        // One more tells whether there is another page.
        limit: limit.saturating_add(1),
        ..SnapshotsWanted::default()
    };
    if let Some(text) = query.get("sandboxID") {
        // What is no id names no sandbox, and so none of its snapshots.
        let Ok(id) = text.parse::<SandboxId>() else { return Ok(empty()) };
        wanted.sandbox = Some(id);
    }
    if let Some(text) = query.get("name") {
        let reference: Reference = text.parse()?;
        if reference.namespace().is_some_and(|namespace| namespace != team.slug) {
            return Ok(empty());
        }
        wanted.name = Some(reference.name().to_owned());
        wanted.tag = reference.tag().map(str::to_owned);
    }
    let mut found = app.store.snapshots(&team.id, &wanted).await?;
    let has_more = found.len() > page.limit();
    found.truncate(page.limit());
    let last = found.last().filter(|_| has_more);
    let mut headers = HeaderMap::new();
    insert_next_token(&mut headers, last.map(|record| page.token(&position(record))));
    let shown: Vec<_> = found.iter().map(|record| shapes::snapshot(&team, record)).collect();
    Ok((headers, JsonAnswer(shown)).into_response())
}

fn empty() -> Response {
    JsonAnswer(Vec::<rest::SnapshotInfo>::new()).into_response()
}

fn position(record: &SnapshotRecord) -> Position {
    Position { at: record.kept.created_at, id: record.kept.id.to_string() }
}

/// Removes a snapshot. Sandboxes that were started from it go on.
#[utoipa::path(
    delete, path = "/templates/{id}", tag = "snapshots",
    params(("id" = String, Path, description = "The snapshot's id or name; may contain `:`")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such snapshot"),
        (status = 501, description = "It is a template, which this server does not remove yet"),
        (status = 503, description = "The node that keeps it is away"),
    ),
)]
pub(crate) async fn remove(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Segments(named): Segments<String>,
) -> Answer {
    let reference: Reference = named.parse()?;
    match app.templates.resolve(&reference, &team) {
        Ok(_) => return Err(later::not_supported(&format!("removing the template '{named}'"))),
        Err(ResolveError::Unknown { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    let unknown = || ResolveError::Unknown { name: reference.to_string() };
    let record = find_snapshot(&app, &reference, &team).await?.ok_or_else(unknown)?;
    if !app.store.delete_snapshot(&record.kept.id).await? {
        return Err(unknown().into());
    }
    // Nobody can start from it any more; its node is asked behind the answer, and by every reconcile.
    app.snapshots.give_up(&record.kept.id);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Starts copies of a running sandbox, which goes on. Each has memory, disk and settings as it has
/// them now, and an id of its own.
#[utoipa::path(
    post, path = "/sandboxes/{id}/fork", tag = "sandboxes", params(Named),
    request_body = Option<rest::ForkSandbox>,
    responses(
        (status = 201, description = "What became of each", body = Vec<rest::ForkResult>),
        (status = 404, description = "There is no such sandbox"),
        (status = 409, description = "It is paused, or changing"),
        (status = 503, description = "Its guest does not answer, or there is no room for the copy"),
    ),
)]
pub(crate) async fn fork(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    OptionalJson(body): OptionalJson<rest::ForkSandbox>,
) -> Answer {
    let body = body.unwrap_or_default();
    let seconds = body.timeout.unwrap_or(DEFAULT_SECONDS_V1);
    let lifetime = create::lifetime(seconds, team.limits.max_length())?;
    let count = body.count.unwrap_or(1);
    let count = usize::try_from(count).ok().filter(|_| (1..=MAX_FORKS).contains(&count));
    let count = count.ok_or_else(|| {
        ApiError::bad_request(format!("the field 'count' must be from 1 to {MAX_FORKS}"))
    })?;
    let forks = copies::fork(&app, &team, &named.id, lifetime, count).await;
    let forks = forks.map_err(|e| ApiError::of_copy(e, &named.text, "cannot be forked"))?;
    let results = forks.into_iter().map(|fork| match fork {
        Ok(sandbox) => {
            rest::ForkResult { sandbox: Some(shapes::sandbox(&app, &sandbox)), error: None }
        }
        Err(e) => rest::ForkResult { sandbox: None, error: Some(ApiError::from(e).into_body()) },
    });
    Ok((StatusCode::CREATED, JsonAnswer(results.collect::<Vec<_>>())).into_response())
}
