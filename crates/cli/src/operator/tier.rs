//! `belljar tier list|create|update|delete`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use belljar_wire::rest::{Limits, Tier};

use super::removed;
use crate::api::Api;
use crate::args::{LimitOptions, TierCommand};
use crate::output;

pub(crate) async fn run(api: &Api, command: TierCommand, as_json: bool) -> Result<ExitCode> {
    match command {
        TierCommand::List => return list(api, as_json).await,
        TierCommand::Create { tier, like, limits } => {
            let tiers = tiers(api).await?;
            // The API takes both with one call; people who make one do not mean to change another.
            if tiers.iter().any(|there| there.id == tier) {
                bail!("there is a tier {tier:?} already: `belljar tier update {tier}` changes it");
            }
            let begin = found(tiers, &like)?;
            show(&put(api, &tier, &overlaid(begin.limits, &limits)).await?, as_json)?;
        }
        TierCommand::Update { tier, limits } => {
            let now = found(tiers(api).await?, &tier)?;
            show(&put(api, &now.id, &overlaid(now.limits, &limits)).await?, as_json)?;
        }
        TierCommand::Delete { tier } => {
            // Its name becomes part of a path, so it is one of those there are.
            let now = found(tiers(api).await?, &tier)?;
            let was_there = api.delete(&format!("/admin/tiers/{}", now.id)).await?;
            return removed("tier", &now.id, was_there, as_json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn tiers(api: &Api) -> Result<Vec<Tier>> {
    api.get("/admin/tiers").await
}

fn found(tiers: Vec<Tier>, name: &str) -> Result<Tier> {
    match tiers.into_iter().find(|tier| tier.id == name) {
        Some(tier) => Ok(tier),
        None => bail!("there is no tier {name:?}: `belljar tier list` shows all"),
    }
}

async fn put(api: &Api, tier: &str, limits: &Limits) -> Result<Tier> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if tier.is_empty() || !tier.bytes().all(plain) {
        bail!("{tier:?} cannot name a tier: use lower-case letters, digits and `-`");
    }
    api.put(&format!("/admin/tiers/{tier}"), &serde_json::to_value(limits)?).await
}

/// What is named on the command line, over what was there.
fn overlaid(begin: Limits, limits: &LimitOptions) -> Limits {
    Limits {
        max_concurrent_sandboxes: limits.max_sandboxes.unwrap_or(begin.max_concurrent_sandboxes),
        max_length_seconds: limits.max_length_seconds.unwrap_or(begin.max_length_seconds),
        max_vcpus: limits.max_vcpus.unwrap_or(begin.max_vcpus),
        max_memory_mb: limits.max_memory_mib.unwrap_or(begin.max_memory_mb),
        max_disk_size_mb: limits.max_disk_mib.unwrap_or(begin.max_disk_size_mb),
        creates_per_second: limits.creates_per_second.unwrap_or(begin.creates_per_second),
        max_concurrent_builds: begin.max_concurrent_builds,
        events_ttl_days: limits.events_ttl_days.unwrap_or(begin.events_ttl_days),
    }
}

async fn list(api: &Api, as_json: bool) -> Result<ExitCode> {
    let tiers = tiers(api).await?;
    if as_json {
        output::json(&tiers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = tiers.iter().map(|tier| {
        let limits = &tier.limits;
        let numbers = [
            limits.max_concurrent_sandboxes,
            limits.max_length_seconds,
            limits.max_vcpus,
            limits.max_memory_mb,
            limits.max_disk_size_mb,
            limits.creates_per_second,
            limits.events_ttl_days,
        ];
        std::iter::once(tier.id.clone()).chain(numbers.map(|n| n.to_string())).collect()
    });
    let header = [
        "TIER",
        "SANDBOXES",
        "SECONDS",
        "VCPUS",
        "MEMORY MIB",
        "DISK MIB",
        "CREATES/S",
        "EVENT DAYS",
    ];
    output::table(&header, rows.collect(), "There is no tier.")?;
    Ok(ExitCode::SUCCESS)
}

fn show(tier: &Tier, as_json: bool) -> Result<()> {
    if as_json {
        return output::json(tier);
    }
    let limits = &tier.limits;
    output::line(&tier.id)?;
    for (what, value) in [
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
        ("events", format!("kept {} days", limits.events_ttl_days)),
    ] {
        output::line(&format!("  {what:<10} {value}"))?;
    }
    Ok(())
}
