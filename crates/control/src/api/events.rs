//! Lifecycle events. Source: contract section 1.7.
//!
//! Events are written behind the answers, so a list first waits for what is on its way: who has
//! killed a sandbox and then asks finds that in the list.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_wire::rest::{self, EventType};

use super::auth::Caller;
use super::error::ApiError;
use super::query::Query;
use super::sandboxes::Named;
use crate::app::App;
use crate::event::Event;
use crate::store::EventsWanted;

/// How long a list waits for what was done just before to be in the store.
const SETTLE: Duration = Duration::from_secs(2);
const DEFAULT_LIMIT: u32 = 10;
const MAX_LIMIT: u32 = 100;
/// What the document can say of a 32-bit number.
const MAX_OFFSET: u32 = i32::MAX.unsigned_abs();

type Answer = Result<Response, ApiError>;

/// Lists what happened to the team's sandboxes.
#[utoipa::path(
    get, path = "/events/sandboxes", tag = "events",
    params(
        ("offset" = Option<u32>, Query, description = "Items to skip; absent: 0", minimum = 0, maximum = 2147483647),
        ("limit" = Option<u32>, Query, description = "Items; absent: 10", minimum = 1, maximum = 100),
        ("orderAsc" = Option<bool>, Query, description = "Oldest first; absent: false"),
        ("types" = inline(Option<Vec<EventType>>), Query, description = "Only these types; may be repeated"),
    ),
    responses((status = 200, description = "The events", body = Vec<rest::SandboxEvent>)),
)]
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    query: Query,
) -> Answer {
    let wanted = wanted(&query)?;
    let _in_time = app.writer.settled(SETTLE).await;
    Ok(shown(&app.store.events(&team.id, &wanted).await?))
}

/// Lists what happened to one sandbox, also after its end.
#[utoipa::path(
    get, path = "/events/sandboxes/{id}", tag = "events",
    params(
        Named,
        ("offset" = Option<u32>, Query, description = "Items to skip; absent: 0", minimum = 0, maximum = 2147483647),
        ("limit" = Option<u32>, Query, description = "Items; absent: 10", minimum = 1, maximum = 100),
        ("orderAsc" = Option<bool>, Query, description = "Oldest first; absent: false"),
        ("types" = inline(Option<Vec<EventType>>), Query, description = "Only these types; may be repeated"),
    ),
    responses(
        (status = 200, description = "The events", body = Vec<rest::SandboxEvent>),
        (status = 404, description = "There is no such sandbox, or its events are too old"),
    ),
)]
pub(crate) async fn list_of_sandbox(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    query: Query,
) -> Answer {
    let wanted = EventsWanted { sandbox: Some(named.id.clone()), ..wanted(&query)? };
    let _in_time = app.writer.settled(SETTLE).await;
    let events = app.store.events(&team.id, &wanted).await?;
    // Nothing on this page, or nothing at all. What lives has an event, wherever it is.
    let is_known = !events.is_empty()
        || app.store.has_events(&team.id, &named.id).await?
        || app.live.find(&named.id, &team.id, clock::now()).is_some();
    if is_known { Ok(shown(&events)) } else { Err(ApiError::no_sandbox(&named.text)) }
}

fn shown(events: &[Event]) -> Response {
    let events: Vec<_> = events.iter().map(Event::to_wire).collect();
    JsonAnswer(events).into_response()
}

fn wanted(query: &Query) -> Result<EventsWanted, ApiError> {
    let page = Page::from_query(query)?;
    Ok(EventsWanted {
        sandbox: None,
        kinds: kinds(query)?,
        oldest_first: page.oldest_first,
        offset: page.offset,
        limit: page.limit,
    })
}

fn kinds(query: &Query) -> Result<Vec<EventType>, ApiError> {
    let parse = |word: &str| {
        EventType::parse(word).ok_or_else(|| {
            let known = EventType::ALL.map(EventType::as_str).join(", ");
            ApiError::bad_request(format!(
                "the parameter 'types' has the unknown event type '{word}'; there are {known}"
            ))
        })
    };
    let mut kinds = query.list("types").map(parse).collect::<Result<Vec<_>, _>>()?;
    kinds.sort_unstable();
    kinds.dedup();
    Ok(kinds)
}

/// Which part of a list of events or deliveries is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) offset: u32,
    pub(crate) limit: u32,
    pub(crate) oldest_first: bool,
}

impl Page {
    /// Reads `offset`, `limit` and `orderAsc`.
    pub(crate) fn from_query(query: &Query) -> Result<Page, ApiError> {
        let oldest_first = match query.get("orderAsc") {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => {
                return Err(ApiError::bad_request(
                    "the parameter 'orderAsc' must be true or false",
                ));
            }
        };
        Ok(Page {
            offset: query.number("offset", 0..=MAX_OFFSET)?.unwrap_or(0),
            limit: query.number("limit", 1..=MAX_LIMIT)?.unwrap_or(DEFAULT_LIMIT),
            oldest_first,
        })
    }
}
