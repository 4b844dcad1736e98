//! What teams use. Source: contract section 1.6; the shapes are those of upstream's public
//! specification of its API.

use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::{FromRequestParts, Path, State};
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_domain::{Kind, UnixMillis};
use belljar_wire::rest;
use http::request::Parts;

use super::auth::Caller;
use super::error::ApiError;
use super::query::Query;
use super::range::range;
use super::shapes;
use crate::app::App;
use crate::store::{UsagePeak, UsageStep};
use crate::team::TeamId;
use crate::usage::KEPT_MS;

/// What is shown when the request does not say from when: a day.
const DEFAULT_MS: i64 = 86_400_000;
/// Points in an answer, about.
const MAX_POINTS: i64 = 500;
/// Steps of time, in seconds: round ones, so that points stay where they are when the range moves.
/// The last is the one for all that is kept.
const STEPS_SECONDS: [i64; 11] = [5, 10, 15, 30, 60, 120, 300, 600, 1_800, 3_600, 7_200];

type Answer = Result<Response, ApiError>;

/// The team a path names.
pub(crate) struct NamedTeam(TeamId);

impl<S: Send + Sync> FromRequestParts<S> for NamedTeam {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        let team = text.ok().and_then(|Path(text)| TeamId::parse(&text));
        let wrong = || ApiError::bad_request("the team in the path must be a UUID");
        team.map(NamedTeam).ok_or_else(wrong)
    }
}

impl NamedTeam {
    /// A team sees its own figures only.
    fn must_be(&self, caller: &TeamId) -> Result<(), ApiError> {
        if self.0 == *caller {
            return Ok(());
        }
        Err(ApiError::of_kind(Kind::Forbidden, "you don't have access to the metrics of this team"))
    }
}

/// Shows what a team used, oldest first, in steps that become longer with the range.
#[utoipa::path(
    get, path = "/teams/{id}/metrics", tag = "teams",
    params(
        ("id" = uuid::Uuid, Path, description = "The team"),
        ("start" = Option<i64>, Query, description = "Not before this time, in seconds since 1970. Absent: a day before `end`", minimum = 0, maximum = 253402300799_i64),
        ("end" = Option<i64>, Query, description = "Not after this time, in seconds since 1970. Absent: now", minimum = 0, maximum = 253402300799_i64),
    ),
    responses(
        (status = 200, description = "One point for each step", body = Vec<rest::TeamMetric>),
        (status = 403, description = "It is another team"),
    ),
)]
pub(crate) async fn of_team(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: NamedTeam,
    query: Query,
) -> Answer {
    named.must_be(&team.id)?;
    let window = Window::read(&query, clock::now())?;
    let step_ms = window.step_ms();
    let found = app.store.usage(&team.id, window.start, window.end, step_ms).await?;
    Ok(JsonAnswer(points(&window, step_ms, &found)).into_response())
}

/// Shows when a team's use was at its highest.
#[utoipa::path(
    get, path = "/teams/{id}/metrics/max", tag = "teams",
    params(
        ("id" = uuid::Uuid, Path, description = "The team"),
        ("metric" = inline(Metric), Query, description = "Of what"),
        ("start" = Option<i64>, Query, description = "Not before this time, in seconds since 1970. Absent: a day before `end`", minimum = 0, maximum = 253402300799_i64),
        ("end" = Option<i64>, Query, description = "Not after this time, in seconds since 1970. Absent: now", minimum = 0, maximum = 253402300799_i64),
    ),
    responses(
        (status = 200, description = "The highest value; 0 at `end` when nothing ran", body = rest::MaxTeamMetric),
        (status = 403, description = "It is another team"),
    ),
)]
pub(crate) async fn max_of_team(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: NamedTeam,
    query: Query,
) -> Answer {
    named.must_be(&team.id)?;
    let peak = match query.get("metric") {
        Some("concurrent_sandboxes") => UsagePeak::Concurrent,
        Some("sandbox_start_rate") => UsagePeak::StartRate,
        _ => {
            return Err(ApiError::bad_request(
                "the parameter 'metric' must be concurrent_sandboxes or sandbox_start_rate",
            ));
        }
    };
    let window = Window::read(&query, clock::now())?;
    let found = app.store.usage_peak(&team.id, peak, window.start, window.end).await?;
    let (at, value) = found.unwrap_or((window.end, 0.0));
    let timestamp_unix = at.0.div_euclid(1000);
    let max = rest::MaxTeamMetric { timestamp: shapes::time(at), timestamp_unix, value };
    Ok(JsonAnswer(max).into_response())
}

/// What can be at its highest.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "names the words for the API's description")]
enum Metric {
    #[schema(rename = "concurrent_sandboxes")]
    ConcurrentSandboxes,
    #[schema(rename = "sandbox_start_rate")]
    SandboxStartRate,
}

/// From `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    start: UnixMillis,
    end: UnixMillis,
}

impl Window {
    /// The range a query asks for, cut to what can be known.
    fn read(query: &Query, now: UnixMillis) -> Result<Window, ApiError> {
        let (start, end) = range(query)?;
        let end = UnixMillis(end.unwrap_or(now).0.min(now.0) + 1);
        let start = start.map_or(end.0 - DEFAULT_MS, |start| start.0).max(now.0 - KEPT_MS);
        Ok(Window { start: UnixMillis(start.min(end.0)), end })
    }

    fn step_ms(&self) -> i64 {
        let at_least = (self.end.0 - self.start.0) / MAX_POINTS;
        let fitting = STEPS_SECONDS.iter().map(|seconds| seconds * 1000);
        let mut steps = fitting.skip_while(|step| *step < at_least);
        steps.next().unwrap_or(STEPS_SECONDS[STEPS_SECONDS.len() - 1] * 1000)
    }
}

/// A point for every step of the window; those nothing is known of are zero.
fn points(window: &Window, step_ms: i64, found: &[UsageStep]) -> Vec<rest::TeamMetric> {
    let first = window.start.0.div_euclid(step_ms);
    let after = (window.end.0 - 1).div_euclid(step_ms) + 1;
    let mut found = found.iter().peekable();
    let point = |index: i64| {
        let step = found.next_if(|step| step.index == index);
        let at = UnixMillis(index * step_ms);
        let started = step.map_or(0, |step| step.started);
        let concurrent = step.map_or(0, |step| step.concurrent);
        rest::TeamMetric {
            timestamp: shapes::time(at),
            timestamp_unix: at.0.div_euclid(1000),
            concurrent_sandboxes: u32::try_from(concurrent).unwrap_or(u32::MAX),
            sandbox_start_rate: per_second(started, step_ms),
        }
    };
    (first..after).map(point).collect()
}

#[expect(clippy::cast_precision_loss, reason = "far below what a double holds exactly")]
fn per_second(count: i64, span_ms: i64) -> f64 {
    count as f64 * 1000.0 / span_ms as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

    fn window(query: &str) -> Window {
        let query = Query::parse(Some(query)).expect("a query");
        Window::read(&query, NOW).expect("a window")
    }

    #[test]
    fn ranges_are_cut_to_what_is_kept() {
        let day = window("");
        assert_eq!((day.start.0, day.end.0), (NOW.0 + 1 - DEFAULT_MS, NOW.0 + 1));
        let all = window("start=0&end=253402300799");
        assert_eq!((all.start.0, all.end.0), (NOW.0 - KEPT_MS, NOW.0 + 1));
        let past = window("start=0&end=0");
        assert!(past.start <= past.end && past.end.0 == 1000, "{past:?}");
        let future = window("start=1800000000");
        assert_eq!(future.start, future.end);
        assert!(points(&future, 5_000, &[]).len() <= 1);
    }

    #[test]
    fn answers_stay_small_whatever_the_range() {
        for (query, seconds) in [
            ("start=1699999400", 5),
            ("start=1699997500", 5),
            ("start=1699990000", 30),
            ("", 300),
            ("start=0", 7_200),
        ] {
            let window = window(query);
            assert_eq!(window.step_ms(), seconds * 1000, "{query}");
            let points = points(&window, window.step_ms(), &[]);
            let most = usize::try_from(MAX_POINTS).expect("it fits") + 2;
            assert!((1..=most).contains(&points.len()), "{query}: {}", points.len());
        }
    }

    #[test]
    fn steps_without_a_sample_are_zero() {
        let window = Window { start: UnixMillis(10_000), end: UnixMillis(30_000) };
        let found = [UsageStep { index: 3, concurrent: 4, started: 10 }];
        let points = points(&window, 5_000, &found);
        let seen: Vec<_> = points
            .iter()
            .map(|p| (p.timestamp_unix, p.concurrent_sandboxes, p.sandbox_start_rate))
            .collect();
        assert_eq!(seen, [(10, 0, 0.0), (15, 4, 2.0), (20, 0, 0.0), (25, 0, 0.0)]);
    }
}
