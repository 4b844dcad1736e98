//! Between the node RPC's messages and the domain: parsed once, here.

use belljar_domain::{IdError, Kind, Secret, UnixMillis};
use belljar_sandbox::template::Template;
use belljar_sandbox::{CreateSandbox, Direction, Ended, LogEntry, LogQuery, SandboxInfo};
use belljar_wire::guest::LogLevel;
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

pub(crate) fn create_request(
    from: pb::CreateSandboxRequest,
) -> Result<CreateSandbox, ConnectError> {
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
    })
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
        envd_version: info.envd_version.clone(),
        ..pb::SandboxInfo::default()
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
        ..pb::watch_sandboxes_response::Ended::default()
    };
    pb::WatchSandboxesResponse { ended: notice.into(), ..pb::WatchSandboxesResponse::default() }
}
