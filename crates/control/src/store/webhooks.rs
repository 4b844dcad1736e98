//! Webhooks as teams set them up.

use belljar_domain::{Secret, UnixMillis};
use belljar_wire::rest::EventType;

use super::{Store, StoreError, Tx, corrupt, during, on_pool, on_tx};
use crate::team::TeamId;

/// What a delivery that was waiting when its webhook was switched off says.
const SWITCHED_OFF: &str = "the webhook was switched off";

/// One webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Webhook {
    pub(crate) id: String,
    pub(crate) team: TeamId,
    pub(crate) terms: WebhookTerms,
    pub(crate) created_at: UnixMillis,
}

/// What its team decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WebhookTerms {
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) enabled: bool,
    pub(crate) kinds: Vec<EventType>,
    pub(crate) secret: Secret<String>,
}

/// What of it a team changes; `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WebhookChange {
    pub(crate) name: Option<String>,
    pub(crate) url: Option<String>,
    pub(crate) enabled: Option<bool>,
    pub(crate) kinds: Option<Vec<EventType>>,
    pub(crate) secret: Option<Secret<String>>,
}

/// The columns of a [`Webhook`] as stored.
#[derive(sqlx::FromRow)]
struct StoredWebhook {
    id: String,
    team_id: String,
    name: String,
    url: String,
    enabled: bool,
    event_types: String,
    signature_secret: String,
    created_at_ms: i64,
}

impl TryFrom<StoredWebhook> for Webhook {
    type Error = StoreError;

    fn try_from(row: StoredWebhook) -> Result<Self, StoreError> {
        Ok(Webhook {
            id: row.id,
            team: TeamId::parse(&row.team_id).ok_or_else(|| corrupt("a team id", &row.team_id))?,
            terms: WebhookTerms {
                name: row.name,
                url: row.url,
                enabled: row.enabled,
                kinds: serde_json::from_str(&row.event_types)
                    .map_err(|_| corrupt("a webhook's event types", &row.event_types))?,
                secret: Secret::new(row.signature_secret),
            },
            created_at: UnixMillis(row.created_at_ms),
        })
    }
}

fn kinds_text(kinds: &[EventType]) -> String {
    serde_json::to_string(kinds).expect("a list of words has a JSON form")
}

impl Store {
    /// Adds a webhook unless its team has `limit` of them. Says whether it was added.
    pub(crate) async fn add_webhook(
        &self,
        webhook: &Webhook,
        limit: u32,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin("begin to add a webhook").await?;
        let added = add(&mut tx, webhook, limit).await.map_err(during("add a webhook"))?;
        tx.commit("finish adding a webhook").await?;
        Ok(added)
    }

    /// The webhooks of `team`, oldest first.
    pub(crate) async fn webhooks(&self, team: &TeamId) -> Result<Vec<Webhook>, StoreError> {
        let rows: Vec<StoredWebhook> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT id, team_id, name, url, enabled, event_types, signature_secret, \
                 created_at_ms FROM webhooks WHERE team_id = $1 ORDER BY created_at_ms, id",
            )
            .bind(team.to_string())
            .fetch_all(pool)
            .await
            .map_err(during("list webhooks"))?
        });
        rows.into_iter().map(Webhook::try_from).collect()
    }

    /// The webhook `id`, if it is one of `team`.
    pub(crate) async fn webhook(
        &self,
        team: &TeamId,
        id: &str,
    ) -> Result<Option<Webhook>, StoreError> {
        let row: Option<StoredWebhook> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT id, team_id, name, url, enabled, event_types, signature_secret, \
                 created_at_ms FROM webhooks WHERE id = $1 AND team_id = $2",
            )
            .bind(id)
            .bind(team.to_string())
            .fetch_optional(pool)
            .await
            .map_err(during("find a webhook"))?
        });
        row.map(Webhook::try_from).transpose()
    }

    /// Changes the webhook `id` of `team` and says what it then is. Deliveries that wait for one
    /// that is switched off are dead; they can be asked for again.
    pub(crate) async fn change_webhook(
        &self,
        team: &TeamId,
        id: &str,
        change: &WebhookChange,
        now: UnixMillis,
    ) -> Result<Option<Webhook>, StoreError> {
        let mut tx = self.begin("begin to change a webhook").await?;
        let is_there = update(&mut tx, team, id, change, now);
        if !is_there.await.map_err(during("change a webhook"))? {
            return Ok(None);
        }
        if change.enabled == Some(false) {
            bury(&mut tx, id, now).await.map_err(during("give up deliveries of a webhook"))?;
        }
        tx.commit("finish changing a webhook").await?;
        self.webhook(team, id).await
    }

    /// Removes the webhook `id` of `team` with its deliveries. False when there is none.
    pub(crate) async fn remove_webhook(&self, team: &TeamId, id: &str) -> Result<bool, StoreError> {
        let removed = on_pool!(self, pool => {
            sqlx::query("DELETE FROM webhooks WHERE id = $1 AND team_id = $2")
                .bind(id)
                .bind(team.to_string())
                .execute(pool)
                .await
                .map_err(during("remove a webhook"))?
                .rows_affected()
        });
        Ok(removed > 0)
    }
}

async fn add(tx: &mut Tx, webhook: &Webhook, limit: u32) -> Result<bool, sqlx::Error> {
    let team = webhook.team.to_string();
    let added = on_tx!(tx, connection => {
        // Holds the team's row, so that two callers cannot both take the last place.
        sqlx::query("UPDATE teams SET slug = slug WHERE id = $1")
            .bind(&team)
            .execute(&mut *connection)
            .await?;
        sqlx::query(
            "INSERT INTO webhooks (id, team_id, name, url, enabled, event_types, \
             signature_secret, created_at_ms, updated_at_ms) \
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $8 \
             WHERE (SELECT COUNT(*) FROM webhooks WHERE team_id = $2) < $9",
        )
        .bind(&webhook.id)
        .bind(&team)
        .bind(&webhook.terms.name)
        .bind(&webhook.terms.url)
        .bind(webhook.terms.enabled)
        .bind(kinds_text(&webhook.terms.kinds))
        .bind(webhook.terms.secret.expose())
        .bind(webhook.created_at.0)
        .bind(i64::from(limit))
        .execute(connection)
        .await?
        .rows_affected()
    });
    Ok(added > 0)
}

async fn update(
    tx: &mut Tx,
    team: &TeamId,
    id: &str,
    change: &WebhookChange,
    now: UnixMillis,
) -> Result<bool, sqlx::Error> {
    let changed = on_tx!(tx, connection => {
        sqlx::query(
            "UPDATE webhooks SET name = COALESCE($1, name), url = COALESCE($2, url), \
             enabled = COALESCE($3, enabled), event_types = COALESCE($4, event_types), \
             signature_secret = COALESCE($5, signature_secret), updated_at_ms = $6 \
             WHERE id = $7 AND team_id = $8",
        )
        .bind(change.name.as_deref())
        .bind(change.url.as_deref())
        .bind(change.enabled)
        .bind(change.kinds.as_deref().map(kinds_text))
        .bind(change.secret.as_ref().map(|secret| secret.expose().as_str()))
        .bind(now.0)
        .bind(id)
        .bind(team.to_string())
        .execute(connection)
        .await?
        .rows_affected()
    });
    Ok(changed > 0)
}

async fn bury(tx: &mut Tx, id: &str, now: UnixMillis) -> Result<(), sqlx::Error> {
    on_tx!(tx, connection => {
        sqlx::query(
            "UPDATE deliveries SET state = 'dead', last_error = $1, updated_at_ms = $2 \
             WHERE webhook_id = $3 AND state = 'pending'",
        )
        .bind(SWITCHED_OFF)
        .bind(now.0)
        .bind(id)
        .execute(connection)
        .await
        .map(drop)
    })
}
