//! Logs of a sandbox. Source: contract sections 1.2 and 9.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_domain::{Kind, UnixMillis};
use belljar_wire::rest;

use super::auth::Caller;
use super::error::ApiError;
use super::query::Query;
use super::sandboxes::Named;
use super::shapes;
use crate::app::App;
use crate::node::{LogEntry, LogsWanted};
use crate::team::Team;

const MAX_LIMIT: u32 = 1000;
/// What version 1 takes for a limit at all: its parameter is a 32-bit integer.
const MAX_ASKED: u32 = i32::MAX as u32;
const MAX_SEARCH_CHARS: usize = 256;

/// What processes say goes by this name, and what the guest daemon says of the log by that one.
const PROCESS_LOGGER: &str = "process";
const DAEMON_LOGGER: &str = "envd";

type Answer = Result<Response, ApiError>;

/// Reads the newest log lines of a sandbox, oldest first. Deprecated: version 2 filters.
#[utoipa::path(
    get, path = "/sandboxes/{id}/logs", tag = "sandboxes",
    params(
        Named,
        ("start" = Option<i64>, Query, description = "Not before this time, in milliseconds since 1970", minimum = 0),
        ("limit" = Option<u32>, Query, description = "Lines; more than 1000 counts as 1000", minimum = 0),
    ),
    responses(
        (status = 200, description = "The lines, in two forms", body = rest::SandboxLogs),
        (status = 404, description = "There is no such sandbox"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn list_v1(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    query: Query,
) -> Answer {
    let wanted = LogsWanted {
        cursor: time(&query, "start")?,
        // Clients of this version were never told a limit.
        limit: query
            .number("limit", 0..=MAX_ASKED)?
            .map_or(MAX_LIMIT, |limit| limit.min(MAX_LIMIT)),
        backward: false,
        min_level: None,
        search: String::new(),
    };
    let entries = entries(&app, &team, &named, wanted).await?;
    let log_entries: Vec<_> = entries.iter().map(entry).collect();
    let logs = log_entries.iter().map(line).collect();
    Ok(JsonAnswer(rest::SandboxLogs { logs, log_entries }).into_response())
}

/// Reads log lines of a sandbox.
#[utoipa::path(
    get, path = "/v2/sandboxes/{id}/logs", tag = "sandboxes",
    params(
        Named,
        ("cursor" = Option<i64>, Query, description = "Where to begin, in milliseconds since 1970", minimum = 0),
        ("limit" = Option<u32>, Query, description = "Lines", minimum = 0, maximum = 1000),
        ("direction" = inline(Option<Direction>), Query, description = "Absent: forward"),
        ("level" = inline(Option<rest::LogLevel>), Query, description = "At least this bad"),
        ("search" = Option<String>, Query, description = "Text to contain", max_length = 256),
    ),
    responses(
        (status = 200, description = "The lines, in the order asked for", body = rest::SandboxLogsV2),
        (status = 404, description = "There is no such sandbox"),
        (status = 504, description = "Its node did not answer in time"),
    ),
)]
pub(crate) async fn list_v2(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    query: Query,
) -> Answer {
    let wanted = LogsWanted {
        cursor: time(&query, "cursor")?,
        limit: query.number("limit", 0..=MAX_LIMIT)?.unwrap_or(MAX_LIMIT),
        backward: direction(&query)? == Direction::NewestFirst,
        min_level: query.exact("level").map(level).transpose()?,
        search: search(&query)?.to_owned(),
    };
    let entries = entries(&app, &team, &named, wanted).await?;
    let logs = entries.iter().map(entry).collect();
    Ok(JsonAnswer(rest::SandboxLogsV2 { logs }).into_response())
}

async fn entries(
    app: &App,
    team: &Team,
    named: &Named,
    wanted: LogsWanted,
) -> Result<Vec<LogEntry>, ApiError> {
    let sandbox = app
        .live
        .find(&named.id, &team.id, clock::now())
        .ok_or_else(|| ApiError::no_sandbox(&named.text))?;
    let is_paused = sandbox.asleep_since.is_some();
    match app.node_of(&sandbox).rpc.logs(&sandbox.id, wanted).await {
        // A node keeps no lines of what it does not run.
        Err(error) if is_paused && error.kind() == Kind::NotFound => Ok(Vec::new()),
        lines => lines.map_err(|error| ApiError::of_sandbox(error.kind(), &error, &named.text)),
    }
}

fn time(query: &Query, name: &str) -> Result<Option<UnixMillis>, ApiError> {
    let Some(text) = query.exact(name) else { return Ok(None) };
    match text.parse() {
        Ok(unix_ms) if unix_ms >= 0 => Ok(Some(UnixMillis(unix_ms))),
        _ => Err(ApiError::bad_request(format!(
            "the parameter '{name}' must be a time in milliseconds since 1970"
        ))),
    }
}

/// Which lines come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, utoipa::ToSchema)]
enum Direction {
    #[schema(rename = "forward")]
    OldestFirst,
    #[schema(rename = "backward")]
    NewestFirst,
}

fn direction(query: &Query) -> Result<Direction, ApiError> {
    match query.exact("direction") {
        None | Some("forward") => Ok(Direction::OldestFirst),
        Some("backward") => Ok(Direction::NewestFirst),
        Some(_) => {
            Err(ApiError::bad_request("the parameter 'direction' must be forward or backward"))
        }
    }
}

fn level(word: &str) -> Result<rest::LogLevel, ApiError> {
    rest::LogLevel::parse(word).ok_or_else(|| {
        ApiError::bad_request("the parameter 'level' must be debug, info, warn or error")
    })
}

fn search(query: &Query) -> Result<&str, ApiError> {
    let text = query.get("search").unwrap_or_default();
    if text.chars().count() > MAX_SEARCH_CHARS {
        return Err(ApiError::bad_request(format!(
            "the parameter 'search' may have at most {MAX_SEARCH_CHARS} characters"
        )));
    }
    Ok(text)
}

fn entry(entry: &LogEntry) -> rest::SandboxLogEntry {
    let is_of_process = entry.pid != 0;
    let logger = if is_of_process { PROCESS_LOGGER } else { DAEMON_LOGGER };
    let mut fields = BTreeMap::from([
        ("logger".to_owned(), logger.to_owned()),
        ("event_type".to_owned(), entry.event.clone()),
    ]);
    if is_of_process {
        fields.insert("pid".to_owned(), entry.pid.to_string());
        fields.insert("cmd".to_owned(), entry.command.clone());
    }
    if entry.cut {
        fields.insert("continues".to_owned(), "true".to_owned());
    }
    rest::SandboxLogEntry {
        timestamp: shapes::time(entry.at),
        message: entry.text.clone(),
        level: entry.level,
        fields,
    }
}

/// The same entry as one JSON object in a string: the official command line parses it, and takes
/// `level`, `logger` and `message` for granted.
fn line(entry: &rest::SandboxLogEntry) -> rest::SandboxLog {
    let mut object = serde_json::Map::new();
    object.insert("level".to_owned(), entry.level.as_str().into());
    object.insert("message".to_owned(), entry.message.clone().into());
    for (name, value) in &entry.fields {
        object.insert(name.clone(), value.clone().into());
    }
    let line = serde_json::Value::Object(object).to_string();
    rest::SandboxLog { timestamp: entry.timestamp, line }
}
