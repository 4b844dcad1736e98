//! What a scripted node holds, and how it misbehaves.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use belljar_daemon::clock;
use belljar_wire::rpc::belljar::node::v1::{
    AutoPause, CreateSandboxRequest, DescribeResponse, LogEntry, MetricsSample, NodeStatus,
    PauseSandboxRequest, ReclaimedSandbox, SandboxInfo, SandboxLogsRequest, SnapshotInfo,
    StartingSandbox, TemplateInfo, watch_sandboxes_response,
};
use connectrpc::ConnectError;
use tokio::sync::{broadcast, watch};

pub(crate) const TEMPLATE_ID: &str = "basebasebasebasebase";
pub(crate) const BUILD_ID: &str = "6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11";

/// What the node holds, and how it misbehaves.
pub(crate) struct State {
    pub(crate) sandboxes: Mutex<HashMap<String, SandboxInfo>>,
    /// Every create that was asked for.
    pub(crate) creates: Mutex<Vec<CreateSandboxRequest>>,
    /// The answer to the next create, if not the usual one.
    pub(crate) next_create: Mutex<Option<ConnectError>>,
    /// Report a created sandbox as ended before answering the create.
    pub(crate) end_at_once: Mutex<bool>,
    /// While true, creates wait.
    pub(crate) hold_creates: watch::Sender<bool>,
    /// Every end that was set, with whose it was, in order.
    pub(crate) ends_set: Mutex<Vec<(String, i64)>>,
    /// While true, ends are moved and nobody is told.
    pub(crate) hold_end_moves: watch::Sender<bool>,
    /// What it says starts, with the sandboxes.
    pub(crate) starting: Mutex<Vec<StartingSandbox>>,
    /// How often it was asked what it holds.
    pub(crate) lists: watch::Sender<u64>,
    pub(crate) more_templates: Mutex<Vec<TemplateInfo>>,
    /// What it keeps.
    pub(crate) snapshots: Mutex<BTreeMap<String, SnapshotInfo>>,
    /// What it finds in its blob store.
    pub(crate) stored: Mutex<BTreeMap<String, SnapshotInfo>>,
    /// How sandboxes are paused at their end.
    pub(super) auto_pauses: Mutex<HashMap<String, AutoPause>>,
    /// Every pause that was asked for.
    pub(crate) pauses: Mutex<Vec<PauseSandboxRequest>>,
    /// The answer to the next pause or snapshot, if not the usual one.
    pub(crate) next_save: Mutex<Option<ConnectError>>,
    /// While true, pauses and snapshots wait before they are begun.
    pub(crate) hold_saves: watch::Sender<bool>,
    /// Whether guests answer.
    pub(crate) guests_answer: Mutex<bool>,
    /// The log of every sandbox.
    pub(crate) log: Mutex<Vec<LogEntry>>,
    /// Every question for it.
    pub(crate) log_requests: Mutex<Vec<SandboxLogsRequest>>,
    /// Ends of an earlier run that nobody has recorded yet.
    pub(crate) reclaimed: Mutex<Vec<ReclaimedSandbox>>,
    /// What each sandbox used.
    pub(crate) samples: Mutex<HashMap<String, Vec<MetricsSample>>>,
    /// What the node was told to be.
    pub(crate) status: Mutex<NodeStatus>,
    /// What it says of itself but for its status and its sandboxes.
    pub(crate) description: Mutex<DescribeResponse>,
    pub(super) ended: broadcast::Sender<watch_sandboxes_response::Ended>,
}

impl State {
    pub(super) fn empty() -> State {
        State {
            sandboxes: Mutex::default(),
            creates: Mutex::default(),
            next_create: Mutex::default(),
            end_at_once: Mutex::default(),
            hold_creates: watch::channel(false).0,
            ends_set: Mutex::default(),
            hold_end_moves: watch::channel(false).0,
            starting: Mutex::default(),
            lists: watch::channel(0).0,
            more_templates: Mutex::default(),
            snapshots: Mutex::default(),
            stored: Mutex::default(),
            auto_pauses: Mutex::default(),
            pauses: Mutex::default(),
            next_save: Mutex::default(),
            hold_saves: watch::channel(false).0,
            guests_answer: Mutex::new(true),
            log: Mutex::default(),
            log_requests: Mutex::default(),
            reclaimed: Mutex::default(),
            samples: Mutex::default(),
            status: Mutex::new(NodeStatus::NODE_STATUS_READY),
            description: Mutex::new(DescribeResponse {
                node_id: "fake".to_owned(),
                tier: "fake".to_owned(),
                ..Default::default()
            }),
            ended: broadcast::channel(64).0,
        }
    }

    /// A sandbox ends by itself.
    pub(crate) fn end(&self, id: &str, reason: &str) {
        let gone = self.sandboxes.lock().expect("no panic holds it").remove(id).expect("it runs");
        self.report(&gone, reason);
    }

    /// The time of a sandbox is up, and it was created to be paused then. Whether anybody is told.
    pub(crate) fn pause_at_end(&self, id: &str, is_told: bool) -> String {
        let how = self.auto_pauses.lock().expect("no panic holds it").remove(id);
        let how = how.expect("it is paused at its end");
        let gone = self.sandboxes.lock().expect("no panic holds it").remove(id).expect("it runs");
        let kept = self.keep(&gone, &how.snapshot_id, true, how.filesystem_only);
        if is_told {
            let _listeners = self.ended.send(watch_sandboxes_response::Ended {
                snapshot: kept.into(),
                ..ended(&gone, "paused")
            });
        }
        how.snapshot_id
    }

    /// Keeps a sandbox as a snapshot.
    pub(super) fn keep(
        &self,
        of: &SandboxInfo,
        id: &str,
        paused: bool,
        filesystem_only: bool,
    ) -> SnapshotInfo {
        let kept = SnapshotInfo {
            snapshot_id: id.to_owned(),
            sandbox_id: of.sandbox_id.clone(),
            execution_id: of.execution_id.clone(),
            template_id: of.template_id.clone(),
            build_id: of.build_id.clone(),
            paused,
            filesystem_only,
            guest_unresponsive: !*self.guests_answer.lock().expect("no panic holds it"),
            vcpus: of.vcpus,
            memory_mib: of.memory_mib,
            disk_mib: of.disk_mib,
            envd_version: of.envd_version.clone(),
            terms: of.terms.clone(),
            started_at_unix_ms: of.started_at_unix_ms,
            created_at_unix_ms: clock::now().0,
            own_bytes: 1 << 20,
            ..Default::default()
        };
        let mut snapshots = self.snapshots.lock().expect("no panic holds it");
        snapshots.insert(id.to_owned(), kept.clone());
        kept
    }

    /// Answers to a pause or a snapshot of `id` up to the point where it is done: what it is of.
    pub(super) async fn save(
        &self,
        id: &str,
        needs_guest: bool,
    ) -> Result<SandboxInfo, ConnectError> {
        let mut held = self.hold_saves.subscribe();
        held.wait_for(|held| !held).await.expect("the node outlives its calls");
        if let Some(error) = self.next_save.lock().expect("no panic holds it").take() {
            return Err(error);
        }
        let sandboxes = self.sandboxes.lock().expect("no panic holds it");
        let of = sandboxes.get(id).cloned();
        let of = of.ok_or_else(|| ConnectError::not_found("it does not run here"))?;
        if needs_guest && !*self.guests_answer.lock().expect("no panic holds it") {
            return Err(ConnectError::failed_precondition("its guest does not answer"));
        }
        Ok(of)
    }

    /// The snapshots it keeps, oldest first by id.
    pub(crate) fn kept(&self) -> Vec<String> {
        self.snapshots.lock().expect("no panic holds it").keys().cloned().collect()
    }

    /// Whether a sandbox can be started from `build`; takes it over from the blob store if that has it.
    pub(super) fn has_build(&self, build: &str) -> bool {
        if let Some(stored) = self.stored.lock().expect("no panic holds it").get(build).cloned() {
            self.snapshots.lock().expect("no panic holds it").insert(build.to_owned(), stored);
        }
        let more = self.more_templates.lock().expect("no panic holds it");
        build == BUILD_ID
            || more.iter().any(|template| template.build_id == build)
            || self.snapshots.lock().expect("no panic holds it").contains_key(build)
    }

    /// Ends a sandbox without telling anybody; whoever gets what is answered may tell it later.
    pub(crate) fn end_silently(&self, id: &str) -> SandboxInfo {
        self.sandboxes.lock().expect("no panic holds it").remove(id).expect("it runs")
    }

    /// A sandbox that was asked for runs, whether or not anybody was told.
    pub(crate) fn run(&self, asked: &CreateSandboxRequest) {
        let mut info = sandbox_info(&asked.sandbox_id, &asked.execution_id, asked.end_at_unix_ms);
        info.terms.clone_from(&asked.terms);
        let mut sandboxes = self.sandboxes.lock().expect("no panic holds it");
        sandboxes.insert(asked.sandbox_id.clone(), info);
    }

    pub(crate) fn holds(&self, id: &str) -> bool {
        self.sandboxes.lock().expect("no panic holds it").contains_key(id)
    }

    pub(crate) fn end_of(&self, id: &str) -> i64 {
        self.sandboxes.lock().expect("no panic holds it")[id].end_at_unix_ms
    }

    /// Tells everybody who watches that a sandbox ended.
    pub(crate) fn report(&self, gone: &SandboxInfo, reason: &str) {
        // Nobody listens before the first watch.
        let _listeners = self.ended.send(ended(gone, reason));
    }
}

pub(super) fn ended(gone: &SandboxInfo, reason: &str) -> watch_sandboxes_response::Ended {
    watch_sandboxes_response::Ended {
        sandbox_id: gone.sandbox_id.clone(),
        execution_id: gone.execution_id.clone(),
        reason: reason.to_owned(),
        ..Default::default()
    }
}

pub(crate) fn template(
    id: &str,
    build: &str,
    aliases: &[&str],
    created_at_ms: i64,
) -> TemplateInfo {
    TemplateInfo {
        template_id: id.to_owned(),
        build_id: build.to_owned(),
        aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
        vcpus: 2,
        memory_mib: 512,
        disk_mib: 1024,
        envd_version: "0.6.13".to_owned(),
        created_at_unix_ms: created_at_ms,
        ..Default::default()
    }
}

pub(crate) fn sandbox_info(id: &str, execution: &str, end_at_ms: i64) -> SandboxInfo {
    SandboxInfo {
        sandbox_id: id.to_owned(),
        execution_id: execution.to_owned(),
        build_id: BUILD_ID.to_owned(),
        template_id: TEMPLATE_ID.to_owned(),
        route_ip: "10.11.0.7".to_owned(),
        started_at_unix_ms: clock::now().0,
        end_at_unix_ms: end_at_ms,
        vcpus: 2,
        memory_mib: 512,
        disk_mib: 1024,
        envd_version: "0.6.13".to_owned(),
        ..Default::default()
    }
}
