//! Webhooks and their deliveries. Source: contract section 1.7; deliveries are our own addition.

use std::sync::Arc;

use axum::Extension;
use axum::Json as JsonAnswer;
use axum::extract::{FromRequestParts, RawPathParams, State};
use axum::response::{IntoResponse, Response};
use belljar_daemon::clock;
use belljar_domain::Kind;
use belljar_wire::rest::{self, DeliveryState};
use http::StatusCode;
use http::request::Parts;

use super::auth::Caller;
use super::body::Json;
use super::error::ApiError;
use super::events::Page;
use super::query::Query;
use super::shapes::time;
use crate::app::App;
use crate::store::{DeliveriesWanted, Delivery, Webhook};
use crate::team::Team;
use crate::webhook::terms;

/// Webhooks one team may have.
const MAX_WEBHOOKS: u32 = 20;

type Answer = Result<Response, ApiError>;

/// The webhook a path names, and the delivery if it goes on. What is no id names none.
pub(crate) struct Named {
    webhook: String,
    delivery: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state).await;
        let params = params.map_err(|_| no_webhook())?;
        let id = |name: &str| {
            let found = params.iter().find(|(n, _)| *n == name);
            found.and_then(|(_, text)| uuid::Uuid::try_parse(text).ok()).map(|id| id.to_string())
        };
        Ok(Named {
            webhook: id("id").ok_or_else(no_webhook)?,
            delivery: id("delivery").unwrap_or_default(),
        })
    }
}

fn no_webhook() -> ApiError {
    ApiError::not_found("the webhook doesn't exist or you don't have access to it")
}

fn no_delivery() -> ApiError {
    ApiError::not_found("the delivery doesn't exist, or is older than events are kept")
}

async fn find(app: &App, team: &Team, named: &Named) -> Result<Webhook, ApiError> {
    app.store.webhook(&team.id, &named.webhook).await?.ok_or_else(no_webhook)
}

/// Makes a webhook.
#[utoipa::path(
    post, path = "/events/webhooks", tag = "events",
    request_body = rest::NewWebhook,
    responses(
        (status = 201, description = "It is made", body = rest::Webhook),
        (status = 409, description = "The team has as many as it may"),
    ),
)]
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Json(body): Json<rest::NewWebhook>,
) -> Answer {
    let terms = terms::of_new(body, app.config.webhooks.allow_private)?;
    let id = uuid::Uuid::new_v4().to_string();
    let webhook = Webhook { id, team: team.id.clone(), terms, created_at: clock::now() };
    if !app.store.add_webhook(&webhook, MAX_WEBHOOKS).await? {
        return Err(ApiError::of_kind(
            Kind::Conflict,
            format!(
                "your team has {MAX_WEBHOOKS} webhooks, the most it may have; delete one first"
            ),
        ));
    }
    Ok((StatusCode::CREATED, JsonAnswer(shown(&webhook))).into_response())
}

/// Lists the team's webhooks, oldest first.
#[utoipa::path(
    get, path = "/events/webhooks", tag = "events",
    responses(
        (status = 200, description = "All of them", body = Vec<rest::Webhook>),
    ),
)]
pub(crate) async fn list(State(app): State<Arc<App>>, Extension(team): Caller) -> Answer {
    let webhooks: Vec<_> = app.store.webhooks(&team.id).await?.iter().map(shown).collect();
    Ok(JsonAnswer(webhooks).into_response())
}

/// Shows a webhook, without its secret.
#[utoipa::path(
    get, path = "/events/webhooks/{id}", tag = "events",
    params(
        ("id" = String, Path, description = "The webhook"),
    ),
    responses(
        (status = 200, description = "The webhook", body = rest::Webhook),
        (status = 404, description = "There is no such webhook"),
    ),
)]
pub(crate) async fn detail(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
) -> Answer {
    Ok(JsonAnswer(shown(&find(&app, &team, &named).await?)).into_response())
}

/// Changes a webhook. What waits for one that is switched off is given up.
#[utoipa::path(
    patch, path = "/events/webhooks/{id}", tag = "events",
    request_body = rest::UpdateWebhook,
    params(
        ("id" = String, Path, description = "The webhook"),
    ),
    responses(
        (status = 200, description = "What it is now", body = rest::Webhook),
        (status = 404, description = "There is no such webhook"),
    ),
)]
pub(crate) async fn change(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    Json(body): Json<rest::UpdateWebhook>,
) -> Answer {
    let change = terms::of_change(body, app.config.webhooks.allow_private)?;
    let changed = app.store.change_webhook(&team.id, &named.webhook, &change, clock::now()).await?;
    Ok(JsonAnswer(shown(&changed.ok_or_else(no_webhook)?)).into_response())
}

/// Removes a webhook with its deliveries.
#[utoipa::path(
    delete, path = "/events/webhooks/{id}", tag = "events",
    params(
        ("id" = String, Path, description = "The webhook"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such webhook"),
    ),
)]
pub(crate) async fn remove(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
) -> Answer {
    if app.store.remove_webhook(&team.id, &named.webhook).await? {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(no_webhook())
    }
}

/// Lists what was sent to a webhook, or will be, or could not be.
#[utoipa::path(
    get, path = "/events/webhooks/{id}/deliveries", tag = "events",
    params(
        ("id" = String, Path, description = "The webhook"),
        ("state" = inline(Option<DeliveryState>), Query, description = "Only these; `dead` is what was given up"),
        ("offset" = Option<u32>, Query, description = "Items to skip; absent: 0", minimum = 0, maximum = 2147483647),
        ("limit" = Option<u32>, Query, description = "Items; absent: 10", minimum = 1, maximum = 100),
        ("orderAsc" = Option<bool>, Query, description = "Oldest first; absent: false"),
    ),
    responses(
        (status = 200, description = "The deliveries", body = Vec<rest::WebhookDelivery>),
        (status = 404, description = "There is no such webhook"),
    ),
)]
pub(crate) async fn deliveries(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
    query: Query,
) -> Answer {
    let page = Page::from_query(&query)?;
    let state = query.get("state").map(|word| {
        DeliveryState::parse(word).ok_or_else(|| {
            ApiError::bad_request("the parameter 'state' must be pending, delivered or dead")
        })
    });
    let wanted = DeliveriesWanted {
        state: state.transpose()?,
        oldest_first: page.oldest_first,
        offset: page.offset,
        limit: page.limit,
    };
    let webhook = find(&app, &team, &named).await?;
    let found = app.store.deliveries(&webhook.id, &wanted).await?;
    Ok(JsonAnswer(found.iter().map(delivery).collect::<Vec<_>>()).into_response())
}

/// Takes a delivery off the dead ones and sends it again.
#[utoipa::path(
    post, path = "/events/webhooks/{id}/deliveries/{delivery}/retry", tag = "events",
    params(
        ("id" = String, Path, description = "The webhook"),
        ("delivery" = String, Path, description = "The delivery"),
    ),
    responses(
        (status = 202, description = "It will be sent", body = rest::WebhookDelivery),
        (status = 404, description = "There is no such webhook or delivery"),
        (status = 409, description = "It is not dead, or its webhook is switched off"),
    ),
)]
pub(crate) async fn retry(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    named: Named,
) -> Answer {
    let webhook = find(&app, &team, &named).await?;
    if !webhook.terms.enabled {
        return Err(ApiError::of_kind(
            Kind::Conflict,
            "the webhook is switched off; set 'enabled' to true first",
        ));
    }
    let revived = app.store.revive(&webhook.id, &named.delivery, clock::now()).await?;
    let found = app.store.delivery(&webhook.id, &named.delivery).await?.ok_or_else(no_delivery)?;
    if !revived {
        return Err(ApiError::of_kind(
            Kind::Conflict,
            format!("the delivery is {}; only dead ones can be retried", found.state.as_str()),
        ));
    }
    Ok((StatusCode::ACCEPTED, JsonAnswer(delivery(&found))).into_response())
}

fn shown(webhook: &Webhook) -> rest::Webhook {
    rest::Webhook {
        id: webhook.id.clone(),
        team_id: webhook.team.to_string(),
        name: webhook.terms.name.clone(),
        url: webhook.terms.url.clone(),
        enabled: webhook.terms.enabled,
        events: webhook.terms.kinds.clone(),
        created_at: time(webhook.created_at),
    }
}

fn delivery(delivery: &Delivery) -> rest::WebhookDelivery {
    let is_pending = delivery.state == DeliveryState::Pending;
    rest::WebhookDelivery {
        id: delivery.id.clone(),
        webhook_id: delivery.webhook.clone(),
        event_id: delivery.event.clone(),
        event_type: delivery.kind,
        sandbox_id: delivery.sandbox.clone(),
        state: delivery.state,
        attempts: delivery.attempts,
        created_at: time(delivery.created_at),
        next_attempt_at: is_pending.then(|| time(delivery.next_at)),
        finished_at: (!is_pending).then(|| time(delivery.updated_at)),
        last_status: delivery.last_status,
        last_error: delivery.last_error.clone(),
    }
}
