//! Lifecycle events and, with each, its deliveries: written in the transaction of a state change.

use std::collections::HashMap;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::{SandboxId, UnixMillis};
use belljar_wire::rest::EventType;

use super::{Store, StoreError, Tx, corrupt, during, on_pool, on_tx};
use crate::event::Event;
use crate::team::TeamId;

/// Which events are wanted, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventsWanted {
    /// Only of this sandbox.
    pub(crate) sandbox: Option<SandboxId>,
    /// Only of these types; empty is all.
    pub(crate) kinds: Vec<EventType>,
    pub(crate) oldest_first: bool,
    pub(crate) offset: u32,
    pub(crate) limit: u32,
}

/// The columns of an [`Event`] as stored.
#[derive(sqlx::FromRow)]
pub(super) struct StoredEvent {
    id: String,
    #[sqlx(rename = "type")]
    kind: String,
    team_id: String,
    sandbox_id: String,
    execution_id: String,
    template_id: String,
    build_id: String,
    at_ms: i64,
    data: String,
}

impl TryFrom<StoredEvent> for Event {
    type Error = StoreError;

    fn try_from(row: StoredEvent) -> Result<Self, StoreError> {
        let kind = EventType::parse(&row.kind).ok_or_else(|| corrupt("an event's type", &row.kind));
        let team = TeamId::parse(&row.team_id).ok_or_else(|| corrupt("a team id", &row.team_id));
        let execution = row.execution_id.parse();
        let template = row.template_id.parse();
        Ok(Event {
            id: row.id,
            kind: kind?,
            at: UnixMillis(row.at_ms),
            team: team?,
            sandbox: row
                .sandbox_id
                .parse()
                .map_err(|_| corrupt("a sandbox id", &row.sandbox_id))?,
            execution: execution.map_err(|_| corrupt("an execution id", &row.execution_id))?,
            template: template.map_err(|_| corrupt("a template id", &row.template_id))?,
            build: row.build_id.parse().map_err(|_| corrupt("a build id", &row.build_id))?,
            data: serde_json::from_str(&row.data)
                .map_err(|_| corrupt("an event's data", &row.data))?,
        })
    }
}

/// A list of events: of whom, in which order. `$2` to `$7` are the wanted types, `$8` the sandbox.
macro_rules! list_sql {
    ($of:literal, $order:literal) => {
        concat!(
            "SELECT id, type, team_id, sandbox_id, execution_id, template_id, build_id, at_ms, ",
            "data FROM events WHERE team_id = $1 AND type IN ($2, $3, $4, $5, $6, $7) AND ",
            $of,
            " ORDER BY at_ms ",
            $order,
            ", seq ",
            $order,
            " LIMIT $9 OFFSET $10"
        )
    };
}

fn list_statement(wanted: &EventsWanted) -> &'static str {
    match (wanted.sandbox.is_some(), wanted.oldest_first) {
        (false, true) => list_sql!("$8 = ''", "ASC"),
        (false, false) => list_sql!("$8 = ''", "DESC"),
        (true, true) => list_sql!("sandbox_id = $8", "ASC"),
        (true, false) => list_sql!("sandbox_id = $8", "DESC"),
    }
}

/// The types to look for: exactly as many as there are, so that one statement serves all filters.
fn kinds(wanted: &[EventType]) -> [&'static str; EventType::ALL.len()] {
    let all = if wanted.is_empty() { &EventType::ALL[..] } else { wanted };
    std::array::from_fn(|i| all.get(i).map_or("", |kind| kind.as_str()))
}

impl Store {
    /// The wanted part of the events of `team`.
    pub(crate) async fn events(
        &self,
        team: &TeamId,
        wanted: &EventsWanted,
    ) -> Result<Vec<Event>, StoreError> {
        let sandbox = wanted.sandbox.as_ref().map_or("", SandboxId::as_str);
        let rows: Vec<StoredEvent> = on_pool!(self, pool => {
            let mut query = sqlx::query_as(list_statement(wanted)).bind(team.to_string());
            for kind in kinds(&wanted.kinds) {
                query = query.bind(kind);
            }
            query
                .bind(sandbox)
                .bind(i64::from(wanted.limit))
                .bind(i64::from(wanted.offset))
                .fetch_all(pool)
                .await
                .map_err(during("list events"))?
        });
        rows.into_iter().map(Event::try_from).collect()
    }

    /// Whether `team` has an event of `sandbox`.
    pub(crate) async fn has_events(
        &self,
        team: &TeamId,
        sandbox: &SandboxId,
    ) -> Result<bool, StoreError> {
        let found: Option<i64> = on_pool!(self, pool => {
            sqlx::query_scalar(
                "SELECT seq FROM events WHERE sandbox_id = $1 AND team_id = $2 LIMIT 1",
            )
            .bind(sandbox.as_str())
            .bind(team.to_string())
            .fetch_optional(pool)
            .await
            .map_err(during("find events of a sandbox"))?
        });
        Ok(found.is_some())
    }
}

/// Days events are kept when a team's tier says nothing, and the most a team can have.
/// Source: contract section 9.
const DEFAULT_DAYS: i64 = 7;
const MAX_DAYS: i64 = 365;
/// What a team's own number of days is called among its limits.
const DAYS: &str = "events_ttl_days";

impl Store {
    /// How long the events of each team are kept.
    pub(crate) async fn event_retention(&self) -> Result<Vec<(TeamId, Duration)>, StoreError> {
        let rows: Vec<(String, Option<i64>, String)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT teams.id, tiers.events_ttl_days, teams.limits FROM teams \
                 LEFT JOIN tiers ON tiers.id = teams.tier_id",
            )
            .fetch_all(pool)
            .await
            .map_err(during("read how long events are kept"))?
        });
        let retention = |(team, tier_days, limits): (String, Option<i64>, String)| {
            let limits: serde_json::Value = serde_json::from_str(&limits).unwrap_or_default();
            let days = limits[DAYS].as_i64().or(tier_days).unwrap_or(DEFAULT_DAYS);
            let hours = u64::try_from(days.clamp(1, MAX_DAYS)).unwrap_or_default() * 24;
            let team = TeamId::parse(&team).ok_or_else(|| corrupt("a team id", &team))?;
            Ok((team, Duration::from_secs(hours * 3600)))
        };
        rows.into_iter().map(retention).collect()
    }

    /// Removes at most `limit` events of `team` older than `before`, oldest first, with their
    /// deliveries. Says how many events.
    pub(crate) async fn remove_events(
        &self,
        team: &TeamId,
        before: UnixMillis,
        limit: u32,
    ) -> Result<u64, StoreError> {
        let done = on_pool!(self, pool => {
            sqlx::query(
                "DELETE FROM events WHERE seq IN ( \
                 SELECT seq FROM events WHERE team_id = $1 AND at_ms < $2 \
                 ORDER BY at_ms, seq LIMIT $3)",
            )
            .bind(team.to_string())
            .bind(before.0)
            .bind(i64::from(limit))
            .execute(pool)
            .await
            .map_err(during("remove old events"))?
            .rows_affected()
        });
        Ok(done)
    }
}

/// Writes the events of one transaction; remembers meanwhile which team has which webhooks.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    listeners: HashMap<TeamId, Vec<Listener>>,
    deliveries: u64,
}

/// A webhook that is switched on.
#[derive(Debug)]
struct Listener {
    webhook: String,
    kinds: Vec<EventType>,
}

impl Recorder {
    /// Whether anything is to be delivered once the transaction is through.
    pub(super) fn has_deliveries(&self) -> bool {
        self.deliveries > 0
    }

    /// Writes `event` and a delivery for every webhook that wants it; nothing when it is there.
    pub(super) async fn record(&mut self, tx: &mut Tx, event: &Event) -> Result<(), sqlx::Error> {
        let data = serde_json::to_string(&event.data).expect("times and words have a JSON form");
        let seq: Option<i64> = on_tx!(tx, connection => {
            sqlx::query_scalar(
                "INSERT INTO events (id, type, team_id, sandbox_id, execution_id, template_id, \
                 build_id, at_ms, data) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) \
                 ON CONFLICT (id) DO NOTHING RETURNING seq",
            )
            .bind(&event.id)
            .bind(event.kind.as_str())
            .bind(event.team.to_string())
            .bind(event.sandbox.as_str())
            .bind(event.execution.as_str())
            .bind(event.template.as_str())
            .bind(event.build.as_str())
            .bind(event.at.0)
            .bind(data)
            .fetch_optional(connection)
            .await?
        });
        let Some(seq) = seq else { return Ok(()) };
        if !self.listeners.contains_key(&event.team) {
            self.listeners.insert(event.team.clone(), listeners(tx, &event.team).await?);
        }
        let listeners = self.listeners.get(&event.team).into_iter().flatten();
        for listener in listeners.filter(|listener| listener.kinds.contains(&event.kind)) {
            queue(tx, &listener.webhook, seq, clock::now()).await?;
            self.deliveries += 1;
        }
        Ok(())
    }
}

async fn listeners(tx: &mut Tx, team: &TeamId) -> Result<Vec<Listener>, sqlx::Error> {
    let rows: Vec<(String, String)> = on_tx!(tx, connection => {
        sqlx::query_as("SELECT id, event_types FROM webhooks WHERE team_id = $1 AND enabled = $2")
            .bind(team.to_string())
            .bind(true)
            .fetch_all(connection)
            .await?
    });
    let listener = |(webhook, kinds): (String, String)| Listener {
        webhook,
        // A list that cannot be read must not stop the state change; the webhook hears of all.
        kinds: serde_json::from_str(&kinds).unwrap_or_else(|_| EventType::ALL.to_vec()),
    };
    Ok(rows.into_iter().map(listener).collect())
}

async fn queue(tx: &mut Tx, webhook: &str, seq: i64, now: UnixMillis) -> Result<(), sqlx::Error> {
    on_tx!(tx, connection => {
        sqlx::query(
            "INSERT INTO deliveries (id, webhook_id, event_seq, state, attempts, next_at_ms, \
             leased_until_ms, created_at_ms, updated_at_ms) \
             VALUES ($1, $2, $3, 'pending', 0, $4, 0, $4, $4)",
        )
        .bind(uuid::Uuid::new_v4().to_string())
        .bind(webhook)
        .bind(seq)
        .bind(now.0)
        .execute(connection)
        .await
        .map(drop)
    })
}
