//! API keys of teams and access tokens of users, made and removed by the operator.

use std::sync::Arc;

use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_wire::rest;
use http::StatusCode;

use super::super::body::Json;
use super::super::credentials::{
    created_key, created_token, credential_id, key, no_key, no_token, token,
};
use super::super::error::ApiError;
use super::super::names::name;
use super::super::path::Segments;
use super::{no_user, team_id, team_named, user_id};
use crate::app::App;
use crate::keys::{AccessToken, ApiKey};
use crate::team::UserId;

type Answer = Result<Response, ApiError>;

/// Lists the API keys of a team.
#[utoipa::path(
    get, path = "/admin/teams/{teamID}/api-keys", tag = "admin",
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 200, description = "All, oldest first", body = Vec<rest::TeamApiKey>),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn list_keys(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
) -> Answer {
    let team = team_named(&app, &id).await?.team;
    let keys = app.store.keys_of(&team.id).await?;
    Ok(JsonAnswer(keys.into_iter().map(key).collect::<Vec<_>>()).into_response())
}

/// Makes an API key for a team.
#[utoipa::path(
    post, path = "/admin/teams/{teamID}/api-keys", tag = "admin", request_body = rest::NewTeamApiKey,
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 201, description = "All of it, this once", body = rest::CreatedTeamApiKey),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn create_key(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
    Json(body): Json<rest::NewTeamApiKey>,
) -> Answer {
    let team = team_named(&app, &id).await?.team;
    let (name, new) = (name("name", &body.name)?, ApiKey::random());
    let made = app.store.insert_key(&team.id, &new, &name, None).await?;
    Ok(created_key(&new, made))
}

/// Removes an API key of a team: it opens nothing from now on.
#[utoipa::path(
    delete, path = "/admin/teams/{teamID}/api-keys/{keyID}", tag = "admin",
    params(
        ("teamID" = String, Path, description = "The team, a UUID"),
        ("keyID" = String, Path, description = "The key's id, a UUID"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such team, or it has no such key"),
    ),
)]
pub(crate) async fn delete_key(
    State(app): State<Arc<App>>,
    Segments((id, key)): Segments<(String, String)>,
) -> Answer {
    let (team, key) = (team_id(&id)?, credential_id(&key).ok_or_else(no_key)?);
    let removed = app.store.delete_key(&team, &key).await?;
    app.access.forget();
    if removed { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(no_key()) }
}

/// Lists the access tokens of a user.
#[utoipa::path(
    get, path = "/admin/users/{userID}/access-tokens", tag = "admin",
    params(("userID" = String, Path, description = "The user, a UUID")),
    responses(
        (status = 200, description = "All, oldest first", body = Vec<rest::AccessToken>),
        (status = 404, description = "There is no such user"),
    ),
)]
pub(crate) async fn list_tokens(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
) -> Answer {
    let user = user_named(&app, &id).await?;
    let tokens = app.store.tokens_of(&user).await?;
    Ok(JsonAnswer(tokens.into_iter().map(token).collect::<Vec<_>>()).into_response())
}

/// Makes an access token for a user.
#[utoipa::path(
    post, path = "/admin/users/{userID}/access-tokens", tag = "admin",
    request_body = rest::NewAccessToken,
    params(("userID" = String, Path, description = "The user, a UUID")),
    responses(
        (status = 201, description = "All of it, this once", body = rest::CreatedAccessToken),
        (status = 404, description = "There is no such user"),
    ),
)]
pub(crate) async fn create_token(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
    Json(body): Json<rest::NewAccessToken>,
) -> Answer {
    let user = user_named(&app, &id).await?;
    let (name, new) = (name("name", &body.name)?, AccessToken::random());
    let made = app.store.insert_token(&user, &new, &name).await?;
    Ok(created_token(&new, made))
}

/// Removes an access token of a user: it opens nothing from now on.
#[utoipa::path(
    delete, path = "/admin/users/{userID}/access-tokens/{tokenID}", tag = "admin",
    params(
        ("userID" = String, Path, description = "The user, a UUID"),
        ("tokenID" = String, Path, description = "The token's id, a UUID"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such user, or they have no such token"),
    ),
)]
pub(crate) async fn delete_token(
    State(app): State<Arc<App>>,
    Segments((id, token)): Segments<(String, String)>,
) -> Answer {
    let (user, token) = (user_id(&id)?, credential_id(&token).ok_or_else(no_token)?);
    let removed = app.store.delete_token(&user, &token).await?;
    app.access.forget();
    if removed { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(no_token()) }
}

async fn user_named(app: &Arc<App>, text: &str) -> Result<UserId, ApiError> {
    let id = user_id(text)?;
    Ok(app.store.user(&id).await?.ok_or_else(|| no_user(text))?.id)
}
