//! `belljar team list|create|update|block|unblock|delete`.

use std::process::ExitCode;

use anyhow::Result;
use belljar_wire::rest::{AdminTeam, LimitOverrides, NewTeam, UpdateTeam};

use super::{find_team, removed};
use crate::api::Api;
use crate::args::{LimitOptions, TeamCommand};
use crate::output;

pub(crate) async fn run(api: &Api, command: TeamCommand, as_json: bool) -> Result<ExitCode> {
    match command {
        TeamCommand::List => return list(api, as_json).await,
        TeamCommand::Create { name, slug, tier, allow, limits } => {
            let team = NewTeam {
                name,
                slug,
                tier,
                limit_overrides: Some(overlaid(LimitOverrides::default(), &limits)),
                allowed_addresses: Some(allow),
            };
            let made: AdminTeam = api.post("/admin/teams", &serde_json::to_value(team)?).await?;
            show(&made, as_json)?;
        }
        TeamCommand::Update { team, name, tier, allow, allow_all, tier_limits, limits } => {
            let now = find_team(api, &team).await?;
            let begin = if tier_limits { LimitOverrides::default() } else { now.limit_overrides };
            let change = UpdateTeam {
                name,
                tier,
                limit_overrides: Some(overlaid(begin, &limits)),
                allowed_addresses: (allow_all || !allow.is_empty()).then_some(allow),
                ..UpdateTeam::default()
            };
            show(&patch(api, &now, &change).await?, as_json)?;
        }
        TeamCommand::Block { team, reason } => {
            let change =
                UpdateTeam { blocked: Some(true), blocked_reason: reason, ..UpdateTeam::default() };
            let now = find_team(api, &team).await?;
            show(&patch(api, &now, &change).await?, as_json)?;
        }
        TeamCommand::Unblock { team } => {
            let change = UpdateTeam { blocked: Some(false), ..UpdateTeam::default() };
            let now = find_team(api, &team).await?;
            show(&patch(api, &now, &change).await?, as_json)?;
        }
        TeamCommand::Delete { team } => {
            let now = find_team(api, &team).await?;
            let was_there = api.delete(&format!("/admin/teams/{}", now.team_id)).await?;
            return removed("team", &now.team_id, was_there, as_json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn patch(api: &Api, team: &AdminTeam, change: &UpdateTeam) -> Result<AdminTeam> {
    let path = format!("/admin/teams/{}", team.team_id);
    api.patch(&path, &serde_json::to_value(change)?).await
}

/// What is named on the command line, over what was there.
fn overlaid(begin: LimitOverrides, limits: &LimitOptions) -> LimitOverrides {
    LimitOverrides {
        max_concurrent_sandboxes: limits.max_sandboxes.or(begin.max_concurrent_sandboxes),
        max_length_seconds: limits.max_length_seconds.or(begin.max_length_seconds),
        max_vcpus: limits.max_vcpus.or(begin.max_vcpus),
        max_memory_mb: limits.max_memory_mib.or(begin.max_memory_mb),
        max_disk_size_mb: limits.max_disk_mib.or(begin.max_disk_size_mb),
        creates_per_second: limits.creates_per_second.or(begin.creates_per_second),
        max_concurrent_builds: begin.max_concurrent_builds,
        events_ttl_days: limits.events_ttl_days.or(begin.events_ttl_days),
    }
}

async fn list(api: &Api, as_json: bool) -> Result<ExitCode> {
    let teams: Vec<AdminTeam> = api.get("/admin/teams").await?;
    if as_json {
        output::json(&teams)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = teams.iter().map(|team| {
        vec![
            team.slug.clone(),
            team.name.clone(),
            team.team_id.clone(),
            team.tier.clone(),
            team.limits.max_concurrent_sandboxes.to_string(),
            team.blocked_reason.clone().unwrap_or_default(),
        ]
    });
    let header = ["SLUG", "NAME", "TEAM", "TIER", "SANDBOXES", "BLOCKED"];
    output::table(&header, rows.collect(), "There is no team.")?;
    Ok(ExitCode::SUCCESS)
}

fn show(team: &AdminTeam, as_json: bool) -> Result<()> {
    if as_json {
        return output::json(team);
    }
    let limits = &team.limits;
    output::line(&format!("{} ({})", team.name, team.slug))?;
    for (what, value) in [
        ("id", team.team_id.clone()),
        ("tier", team.tier.clone()),
        ("blocked", team.blocked_reason.clone().unwrap_or_else(|| "no".to_owned())),
        ("sandboxes", format!("{} at once", limits.max_concurrent_sandboxes)),
        ("length", format!("{} s", limits.max_length_seconds)),
        (
            "size",
            format!(
                "{} processors, {} MiB of memory, {} MiB of disk",
                limits.max_vcpus, limits.max_memory_mb, limits.max_disk_size_mb
            ),
        ),
        ("rate", format!("{} creations a second", limits.creates_per_second)),
        (
            "addresses",
            if team.allowed_addresses.is_empty() {
                "all".to_owned()
            } else {
                team.allowed_addresses.join(", ")
            },
        ),
    ] {
        output::line(&format!("  {what:<10} {value}"))?;
    }
    Ok(())
}
