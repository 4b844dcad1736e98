//! A node's answers, checked and turned into domain types.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use belljar_domain::{MiB, UnixMillis, Vcpus};
use belljar_wire::rest::LogLevel;
use belljar_wire::rpc::belljar::node::v1::{
    self as pb, Capacity, DescribeResponse, NodeStatus, ReclaimedSandbox, SandboxInfo,
    SnapshotInfo, TemplateInfo,
};
use tracing::warn;

use super::{Description, LogEntry, Reclaimed};
use crate::live::{Kept, Observed};
use crate::placement::Taken;
use crate::templates::Template;

/// The words of the node protocol, so that the store holds only known ones.
pub(super) fn reason(text: &str) -> &'static str {
    match text {
        "killed" => "killed",
        "expired" => "expired",
        "crashed" => "crashed",
        "shutdown" => "shutdown",
        "lost" => "lost",
        "paused" => "paused",
        _ => "unknown",
    }
}

pub(super) fn readable(info: &SandboxInfo) -> Option<Observed> {
    observed(info)
        .inspect_err(|reason| warn!(sandbox = info.sandbox_id, reason, "unreadable sandbox"))
        .ok()
}

pub(super) fn observed(info: &SandboxInfo) -> Result<Observed, String> {
    Ok(Observed {
        id: info.sandbox_id.parse().map_err(text)?,
        execution: info.execution_id.parse().map_err(text)?,
        template: info.template_id.parse().map_err(text)?,
        build: info.build_id.parse().map_err(text)?,
        ip: info.route_ip.parse().map_err(|_| format!("{:?} is no address", info.route_ip))?,
        started_at: UnixMillis(info.started_at_unix_ms),
        end_at: UnixMillis(info.end_at_unix_ms),
        vcpus: Vcpus(info.vcpus),
        memory: MiB(info.memory_mib),
        disk: MiB(info.disk_mib),
        envd_version: info.envd_version.as_str().into(),
        terms: info.terms.clone(),
    })
}

pub(super) fn reclaimed(info: &ReclaimedSandbox) -> Result<Reclaimed, String> {
    Ok(Reclaimed {
        was: Observed {
            id: info.sandbox_id.parse().map_err(text)?,
            execution: info.execution_id.parse().map_err(text)?,
            template: info.template_id.parse().map_err(text)?,
            build: info.build_id.parse().map_err(text)?,
            ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            started_at: UnixMillis(info.started_at_unix_ms),
            end_at: UnixMillis(info.end_at_unix_ms),
            vcpus: Vcpus(info.vcpus),
            memory: MiB(info.memory_mib),
            disk: MiB(info.disk_mib),
            envd_version: Arc::default(),
            terms: info.terms.clone(),
        },
        at: UnixMillis(info.reclaimed_at_unix_ms),
        reason: reason(&info.reason),
    })
}

pub(super) fn readable_snapshot(info: &SnapshotInfo) -> Option<Kept> {
    snapshot(info)
        .inspect_err(|reason| warn!(snapshot = info.snapshot_id, reason, "unreadable snapshot"))
        .ok()
}

pub(super) fn snapshot(info: &SnapshotInfo) -> Result<Kept, String> {
    Ok(Kept {
        id: info.snapshot_id.parse().map_err(text)?,
        sandbox: info.sandbox_id.parse().map_err(text)?,
        execution: info.execution_id.parse().map_err(text)?,
        template: info.template_id.parse().map_err(text)?,
        build: info.build_id.parse().map_err(text)?,
        is_pause: info.paused,
        filesystem_only: info.filesystem_only,
        guest_unresponsive: info.guest_unresponsive,
        vcpus: Vcpus(info.vcpus),
        memory: MiB(info.memory_mib),
        disk: MiB(info.disk_mib),
        envd_version: info.envd_version.as_str().into(),
        terms: info.terms.clone(),
        started_at: UnixMillis(info.started_at_unix_ms),
        created_at: UnixMillis(info.created_at_unix_ms),
        own_bytes: info.own_bytes,
        uploaded: info.uploaded,
    })
}

pub(super) fn description(answer: &DescribeResponse) -> Description {
    let load = answer.load.as_option().cloned().unwrap_or_default();
    let starting = u64::from(load.starting_count);
    Description {
        takes_sandboxes: !matches!(
            answer.status.as_known(),
            Some(NodeStatus::NODE_STATUS_DRAINING | NodeStatus::NODE_STATUS_STANDBY)
        ),
        taken: Taken {
            sandboxes: u64::from(load.sandbox_count).saturating_add(starting),
            vcpus: load.allocated_vcpus,
            memory_mib: load.allocated_memory_mib,
            disk_mib: load.allocated_disk_mib,
        },
        capacity: answer
            .capacity
            .as_option()
            .map(|said| capacity(said, load.allocated_disk_mib))
            .unwrap_or_default(),
    }
}

/// `disk_mib` is what is promised to sandboxes already: the node says what is free beside that.
fn capacity(said: &Capacity, disk_mib: u64) -> Taken {
    // The largest number there is means that the node does not count it.
    let counted = |amount: u64| if amount == u64::MAX { 0 } else { amount };
    Taken {
        sandboxes: said.sandboxes_max.into(),
        vcpus: counted(said.vcpus),
        memory_mib: counted(said.memory_mib),
        disk_mib: match said.disk_free_mib {
            u64::MAX => 0,
            free => free.saturating_add(disk_mib).max(1),
        },
    }
}

pub(super) fn log_entry(entry: pb::LogEntry) -> LogEntry {
    LogEntry {
        at: UnixMillis(entry.at_unix_ms),
        // A newer node may know more words; what it says is worth showing all the same.
        level: LogLevel::parse(&entry.level).unwrap_or(LogLevel::Info),
        event: entry.event,
        pid: entry.pid,
        command: entry.command,
        text: entry.text,
        cut: entry.cut,
    }
}

pub(super) fn template(info: TemplateInfo) -> Result<Template, String> {
    Ok(Template {
        id: info.template_id.parse().map_err(text)?,
        build: info.build_id.parse().map_err(text)?,
        aliases: info.aliases,
        vcpus: Vcpus(info.vcpus),
        memory: MiB(info.memory_mib),
        disk: MiB(info.disk_mib),
        envd_version: info.envd_version.into(),
        created_at: UnixMillis(info.created_at_unix_ms),
        cold_boot: false,
    })
}

fn text(error: belljar_domain::id::IdError) -> String {
    error.to_string()
}
