//! Between the node RPC's messages and the domain: parsed once, here.

use std::str::FromStr;
use std::sync::Arc;

use belljar_domain::{BuildId, IdError, Kind, SandboxId, Secret, UnixMillis};
use belljar_sandbox::admission::{Refused, Status};
use belljar_sandbox::metrics::Sample;
use belljar_sandbox::template::Template;
use belljar_sandbox::{
    AutoPause, CreateError, CreateSandbox, Direction, Ended, LogEntry, LogQuery, SandboxInfo,
    SnapshotMeta, Starting, Untold, Usage,
};
use belljar_wire::guest::LogLevel;
use belljar_wire::refusal::Refusal;
use belljar_wire::rpc::belljar::node::v1 as pb;
use connectrpc::{ConnectError, ErrorCode};

/// The one table from error kinds to this protocol's codes.
pub(crate) fn code(kind: Kind) -> ErrorCode {
    match kind {
        Kind::Invalid => ErrorCode::InvalidArgument,
        Kind::Unauthenticated => ErrorCode::Unauthenticated,
        Kind::Forbidden => ErrorCode::PermissionDenied,
        Kind::NotFound => ErrorCode::NotFound,
        Kind::Conflict => ErrorCode::FailedPrecondition,
        Kind::Quota => ErrorCode::ResourceExhausted,
        Kind::Unavailable => ErrorCode::Unavailable,
        Kind::Timeout => ErrorCode::DeadlineExceeded,
        Kind::Cancelled => ErrorCode::Canceled,
        Kind::Internal => ErrorCode::Internal,
    }
}

pub(crate) fn bad_id(error: &IdError) -> ConnectError {
    ConnectError::new(code(Kind::Invalid), format!("failed to {error}"))
}

/// Longest terms of a create, bytes: whatever a create of the public API can hold, and small enough
/// to be written before each start.
const TERMS_MAX_BYTES: usize = 1024 * 1024;

pub(crate) fn create_request(
    from: pb::CreateSandboxRequest,
) -> Result<CreateSandbox, ConnectError> {
    if from.terms.len() > TERMS_MAX_BYTES {
        let message =
            format!("`terms` has {} bytes, at most {TERMS_MAX_BYTES} are taken", from.terms.len());
        return Err(ConnectError::new(code(Kind::Invalid), message));
    }
    Ok(CreateSandbox {
        sandbox_id: from.sandbox_id.parse().map_err(|e| bad_id(&e))?,
        execution_id: from.execution_id.parse().map_err(|e| bad_id(&e))?,
        template_id: from.template_id.parse().map_err(|e| bad_id(&e))?,
        build_id: from.build_id.parse().map_err(|e| bad_id(&e))?,
        end_at: UnixMillis(from.end_at_unix_ms),
        envd_access_token: (!from.envd_access_token.is_empty())
            .then(|| Secret::new(from.envd_access_token)),
        env_vars: from.env_vars.into_iter().collect(),
        allow_internet_access: from.allow_internet_access,
        terms: from.terms.into(),
        auto_pause: from.auto_pause.into_option().map(auto_pause).transpose()?,
        cold_boot: from.cold_boot,
    })
}

fn auto_pause(from: pb::AutoPause) -> Result<AutoPause, ConnectError> {
    Ok(AutoPause {
        snapshot_id: from.snapshot_id.parse().map_err(|e| bad_id(&e))?,
        filesystem_only: from.filesystem_only,
    })
}

pub(crate) fn snapshot_info(meta: &SnapshotMeta) -> pb::SnapshotInfo {
    pb::SnapshotInfo {
        snapshot_id: meta.snapshot_id.to_string(),
        sandbox_id: meta.sandbox_id.to_string(),
        execution_id: meta.execution_id.to_string(),
        template_id: meta.template_id.to_string(),
        build_id: meta.build_id.to_string(),
        paused: meta.paused,
        filesystem_only: meta.filesystem_only,
        guest_unresponsive: meta.guest_unresponsive,
        vcpus: meta.vcpus.0,
        memory_mib: meta.memory.0,
        disk_mib: meta.disk.0,
        envd_version: meta.envd_version.clone(),
        terms: meta.terms.clone(),
        started_at_unix_ms: meta.started_at.0,
        created_at_unix_ms: meta.created_at.0,
        own_bytes: meta.own_bytes,
        ..pb::SnapshotInfo::default()
    }
}

/// The first of `metas` that fit one answer, and the last id of the page when there are more.
pub(crate) fn snapshot_page(
    metas: &[Arc<SnapshotMeta>],
    is_uploaded: impl Fn(&BuildId) -> bool,
) -> (Vec<pb::SnapshotInfo>, String) {
    let fitting = fitting(metas.iter().map(|meta| meta.terms.len()));
    let page = metas[..fitting].iter().map(|meta| pb::SnapshotInfo {
        uploaded: is_uploaded(&meta.snapshot_id),
        ..snapshot_info(meta)
    });
    let page: Vec<pb::SnapshotInfo> = page.collect();
    let next = page.last().filter(|_| fitting < metas.len()).map(|last| last.snapshot_id.clone());
    (page, next.unwrap_or_default())
}

pub(crate) fn sandbox_info(info: &SandboxInfo) -> pb::SandboxInfo {
    pb::SandboxInfo {
        sandbox_id: info.sandbox_id.to_string(),
        execution_id: info.execution_id.to_string(),
        build_id: info.build_id.to_string(),
        template_id: info.template_id.to_string(),
        route_ip: info.route_ip.to_string(),
        started_at_unix_ms: info.started_at.0,
        end_at_unix_ms: info.end_at.0,
        vcpus: info.vcpus.0,
        memory_mib: info.memory.0,
        disk_mib: info.disk.0,
        envd_version: info.envd_version.to_string(),
        terms: info.terms.to_string(),
        ..pb::SandboxInfo::default()
    }
}

/// Texts of one page of sandboxes, bytes; a page may be longer by one sandbox. Half of what a client
/// takes as one message.
const PAGE_BYTES: usize = 2 * 1024 * 1024;
/// What a sandbox takes in an answer besides its terms.
const SANDBOX_COST_BYTES: usize = 256;

/// How many of the things whose terms have these lengths fit one answer.
fn fitting(terms_bytes: impl Iterator<Item = usize>) -> usize {
    let mut bytes = 0;
    let fits = |terms: &usize| {
        let before = bytes;
        bytes += terms + SANDBOX_COST_BYTES;
        before < PAGE_BYTES
    };
    terms_bytes.take_while(fits).count()
}

/// The first of `infos` that fit one answer, and the last id of the page when there are more.
pub(crate) fn sandbox_page(infos: &[SandboxInfo]) -> (Vec<pb::SandboxInfo>, String) {
    let fitting = fitting(infos.iter().map(|info| info.terms.len()));
    let page: Vec<pb::SandboxInfo> = infos[..fitting].iter().map(sandbox_info).collect();
    let next = page.last().filter(|_| fitting < infos.len()).map(|last| last.sandbox_id.clone());
    (page, next.unwrap_or_default())
}

/// Terms of those that start, bytes: they go with a page of sandboxes, and both fit one message.
const STARTING_TERMS_BYTES: usize = PAGE_BYTES / 4;

/// All of `starting`, with the terms of as many as fit one answer.
pub(crate) fn starting(starting: Vec<Starting>) -> Vec<pb::StartingSandbox> {
    let mut bytes = 0;
    let convert = |starting: Starting| {
        let fits = bytes + starting.terms.len() <= STARTING_TERMS_BYTES;
        bytes += if fits { starting.terms.len() } else { 0 };
        let terms = if fits { starting.terms.to_string() } else { String::new() };
        pb::StartingSandbox {
            sandbox_id: starting.sandbox_id.to_string(),
            execution_id: starting.execution_id.to_string(),
            terms,
            ..pb::StartingSandbox::default()
        }
    };
    starting.into_iter().map(convert).collect()
}

pub(crate) fn untold(end: Untold) -> pb::ReclaimedSandbox {
    pb::ReclaimedSandbox {
        sandbox_id: end.sandbox_id.to_string(),
        execution_id: end.execution_id.to_string(),
        template_id: end.template_id.to_string(),
        build_id: end.build_id.to_string(),
        terms: end.terms,
        started_at_unix_ms: end.started_at.0,
        end_at_unix_ms: end.end_at.0,
        vcpus: end.vcpus.0,
        memory_mib: end.memory.0,
        disk_mib: end.disk.0,
        reclaimed_at_unix_ms: end.noticed_at.0,
        reason: end.how.as_str().to_owned(),
        ..pb::ReclaimedSandbox::default()
    }
}

/// Most ids of one request.
pub(crate) const IDS_MAX: usize = 10_000;

pub(crate) fn ids<T: FromStr<Err = IdError>>(texts: &[String]) -> Result<Vec<T>, ConnectError> {
    if texts.len() > IDS_MAX {
        let message = format!("{} ids were sent, at most {IDS_MAX} are taken", texts.len());
        return Err(ConnectError::new(code(Kind::Invalid), message));
    }
    texts.iter().map(|text| text.parse().map_err(|e| bad_id(&e))).collect()
}

pub(crate) fn status(status: Status) -> pb::NodeStatus {
    match status {
        Status::Ready => pb::NodeStatus::NODE_STATUS_READY,
        Status::Draining => pb::NodeStatus::NODE_STATUS_DRAINING,
        Status::Standby => pb::NodeStatus::NODE_STATUS_STANDBY,
    }
}

/// What a status on the wire means; `None` when it is none.
pub(crate) fn wanted_status(status: Option<pb::NodeStatus>) -> Result<Status, ConnectError> {
    match status {
        Some(pb::NodeStatus::NODE_STATUS_READY) => Ok(Status::Ready),
        Some(pb::NodeStatus::NODE_STATUS_DRAINING) => Ok(Status::Draining),
        Some(pb::NodeStatus::NODE_STATUS_STANDBY) => Ok(Status::Standby),
        Some(pb::NodeStatus::NODE_STATUS_UNSPECIFIED) | None => {
            let message = "`status` must be ready, draining or standby";
            Err(ConnectError::new(code(Kind::Invalid), message))
        }
    }
}

pub(crate) fn samples(sandbox_id: &SandboxId, samples: &[Sample]) -> pb::SandboxSamples {
    pb::SandboxSamples {
        sandbox_id: sandbox_id.to_string(),
        samples: samples.iter().map(sample).collect(),
        ..pb::SandboxSamples::default()
    }
}

fn sample(sample: &Sample) -> pb::MetricsSample {
    let figures = sample.figures;
    pb::MetricsSample {
        at_unix_ms: sample.at.0,
        cpu_count: figures.cpu_count,
        cpu_used_pct: figures.cpu_used_pct,
        mem_used_bytes: figures.mem_used_bytes,
        mem_total_bytes: figures.mem_total_bytes,
        mem_cache_bytes: figures.mem_cache_bytes,
        disk_used_bytes: figures.disk_used_bytes,
        disk_total_bytes: figures.disk_total_bytes,
        ..pb::MetricsSample::default()
    }
}

/// Adds what sandboxes make of the host to what the kernel says of it.
pub(crate) fn load(usage: &Usage, host: pb::Load) -> pb::Load {
    pb::Load {
        sandbox_count: u32::try_from(usage.running).unwrap_or(u32::MAX),
        starting_count: u32::try_from(usage.starting).unwrap_or(u32::MAX),
        allocated_vcpus: usage.allocated.vcpus,
        allocated_memory_mib: usage.allocated.memory_mib,
        allocated_disk_mib: usage.allocated.disk_mib,
        create_successes: usage.created,
        create_fails: usage.failed,
        ..host
    }
}

pub(crate) fn capacity(usage: &Usage) -> pb::Capacity {
    let limits = &usage.limits;
    let free_mib = usage.disk_free_mib.unwrap_or(u64::MAX);
    pb::Capacity {
        vcpus: limits.vcpus,
        memory_mib: limits.memory_mib,
        disk_free_mib: free_mib.saturating_sub(limits.disk_reserve_mib),
        sandboxes_max: u32::try_from(limits.sandboxes_max).unwrap_or(u32::MAX),
        starting_max: u32::try_from(limits.starting_max).unwrap_or(u32::MAX),
        ..pb::Capacity::default()
    }
}

/// Which of the node's limits a create has met, if that is why it failed.
pub(crate) fn refusal(error: &CreateError) -> Option<Refusal> {
    match error {
        CreateError::NoTemplate { .. } => Some(Refusal::NoTemplate),
        CreateError::Incompatible { .. } => Some(Refusal::Incompatible),
        CreateError::Closing => Some(Refusal::Draining),
        CreateError::Refused { limit } => Some(match limit {
            Refused::Status { .. } => Refusal::Draining,
            Refused::SandboxesMax { .. } => Refusal::SandboxesMax,
            Refused::Cpu { .. } => Refusal::Cpu,
            Refused::Memory { .. } => Refusal::Memory,
            Refused::Disk { .. } => Refusal::Disk,
            Refused::StartingSlots { .. } => Refusal::StartingSlots,
        }),
        CreateError::Network { source } if source.kind() == Kind::Quota => {
            Some(Refusal::NetworkSlots)
        }
        CreateError::Io { .. } | CreateError::Fetch { .. } if error.kind() == Kind::Quota => {
            Some(Refusal::Disk)
        }
        CreateError::Fetch { source, .. } if source.is_incompatible() => {
            Some(Refusal::Incompatible)
        }
        CreateError::Exists { .. }
        | CreateError::Killed { .. }
        | CreateError::NoKernel { .. }
        | CreateError::Fetch { .. }
        | CreateError::Network { .. }
        | CreateError::Io { .. }
        | CreateError::Machine { .. }
        | CreateError::Guest { .. } => None,
    }
}

/// Most entries of one answer, and longest text searched for, in characters.
///
/// Source: `contract/e2b-wire.md` sections 1.2 and 9.
const LOG_ENTRIES_MAX: u32 = 1000;
const SEARCH_MAX_CHARS: usize = 256;

pub(crate) fn log_query(from: pb::SandboxLogsRequest) -> Result<LogQuery, ConnectError> {
    let invalid = |message: &str| ConnectError::new(code(Kind::Invalid), message);
    let min_level = match from.min_level.as_str() {
        "" => LogLevel::Debug,
        word => LogLevel::parse(word).ok_or_else(|| invalid("there is no such log level"))?,
    };
    if from.search.chars().count() > SEARCH_MAX_CHARS {
        return Err(invalid("the text to search for is too long"));
    }
    Ok(LogQuery {
        cursor: from.cursor_unix_ms.map(UnixMillis),
        limit: usize::try_from(from.limit.min(LOG_ENTRIES_MAX)).unwrap_or_default(),
        direction: if from.backward { Direction::Backward } else { Direction::Forward },
        min_level,
        search: from.search,
    })
}

pub(crate) fn log_entry(entry: &LogEntry) -> pb::LogEntry {
    pb::LogEntry {
        at_unix_ms: entry.at.0,
        level: entry.level.as_str().to_owned(),
        event: entry.event.as_str().to_owned(),
        pid: entry.pid,
        command: entry.command.to_string(),
        text: entry.text.to_string(),
        cut: entry.cut,
        ..pb::LogEntry::default()
    }
}

pub(crate) fn template_info(template: &Template) -> pb::TemplateInfo {
    let meta = &template.meta;
    pb::TemplateInfo {
        template_id: meta.template_id.to_string(),
        build_id: meta.build_id.to_string(),
        aliases: meta.aliases.clone(),
        vcpus: meta.vcpus.0,
        memory_mib: meta.memory.0,
        disk_mib: meta.disk.0,
        envd_version: meta.envd_version.clone(),
        created_at_unix_ms: meta.created_at.0,
        ..pb::TemplateInfo::default()
    }
}

pub(crate) fn ended(ended: &Ended) -> pb::WatchSandboxesResponse {
    let notice = pb::watch_sandboxes_response::Ended {
        sandbox_id: ended.sandbox_id.to_string(),
        execution_id: ended.execution_id.to_string(),
        reason: ended.reason.as_str().to_owned(),
        snapshot: ended.snapshot.as_deref().map(snapshot_info).into(),
        ..pb::watch_sandboxes_response::Ended::default()
    };
    pb::WatchSandboxesResponse { ended: notice.into(), ..pb::WatchSandboxesResponse::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_domain::ExecutionId;

    #[test]
    fn all_that_start_are_told_with_the_terms_that_fit() {
        let one = |terms: usize| Starting {
            sandbox_id: SandboxId::random(),
            execution_id: ExecutionId::random(),
            terms: "x".repeat(terms).into(),
        };
        let told = starting(vec![one(9), one(STARTING_TERMS_BYTES), one(STARTING_TERMS_BYTES - 9)]);
        let lengths: Vec<usize> = told.iter().map(|starting| starting.terms.len()).collect();
        assert_eq!(lengths, [9, 0, STARTING_TERMS_BYTES - 9]);
    }
}
