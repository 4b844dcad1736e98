//! Tiers: named sets of limits, given to teams.

use std::sync::Arc;

use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_domain::{MiB, Vcpus};
use belljar_wire::rest;
use http::StatusCode;

use super::super::body::Json;
use super::super::error::ApiError;
use super::super::names::slug;
use super::super::path::Segments;
use crate::app::App;
use crate::limits::{LimitOverrides, Limits};
use crate::store::{TierError, TierRecord};

/// Days after which events may be gone at the latest. Source: contract section 9.
const MAX_EVENTS_TTL_DAYS: u32 = 365;

type Answer = Result<Response, ApiError>;

/// Lists tiers.
#[utoipa::path(
    get, path = "/admin/tiers", tag = "admin",
    responses((status = 200, description = "All, by name", body = Vec<rest::Tier>)),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Answer {
    let tiers = app.store.tiers().await?;
    Ok(JsonAnswer(tiers.into_iter().map(shown).collect::<Vec<_>>()).into_response())
}

/// Makes a tier, or gives one other limits. Its teams have them at once.
#[utoipa::path(
    put, path = "/admin/tiers/{tierID}", tag = "admin", request_body = rest::Limits,
    params(("tierID" = String, Path, description = "Its name: lower-case letters, digits and `-`")),
    responses((status = 200, description = "As it is now", body = rest::Tier)),
)]
pub(crate) async fn put(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
    Json(body): Json<rest::Limits>,
) -> Answer {
    let tier = TierRecord { id: slug("tierID", &id)?, limits: limits_from(&body) };
    check(&overrides_of_all(&tier.limits))?;
    app.store.put_tier(&tier).await?;
    app.access.forget();
    Ok(JsonAnswer(shown(tier)).into_response())
}

/// Removes a tier.
#[utoipa::path(
    delete, path = "/admin/tiers/{tierID}", tag = "admin",
    params(("tierID" = String, Path, description = "Its name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such tier"),
        (status = 409, description = "It has teams, or every server has it"),
    ),
)]
pub(crate) async fn delete(State(app): State<Arc<App>>, Segments(id): Segments<String>) -> Answer {
    app.store.delete_tier(&id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

impl From<TierError> for ApiError {
    fn from(error: TierError) -> Self {
        match error {
            TierError::Store(e) => e.into(),
            e => ApiError::of_kind(e.kind(), e.to_string()),
        }
    }
}

fn shown(tier: TierRecord) -> rest::Tier {
    rest::Tier { limits: limits(&tier.limits), id: tier.id }
}

pub(super) fn limits(limits: &Limits) -> rest::Limits {
    rest::Limits {
        max_concurrent_sandboxes: limits.max_concurrent_sandboxes,
        max_length_seconds: limits.max_length_seconds,
        max_vcpus: limits.max_vcpus.0,
        max_memory_mb: limits.max_memory.0,
        max_disk_size_mb: limits.max_disk.0,
        creates_per_second: limits.creates_per_second,
        max_concurrent_builds: limits.max_concurrent_builds,
        events_ttl_days: limits.events_ttl_days,
    }
}

fn limits_from(limits: &rest::Limits) -> Limits {
    Limits {
        max_concurrent_sandboxes: limits.max_concurrent_sandboxes,
        max_length_seconds: limits.max_length_seconds,
        max_vcpus: Vcpus(limits.max_vcpus),
        max_memory: MiB(limits.max_memory_mb),
        max_disk: MiB(limits.max_disk_size_mb),
        creates_per_second: limits.creates_per_second,
        max_concurrent_builds: limits.max_concurrent_builds,
        events_ttl_days: limits.events_ttl_days,
    }
}

pub(super) fn overrides(own: &LimitOverrides) -> rest::LimitOverrides {
    rest::LimitOverrides {
        max_concurrent_sandboxes: own.max_concurrent_sandboxes,
        max_length_seconds: own.max_length_seconds,
        max_vcpus: own.max_vcpus,
        max_memory_mb: own.max_memory_mib,
        max_disk_size_mb: own.max_disk_mib,
        creates_per_second: own.creates_per_second,
        max_concurrent_builds: own.max_concurrent_builds,
        events_ttl_days: own.events_ttl_days,
    }
}

/// # Errors
/// 400 names the limit that cannot be.
pub(super) fn overrides_from(own: &rest::LimitOverrides) -> Result<LimitOverrides, ApiError> {
    let own = LimitOverrides {
        max_concurrent_sandboxes: own.max_concurrent_sandboxes,
        max_length_seconds: own.max_length_seconds,
        max_vcpus: own.max_vcpus,
        max_memory_mib: own.max_memory_mb,
        max_disk_mib: own.max_disk_size_mb,
        creates_per_second: own.creates_per_second,
        max_concurrent_builds: own.max_concurrent_builds,
        events_ttl_days: own.events_ttl_days,
    };
    check(&own)?;
    Ok(own)
}

fn overrides_of_all(limits: &Limits) -> LimitOverrides {
    LimitOverrides {
        max_length_seconds: Some(limits.max_length_seconds),
        events_ttl_days: Some(limits.events_ttl_days),
        ..LimitOverrides::default()
    }
}

/// A limit of 0 means none of it, which is odd but clear; these two mean nothing then.
fn check(own: &LimitOverrides) -> Result<(), ApiError> {
    if own.max_length_seconds == Some(0) {
        return Err(ApiError::bad_request("the field 'maxLengthSeconds' must be at least 1"));
    }
    match own.events_ttl_days {
        Some(days) if !(1..=MAX_EVENTS_TTL_DAYS).contains(&days) => Err(ApiError::bad_request(
            format!("the field 'eventsTTLDays' must be from 1 to {MAX_EVENTS_TTL_DAYS}"),
        )),
        _ => Ok(()),
    }
}
