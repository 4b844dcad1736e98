//! Lifecycle events and webhooks. Source: contract section 1.7; deliveries are our own addition.

use belljar_domain::Secret;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};

/// What happened to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum EventType {
    /// A run began.
    #[serde(rename = "sandbox.lifecycle.created")]
    Created,
    /// A run ended for good.
    #[serde(rename = "sandbox.lifecycle.killed")]
    Killed,
    /// Its end was moved.
    #[serde(rename = "sandbox.lifecycle.updated")]
    Updated,
    /// It was saved and stopped.
    #[serde(rename = "sandbox.lifecycle.paused")]
    Paused,
    /// It runs again from what was saved.
    #[serde(rename = "sandbox.lifecycle.resumed")]
    Resumed,
    /// It was saved and goes on.
    #[serde(rename = "sandbox.lifecycle.checkpointed")]
    Checkpointed,
}

impl EventType {
    /// Every type, in the contract's order.
    pub const ALL: [EventType; 6] = [
        EventType::Created,
        EventType::Killed,
        EventType::Updated,
        EventType::Paused,
        EventType::Resumed,
        EventType::Checkpointed,
    ];

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            EventType::Created => "sandbox.lifecycle.created",
            EventType::Killed => "sandbox.lifecycle.killed",
            EventType::Updated => "sandbox.lifecycle.updated",
            EventType::Paused => "sandbox.lifecycle.paused",
            EventType::Resumed => "sandbox.lifecycle.resumed",
            EventType::Checkpointed => "sandbox.lifecycle.checkpointed",
        }
    }

    /// The type `text` spells, letter for letter.
    pub fn parse(text: &str) -> Option<EventType> {
        EventType::ALL.into_iter().find(|event| event.as_str() == text)
    }

    /// The event's label: what was done, as a verb.
    pub fn label(self) -> &'static str {
        match self {
            EventType::Created => "create",
            EventType::Killed => "kill",
            EventType::Updated => "update",
            EventType::Paused => "pause",
            EventType::Resumed => "resume",
            EventType::Checkpointed => "checkpoint",
        }
    }
}

/// One event: an item of `GET /events/sandboxes` and the body of a delivery. Snake case on the wire.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxEvent {
    /// The same for the same event, however often it is delivered. A UUID.
    pub id: String,
    /// Shape of this object: `v2`.
    pub version: String,
    /// What happened.
    #[serde(rename = "type")]
    pub event_type: EventType,
    /// When.
    pub timestamp: DateTime<Utc>,
    /// `lifecycle`.
    pub event_category: String,
    /// See [`EventType::label`].
    pub event_label: String,
    /// What else is known of it; the fields depend on the type.
    pub event_data: EventData,
    /// The sandbox.
    pub sandbox_id: String,
    /// The run of it.
    pub sandbox_execution_id: String,
    /// What it was made from.
    pub sandbox_template_id: String,
    /// The build of that.
    pub sandbox_build_id: String,
    /// Whose it is.
    pub sandbox_team_id: String,
}

/// Details of an event.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EventData {
    /// The caller's own labels of the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_metadata: Option<std::collections::BTreeMap<String, String>>,
    /// The run that is over: on killed and paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution: Option<EventExecution>,
    /// The new end of the sandbox: on updated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_timeout: Option<DateTime<Utc>>,
    /// Why it ended: on killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<KillReason>,
}

/// Why a sandbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum KillReason {
    /// Somebody asked for it.
    Request,
    /// Its time was up.
    Timeout,
    /// It ended by itself.
    Crashed,
    /// The server that held it stopped or lost it.
    Lost,
}

/// A run that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EventExecution {
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// Virtual CPUs it had.
    pub vcpu_count: u32,
    /// Memory it had, in MiB.
    pub memory_mb: u32,
    /// How long it ran, in milliseconds.
    pub execution_time: u64,
}

/// Body of `POST /events/webhooks`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct NewWebhook {
    /// For people. 1 to 128 characters.
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 128))]
    pub name: String,
    /// Where events are sent: `http` or `https`, at most 2048 bytes.
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 2048))]
    pub url: String,
    /// Absent: true.
    #[serde(default)]
    pub enabled: Option<bool>,
    /// Which events are sent. At least one.
    #[cfg_attr(feature = "openapi", schema(min_items = 1))]
    pub events: Vec<EventType>,
    /// What signatures are made with, 16 to 256 bytes. Never shown.
    #[serde(deserialize_with = "secret")]
    #[cfg_attr(feature = "openapi", schema(value_type = String, min_length = 16, max_length = 256))]
    pub signature_secret: Secret<String>,
}

/// Body of `PATCH /events/webhooks/{id}`: what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateWebhook {
    /// See [`NewWebhook::name`].
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 128))]
    pub name: Option<String>,
    /// See [`NewWebhook::url`].
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 2048))]
    pub url: Option<String>,
    /// See [`NewWebhook::enabled`].
    #[serde(default)]
    pub enabled: Option<bool>,
    /// See [`NewWebhook::events`].
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(min_items = 1))]
    pub events: Option<Vec<EventType>>,
    /// See [`NewWebhook::signature_secret`].
    #[serde(default, deserialize_with = "optional_secret")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, min_length = 16, max_length = 256))]
    pub signature_secret: Option<Secret<String>>,
}

fn secret<'de, D: Deserializer<'de>>(from: D) -> Result<Secret<String>, D::Error> {
    String::deserialize(from).map(Secret::new)
}

fn optional_secret<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Secret<String>>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.map(Secret::new))
}

/// A webhook as it is shown: everything but its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Webhook {
    /// A UUID.
    pub id: String,
    /// Whose it is.
    #[serde(rename = "teamID")]
    pub team_id: String,
    /// See [`NewWebhook::name`].
    pub name: String,
    /// See [`NewWebhook::url`].
    pub url: String,
    /// See [`NewWebhook::enabled`].
    pub enabled: bool,
    /// See [`NewWebhook::events`].
    pub events: Vec<EventType>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// How far a delivery got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum DeliveryState {
    /// It will be tried, for the first time or again.
    Pending,
    /// The receiver took it.
    Delivered,
    /// It is not tried any more, unless somebody asks for it.
    Dead,
}

impl DeliveryState {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            DeliveryState::Pending => "pending",
            DeliveryState::Delivered => "delivered",
            DeliveryState::Dead => "dead",
        }
    }

    /// The state `text` spells, letter for letter.
    pub fn parse(text: &str) -> Option<DeliveryState> {
        let all = [DeliveryState::Pending, DeliveryState::Delivered, DeliveryState::Dead];
        all.into_iter().find(|state| state.as_str() == text)
    }
}

/// One event on its way to one webhook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct WebhookDelivery {
    /// A UUID; the same at every try.
    pub id: String,
    /// The webhook.
    #[serde(rename = "webhookID")]
    pub webhook_id: String,
    /// The event.
    #[serde(rename = "eventID")]
    pub event_id: String,
    /// Its type.
    pub event_type: EventType,
    /// Its sandbox.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    /// How far it got.
    pub state: DeliveryState,
    /// Tries that have come to an end.
    pub attempts: u32,
    /// When the event happened.
    pub created_at: DateTime<Utc>,
    /// When it is tried next; only while it is pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// When it was delivered or given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// The HTTP status of the last answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_status: Option<u16>,
    /// What went wrong last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_types_are_those_of_their_json() {
        for event in EventType::ALL {
            assert_eq!(serde_json::to_value(event).expect("JSON"), event.as_str());
            assert_eq!(EventType::parse(event.as_str()), Some(event));
        }
        assert_eq!(EventType::parse("sandbox.lifecycle.exploded"), None);
        for state in [DeliveryState::Pending, DeliveryState::Delivered, DeliveryState::Dead] {
            assert_eq!(serde_json::to_value(state).expect("JSON"), state.as_str());
            assert_eq!(DeliveryState::parse(state.as_str()), Some(state));
        }
    }

    #[test]
    fn secrets_of_bodies_are_not_printed() {
        let body = r#"{"name":"n","url":"u","events":[],"signatureSecret":"do-not-print-this"}"#;
        let new: NewWebhook = serde_json::from_str(body).expect("a body");
        let change: UpdateWebhook = serde_json::from_str(body).expect("a body");
        assert_eq!(new.signature_secret.expose(), "do-not-print-this");
        assert!(!format!("{new:?}{change:?}").contains("print"));
        let null: UpdateWebhook =
            serde_json::from_str(r#"{"signatureSecret":null}"#).expect("a body");
        assert_eq!(null, UpdateWebhook::default());
    }
}
