//! Users and which teams they may act for, as the operator keeps them.

use std::sync::Arc;

use axum::Json as JsonAnswer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_wire::rest;
use http::StatusCode;

use super::super::body::{Json, OptionalJson};
use super::super::error::ApiError;
use super::super::names::{email, name};
use super::super::path::Segments;
use super::super::shapes::time;
use super::{no_user, team_id, team_named, user_id};
use crate::app::App;
use crate::store::{Identity, MemberRecord, UserError, UserRecord};

type Answer = Result<Response, ApiError>;

/// Lists users.
#[utoipa::path(
    get, path = "/admin/users", tag = "admin",
    responses((status = 200, description = "All, oldest first", body = Vec<rest::User>)),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Answer {
    let users = app.store.users().await?;
    Ok(JsonAnswer(users.into_iter().map(shown).collect::<Vec<_>>()).into_response())
}

/// Makes a user. Who signs in at the identity provider needs none made before.
#[utoipa::path(
    post, path = "/admin/users", tag = "admin", request_body = rest::NewUser,
    responses(
        (status = 201, description = "As it is now", body = rest::User),
        (status = 409, description = "The address or the identity is another user's"),
    ),
)]
pub(crate) async fn create(State(app): State<Arc<App>>, Json(body): Json<rest::NewUser>) -> Answer {
    let email = email("email", &body.email)?;
    let identity = match &body.identity {
        Some(identity) => Some(Identity {
            issuer: name("identity.issuer", &identity.issuer)?,
            subject: name("identity.subject", &identity.subject)?,
        }),
        None => None,
    };
    let made = app.store.create_user(&email, identity.as_ref()).await?;
    app.access.forget();
    Ok((StatusCode::CREATED, JsonAnswer(shown(made))).into_response())
}

/// Removes a user with their access tokens. Keys they made stay with their teams.
#[utoipa::path(
    delete, path = "/admin/users/{userID}", tag = "admin",
    params(("userID" = String, Path, description = "The user, a UUID")),
    responses(
        (status = 204, description = "They are gone"),
        (status = 404, description = "There is no such user"),
    ),
)]
pub(crate) async fn delete(State(app): State<Arc<App>>, Segments(id): Segments<String>) -> Answer {
    let removed = app.store.delete_user(&user_id(&id)?).await?;
    app.access.forget();
    if removed { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(no_user(&id)) }
}

/// Lists the users of a team.
#[utoipa::path(
    get, path = "/admin/teams/{teamID}/members", tag = "admin",
    params(("teamID" = String, Path, description = "The team, a UUID")),
    responses(
        (status = 200, description = "All, by address", body = Vec<rest::Member>),
        (status = 404, description = "There is no such team"),
    ),
)]
pub(crate) async fn list_members(
    State(app): State<Arc<App>>,
    Segments(id): Segments<String>,
) -> Answer {
    let team = team_named(&app, &id).await?.team;
    let members = app.store.members(&team.id).await?;
    Ok(JsonAnswer(members.into_iter().map(member).collect::<Vec<_>>()).into_response())
}

/// Lets a user act for a team.
#[utoipa::path(
    put, path = "/admin/teams/{teamID}/members/{userID}", tag = "admin",
    request_body = Option<rest::NewMember>,
    params(
        ("teamID" = String, Path, description = "The team, a UUID"),
        ("userID" = String, Path, description = "The user, a UUID"),
    ),
    responses(
        (status = 200, description = "As it is now", body = rest::Member),
        (status = 404, description = "There is no such team or user"),
    ),
)]
pub(crate) async fn put_member(
    State(app): State<Arc<App>>,
    Segments((team, user)): Segments<(String, String)>,
    OptionalJson(body): OptionalJson<rest::NewMember>,
) -> Answer {
    let (team, user) = (team_id(&team)?, user_id(&user)?);
    let make_default = body.unwrap_or_default().is_default.unwrap_or(false);
    let made = app.store.put_member(&team, &user, make_default).await?;
    app.access.forget();
    Ok(JsonAnswer(member(made)).into_response())
}

/// Ends that a user may act for a team.
#[utoipa::path(
    delete, path = "/admin/teams/{teamID}/members/{userID}", tag = "admin",
    params(
        ("teamID" = String, Path, description = "The team, a UUID"),
        ("userID" = String, Path, description = "The user, a UUID"),
    ),
    responses(
        (status = 204, description = "They are no member any more"),
        (status = 404, description = "They were none"),
    ),
)]
pub(crate) async fn remove_member(
    State(app): State<Arc<App>>,
    Segments((team, user)): Segments<(String, String)>,
) -> Answer {
    let removed = app.store.remove_member(&team_id(&team)?, &user_id(&user)?).await?;
    app.access.forget();
    if removed {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Err(ApiError::not_found("the user is not a member of the team"))
}

impl From<UserError> for ApiError {
    fn from(error: UserError) -> Self {
        match error {
            UserError::Store(e) => e.into(),
            e => ApiError::of_kind(e.kind(), e.to_string()),
        }
    }
}

fn shown(user: UserRecord) -> rest::User {
    let identity = |i: Identity| rest::UserIdentity { issuer: i.issuer, subject: i.subject };
    rest::User {
        id: user.id.to_string(),
        email: user.email,
        identities: user.identities.into_iter().map(identity).collect(),
        created_at: time(user.created_at),
    }
}

fn member(record: MemberRecord) -> rest::Member {
    rest::Member {
        user_id: record.user.to_string(),
        email: record.email,
        is_default: record.is_default,
    }
}
