//! Nodes as the operator sees them, and whether they take sandboxes.

use belljar_wire::rpc::belljar::node::v1::{
    DescribeResponse, Disk, HugePages, Load, Machine, NodeStatus,
};
use serde_json::{Value, json};

use crate::support::{Rig, eventually};

const CLUSTER: &str = "00000000-0000-0000-0000-000000000000";

fn description() -> DescribeResponse {
    DescribeResponse {
        node_id: "node-1".to_owned(),
        version: "0.1.0".to_owned(),
        commit: "abc".to_owned(),
        service_instance_id: "s-1".to_owned(),
        status_changed_at_unix_ms: 1_700_000_000_000,
        machine: Machine {
            cpu_family: "6".to_owned(),
            cpu_model: "85".to_owned(),
            cpu_model_name: "Some CPU".to_owned(),
            cpu_architecture: "x86_64".to_owned(),
            ..Default::default()
        }
        .into(),
        load: Load {
            starting_count: 1,
            allocated_vcpus: 4,
            allocated_memory_mib: 2,
            cpu_percent: 12.6,
            cpu_count: 8,
            memory_used_bytes: 10,
            memory_total_bytes: 20,
            create_successes: 7,
            create_fails: 3,
            disks: vec![Disk {
                mount: "/".to_owned(),
                device: "/dev/vda".to_owned(),
                fs_type: "ext4".to_owned(),
                used_bytes: 1,
                total_bytes: 2,
                ..Default::default()
            }],
            huge_pages: HugePages {
                total: 5,
                used: 4,
                reserved: 3,
                page_size_bytes: 2 << 20,
                ..Default::default()
            }
            .into(),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_node_is_shown_with_all_it_says() {
    let rig = Rig::start().await;
    *rig.node.state.description.lock().expect("no panic holds it") = description();
    rig.create(r#"{"templateID":"base"}"#).await;
    let expected = json!({
        "id": "node-1", "version": "0.1.0", "commit": "abc", "serviceInstanceID": "s-1",
        "clusterID": CLUSTER, "status": "ready", "statusChangedAt": "2023-11-14T22:13:20Z",
        "sandboxCount": 1, "sandboxStartingCount": 1, "createSuccesses": 7, "createFails": 3,
        "machineInfo": {
            "cpuFamily": "6", "cpuModel": "85", "cpuModelName": "Some CPU",
            "cpuArchitecture": "x86_64",
        },
        "metrics": {
            "allocatedCPU": 4, "cpuPercent": 13, "cpuCount": 8,
            "allocatedMemoryBytes": 2 << 20, "memoryUsedBytes": 10, "memoryTotalBytes": 20,
            "hugePagesTotal": 5, "hugePagesUsed": 4, "hugePagesReserved": 3,
            "hugePageSizeBytes": 2 << 20,
            "disks": [{
                "mountPoint": "/", "device": "/dev/vda", "filesystemType": "ext4",
                "usedBytes": 1, "totalBytes": 2,
            }],
        },
    });
    let list = rig.admin("GET", "/nodes", Value::Null).await;
    assert_eq!((list.status, list.json()), (200, json!([expected])));
    assert_eq!(rig.admin("GET", "/nodes/node-1", Value::Null).await.json(), expected);
    let of_cluster = format!("/nodes?clusterID={CLUSTER}");
    assert_eq!(rig.admin("GET", &of_cluster, Value::Null).await.json(), json!([expected]));
    let other = "/nodes?clusterID=6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11";
    assert_eq!(rig.admin("GET", other, Value::Null).await.json(), json!([]));
    rig.admin("GET", "/nodes/node-2", Value::Null).await.assert_error(404, "\"node-2\"");
    rig.control.client.get("/nodes").await.assert_error(401, "X-Admin-Token");
    rig.stop().await;
}

#[tokio::test]
async fn a_node_is_told_whether_to_take_sandboxes() {
    let rig = Rig::start().await;
    let status = || *rig.node.state.status.lock().expect("no panic holds it");
    for (word, told) in [
        ("draining", NodeStatus::NODE_STATUS_DRAINING),
        ("standby", NodeStatus::NODE_STATUS_STANDBY),
        ("ready", NodeStatus::NODE_STATUS_READY),
    ] {
        let set = rig.admin("POST", "/nodes/fake", json!({"status": word})).await;
        assert_eq!(set.status, 204, "{}", set.text);
        assert_eq!(status(), told);
        assert_eq!(rig.admin("GET", "/nodes/fake", Value::Null).await.json()["status"], word);
    }
    for word in ["connecting", "unhealthy"] {
        let refused = rig.admin("POST", "/nodes/fake", json!({"status": word})).await;
        refused.assert_error(409, "'status'");
    }
    assert_eq!(status(), NodeStatus::NODE_STATUS_READY);
    rig.admin("POST", "/nodes/fake", json!({"status": "gone"})).await.assert_error(400, "'status'");
    rig.admin("POST", "/nodes/fake", json!({})).await.assert_error(400, "status");
    let nobody = rig.admin("POST", "/nodes/other", json!({"status": "ready"})).await;
    nobody.assert_error(404, "\"other\"");
    rig.stop().await;
}

#[tokio::test]
async fn a_node_that_is_away_is_shown_as_it_was() {
    let rig = Rig::start().await;
    let known = rig.admin("GET", "/nodes/fake", Value::Null).await.json();
    assert_eq!(known["status"], "ready");
    let Rig { dir, node, control } = rig;
    node.stop().await;
    let ask = async || {
        let headers = [("x-admin-token", crate::support::ADMIN_TOKEN)];
        control.client.ask(http::Method::GET, "/nodes", &headers, "").await.json()
    };
    eventually("it is unhealthy", || async { ask().await[0]["status"] == "unhealthy" }).await;
    let mut shown = ask().await;
    shown[0]["status"] = json!("ready");
    assert_eq!(shown[0], known);
    let node = crate::support::node::FakeNode::start(&dir.path().join("node.sock")).await;
    eventually("it is back", || async { ask().await[0]["status"] == "ready" }).await;
    Rig { dir, node, control }.stop().await;
}
