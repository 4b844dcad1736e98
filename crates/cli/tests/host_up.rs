//! The whole server on real machines, namespaces and disks: what a crash leaves, and that nothing
//! is left of it. Needs root, QEMU and the assets `cargo xtask test` prepares.

#[path = "support/server.rs"]
mod server;

use std::path::Path;

use belljar_testkit::{HostSnapshot, Sight, assert_clean, assets, is_root, skip};
use serde_json::json;

use server::{Server, build_base, left_in};

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
    assert_eq!(left_in(data.path(), server.text("host_tag")), Vec::<String>::new());
    for id in &ids {
        assert_eq!(server.api("GET", &format!("/sandboxes/{id}"), None).0, 404, "sandbox {id}");
    }
    // What was reclaimed does not stand in the way of new ones.
    let sandbox = server.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id");
    assert_eq!(server.traffic(id, 49983, "/health", "").0, 204);
    server.stop();
    assert_clean(&before).await;
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
