//! `belljar key list|create|delete` and `belljar token list|create|delete`.

use std::process::ExitCode;

use anyhow::Result;
use belljar_wire::rest::{
    AccessToken, CreatedAccessToken, CreatedTeamApiKey, IdentifierMask, NewAccessToken,
    NewTeamApiKey, TeamApiKey,
};

use super::{find_team, find_user, removed, when};
use crate::api::Api;
use crate::args::{KeyCommand, TokenCommand};
use crate::output;
use crate::sandbox::path_segment;

pub(crate) async fn keys(api: &Api, command: KeyCommand, as_json: bool) -> Result<ExitCode> {
    match command {
        KeyCommand::List { team } => {
            let team = find_team(api, &team).await?;
            let keys: Vec<TeamApiKey> =
                api.get(&format!("/admin/teams/{}/api-keys", team.team_id)).await?;
            if as_json {
                output::json(&keys)?;
                return Ok(ExitCode::SUCCESS);
            }
            let rows = keys.iter().map(|key| {
                let by = key.created_by.as_ref().map(|user| user.email.clone());
                vec![
                    key.name.clone(),
                    key.id.clone(),
                    masked(&key.mask),
                    when(Some(&key.created_at)),
                    when(key.last_used.as_ref()),
                    by.unwrap_or_else(|| "operator".to_owned()),
                ]
            });
            let header = ["NAME", "ID", "KEY", "MADE (UTC)", "USED (UTC)", "MADE BY"];
            output::table(&header, rows.collect(), "The team has no key.")?;
            Ok(ExitCode::SUCCESS)
        }
        KeyCommand::Create { team, name } => {
            let team = find_team(api, &team).await?;
            let path = format!("/admin/teams/{}/api-keys", team.team_id);
            let body = serde_json::to_value(NewTeamApiKey { name })?;
            let made: CreatedTeamApiKey = api.post(&path, &body).await?;
            if as_json {
                output::json(&made)?;
            } else {
                output::line(&made.key)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        KeyCommand::Delete { team, id } => {
            let team = find_team(api, &team).await?;
            let path = format!("/admin/teams/{}/api-keys/{}", team.team_id, path_segment(&id));
            removed("key", &id, api.delete(&path).await?, as_json)
        }
    }
}

pub(crate) async fn tokens(api: &Api, command: TokenCommand, as_json: bool) -> Result<ExitCode> {
    match command {
        TokenCommand::List { user } => {
            let user = find_user(api, &user).await?;
            let tokens: Vec<AccessToken> =
                api.get(&format!("/admin/users/{}/access-tokens", user.id)).await?;
            if as_json {
                output::json(&tokens)?;
                return Ok(ExitCode::SUCCESS);
            }
            let rows = tokens.iter().map(|token| {
                vec![
                    token.name.clone(),
                    token.id.clone(),
                    masked(&token.mask),
                    when(Some(&token.created_at)),
                    when(token.last_used.as_ref()),
                ]
            });
            let header = ["NAME", "ID", "TOKEN", "MADE (UTC)", "USED (UTC)"];
            output::table(&header, rows.collect(), "The user has no token.")?;
            Ok(ExitCode::SUCCESS)
        }
        TokenCommand::Create { user, name } => {
            let user = find_user(api, &user).await?;
            let path = format!("/admin/users/{}/access-tokens", user.id);
            let body = serde_json::to_value(NewAccessToken { name })?;
            let made: CreatedAccessToken = api.post(&path, &body).await?;
            if as_json {
                output::json(&made)?;
            } else {
                output::line(&made.token)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        TokenCommand::Delete { user, id } => {
            let user = find_user(api, &user).await?;
            let path = format!("/admin/users/{}/access-tokens/{}", user.id, path_segment(&id));
            removed("token", &id, api.delete(&path).await?, as_json)
        }
    }
}

fn masked(mask: &IdentifierMask) -> String {
    format!("{}{}…{}", mask.prefix, mask.masked_value_prefix, mask.masked_value_suffix)
}
