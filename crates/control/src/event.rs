//! Lifecycle events: what a team is told of its sandboxes. Source: contract section 1.7.
//!
//! An event is written in the transaction of the state change it tells of, and only when that
//! changed something, so there is exactly one for each change, whatever crashes and whoever writes
//! again. Its id follows from what it tells, which a receiver can rely on too.

use std::collections::BTreeMap;

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, UnixMillis, Vcpus};
use belljar_wire::rest::{self, EventType, KillReason};
use sha2::{Digest as _, Sha256};

use crate::live::Sandbox;
use crate::team::TeamId;

/// Shape of the wire's event object.
const VERSION: &str = "v2";
const CATEGORY: &str = "lifecycle";
/// Set apart from other names an id could be made of.
const NAMESPACE: &str = "belljar.event";

/// What an event says of the run it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) team: TeamId,
    pub(crate) sandbox: SandboxId,
    pub(crate) execution: ExecutionId,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) started_at: UnixMillis,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) id: String,
    pub(crate) kind: EventType,
    pub(crate) at: UnixMillis,
    pub(crate) team: TeamId,
    pub(crate) sandbox: SandboxId,
    pub(crate) execution: ExecutionId,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    pub(crate) data: rest::EventData,
}

impl From<&Sandbox> for Run {
    fn from(sandbox: &Sandbox) -> Run {
        Run {
            team: sandbox.team.clone(),
            sandbox: sandbox.id.clone(),
            execution: sandbox.execution.clone(),
            template: sandbox.template.clone(),
            build: sandbox.build.clone(),
            metadata: sandbox.metadata.to_map(),
            started_at: sandbox.started_at,
            vcpus: sandbox.vcpus,
            memory: sandbox.memory,
        }
    }
}

impl Event {
    /// A run began.
    pub(crate) fn created(run: Run) -> Event {
        let at = run.started_at;
        Event::new(run, EventType::Created, at, "", rest::EventData::default())
    }

    /// The end of a run was moved to `end_at`.
    pub(crate) fn updated(run: Run, at: UnixMillis, end_at: UnixMillis) -> Event {
        let data = rest::EventData { set_timeout: Some(time(end_at)), ..Default::default() };
        // An end may be moved to and fro, so the time belongs to what is told.
        let revision = format!("{}/{}", at.0, end_at.0);
        Event::new(run, EventType::Updated, at, &revision, data)
    }

    /// A run ended. `reason` is a word of the node protocol, or `lost`.
    pub(crate) fn killed(run: Run, at: UnixMillis, reason: &str) -> Event {
        let data = rest::EventData {
            execution: Some(execution(&run, at)),
            reason: Some(kill_reason(reason)),
            ..Default::default()
        };
        Event::new(run, EventType::Killed, at, "", data)
    }

    /// A run ended, and its sandbox is paused.
    pub(crate) fn paused(run: Run, at: UnixMillis) -> Event {
        let data = rest::EventData { execution: Some(execution(&run, at)), ..Default::default() };
        Event::new(run, EventType::Paused, at, "", data)
    }

    /// A run of a sandbox began that was paused.
    pub(crate) fn resumed(run: Run) -> Event {
        let at = run.started_at;
        Event::new(run, EventType::Resumed, at, "", rest::EventData::default())
    }

    /// `snapshot` was taken of a run, which goes on.
    pub(crate) fn checkpointed(run: Run, at: UnixMillis, snapshot: &BuildId) -> Event {
        let data = rest::EventData::default();
        Event::new(run, EventType::Checkpointed, at, snapshot.as_str(), data)
    }

    /// A paused sandbox is gone for good. Its last run is over for longer, and was told of.
    pub(crate) fn discarded(run: Run, at: UnixMillis, reason: &str) -> Event {
        let data = rest::EventData { reason: Some(kill_reason(reason)), ..Default::default() };
        Event::new(run, EventType::Killed, at, "", data)
    }

    fn new(
        run: Run,
        kind: EventType,
        at: UnixMillis,
        revision: &str,
        data: rest::EventData,
    ) -> Event {
        Event {
            id: id(&run.execution, kind, revision),
            kind,
            at,
            team: run.team,
            sandbox: run.sandbox,
            execution: run.execution,
            template: run.template,
            build: run.build,
            data: rest::EventData { sandbox_metadata: Some(run.metadata), ..data },
        }
    }

    /// As it is listed and delivered.
    pub(crate) fn to_wire(&self) -> rest::SandboxEvent {
        rest::SandboxEvent {
            id: self.id.clone(),
            version: VERSION.to_owned(),
            event_type: self.kind,
            timestamp: time(self.at),
            event_category: CATEGORY.to_owned(),
            event_label: self.kind.label().to_owned(),
            event_data: self.data.clone(),
            sandbox_id: self.sandbox.to_string(),
            sandbox_execution_id: self.execution.to_string(),
            sandbox_template_id: self.template.to_string(),
            sandbox_build_id: self.build.to_string(),
            sandbox_team_id: self.team.to_string(),
        }
    }
}

/// A run that is over at `at`.
fn execution(run: &Run, at: UnixMillis) -> rest::EventExecution {
    rest::EventExecution {
        started_at: time(run.started_at),
        vcpu_count: run.vcpus.0,
        memory_mb: run.memory.0,
        execution_time: u64::try_from(at.since(run.started_at).as_millis()).unwrap_or(u64::MAX),
    }
}

/// A UUID of version 8 made of SHA-256 over what the event tells.
fn id(execution: &ExecutionId, kind: EventType, revision: &str) -> String {
    let mut hash = Sha256::new();
    for part in [NAMESPACE, execution.as_str(), kind.as_str(), revision] {
        // None of the parts has a line feed.
        hash.update(part);
        hash.update("\n");
    }
    let digest = hash.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

fn kill_reason(word: &str) -> KillReason {
    match word {
        "killed" => KillReason::Request,
        "expired" => KillReason::Timeout,
        "crashed" => KillReason::Crashed,
        _ => KillReason::Lost,
    }
}

fn time(at: UnixMillis) -> rest::Time {
    rest::Time::from_timestamp_millis(at.0).unwrap_or(rest::Time::MAX_UTC)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A run of a team, for tests here and of the store.
    pub(crate) fn run(team: &TeamId) -> Run {
        Run {
            team: team.clone(),
            sandbox: SandboxId::random(),
            execution: ExecutionId::random(),
            template: TemplateId::random(),
            build: BuildId::random(),
            metadata: BTreeMap::from([("user".to_owned(), "ann".to_owned())]),
            started_at: UnixMillis(1_700_000_000_000),
            vcpus: Vcpus(2),
            memory: MiB(512),
        }
    }

    #[test]
    fn the_object_has_the_contracts_fields() {
        let run = run(&TeamId::random());
        let killed = Event::killed(run.clone(), UnixMillis(1_700_000_001_500), "expired");
        assert_eq!(
            serde_json::to_value(killed.to_wire()).expect("JSON"),
            json!({
                "id": killed.id,
                "version": "v2",
                "type": "sandbox.lifecycle.killed",
                "timestamp": "2023-11-14T22:13:21.500Z",
                "event_category": "lifecycle",
                "event_label": "kill",
                "event_data": {
                    "sandbox_metadata": {"user": "ann"},
                    "execution": {
                        "started_at": "2023-11-14T22:13:20Z",
                        "vcpu_count": 2,
                        "memory_mb": 512,
                        "execution_time": 1500,
                    },
                    "reason": "timeout",
                },
                "sandbox_id": run.sandbox.as_str(),
                "sandbox_execution_id": run.execution.as_str(),
                "sandbox_template_id": run.template.as_str(),
                "sandbox_build_id": run.build.as_str(),
                "sandbox_team_id": run.team.to_string(),
            })
        );
        let updated = Event::updated(run, UnixMillis(5), UnixMillis(1_700_000_002_000)).to_wire();
        let updated = serde_json::to_value(updated).expect("JSON");
        assert_eq!(updated["event_data"]["set_timeout"], "2023-11-14T22:13:22Z");
        assert_eq!(updated["event_label"], "update");
    }

    #[test]
    fn an_id_follows_from_what_is_told() {
        let (one, other) = (run(&TeamId::random()), run(&TeamId::random()));
        let at = UnixMillis(7);
        let ids = [
            Event::created(one.clone()).id,
            Event::created(other.clone()).id,
            Event::killed(one.clone(), at, "killed").id,
            Event::updated(one.clone(), at, UnixMillis(8)).id,
            Event::updated(one.clone(), at, UnixMillis(9)).id,
            Event::updated(one.clone(), UnixMillis(8), UnixMillis(9)).id,
        ];
        let different: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(different.len(), ids.len());
        // Who learns of an end later, or knows another reason, tells of the same end.
        assert_eq!(Event::killed(one, UnixMillis(99), "lost").id, ids[2]);
        let parsed = uuid::Uuid::try_parse(&ids[0]).expect("a UUID");
        assert_eq!(parsed.get_version_num(), 8);
    }
}
