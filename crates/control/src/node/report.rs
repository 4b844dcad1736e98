//! What the operator sees of a node, in the shapes of the public API.
//!
//! Nothing here is decided upon: the figures go from the node's answer to the operator's screen,
//! so they are not turned into domain types on the way.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use belljar_wire::rest;
use belljar_wire::rpc::belljar::node::v1::{
    DescribeRequest, DescribeResponse, Load, NodeStatus, SetNodeStatusRequest,
};

use super::{CALL_DEADLINE, Node, NodeCallError, within};

/// The one cluster of this server. A UUID because the API has it as one.
pub(crate) const CLUSTER: &str = "00000000-0000-0000-0000-000000000000";
const MIB_BYTES: u64 = 1 << 20;

/// What each node said last, by its place in the list of nodes: shown while it does not answer.
#[derive(Debug, Default)]
pub(crate) struct Reports(Mutex<HashMap<usize, rest::Node>>);

impl Reports {
    pub(crate) fn remember(&self, place: usize, node: &rest::Node) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(place, node.clone());
    }

    /// What the node said last, as one that does not answer.
    pub(crate) fn recall(&self, place: usize) -> Option<rest::Node> {
        let mut node =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&place).cloned()?;
        node.status = rest::NodeStatus::Unhealthy;
        Some(node)
    }
}

impl Node {
    /// Everything the node says of itself.
    pub(crate) async fn report(&self) -> Result<rest::Node, NodeCallError> {
        let answer = self
            .client
            .describe_with_options(DescribeRequest::default(), within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "describe the node", source })?
            .into_owned();
        Ok(shown(answer))
    }

    /// Says whether the node takes new sandboxes.
    pub(crate) async fn set_status(&self, status: NodeStatus) -> Result<(), NodeCallError> {
        let request = SetNodeStatusRequest { status: status.into(), ..Default::default() };
        self.client
            .set_node_status_with_options(request, within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "set the status of the node", source })?;
        Ok(())
    }
}

/// The status to ask a node for; `None` for those that nobody can bring about.
pub(crate) fn settable(status: rest::NodeStatus) -> Option<NodeStatus> {
    match status {
        rest::NodeStatus::Ready => Some(NodeStatus::NODE_STATUS_READY),
        rest::NodeStatus::Draining => Some(NodeStatus::NODE_STATUS_DRAINING),
        rest::NodeStatus::Standby => Some(NodeStatus::NODE_STATUS_STANDBY),
        rest::NodeStatus::Connecting | rest::NodeStatus::Unhealthy => None,
    }
}

fn shown(answer: DescribeResponse) -> rest::Node {
    let load = answer.load.into_option().unwrap_or_default();
    let machine = answer.machine.into_option().unwrap_or_default();
    let status = match answer.status.as_known() {
        Some(NodeStatus::NODE_STATUS_DRAINING) => rest::NodeStatus::Draining,
        Some(NodeStatus::NODE_STATUS_STANDBY) => rest::NodeStatus::Standby,
        // One that says nothing takes sandboxes: nodes of the first version have no other status.
        Some(NodeStatus::NODE_STATUS_READY | NodeStatus::NODE_STATUS_UNSPECIFIED) | None => {
            rest::NodeStatus::Ready
        }
    };
    rest::Node {
        version: answer.version,
        commit: answer.commit,
        id: answer.node_id,
        service_instance_id: answer.service_instance_id,
        cluster_id: CLUSTER.to_owned(),
        machine_info: rest::MachineInfo {
            cpu_family: machine.cpu_family,
            cpu_model: machine.cpu_model,
            cpu_model_name: machine.cpu_model_name,
            cpu_architecture: machine.cpu_architecture,
        },
        status,
        status_changed_at: rest::Time::from_timestamp_millis(answer.status_changed_at_unix_ms)
            .unwrap_or(rest::Time::MAX_UTC),
        sandbox_count: load.sandbox_count,
        create_successes: load.create_successes,
        create_fails: load.create_fails,
        sandbox_starting_count: load.starting_count,
        metrics: metrics(load),
    }
}

fn metrics(load: Load) -> rest::NodeMetrics {
    let pages = load.huge_pages.into_option().unwrap_or_default();
    let disks = load.disks.into_iter().map(|disk| rest::DiskMetrics {
        mount_point: disk.mount,
        device: disk.device,
        filesystem_type: disk.fs_type,
        used_bytes: disk.used_bytes,
        total_bytes: disk.total_bytes,
    });
    rest::NodeMetrics {
        allocated_cpu: load.allocated_vcpus,
        cpu_percent: percent(load.cpu_percent),
        cpu_count: load.cpu_count,
        allocated_memory_bytes: load.allocated_memory_mib.saturating_mul(MIB_BYTES),
        memory_used_bytes: load.memory_used_bytes,
        memory_total_bytes: load.memory_total_bytes,
        huge_pages_total: pages.total,
        huge_pages_used: pages.used,
        huge_pages_reserved: pages.reserved,
        huge_page_size_bytes: pages.page_size_bytes,
        disks: disks.collect(),
    }
}

/// A share as whole percent, 0 to 100, whatever the node says.
fn percent(value: f32) -> u32 {
    if !value.is_finite() {
        return 0;
    }
    // A float has no lossless way to an integer; the range is checked first.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    let whole = value.round().clamp(0.0, 100.0) as u32;
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_and_bounded() {
        for (value, whole) in [(0.4, 0), (49.6, 50), (100.0, 100), (250.0, 100), (-3.0, 0)] {
            assert_eq!(percent(value), whole, "{value}");
        }
        assert_eq!((percent(f32::NAN), percent(f32::INFINITY)), (0, 0));
    }

    #[test]
    fn a_node_that_does_not_answer_is_shown_as_it_was_but_unhealthy() {
        let (reports, node) = (Reports::default(), shown(DescribeResponse::default()));
        assert_eq!(node.status, rest::NodeStatus::Ready);
        assert_eq!(reports.recall(0), None);
        reports.remember(0, &node);
        let recalled = reports.recall(0).expect("it was remembered");
        assert_eq!(recalled, rest::Node { status: rest::NodeStatus::Unhealthy, ..node });
    }
}
