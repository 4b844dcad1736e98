//! Pausing and copying sandboxes on their node, and the snapshots it keeps.

use std::time::Duration;

use belljar_domain::{BuildId, SandboxId};
use belljar_wire::rpc::belljar::node::v1::{
    DeleteSnapshotRequest, ListSnapshotsRequest, PauseSandboxRequest, SnapshotSandboxRequest,
};

use super::{CALL_DEADLINE, Node, NodeCallError, answers, malformed, within};
use crate::live::Kept;

/// Freezing, and bringing what was changed to stable storage: gigabytes at worst.
const SAVE_DEADLINE: Duration = Duration::from_secs(55);

/// How to pause a sandbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PauseMode {
    pub(crate) filesystem_only: bool,
    /// Whether to refuse when its guest does not answer.
    pub(crate) require_healthy_guest: bool,
}

impl Node {
    /// Pauses a sandbox as `snapshot`. On an error it runs on, unless nobody knows.
    pub(crate) async fn pause(
        &self,
        id: &SandboxId,
        snapshot: &BuildId,
        mode: PauseMode,
    ) -> Result<Kept, NodeCallError> {
        const WHAT: &str = "pause a sandbox";
        let request = PauseSandboxRequest {
            sandbox_id: id.to_string(),
            snapshot_id: snapshot.to_string(),
            filesystem_only: mode.filesystem_only,
            require_healthy_guest: mode.require_healthy_guest,
            ..Default::default()
        };
        let answer = self
            .client
            .pause_sandbox_with_options(request, within(SAVE_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: WHAT, source })?
            .into_owned();
        let info = answer.snapshot.into_option().unwrap_or_default();
        answers::snapshot(&info).map_err(|reason| malformed(WHAT, &reason))
    }

    /// Copies a running sandbox as `snapshot`; it goes on.
    pub(crate) async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: &BuildId,
        filesystem_only: bool,
    ) -> Result<Kept, NodeCallError> {
        const WHAT: &str = "take a snapshot of a sandbox";
        let request = SnapshotSandboxRequest {
            sandbox_id: id.to_string(),
            snapshot_id: snapshot.to_string(),
            filesystem_only,
            ..Default::default()
        };
        let answer = self
            .client
            .snapshot_sandbox_with_options(request, within(SAVE_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: WHAT, source })?
            .into_owned();
        let info = answer.snapshot.into_option().unwrap_or_default();
        answers::snapshot(&info).map_err(|reason| malformed(WHAT, &reason))
    }

    /// Every snapshot the node keeps. Those this process cannot read are left out, with a warning.
    pub(crate) async fn snapshots(&self) -> Result<Vec<Kept>, NodeCallError> {
        const WHAT: &str = "list snapshots";
        let (mut kept, mut after) = (Vec::new(), String::new());
        loop {
            let request =
                ListSnapshotsRequest { after_snapshot_id: after.clone(), ..Default::default() };
            let page = self
                .client
                .list_snapshots_with_options(request, within(CALL_DEADLINE))
                .await
                .map_err(|source| NodeCallError { what: WHAT, source })?
                .into_owned();
            kept.extend(page.snapshots.iter().filter_map(answers::readable_snapshot));
            if page.next_after_snapshot_id.is_empty() {
                return Ok(kept);
            }
            // Ids only grow from page to page, or this would never end.
            if page.next_after_snapshot_id <= after {
                return Err(malformed(WHAT, "its pages do not go on"));
            }
            after = page.next_after_snapshot_id;
        }
    }

    /// Removes a snapshot. What runs from it goes on.
    pub(crate) async fn delete_snapshot(&self, id: &BuildId) -> Result<(), NodeCallError> {
        let request = DeleteSnapshotRequest { snapshot_id: id.to_string(), ..Default::default() };
        self.client
            .delete_snapshot_with_options(request, within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "delete a snapshot", source })?;
        Ok(())
    }
}
