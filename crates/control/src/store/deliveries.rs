//! Deliveries: events on their way to webhooks.
//!
//! Of a delivery, whoever takes it has it until its lease is over; then it is free again, so one
//! whose server died is delivered by the next. Of one sandbox and one webhook, only the oldest
//! pending delivery can be taken: events of a sandbox arrive in their order.

use std::time::Duration;

use belljar_domain::{Secret, UnixMillis};
use belljar_wire::rest::{DeliveryState, EventType};

use super::events::StoredEvent;
use super::{Store, StoreError, corrupt, during, on_pool};
use crate::event::Event;
use crate::team::TeamId;
use crate::webhook::{After, Next};

/// A time further ahead than any wait or lease is one of a clock that was set back since.
const FARTHEST: Duration = Duration::from_secs(3600);

/// What a delivery says that was given up because too many waited.
const TOO_FAR_BEHIND: &str = "too many deliveries were waiting for this webhook";

/// A webhook that has something to be delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) webhook: String,
    pub(crate) team: TeamId,
    pub(crate) url: String,
    pub(crate) secret: Secret<String>,
}

/// A delivery that is ours until its lease is over.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Taken {
    pub(crate) id: String,
    /// Tries that came to an end.
    pub(crate) attempts: u32,
    /// Whose it is: of two takers of one delivery, the second has another time.
    pub(crate) leased_until: UnixMillis,
    pub(crate) event: Event,
}

/// A delivery as its team sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) id: String,
    pub(crate) webhook: String,
    pub(crate) event: String,
    pub(crate) kind: EventType,
    pub(crate) sandbox: String,
    pub(crate) state: DeliveryState,
    pub(crate) attempts: u32,
    pub(crate) created_at: UnixMillis,
    pub(crate) next_at: UnixMillis,
    pub(crate) updated_at: UnixMillis,
    pub(crate) last_status: Option<u16>,
    pub(crate) last_error: Option<String>,
}

/// Which deliveries are wanted, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeliveriesWanted {
    pub(crate) state: Option<DeliveryState>,
    pub(crate) oldest_first: bool,
    pub(crate) offset: u32,
    pub(crate) limit: u32,
}

/// The columns of a [`Delivery`] as stored.
#[derive(sqlx::FromRow)]
struct StoredDelivery {
    id: String,
    webhook_id: String,
    event_id: String,
    kind: String,
    sandbox_id: String,
    state: String,
    attempts: i64,
    next_at_ms: i64,
    last_status: Option<i64>,
    last_error: Option<String>,
    created_at_ms: i64,
    updated_at_ms: i64,
}

impl TryFrom<StoredDelivery> for Delivery {
    type Error = StoreError;

    fn try_from(row: StoredDelivery) -> Result<Self, StoreError> {
        let kind = EventType::parse(&row.kind).ok_or_else(|| corrupt("an event's type", &row.kind));
        let state = DeliveryState::parse(&row.state)
            .ok_or_else(|| corrupt("a delivery's state", &row.state));
        Ok(Delivery {
            id: row.id,
            webhook: row.webhook_id,
            event: row.event_id,
            kind: kind?,
            sandbox: row.sandbox_id,
            state: state?,
            attempts: count(row.attempts),
            created_at: UnixMillis(row.created_at_ms),
            next_at: UnixMillis(row.next_at_ms),
            updated_at: UnixMillis(row.updated_at_ms),
            last_status: row.last_status.and_then(|status| u16::try_from(status).ok()),
            last_error: row.last_error,
        })
    }
}

/// Counts are never negative, and never near the end of their type.
fn count(stored: i64) -> u32 {
    u32::try_from(stored).unwrap_or_default()
}

/// A list of deliveries: in which state, in which order.
macro_rules! list_sql {
    ($state:literal, $order:literal) => {
        concat!(
            "SELECT d.id, d.webhook_id, e.id AS event_id, e.type AS kind, e.sandbox_id, d.state, ",
            "d.attempts, d.next_at_ms, d.last_status, d.last_error, d.created_at_ms, ",
            "d.updated_at_ms FROM deliveries d JOIN events e ON e.seq = d.event_seq ",
            "WHERE d.webhook_id = $1 AND ",
            $state,
            " ORDER BY d.created_at_ms ",
            $order,
            ", d.event_seq ",
            $order,
            " LIMIT $3 OFFSET $4"
        )
    };
}

fn list_statement(wanted: &DeliveriesWanted) -> &'static str {
    match (wanted.state.is_some(), wanted.oldest_first) {
        (false, true) => list_sql!("$2 = ''", "ASC"),
        (false, false) => list_sql!("$2 = ''", "DESC"),
        (true, true) => list_sql!("d.state = $2", "ASC"),
        (true, false) => list_sql!("d.state = $2", "DESC"),
    }
}

impl Store {
    /// The wanted part of the deliveries of `webhook`. Whose it is has been checked.
    pub(crate) async fn deliveries(
        &self,
        webhook: &str,
        wanted: &DeliveriesWanted,
    ) -> Result<Vec<Delivery>, StoreError> {
        let rows: Vec<StoredDelivery> = on_pool!(self, pool => {
            sqlx::query_as(list_statement(wanted))
                .bind(webhook)
                .bind(wanted.state.map_or("", DeliveryState::as_str))
                .bind(i64::from(wanted.limit))
                .bind(i64::from(wanted.offset))
                .fetch_all(pool)
                .await
                .map_err(during("list deliveries"))?
        });
        rows.into_iter().map(Delivery::try_from).collect()
    }

    /// One delivery of `webhook`. Whose the webhook is has been checked.
    pub(crate) async fn delivery(
        &self,
        webhook: &str,
        id: &str,
    ) -> Result<Option<Delivery>, StoreError> {
        let row: Option<StoredDelivery> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT d.id, d.webhook_id, e.id AS event_id, e.type AS kind, e.sandbox_id, \
                 d.state, d.attempts, d.next_at_ms, d.last_status, d.last_error, \
                 d.created_at_ms, d.updated_at_ms \
                 FROM deliveries d JOIN events e ON e.seq = d.event_seq \
                 WHERE d.webhook_id = $1 AND d.id = $2",
            )
            .bind(webhook)
            .bind(id)
            .fetch_optional(pool)
            .await
            .map_err(during("find a delivery"))?
        });
        row.map(Delivery::try_from).transpose()
    }

    /// Makes a dead delivery pending, as if it had never been tried. False when it is not dead.
    pub(crate) async fn revive(
        &self,
        webhook: &str,
        id: &str,
        now: UnixMillis,
    ) -> Result<bool, StoreError> {
        let revived = on_pool!(self, pool => {
            sqlx::query(
                "UPDATE deliveries SET state = 'pending', attempts = 0, next_at_ms = $1, \
                 leased_until_ms = 0, updated_at_ms = $1 \
                 WHERE webhook_id = $2 AND id = $3 AND state = 'dead'",
            )
            .bind(now.0)
            .bind(webhook)
            .bind(id)
            .execute(pool)
            .await
            .map_err(during("ask for a delivery again"))?
            .rows_affected()
        });
        if revived > 0 {
            self.deliveries_due().notify_one();
        }
        Ok(revived > 0)
    }

    /// At most `limit` webhooks with something due, in the order of their ids, after `after`.
    pub(crate) async fn waiting(
        &self,
        after: &str,
        now: UnixMillis,
        limit: u32,
    ) -> Result<Vec<Waiting>, StoreError> {
        let rows: Vec<(String, String, String, String)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT w.id, w.team_id, w.url, w.signature_secret FROM webhooks w \
                 WHERE w.id > $1 AND w.enabled = $2 AND EXISTS ( \
                     SELECT 1 FROM deliveries d WHERE d.webhook_id = w.id \
                     AND d.state = 'pending' \
                     AND (d.next_at_ms <= $3 OR d.next_at_ms > $4) \
                     AND (d.leased_until_ms <= $3 OR d.leased_until_ms > $4)) \
                 ORDER BY w.id LIMIT $5",
            )
            .bind(after)
            .bind(true)
            .bind(now.0)
            .bind(now.plus(FARTHEST).0)
            .bind(i64::from(limit))
            .fetch_all(pool)
            .await
            .map_err(during("find webhooks with deliveries"))?
        });
        let waiting = |(webhook, team, url, secret): (String, String, String, String)| {
            let team = TeamId::parse(&team).ok_or_else(|| corrupt("a team's id", &team))?;
            Ok(Waiting { webhook, team, url, secret: Secret::new(secret) })
        };
        rows.into_iter().map(waiting).collect()
    }

    /// Takes at most `limit` due deliveries of `webhook` until `now` + `lease`, oldest first.
    pub(crate) async fn take_deliveries(
        &self,
        webhook: &str,
        limit: u32,
        now: UnixMillis,
        lease: Duration,
    ) -> Result<Vec<Taken>, StoreError> {
        // The oldest of each sandbox, found in one pass: a look back for every row is quadratic, and
        // on SQLite nobody else writes meanwhile. The outer conditions again: of two servers that chose the same row, the second sees
        // that it is taken once the first one's statement is through.
        let leased_until = now.plus(lease);
        let rows: Vec<(String, i64, i64)> = on_pool!(self, pool => {
            sqlx::query_as(
                "UPDATE deliveries SET leased_until_ms = $4 WHERE id IN ( \
                     SELECT d.id FROM deliveries d JOIN events e ON e.seq = d.event_seq \
                     WHERE d.webhook_id = $1 AND d.state = 'pending' \
                     AND (d.next_at_ms <= $2 OR d.next_at_ms > $3) \
                     AND (d.leased_until_ms <= $2 OR d.leased_until_ms > $3) \
                     AND d.event_seq IN ( \
                         SELECT MIN(p.event_seq) FROM deliveries p \
                         JOIN events pe ON pe.seq = p.event_seq \
                         WHERE p.webhook_id = $1 AND p.state = 'pending' \
                         GROUP BY pe.sandbox_id) \
                     ORDER BY d.event_seq LIMIT $5) \
                 AND state = 'pending' AND (leased_until_ms <= $2 OR leased_until_ms > $3) \
                 RETURNING id, attempts, event_seq",
            )
            .bind(webhook)
            .bind(now.0)
            .bind(now.plus(FARTHEST).0)
            .bind(leased_until.0)
            .bind(i64::from(limit))
            .fetch_all(pool)
            .await
            .map_err(during("take deliveries"))?
        });
        let mut taken = Vec::with_capacity(rows.len());
        for (id, attempts, seq) in rows {
            // Gone with its event: too old to be delivered.
            let Some(event) = self.event(seq).await? else { continue };
            taken.push(Taken { id, attempts: count(attempts), leased_until, event });
        }
        Ok(taken)
    }

    async fn event(&self, seq: i64) -> Result<Option<Event>, StoreError> {
        let row: Option<StoredEvent> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT id, type, team_id, sandbox_id, execution_id, template_id, build_id, \
                 at_ms, data FROM events WHERE seq = $1",
            )
            .bind(seq)
            .fetch_optional(pool)
            .await
            .map_err(during("read an event"))?
        });
        row.map(Event::try_from).transpose()
    }

    /// Writes what became of a delivery that was taken until `leased_until`. Nothing happens when it is
    /// over already, or somebody else took it since.
    pub(crate) async fn finish_delivery(
        &self,
        id: &str,
        leased_until: UnixMillis,
        after: &After,
        now: UnixMillis,
    ) -> Result<(), StoreError> {
        let (state, next_at) = match after.state {
            Next::Delivered => (DeliveryState::Delivered, now),
            Next::Pending { due } => (DeliveryState::Pending, due),
            Next::Dead => (DeliveryState::Dead, now),
        };
        on_pool!(self, pool => {
            sqlx::query(
                "UPDATE deliveries SET state = $1, attempts = $2, next_at_ms = $3, \
                 leased_until_ms = 0, last_status = $4, last_error = $5, updated_at_ms = $6 \
                 WHERE id = $7 AND state = 'pending' AND leased_until_ms = $8",
            )
            .bind(state.as_str())
            .bind(i64::from(after.attempts))
            .bind(next_at.0)
            .bind(after.last_status.map(i64::from))
            .bind(after.last_error.as_deref())
            .bind(now.0)
            .bind(id)
            .bind(leased_until.0)
            .execute(pool)
            .await
            .map(drop)
            .map_err(during("finish a delivery"))
        })
    }

    /// Gives a delivery back that was taken until `leased_until` and not tried to the end. Nothing
    /// happens when somebody else took it since.
    pub(crate) async fn release_delivery(
        &self,
        id: &str,
        leased_until: UnixMillis,
    ) -> Result<(), StoreError> {
        on_pool!(self, pool => {
            sqlx::query(
                "UPDATE deliveries SET leased_until_ms = 0 WHERE id = $1 AND leased_until_ms = $2",
            )
            .bind(id)
            .bind(leased_until.0)
            .execute(pool)
            .await
            .map(drop)
            .map_err(during("give a delivery back"))
        })
    }

    /// The webhooks with more than `limit` deliveries waiting.
    pub(crate) async fn far_behind(&self, limit: u32) -> Result<Vec<String>, StoreError> {
        on_pool!(self, pool => {
            sqlx::query_scalar(
                "SELECT webhook_id FROM deliveries WHERE state = 'pending' \
                 GROUP BY webhook_id HAVING COUNT(*) > $1",
            )
            .bind(i64::from(limit))
            .fetch_all(pool)
            .await
            .map_err(during("find webhooks that are far behind"))
        })
    }

    /// Gives up all deliveries waiting for `webhook` but the newest `keep`. Says how many.
    pub(crate) async fn drop_backlog(
        &self,
        webhook: &str,
        keep: u32,
        now: UnixMillis,
    ) -> Result<u64, StoreError> {
        let done = on_pool!(self, pool => {
            sqlx::query(
                "UPDATE deliveries SET state = 'dead', last_error = $1, updated_at_ms = $2 \
                 WHERE webhook_id = $3 AND state = 'pending' AND event_seq <= ( \
                     SELECT event_seq FROM deliveries \
                     WHERE webhook_id = $3 AND state = 'pending' \
                     ORDER BY event_seq DESC LIMIT 1 OFFSET $4)",
            )
            .bind(TOO_FAR_BEHIND)
            .bind(now.0)
            .bind(webhook)
            .bind(i64::from(keep))
            .execute(pool)
            .await
            .map_err(during("give up old deliveries"))?
            .rows_affected()
        });
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
