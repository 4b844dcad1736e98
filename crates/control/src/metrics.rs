//! Figures of this server for Prometheus.
//!
//! Each server has a registry of its own. Labels are routes, outcomes, nodes and the busiest teams:
//! nothing a caller can make up, so that their number is bounded. What can be counted when it is
//! asked for (the live table, queues, memory) is set at the scrape.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::app::App;

/// Teams with a series of their own; the others are one.
const MAX_TEAMS: usize = 50;
/// Their name.
const OTHER_TEAMS: &str = "other";
/// From an answer out of memory to the slowest create.
const BUCKETS_SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: &'static str,
    route: String,
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    method: &'static str,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNode {
    /// Its place in the list the server was started with.
    node: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTeam {
    team: String,
}

/// What became of one attempt to deliver an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The receiver took it.
    Delivered,
    /// It is tried again.
    Retried,
    /// It was given up.
    Dead,
}

/// One answered request.
pub(crate) struct Answered<'a> {
    pub(crate) method: &'a http::Method,
    /// The route's template, such as `/sandboxes/{id}`; `None` when there is no such route.
    pub(crate) route: Option<&'a str>,
    pub(crate) status: http::StatusCode,
    /// Why it was refused, if it was.
    pub(crate) reason: Option<&'static str>,
    pub(crate) took: Duration,
}

/// The series of one server.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    durations: Family<Route, Histogram, fn() -> Histogram>,
    refusals: Family<Reason, Counter>,
    creates: Family<Outcome, Counter>,
    starting: Gauge,
    by_node: Family<OfNode, Gauge>,
    by_team: Family<OfTeam, Gauge>,
    deliveries: Family<Outcome, Counter>,
    queue_depth: Gauge,
    lost_changes: Gauge,
    memory: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let durations: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(BUCKETS_SECONDS));
        let mut metrics = Metrics {
            registry: Registry::default(),
            requests: Family::default(),
            durations,
            refusals: Family::default(),
            creates: Family::default(),
            starting: Gauge::default(),
            by_node: Family::default(),
            by_team: Family::default(),
            deliveries: Family::default(),
            queue_depth: Gauge::default(),
            lost_changes: Gauge::default(),
            memory: Gauge::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let own = self.registry.sub_registry_with_prefix("belljar");
        own.register("http_requests", "Requests answered", self.requests.clone());
        own.register(
            "http_request_duration_seconds",
            "From the end of a request's head to the start of its answer",
            self.durations.clone(),
        );
        own.register("refusals", "Requests refused or failed", self.refusals.clone());
        own.register("sandbox_creates", "Requests to create a sandbox", self.creates.clone());
        own.register("sandboxes_starting", "Creates in progress", self.starting.clone());
        own.register("sandboxes_running", "Running sandboxes of a node", self.by_node.clone());
        own.register(
            "team_sandboxes_running",
            "Running sandboxes of each of the busiest teams, and of the others together",
            self.by_team.clone(),
        );
        own.register(
            "webhook_deliveries",
            "Attempts to deliver an event, by what became of them",
            self.deliveries.clone(),
        );
        own.register(
            "store_queue_depth",
            "Changes waiting to be written to the database",
            self.queue_depth.clone(),
        );
        own.register(
            "store_lost_changes",
            "Changes that were not written since the start and left to the reconciler",
            self.lost_changes.clone(),
        );
        self.registry.register(
            "process_resident_memory_bytes",
            "Memory of this process that is in use",
            self.memory.clone(),
        );
    }

    /// Counts one request. `creates` says that it asked for a new sandbox.
    pub(crate) fn answered(&self, answered: &Answered<'_>, creates: bool) {
        let method = known_method(answered.method);
        let route = answered.route.unwrap_or("none").to_owned();
        let status = status_class(answered.status);
        self.durations
            .get_or_create(&Route { method, route: route.clone() })
            .observe(answered.took.as_secs_f64());
        self.requests.get_or_create(&Request { method, route, status }).inc();
        if let Some(reason) = answered.reason {
            self.refusals.get_or_create(&Reason { reason }).inc();
        }
        if creates {
            let outcome = answered.reason.unwrap_or("created");
            self.creates.get_or_create(&Outcome { outcome }).inc();
        }
    }

    /// Counts a create as in progress until the guard is dropped.
    pub(crate) fn begin_create(&self) -> Creating {
        self.starting.inc();
        Creating(self.starting.clone())
    }

    /// What counts attempts to deliver events.
    pub(crate) fn deliveries(&self) -> DeliveryCounts {
        DeliveryCounts(self.deliveries.clone())
    }

    /// Everything as OpenMetrics text. Walks the live table once.
    pub(crate) fn scrape(&self, app: &App) -> String {
        self.count_sandboxes(app);
        self.queue_depth.set(i64::try_from(app.writer.depth()).unwrap_or(i64::MAX));
        self.lost_changes.set(i64::try_from(app.writer.lost()).unwrap_or(i64::MAX));
        self.memory.set(resident_bytes());
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            // Writing to a string cannot fail; a metric that cannot be written is a defect.
            text.clear();
            let _cannot_fail = text.write_str("# EOF\n");
        }
        text
    }

    fn count_sandboxes(&self, app: &App) {
        let (mut nodes, mut teams) = (HashMap::new(), HashMap::new());
        for sandbox in app.live.all() {
            *nodes.entry(sandbox.node).or_insert(0_i64) += 1;
            *teams.entry(sandbox.team.clone()).or_insert(0_i64) += 1;
        }
        // Who is gone must not stay at the last figure.
        self.by_node.clear();
        self.by_team.clear();
        for member in app.nodes.iter() {
            let count = nodes.get(&member.ix).copied().unwrap_or_default();
            self.by_node.get_or_create(&OfNode { node: member.ix.0 }).set(count);
        }
        let mut teams: Vec<_> = teams.into_iter().collect();
        teams.sort_by(|(a, many), (b, few)| few.cmp(many).then_with(|| a.cmp(b)));
        let others: i64 = teams.iter().skip(MAX_TEAMS).map(|(_, count)| count).sum();
        for (team, count) in teams.iter().take(MAX_TEAMS) {
            self.by_team.get_or_create(&OfTeam { team: team.to_string() }).set(*count);
        }
        self.by_team.get_or_create(&OfTeam { team: OTHER_TEAMS.to_owned() }).set(others);
    }
}

/// Counts attempts to deliver events.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeliveryCounts(Family<Outcome, Counter>);

impl DeliveryCounts {
    /// Counts one attempt.
    pub(crate) fn add(&self, what: Delivery) {
        let outcome = match what {
            Delivery::Delivered => "delivered",
            Delivery::Retried => "retried",
            Delivery::Dead => "dead",
        };
        self.0.get_or_create(&Outcome { outcome }).inc();
    }
}

/// A create in progress.
pub(crate) struct Creating(Gauge);

impl Drop for Creating {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A client may make up methods; their names are not made into series.
fn known_method(method: &http::Method) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];
    KNOWN.into_iter().find(|known| method == *known).unwrap_or("other")
}

fn status_class(status: http::StatusCode) -> &'static str {
    match status.as_u16() {
        100..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    }
}

/// Read from the kernel's memory, so it is not a wait for a disk; 0 when it cannot be read.
fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = kib.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<i64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, StatusCode};

    fn answered(metrics: &Metrics, method: &Method, route: Option<&str>, status: u16) {
        let answered = Answered {
            method,
            route,
            status: StatusCode::from_u16(status).expect("a status"),
            reason: (status >= 400).then_some("invalid"),
            took: Duration::from_millis(3),
        };
        metrics.answered(&answered, route == Some("/sandboxes") && method == Method::POST);
    }

    #[test]
    fn requests_are_counted_by_route_and_class() {
        let metrics = Metrics::new();
        answered(&metrics, &Method::GET, Some("/sandboxes/{id}"), 200);
        answered(&metrics, &Method::GET, Some("/sandboxes/{id}"), 204);
        answered(&metrics, &Method::POST, Some("/sandboxes"), 201);
        answered(&metrics, &Method::POST, Some("/sandboxes"), 400);
        answered(&metrics, &Method::from_bytes(b"BREW").expect("a method"), None, 405);
        for what in [Delivery::Delivered, Delivery::Retried, Delivery::Dead, Delivery::Dead] {
            metrics.deliveries().add(what);
        }
        let creating = metrics.begin_create();
        let mut text = String::new();
        encode(&mut text, &metrics.registry).expect("text");
        for line in [
            r#"belljar_http_requests_total{method="GET",route="/sandboxes/{id}",status="2xx"} 2"#,
            r#"belljar_http_requests_total{method="other",route="none",status="4xx"} 1"#,
            r#"belljar_http_request_duration_seconds_bucket{le="0.005",method="GET",route="/sandboxes/{id}"} 2"#,
            r#"belljar_sandbox_creates_total{outcome="created"} 1"#,
            r#"belljar_sandbox_creates_total{outcome="invalid"} 1"#,
            r#"belljar_refusals_total{reason="invalid"} 2"#,
            r#"belljar_webhook_deliveries_total{outcome="dead"} 2"#,
            "belljar_sandboxes_starting 1",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        drop(creating);
        assert_eq!(metrics.starting.get(), 0);
    }

    #[test]
    fn the_memory_of_this_process_is_known() {
        assert!(resident_bytes() > 1024 * 1024);
    }
}
