//! The routes by which a host holds a sandbox still: its processes, its disks.
//!
//! Each freeze ends by itself: a host that dies between the two calls leaves a guest that works
//! again. An init message, which is what a restored guest gets first, ends it too.
//!
//! Source of the routes: `contract/e2b-wire.md` section 2.1.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Shared};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{Services, json, json_error};
use crate::task;
use crate::workload::FreezeError;

/// How long processes stay frozen without a thaw. The slowest resume anyone has measured took
/// half of it.
///
/// Source: `reference/upstream-internals.md` section 5.
const PROCESSES_LIMIT: Duration = Duration::from_secs(600);

/// How long disks stay stopped without a thaw: long enough to save a machine's memory, short
/// enough for whoever waits for a write.
const DISKS_LIMIT: Duration = Duration::from_secs(60);

/// Groups a freeze takes on, and how long it waits for them, unless the caller says otherwise.
///
/// Source: `reference/upstream-internals.md` section 5.
const GROUPS_MAX: usize = 512;
const WAIT_LIMIT_MS: u64 = 2000;

/// Longest wait a caller may ask for, milliseconds.
const WAIT_MAX_MS: u64 = 60_000;

/// What ends a freeze that nobody else ends. One each at most, however often a host freezes.
#[derive(Debug, Default)]
pub(super) struct Watchdogs {
    processes: Watchdog,
    disks: Watchdog,
}

#[derive(Debug, Default)]
struct Watchdog {
    /// Ends the task that waits now.
    current: Mutex<CancellationToken>,
}

impl Watchdog {
    fn cancel(&self) {
        self.replace(CancellationToken::new()).cancel();
    }

    /// Has `bite` called after `limit`, instead of what was to be called before.
    fn set(&self, tasks: &task::Group, limit: Duration, bite: impl FnOnce() + Send + 'static) {
        let cancelled = CancellationToken::new();
        self.replace(cancelled.clone()).cancel();
        tasks.spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = tokio::time::sleep(limit) => bite(),
            }
        });
    }

    fn replace(&self, new: CancellationToken) -> CancellationToken {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut current, new)
    }
}

/// The query of a freeze; every field may be absent.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct FreezeQuery {
    mode: Option<Mode>,
    max_cgroups: Option<usize>,
    max_wait_ms: Option<u64>,
}

/// What to freeze. Both mean every group but the daemon's own here: nothing else in the guest
/// needs to run for it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    User,
    Hierarchy,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FreezeAnswer {
    frozen: bool,
    cgroups: usize,
    waited_ms: u64,
}

/// `POST /freeze`: answers 200 once every user process has stopped, or an error, and then none is
/// stopped: 504 when one did not stop in time, 409 when there are more groups than allowed.
pub(super) async fn freeze(
    Shared(services): Shared<Services>,
    query: Result<Query<FreezeQuery>, QueryRejection>,
) -> Response {
    let query = match query {
        Ok(Query(query)) => query,
        Err(error) => return json_error(StatusCode::BAD_REQUEST, &error.body_text()),
    };
    let wait_ms = query.max_wait_ms.unwrap_or(WAIT_LIMIT_MS);
    if wait_ms > WAIT_MAX_MS {
        let message = format!("maxWaitMs is {wait_ms}; it may be {WAIT_MAX_MS} at most");
        return json_error(StatusCode::BAD_REQUEST, &message);
    }
    let Some(workload) = services.state.settings().workload.clone() else { return no_groups() };
    let groups_max = query.max_cgroups.unwrap_or(GROUPS_MAX);
    tracing::debug!(mode = ?query.mode.unwrap_or(Mode::User), "freezes user processes");
    let (generation, wait) = (workload.announce(), Duration::from_millis(wait_ms));
    let watched = Arc::clone(&workload);
    // Set before anything stops, and not by the request: its client may leave meanwhile.
    services.watchdogs.processes.set(&services.state.tasks, PROCESSES_LIMIT + wait, move || {
        if watched.thaw_if(generation) {
            tracing::warn!("the host froze user processes and left them; thawed them");
        }
    });
    let job = move || workload.freeze(generation, groups_max, wait);
    let frozen = match task::blocking(job).await {
        Ok(Ok(frozen)) => frozen,
        Ok(Err(error)) => {
            let status = match error {
                FreezeError::TooMany { .. } => StatusCode::CONFLICT,
                FreezeError::TooSlow(_) => StatusCode::GATEWAY_TIMEOUT,
                FreezeError::Refused(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            return json_error(status, &format!("failed to {error}"));
        }
        Err(lost) => {
            let message = format!("failed to {lost}");
            return json_error(StatusCode::INTERNAL_SERVER_ERROR, &message);
        }
    };
    let waited_ms = u64::try_from(frozen.waited.as_millis()).unwrap_or(u64::MAX);
    json(StatusCode::OK, &FreezeAnswer { frozen: true, cgroups: frozen.groups, waited_ms })
}

/// `POST /unfreeze`: 204, also when nothing was frozen.
pub(super) async fn unfreeze(Shared(services): Shared<Services>) -> Response {
    let Some(workload) = &services.state.settings().workload else { return no_groups() };
    // Here and not on a thread of the pool: starts that wait for the thaw may hold all of them.
    workload.thaw();
    services.watchdogs.processes.cancel();
    StatusCode::NO_CONTENT.into_response()
}

/// `POST /fsfreeze`: 204 once every disk is flushed and stopped; 500 with the reason, and then
/// none is stopped.
pub(super) async fn freeze_disks(Shared(services): Shared<Services>) -> Response {
    let state = Arc::clone(&services.state);
    if !state.settings().in_guest {
        return no_disks();
    }
    let announced = state.disks.announce();
    let until = Instant::now() + DISKS_LIMIT;
    let watched = Arc::clone(&state);
    // Set before anything stops, and not by the request: its client may leave meanwhile.
    services.watchdogs.disks.set(&services.state.tasks, DISKS_LIMIT, move || {
        if watched.disks.thaw_if(announced) {
            tracing::warn!("the host stopped the disks and left them; writing goes on");
        }
    });
    let outcome = task::blocking(move || state.disks.freeze(announced, until)).await;
    let message = match outcome {
        Ok(Ok(())) => return StatusCode::NO_CONTENT.into_response(),
        Ok(Err(error)) => format!("failed to {error}"),
        Err(lost) => format!("failed to {lost}"),
    };
    json_error(StatusCode::INTERNAL_SERVER_ERROR, &message)
}

/// `POST /fsthaw`: 204, also when nothing was stopped.
pub(super) async fn thaw_disks(Shared(services): Shared<Services>) -> Response {
    if !services.state.settings().in_guest {
        return no_disks();
    }
    // Here and not on a thread of the pool: uploads that wait for the thaw may hold all of them.
    services.state.disks.thaw();
    services.watchdogs.disks.cancel();
    StatusCode::NO_CONTENT.into_response()
}

/// `POST /collapse`: 501. It is for hosts that restore memory in huge pages, page by page; here a
/// restored guest maps the saved memory as a file.
pub(super) async fn collapse() -> Response {
    let message = "collapse is not implemented: restored memory is mapped here, not loaded by huge \
                   page, so there is nothing to gain; leave the call out";
    json_error(StatusCode::NOT_IMPLEMENTED, message)
}

/// `POST /upgrade`: 501. A daemon is part of its template; replacing a running one would leave
/// machines that no template describes.
pub(super) async fn upgrade() -> Response {
    let message = "upgrade is not implemented: the daemon is replaced with its template; build \
                   the template again and create a new sandbox";
    json_error(StatusCode::NOT_IMPLEMENTED, message)
}

fn no_groups() -> Response {
    let message = "freezing processes is not possible: this daemon runs without control groups \
                   (host mode, or a machine without cgroup2)";
    json_error(StatusCode::NOT_IMPLEMENTED, message)
}

fn no_disks() -> Response {
    let message = "stopping disks is not possible: this daemon serves in host mode";
    json_error(StatusCode::NOT_IMPLEMENTED, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn one_watchdog_waits_and_the_newest_bites() {
        let (tasks, watchdog) = (task::Group::default(), Watchdog::default());
        let (sender, mut bites) = mpsc::channel(8);
        let bite = |name: &'static str| {
            let sender = sender.clone();
            move || sender.try_send(name).expect("room for all")
        };
        watchdog.set(&tasks, Duration::from_millis(20), bite("replaced"));
        watchdog.set(&tasks, Duration::from_millis(20), bite("newest"));
        assert_eq!(bites.recv().await, Some("newest"));
        watchdog.set(&tasks, Duration::from_millis(20), bite("cancelled"));
        watchdog.cancel();
        watchdog.set(&tasks, Duration::from_millis(60), bite("last"));
        assert_eq!(bites.recv().await, Some("last"));
        assert!(tasks.close(Duration::from_secs(10)).await, "no watchdog waits on");
    }
}
