//! API keys of a team, access tokens of a user, and the teams of a user. Source: contract section 1.6.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json as JsonAnswer};
use belljar_wire::rest;
use http::StatusCode;

use super::auth::{Caller, Principal};
use super::body::Json;
use super::error::ApiError;
use super::names::name;
use super::path::Segments;
use super::shapes::time;
use crate::app::App;
use crate::keys::{AccessToken, ApiKey, KeyMask};
use crate::store::{CLI_KEY, CredentialRecord};
use crate::team::{CredentialId, UserId};

/// How many of them one user keeps in one team: logins on other machines go on working, and
/// asking again and again does not fill the store.
const CLI_KEYS_KEPT: u32 = 10;

type Answer = Result<Response, ApiError>;

/// Lists the teams of a user, with a new API key for each.
///
/// The CLI keeps the key of the answer and uses it from then on, and keys are stored as hashes
/// only: so each answer makes its own. Of those made before, a user's newest stay valid.
#[utoipa::path(
    get, path = "/teams", tag = "identity",
    responses((status = 200, description = "All, the default one first", body = Vec<rest::UserTeam>)),
)]
pub(crate) async fn list_teams(
    State(app): State<Arc<App>>,
    Extension(principal): Extension<Principal>,
) -> Answer {
    let user = user_of(&principal)?;
    let mut shown = Vec::new();
    let mut removed = 0;
    for (team, is_default) in app.store.teams_of(user).await? {
        let key = ApiKey::random();
        removed += app.store.keep_newest_keys(&team.id, user, CLI_KEYS_KEPT - 1).await?;
        app.store.insert_key(&team.id, &key, CLI_KEY, Some(user)).await?;
        shown.push(rest::UserTeam {
            team_id: team.id.to_string(),
            name: team.name,
            api_key: key.expose(),
            is_default,
        });
    }
    if removed > 0 {
        app.access.forget();
    }
    Ok(JsonAnswer(shown).into_response())
}

/// Lists the API keys of a team.
#[utoipa::path(
    get, path = "/api-keys", tag = "identity",
    responses((status = 200, description = "All, oldest first", body = Vec<rest::TeamApiKey>)),
)]
pub(crate) async fn list_keys(State(app): State<Arc<App>>, Extension(team): Caller) -> Answer {
    let keys = app.store.keys_of(&team.id).await?;
    Ok(JsonAnswer(keys.into_iter().map(key).collect::<Vec<_>>()).into_response())
}

/// Makes an API key. The operator has a route of their own for it.
#[utoipa::path(
    post, path = "/api-keys", tag = "identity", request_body = rest::NewTeamApiKey,
    responses((status = 201, description = "All of it, this once", body = rest::CreatedTeamApiKey)),
)]
pub(crate) async fn create_key(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Extension(principal): Extension<Principal>,
    Json(body): Json<rest::NewTeamApiKey>,
) -> Answer {
    let user = user_of(&principal)?;
    let new = ApiKey::random();
    let made = app.store.insert_key(&team.id, &new, &name("name", &body.name)?, Some(user)).await?;
    Ok(created_key(&new, made))
}

/// Renames an API key.
#[utoipa::path(
    patch, path = "/api-keys/{id}", tag = "identity", request_body = rest::UpdateTeamApiKey,
    params(("id" = String, Path, description = "The key's id, a UUID")),
    responses(
        (status = 200, description = "Its new name", body = rest::TeamApiKey),
        (status = 404, description = "The team has no such key"),
    ),
)]
pub(crate) async fn rename_key(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Segments(id): Segments<String>,
    Json(body): Json<rest::UpdateTeamApiKey>,
) -> Answer {
    let id = credential_id(&id).ok_or_else(no_key)?;
    let renamed = app.store.rename_key(&team.id, &id, &name("name", &body.name)?).await?;
    Ok(JsonAnswer(key(renamed.ok_or_else(no_key)?)).into_response())
}

/// Removes an API key: it opens nothing from now on.
#[utoipa::path(
    delete, path = "/api-keys/{id}", tag = "identity",
    params(("id" = String, Path, description = "The key's id, a UUID")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "The team has no such key"),
    ),
)]
pub(crate) async fn delete_key(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Segments(id): Segments<String>,
) -> Answer {
    let id = credential_id(&id).ok_or_else(no_key)?;
    let removed = app.store.delete_key(&team.id, &id).await?;
    if !removed {
        return Err(no_key());
    }
    app.access.forget();
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Makes an access token. Deprecated: a user's sign-in does all a token does.
#[utoipa::path(
    post, path = "/access-tokens", tag = "identity", request_body = rest::NewAccessToken,
    responses((status = 201, description = "All of it, this once", body = rest::CreatedAccessToken)),
)]
pub(crate) async fn create_token(
    State(app): State<Arc<App>>,
    Extension(principal): Extension<Principal>,
    Json(body): Json<rest::NewAccessToken>,
) -> Answer {
    let new = AccessToken::random();
    let name = name("name", &body.name)?;
    let made = app.store.insert_token(user_of(&principal)?, &new, &name).await?;
    Ok(created_token(&new, made))
}

/// Removes an access token: it opens nothing from now on.
#[utoipa::path(
    delete, path = "/access-tokens/{id}", tag = "identity",
    params(("id" = String, Path, description = "The token's id, a UUID")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "The user has no such token"),
    ),
)]
pub(crate) async fn delete_token(
    State(app): State<Arc<App>>,
    Extension(principal): Extension<Principal>,
    Segments(id): Segments<String>,
) -> Answer {
    let id = credential_id(&id).ok_or_else(no_token)?;
    let removed = app.store.delete_token(user_of(&principal)?, &id).await?;
    if !removed {
        return Err(no_token());
    }
    app.access.forget();
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The user who asks; the operator is none.
fn user_of(principal: &Principal) -> Result<&UserId, ApiError> {
    match principal {
        Principal::User(user) => Ok(user),
        Principal::Key | Principal::Operator => {
            Err(ApiError::unauthorized("only a user who has signed in may do this"))
        }
    }
}

pub(crate) fn credential_id(text: &str) -> Option<CredentialId> {
    CredentialId::parse(text)
}

pub(crate) fn no_key() -> ApiError {
    ApiError::not_found("the team has no such API key")
}

pub(crate) fn no_token() -> ApiError {
    ApiError::not_found("the user has no such access token")
}

fn mask(mask: KeyMask) -> rest::IdentifierMask {
    rest::IdentifierMask {
        prefix: mask.prefix,
        value_length: mask.value_length,
        masked_value_prefix: mask.head,
        masked_value_suffix: mask.tail,
    }
}

pub(crate) fn key(record: CredentialRecord) -> rest::TeamApiKey {
    rest::TeamApiKey {
        id: record.id.to_string(),
        name: record.name,
        mask: mask(record.mask),
        created_at: time(record.created_at),
        created_by: record
            .created_by
            .map(|(id, email)| rest::TeamUser { id: id.to_string(), email }),
        last_used: record.last_used.map(time),
    }
}

pub(crate) fn token(record: CredentialRecord) -> rest::AccessToken {
    rest::AccessToken {
        id: record.id.to_string(),
        name: record.name,
        mask: mask(record.mask),
        created_at: time(record.created_at),
        last_used: record.last_used.map(time),
    }
}

pub(crate) fn created_key(new: &ApiKey, made: CredentialRecord) -> Response {
    let body = rest::CreatedTeamApiKey { key: new.expose(), shown: key(made) };
    (StatusCode::CREATED, JsonAnswer(body)).into_response()
}

pub(crate) fn created_token(new: &AccessToken, made: CredentialRecord) -> Response {
    let body = rest::CreatedAccessToken { token: new.expose(), shown: token(made) };
    (StatusCode::CREATED, JsonAnswer(body)).into_response()
}
