//! `belljar team|tier|user|key|token`: what whoever runs the server does, over its admin API.

pub(crate) mod credentials;
pub(crate) mod team;
pub(crate) mod tier;
pub(crate) mod token_file;
pub(crate) mod user;

use std::process::ExitCode;

use anyhow::{Result, bail};
use belljar_wire::rest::{AdminTeam, User};

use crate::api::Api;
use crate::output;

/// The team called `text`, by its id or its slug.
async fn find_team(api: &Api, text: &str) -> Result<AdminTeam> {
    let teams: Vec<AdminTeam> = api.get("/admin/teams").await?;
    match teams.into_iter().find(|team| team.team_id == text || team.slug == text) {
        Some(team) => Ok(team),
        None => bail!("there is no team {text:?}: `belljar team list` shows all"),
    }
}

/// The user called `text`, by their id or their address.
async fn find_user(api: &Api, text: &str) -> Result<User> {
    let users: Vec<User> = api.get("/admin/users").await?;
    match users.into_iter().find(|user| user.id == text || user.email == text) {
        Some(user) => Ok(user),
        None => bail!("there is no user {text:?}: `belljar user list` shows all"),
    }
}

/// Says how a removal went.
fn removed(what: &str, id: &str, was_there: bool, as_json: bool) -> Result<ExitCode> {
    if as_json {
        output::json(&serde_json::json!({ "id": id, "deleted": was_there }))?;
    } else if was_there {
        output::line(&format!("{what} {id} deleted"))?;
    } else {
        output::line(&format!("{what} {id} was not there"))?;
    }
    Ok(if was_there { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A time for people; `never` for what has not happened.
fn when(time: Option<&belljar_wire::rest::Time>) -> String {
    time.map_or_else(|| "never".to_owned(), |time| time.format("%Y-%m-%d %H:%M:%S").to_string())
}
