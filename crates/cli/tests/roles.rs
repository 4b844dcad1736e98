//! Control and node in processes of their own, on the fake driver: each may end without the other.

#[path = "support/rows.rs"]
mod rows;
#[path = "support/server.rs"]
mod server;

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use rows::runs;
use server::{Server, fake_template, left_in, node, up, wait_until};

/// Folders of a node with the `base` template, and of a control plane.
fn data_dirs() -> (tempfile::TempDir, tempfile::TempDir) {
    let node = tempfile::tempdir().expect("a temporary folder");
    fake_template(node.path());
    (node, tempfile::tempdir().expect("a temporary folder"))
}

fn socket(node: &Server) -> PathBuf {
    PathBuf::from(node.text("socket"))
}

#[test]
fn sandboxes_outlive_their_control_plane() {
    let (node_data, control_data) = data_dirs();
    let node = Server::start_node(node_data.path(), "fake");
    let control = Server::start_control(control_data.path(), &socket(&node));
    let sandbox = control.create(json!({ "templateID": "base", "metadata": { "who": "roles" } }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    let told = |server: &Server| server.api("GET", &format!("/sandboxes/{id}"), None).1;
    wait_until("its row in the store", || {
        runs(control_data.path()).iter().any(|run| run.sandbox == id)
    });
    let before = told(&control);
    control.crash();

    let control = Server::start_control(control_data.path(), &socket(&node));
    assert_eq!(told(&control), before, "it is the same sandbox, with everything said of it");
    assert_eq!(control.traffic(&id, 49983, "/health", "").0, 204, "its route is back");
    control.stop();

    let control = Server::start_control(control_data.path(), &socket(&node));
    assert_eq!(told(&control), before, "stopping control in order ends no sandbox either");
    assert_eq!(control.api("DELETE", &format!("/sandboxes/{id}"), None).0, 204);
    control.stop();
    let tag = node.text("host_tag").to_owned();
    node.stop();
    assert_eq!(left_in(node_data.path(), &tag), Vec::<String>::new());
}

#[test]
fn a_control_plane_outlives_its_node() {
    let (node_data, control_data) = data_dirs();
    let node = Server::start_node(node_data.path(), "fake");
    let control = Server::start_control(control_data.path(), &socket(&node));
    let sandbox = control.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    node.crash();

    let node = Server::start_node(node_data.path(), "fake");
    assert_eq!(node.ready["reclaimed_sandboxes"], json!(1));
    wait_until("the end of what died with the node", || {
        control.api("GET", &format!("/sandboxes/{id}"), None).0 == 404
    });
    // Its end may be known from its silence, before the node that came back takes sandboxes.
    let mut next = String::new();
    wait_until("a sandbox on the node that came back", || {
        let body = json!({ "templateID": "base" });
        let (status, made) = control.api("POST", "/v2/sandboxes", Some(body));
        next = made["sandboxID"].as_str().unwrap_or_default().to_owned();
        assert!(status == 201 || status == 503, "{made}");
        status == 201
    });
    assert_eq!(control.traffic(&next, 49983, "/health", "").0, 204);
    control.stop();
    node.stop();
}

#[test]
fn what_a_dead_node_had_paused_another_resumes_from_the_blob_store() {
    let blobs = tempfile::tempdir().expect("a temporary folder");
    let ((a_data, control_data), (b_data, _)) = (data_dirs(), data_dirs());
    let start = |data: &tempfile::TempDir| {
        let mut command = node(data.path());
        command.args(["--runtime", "fake", "--blobs"]).arg(blobs.path());
        Server::run(&mut command)
    };
    let (a, b) = (start(&a_data), start(&b_data));
    let mut command = up(control_data.path());
    command.arg("--node").arg(socket(&a)).arg("--node").arg(socket(&b));
    let control = Server::run(&mut command);
    let sandbox = control.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    let token = sandbox["envdAccessToken"].as_str().expect("a token").to_owned();
    assert_eq!(control.api("POST", &format!("/sandboxes/{id}/pause"), None).0, 204);
    // Each node has a template of its own: the other one knows nothing of this one's.
    let snapshots = |data: &tempfile::TempDir| {
        let folders = std::fs::read_dir(data.path().join("snapshots")).expect("list");
        folders.map(|folder| folder.expect("an entry").path()).collect::<Vec<_>>()
    };
    let (home, home_data, other, other_data) = match snapshots(&a_data).is_empty() {
        false => (a, &a_data, b, &b_data),
        true => (b, &b_data, a, &a_data),
    };
    let uploaded = snapshots(home_data)[0].join("uploaded");
    wait_until("the upload", || uploaded.exists());
    home.crash();
    let connect = || control.api("POST", &format!("/v2/sandboxes/{id}/connect"), None).0;
    wait_until("it runs elsewhere", || connect() == 201);
    assert_eq!(snapshots(other_data).len(), 1);
    let headers = format!("X-Access-Token: {token}\r\n");
    let (status, body) = control.traffic(&id, 49983, "/metrics", &headers);
    assert!(status == 200 && body.contains(&id), "{status} {body}");

    // The dead node comes back beside it, and lets go of what it had once that is nobody's.
    let home = start(home_data);
    assert_eq!(control.api("DELETE", &format!("/sandboxes/{id}"), None).0, 204);
    wait_until("both let go of it", || {
        snapshots(home_data).is_empty() && snapshots(other_data).is_empty()
    });
    let refs = blobs.path().join("refs/snapshots");
    let left = || {
        let folders = std::fs::read_dir(&refs).expect("list").map(|f| f.expect("an entry").path());
        folders.map(|folder| std::fs::read_dir(folder).expect("list").count()).sum::<usize>()
    };
    wait_until("the store has no name of it", || left() == 0);
    control.stop();
    home.stop();
    other.stop();
}

#[test]
fn a_server_has_its_own_node_or_others_not_both() {
    let said = Command::new(env!("CARGO_BIN_EXE_belljar"))
        .args(["up", "--node", "x.sock", "--runtime", "fake"])
        .output()
        .expect("the program runs");
    assert_eq!(said.status.code(), Some(2), "wrong usage: {said:?}");
}
