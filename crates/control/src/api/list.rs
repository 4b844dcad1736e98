//! Lists of sandboxes. Source: contract section 1.2.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_domain::{TemplateId, UnixMillis};
use belljar_wire::rest;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::auth::Caller;
use super::error::ApiError;
use super::page::{Position, Wanted, bad_token};
use super::query::{Query, metadata_filter};
use super::shapes;
use crate::app::App;
use crate::live::{Key, Order, Range, Sandbox, States};
use crate::team::Team;
use crate::templates::Reference;

/// Token of the next page; absent on the last one.
const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");
/// Running sandboxes that match, whatever the page.
const TOTAL_RUNNING: HeaderName = HeaderName::from_static("x-total-running");

const EVERY: States = States { running: true, paused: true };
const RUNNING: States = States { running: true, paused: false };

type Answer = Result<Response, ApiError>;

pub(crate) fn insert_next_token(headers: &mut HeaderMap, next: Option<String>) {
    if let Some(next) = next {
        let value = HeaderValue::try_from(next).expect("base64 is valid in a header");
        headers.insert(NEXT_TOKEN, value);
    }
}

/// Lists running sandboxes, newest first. Deprecated: version 2 has pages.
#[utoipa::path(
    get, path = "/sandboxes", tag = "sandboxes",
    params(
        ("metadata" = Option<String>, Query, description = "Labels to have, as `key=value&key=value`, form-encoded"),
    ),
    responses((status = 200, description = "All that match", body = Vec<rest::ListedSandbox>)),
)]
pub(crate) async fn list_v1(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    query: Query,
) -> Answer {
    let filter = Filter { metadata: metadata(&query)?, template: None };
    let all = Range { order: Order::NewestFirst, after: None, started_from: None };
    let found = app.live.list(&team.id, clock::now(), &all, RUNNING);
    let matching = found.iter().filter(|sandbox| filter.lets_through(sandbox));
    let listed: Vec<_> = matching.map(|sandbox| shapes::listed(sandbox)).collect();
    Ok(JsonAnswer(listed).into_response())
}

/// Lists sandboxes.
#[utoipa::path(
    get, path = "/v2/sandboxes", tag = "sandboxes",
    params(
        ("metadata" = Option<String>, Query, description = "Labels to have, as `key=value&key=value`, form-encoded"),
        ("state" = inline(Option<Vec<rest::SandboxState>>), Query, style = Form, explode = false, description = "States to have. Absent: any"),
        ("order" = inline(Option<Order>), Query, description = "By start. Absent: newest first"),
        ("startedAfter" = Option<chrono::DateTime<chrono::Utc>>, Query, description = "Started at this time or later"),
        ("template" = Option<String>, Query, description = "Started from this template, by id or name"),
        ("limit" = Option<u32>, Query, description = "Items on a page", minimum = 1, maximum = 100),
        ("nextToken" = Option<String>, Query, description = "Where the last page ended, from its header"),
    ),
    responses((
        status = 200, description = "One page", body = Vec<rest::ListedSandbox>,
        headers(
            ("X-Next-Token" = String, description = "Token of the next page; absent on the last"),
            ("X-Total-Running" = i64, description = "Running sandboxes that match, whatever the page"),
        ),
    )),
)]
pub(crate) async fn list_v2(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    query: Query,
) -> Answer {
    let wanted = Wanted::from_query(&query)?;
    let filter = Filter {
        metadata: metadata(&query)?,
        template: query.get("template").map(|text| template(&app, &team, text)).transpose()?,
    };
    let range = Range {
        order: wanted.order(),
        after: wanted.after().map(key).transpose()?,
        started_from: query.exact("startedAfter").map(parse_time).transpose()?,
    };
    let states = states(&query)?;
    let (mut page, total) = page(&app, &team, (&range, states), &filter, wanted.limit());
    let has_more = page.len() > wanted.limit();
    page.truncate(wanted.limit());
    let last = page.last().filter(|_| has_more);
    let mut headers = HeaderMap::new();
    headers.insert(TOTAL_RUNNING, HeaderValue::from(total));
    insert_next_token(&mut headers, last.map(|sandbox| wanted.token(&position(sandbox))));
    let listed: Vec<_> = page.iter().map(|sandbox| shapes::listed(sandbox)).collect();
    Ok((headers, JsonAnswer(listed)).into_response())
}

/// One sandbox more than `limit`, if there are as many, and how many running ones match on all pages.
fn page(
    app: &App,
    team: &Team,
    (range, states): (&Range, States),
    filter: &Filter,
    limit: usize,
) -> (Vec<Arc<Sandbox>>, usize) {
    let now = clock::now();
    if filter.is_empty() && range.started_from.is_none() {
        // The index knows the count, so only the page is touched.
        return app.live.page(&team.id, now, range, states, limit + 1);
    }
    // Counting the matches means to look at all of them; the table is not locked meanwhile.
    let all_pages = Range { after: None, ..range.clone() };
    let found = app.live.list(&team.id, now, &all_pages, EVERY);
    let is_after = |sandbox: &Sandbox| {
        range.after.as_ref().is_none_or(|after| {
            let order = (sandbox.started_at, &sandbox.id).cmp(&(after.0, &after.1));
            match range.order {
                Order::OldestFirst => order.is_gt(),
                Order::NewestFirst => order.is_lt(),
            }
        })
    };
    let (mut page, mut total) = (Vec::new(), 0);
    for sandbox in found.iter().filter(|sandbox| filter.lets_through(sandbox)) {
        let runs = sandbox.asleep_since.is_none();
        total += usize::from(runs);
        let is_wanted = if runs { states.running } else { states.paused };
        if is_wanted && page.len() <= limit && is_after(sandbox) {
            page.push(Arc::clone(sandbox));
        }
    }
    (page, total)
}

fn position(sandbox: &Sandbox) -> Position {
    Position { at: sandbox.started_at, id: sandbox.id.to_string() }
}

fn key(position: &Position) -> Result<Key, ApiError> {
    Ok((position.at, position.id.parse().map_err(|_| bad_token())?))
}

/// Which of a team's sandboxes are wanted.
struct Filter {
    metadata: BTreeMap<String, String>,
    /// `Some(None)` matches nothing.
    template: Option<Option<TemplateId>>,
}

impl Filter {
    fn is_empty(&self) -> bool {
        self.metadata.is_empty() && self.template.is_none()
    }

    fn lets_through(&self, sandbox: &Sandbox) -> bool {
        self.metadata.iter().all(|(key, value)| sandbox.metadata.get(key) == Some(value.as_str()))
            && self
                .template
                .as_ref()
                .is_none_or(|wanted| wanted.as_ref() == Some(&sandbox.template))
    }
}

fn metadata(query: &Query) -> Result<BTreeMap<String, String>, ApiError> {
    Ok(query.get("metadata").map(metadata_filter).transpose()?.unwrap_or_default())
}

/// What the `state` filter lets through; without one that is everything.
fn states(query: &Query) -> Result<States, ApiError> {
    let mut named = query.list("state").peekable();
    if named.peek().is_none() {
        return Ok(EVERY);
    }
    let mut states = States { running: false, paused: false };
    for state in named {
        match state {
            "running" => states.running = true,
            "paused" => states.paused = true,
            _ => {
                return Err(ApiError::bad_request(
                    "the parameter 'state' may name running and paused",
                ));
            }
        }
    }
    Ok(states)
}

fn parse_time(text: &str) -> Result<UnixMillis, ApiError> {
    // A plus sign that was not encoded arrives as a space.
    let time: rest::Time = text.replace(' ', "+").parse().map_err(|_| {
        ApiError::bad_request("the parameter 'startedAfter' must be an RFC 3339 time")
    })?;
    Ok(UnixMillis(time.timestamp_millis()))
}

/// The template id to look for, from an id or a name. `None` matches nothing.
fn template(app: &App, team: &Team, text: &str) -> Result<Option<TemplateId>, ApiError> {
    let reference: Reference = text.parse()?;
    match app.templates.resolve(&reference, team) {
        Ok(placed) => Ok(Some(placed.template.id)),
        // A template may be gone while its sandboxes still run.
        Err(_) => Ok(text.parse().ok()),
    }
}
