//! Template endpoints, the reading ones. Source: contract section 1.3.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use belljar_wire::rest;
use http::HeaderMap;

use super::auth::Caller;
use super::error::ApiError;
use super::list::insert_next_token;
use super::page::{Position, Wanted};
use super::path::Segments;
use super::query::Query;
use super::shapes;
use crate::app::App;
use crate::team::Team;
use crate::templates::{Reference, Template};

type Answer = Result<Response, ApiError>;

/// Lists templates. Deprecated: version 2 has pages.
#[utoipa::path(
    get, path = "/templates", tag = "templates",
    params(("teamID" = Option<String>, Query, description = "Ignored: the key says which team")),
    responses((status = 200, description = "All a team can use", body = Vec<rest::Template>)),
)]
pub(crate) async fn list_v1(
    State(app): State<Arc<App>>,
    Extension(_): Caller,
    _ignored: Query,
) -> Answer {
    let spawned = app.store.spawned().await?;
    let all = app.templates.all();
    let shown = all
        .iter()
        .map(|placed| shapes::template(&placed.template, spawned.get(placed.template.id.as_str())));
    Ok(Json(shown.collect::<Vec<_>>()).into_response())
}

/// Lists templates.
#[utoipa::path(
    get, path = "/v2/templates", tag = "templates",
    params(
        ("teamID" = Option<String>, Query, description = "Ignored: the key says which team"),
        ("limit" = Option<u32>, Query, description = "Items on a page", minimum = 1, maximum = 100),
        ("nextToken" = Option<String>, Query, description = "Where the last page ended, from its header"),
    ),
    responses((
        status = 200, description = "One page", body = Vec<rest::Template>,
        headers(("X-Next-Token" = String, description = "Token of the next page; absent on the last")),
    )),
)]
pub(crate) async fn list_v2(
    State(app): State<Arc<App>>,
    Extension(_): Caller,
    query: Query,
) -> Answer {
    let wanted = Wanted::from_query(&query)?;
    let spawned = app.store.spawned().await?;
    let all = app.templates.all();
    let (page, next) = wanted.take(all.iter().map(|placed| &placed.template), |t| Position {
        at: t.created_at,
        id: t.id.to_string(),
    });
    let mut headers = HeaderMap::new();
    insert_next_token(&mut headers, next);
    let shown = page.into_iter().map(|t| shapes::template(t, spawned.get(t.id.as_str())));
    Ok((headers, Json(shown.collect::<Vec<_>>())).into_response())
}

/// Shows a template.
#[utoipa::path(
    get, path = "/templates/{id}", tag = "templates",
    params(("id" = String, Path, description = "Its id or name")),
    responses(
        (status = 200, description = "What is known of it", body = rest::TemplateWithBuilds),
        (status = 403, description = "It is another team's"),
        (status = 404, description = "There is no such template"),
    ),
)]
pub(crate) async fn detail(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Segments(named): Segments<String>,
) -> Answer {
    let template = find(&app, &team, &named)?;
    let spawned = app.store.spawned().await?;
    Ok(Json(rest::TemplateWithBuilds {
        template: shapes::template(&template, spawned.get(template.id.as_str())),
        builds: vec![shapes::build(&template)],
    })
    .into_response())
}

/// Finds a template by name.
#[utoipa::path(
    get, path = "/templates/aliases/{alias}", tag = "templates",
    params(("alias" = String, Path, description = "Its name, with or without a tag")),
    responses(
        (status = 200, description = "The template that has it", body = rest::TemplateAlias),
        (status = 403, description = "It is another team's"),
        (status = 404, description = "There is no such template or tag"),
    ),
)]
pub(crate) async fn alias(
    State(app): State<Arc<App>>,
    Extension(team): Caller,
    Segments(named): Segments<String>,
) -> Answer {
    let template = find(&app, &team, &named)?;
    Ok(Json(rest::TemplateAlias { template_id: template.id.to_string(), public: true })
        .into_response())
}

/// The template a path names by id or name.
fn find(app: &App, team: &Team, text: &str) -> Result<Template, ApiError> {
    let reference: Reference = text.parse()?;
    Ok(app.templates.resolve(&reference, team)?.template)
}
