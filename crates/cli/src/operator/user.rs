//! `belljar user list|create|delete|add|remove`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use belljar_wire::rest::{Member, NewMember, NewUser, User, UserIdentity};

use super::{find_team, find_user, removed, when};
use crate::api::Api;
use crate::args::UserCommand;
use crate::output;

pub(crate) async fn run(api: &Api, command: UserCommand, as_json: bool) -> Result<ExitCode> {
    match command {
        UserCommand::List => list(api, as_json).await,
        UserCommand::Create { email, issuer, subject } => {
            let identity =
                issuer.zip(subject).map(|(issuer, subject)| UserIdentity { issuer, subject });
            let user = NewUser { email, identity };
            let made: User = api.post("/admin/users", &serde_json::to_value(user)?).await?;
            if as_json {
                output::json(&made)?;
            } else {
                output::line(&format!("user {} ({}) made", made.id, made.email))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        UserCommand::Delete { user } => {
            let user = find_user(api, &user).await?;
            let was_there = api.delete(&format!("/admin/users/{}", user.id)).await?;
            removed("user", &user.id, was_there, as_json)
        }
        UserCommand::Add { user, team, default } => {
            let path = membership(api, &team, &user).await?;
            let body = NewMember { is_default: Some(default) };
            let made: Member = api.put(&path, &serde_json::to_value(body)?).await?;
            if as_json {
                output::json(&made)?;
            } else {
                let default = if made.is_default { ", which is their default" } else { "" };
                output::line(&format!("{} may act for team {team}{default}", made.email))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        UserCommand::Remove { user, team } => {
            let path = membership(api, &team, &user).await?;
            if !api.delete(&path).await? {
                bail!("{user} is no member of team {team}");
            }
            if as_json {
                output::json(&serde_json::json!({ "user": user, "team": team, "deleted": true }))?;
            } else {
                output::line(&format!("{user} may not act for team {team} any more"))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn membership(api: &Api, team: &str, user: &str) -> Result<String> {
    let (team, user) = (find_team(api, team).await?, find_user(api, user).await?);
    Ok(format!("/admin/teams/{}/members/{}", team.team_id, user.id))
}

async fn list(api: &Api, as_json: bool) -> Result<ExitCode> {
    let users: Vec<User> = api.get("/admin/users").await?;
    if as_json {
        output::json(&users)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = users.iter().map(|user| {
        let identities = user.identities.iter().map(|i| format!("{} at {}", i.subject, i.issuer));
        vec![
            user.email.clone(),
            user.id.clone(),
            when(Some(&user.created_at)),
            identities.collect::<Vec<_>>().join(", "),
        ]
    });
    let header = ["EMAIL", "USER", "MADE (UTC)", "SIGNS IN AS"];
    output::table(&header, rows.collect(), "There is no user.")?;
    Ok(ExitCode::SUCCESS)
}
