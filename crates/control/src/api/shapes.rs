//! Domain values in the wire's shapes.

use belljar_domain::UnixMillis;
use belljar_wire::rest;

use crate::app::App;
use crate::live::Sandbox;
use crate::store::{DEFAULT_TAG, SnapshotName, SnapshotRecord, Spawned};
use crate::team::Team;
use crate::templates::Template;

/// Required in every answer, means nothing. Source: contract section 1.1.
const CLIENT_ID: &str = "belljar";

/// A point in time for the wire; times no calendar has become the last one it has.
pub(crate) fn time(at: UnixMillis) -> rest::Time {
    rest::Time::from_timestamp_millis(at.0).unwrap_or(rest::Time::MAX_UTC)
}

pub(crate) fn sandbox(app: &App, sandbox: &Sandbox) -> rest::Sandbox {
    rest::Sandbox {
        template_id: sandbox.template.to_string(),
        sandbox_id: sandbox.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        envd_version: sandbox.envd_version.to_string(),
        alias: sandbox.alias.clone(),
        envd_access_token: app.token_of(sandbox).map(|token| token.expose().clone()),
        traffic_access_token: None,
        domain: app.config.public_domain.clone(),
    }
}

pub(crate) fn listed(sandbox: &Sandbox) -> rest::ListedSandbox {
    let unresponsive = sandbox.pause().is_some_and(|saved| saved.guest_unresponsive);
    rest::ListedSandbox {
        template_id: sandbox.template.to_string(),
        sandbox_id: sandbox.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        started_at: time(sandbox.started_at),
        // A paused one has no end ahead: it shows when it was paused.
        end_at: time(sandbox.asleep_since.unwrap_or(sandbox.end_at)),
        cpu_count: sandbox.vcpus.0,
        memory_mb: sandbox.memory.0,
        disk_size_mb: sandbox.disk.0,
        state: match sandbox.asleep_since {
            Some(_) => rest::SandboxState::Paused,
            None => rest::SandboxState::Running,
        },
        envd_version: sandbox.envd_version.to_string(),
        alias: sandbox.alias.clone(),
        metadata: Some(sandbox.metadata.to_map()),
        volume_mounts: None,
        envd_unresponsive_at_pause: unresponsive.then_some(true),
    }
}

pub(crate) fn detail(app: &App, sandbox: &Sandbox) -> rest::SandboxDetail {
    rest::SandboxDetail {
        listed: listed(sandbox),
        envd_access_token: app.token_of(sandbox).map(|token| token.expose().clone()),
        allow_internet_access: Some(sandbox.allow_internet),
        domain: app.config.public_domain.clone(),
        network: None,
        lifecycle: Some(rest::Lifecycle {
            auto_resume: sandbox.lifecycle.auto_resume,
            on_timeout: if sandbox.pauses_at_end() { "pause" } else { "kill" }.to_owned(),
        }),
        pause_mode: sandbox.pause().map(|saved| match saved.filesystem_only {
            true => rest::PauseMode::Filesystem,
            false => rest::PauseMode::Full,
        }),
    }
}

pub(crate) fn snapshot(team: &Team, record: &SnapshotRecord) -> rest::SnapshotInfo {
    let name = |name: &SnapshotName| format!("{}/{}:{}", team.slug, name.name, name.tag);
    rest::SnapshotInfo {
        // Not its name, which a later snapshot may take from it.
        snapshot_id: format!("{}:{DEFAULT_TAG}", record.template),
        names: record.name.iter().map(name).collect(),
    }
}

pub(crate) fn template(template: &Template, spawned: Option<&Spawned>) -> rest::Template {
    rest::Template {
        template_id: template.id.to_string(),
        build_id: template.build.to_string(),
        cpu_count: template.vcpus.0,
        memory_mb: template.memory.0,
        disk_size_mb: template.disk.0,
        public: true,
        aliases: template.aliases.clone(),
        // A template of the server itself has no namespace.
        names: template.aliases.clone(),
        created_at: time(template.created_at),
        updated_at: time(template.created_at),
        created_by: None,
        last_spawned_at: spawned.map(|s| time(s.last)),
        spawn_count: spawned.map_or(0, |s| s.count),
        build_count: 1,
        envd_version: template.envd_version.to_string(),
        build_status: rest::BuildStatus::Ready,
    }
}

pub(crate) fn build(template: &Template) -> rest::TemplateBuild {
    rest::TemplateBuild {
        build_id: template.build.to_string(),
        status: rest::BuildStatus::Ready,
        created_at: time(template.created_at),
        updated_at: time(template.created_at),
        finished_at: Some(time(template.created_at)),
        cpu_count: template.vcpus.0,
        memory_mb: template.memory.0,
        disk_size_mb: Some(template.disk.0),
        envd_version: Some(template.envd_version.to_string()),
    }
}
