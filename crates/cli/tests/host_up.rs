//! The whole server on real machines, namespaces and disks: what a crash leaves, and that nothing
//! is left of it. Needs root, QEMU and the assets `cargo xtask test` prepares.

#[path = "support/server.rs"]
mod server;

use std::path::Path;

use belljar_testkit::{HostSnapshot, Sight, assert_clean, assets, is_root, skip};
use serde_json::json;

use server::{Server, build_base, left_in, up, wait_until};

const SANDBOXES: usize = 10;

#[tokio::test]
async fn ten_live_sandboxes_outlive_no_crash() {
    if !is_root() {
        return skip("machines and namespaces need root");
    }
    let Some(assets) = assets() else {
        return skip("BELLJAR_ASSETS names no guest kernel and root file system");
    };
    let data = tempfile::tempdir().expect("a temporary folder");
    let before = look(data.path());
    build_base(data.path(), "emulated", &assets.vmlinux, &assets.rootfs);

    let server = Server::start(data.path(), "emulated");
    let ids: Vec<String> = create_at_once(&server);
    for id in &ids {
        assert_eq!(server.traffic(id, 49983, "/health", "").0, 204, "sandbox {id}");
    }
    server.crash();

    let server = Server::start(data.path(), "emulated");
    assert_eq!(server.ready["reclaimed_sandboxes"], json!(SANDBOXES));
    let tag = server.text("host_tag").to_owned();
    assert_eq!(left_in(data.path(), &tag), Vec::<String>::new());
    for id in &ids {
        assert_eq!(server.api("GET", &format!("/sandboxes/{id}"), None).0, 404, "sandbox {id}");
    }
    // What was reclaimed does not stand in the way of new ones.
    let sandbox = server.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id");
    assert_eq!(server.traffic(id, 49983, "/health", "").0, 204);
    server.stop();
    assert_eq!(left_in(data.path(), &tag), Vec::<String>::new());
    what_stands_ready_outlives_no_crash(data.path(), &tag);
    assert_clean(&before).await;
}

/// One is handed out, under its own name; neither it nor its successor is left by a crash, and only it
/// was a sandbox.
fn what_stands_ready_outlives_no_crash(data: &Path, tag: &str) {
    let machines = || -> Vec<String> {
        let ledger = std::fs::read_dir(data.join("ledger")).expect("a ledger");
        ledger.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    };
    let mut warm = up(data);
    warm.args(["--runtime", "emulated", "--warm", "base=1"]);
    let server = Server::run(&mut warm);
    wait_until("one that stands ready", || machines().len() == 1);
    assert_eq!(server.api("GET", "/v2/sandboxes", None), (200, json!([])), "nobody sees it");
    let spare = machines();
    // It is in the ledger before it is ready: the first create may be too early for it.
    let used = (0..3).find_map(|_| {
        let sandbox = server.create(json!({ "templateID": "base" }));
        let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
        assert_eq!(server.traffic(&id, 49983, "/health", "").0, 204);
        if !machines().contains(&spare[0]) {
            return Some(id);
        }
        assert_eq!(server.api("DELETE", &format!("/sandboxes/{id}"), None).0, 204);
        None
    });
    let id = used.expect("a create takes it");
    wait_until("its successor", || machines().len() == 2);
    server.crash();

    let server = Server::start(data, "emulated");
    assert_eq!(server.ready["reclaimed_sandboxes"], json!(1));
    assert_eq!(left_in(data, tag), Vec::<String>::new());
    assert_eq!(server.api("GET", &format!("/sandboxes/{id}"), None).0, 404);
    server.stop();
}

fn look(data: &Path) -> HostSnapshot {
    let roots = ["ledger", "overlays"].map(|dir| data.join(dir)).to_vec();
    HostSnapshot::take_with(Sight { tag: None, roots })
}

fn create_at_once(server: &Server) -> Vec<String> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..SANDBOXES)
            .map(|_| scope.spawn(|| server.create(json!({ "templateID": "base" }))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a create that worked"))
            .map(|sandbox| sandbox["sandboxID"].as_str().expect("an id").to_owned())
            .collect()
    })
}
