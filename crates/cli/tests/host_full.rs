//! A disk that is full while a real machine is paused: the sandbox runs on, and is paused once there is
//! room. Needs root, QEMU and the assets `cargo xtask test` prepares.

#[path = "support/server.rs"]
mod server;

use std::path::{Path, PathBuf};

use belljar_testkit::{HostSnapshot, Sight, assert_clean, assets, is_root, skip};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use serde_json::json;

use server::{Server, build_base, left_in, wait_until};

/// Less than what a machine writes to its memory while it starts.
const TOO_SMALL: &str = "size=256k";
const LARGE_ENOUGH: &str = "size=256m";

/// A file system of its own on a folder, until dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn on(folder: PathBuf, options: &str) -> Mounted {
        std::fs::create_dir_all(&folder).expect("a folder");
        let options = std::ffi::CString::new(options).expect("a text without zero bytes");
        mount("none", &folder, "tmpfs", MountFlags::empty(), &*options).expect("a mount");
        Mounted(folder)
    }

    fn resize(&self, options: &str) {
        mount_remount(&self.0, MountFlags::empty(), options).expect("another size");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A failed test must not leave it; who still has a file of it open keeps only that.
        let _gone = unmount(&self.0, UnmountFlags::DETACH).is_ok();
    }
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).map(Iterator::count).unwrap_or_default()
}

#[tokio::test]
async fn a_pause_that_finds_no_room_leaves_the_sandbox_running() {
    if !is_root() {
        return skip("machines and mounts need root");
    }
    let Some(assets) = assets() else {
        return skip("BELLJAR_ASSETS names no guest kernel and root file system");
    };
    let data = tempfile::tempdir().expect("a temporary folder");
    let roots = ["ledger", "overlays"].map(|dir| data.path().join(dir)).to_vec();
    let before = HostSnapshot::take_with(Sight { tag: None, roots });
    build_base(data.path(), "emulated", &assets.vmlinux, &assets.rootfs);
    let layers = Mounted::on(data.path().join("layers"), TOO_SMALL);

    let server = Server::start(data.path(), "emulated");
    let sandbox = server.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id");
    let pause = format!("/sandboxes/{id}/pause");
    for _ in 0..3 {
        let (status, answer) = server.api("POST", &pause, None);
        assert!(
            status == 503 && answer["message"].to_string().contains("there is no room on the node"),
            "{status} {answer}"
        );
        assert_eq!(server.api("GET", &format!("/sandboxes/{id}"), None).1["state"], "running");
        assert_eq!(server.traffic(id, 49983, "/health", "").0, 204);
        let left = ["snapshots", "layers"].map(|folder| entries(&data.path().join(folder)));
        assert_eq!(left, [0, 0], "what a pause without room has left");
    }
    layers.resize(LARGE_ENOUGH);
    assert_eq!(server.api("POST", &pause, None).0, 204);
    let connect = format!("/v2/sandboxes/{id}/connect");
    assert_eq!(server.api("POST", &connect, Some(json!({ "timeout": 60 }))).0, 201);
    assert_eq!(server.traffic(id, 49983, "/health", "").0, 204);
    assert_eq!(server.api("DELETE", &format!("/sandboxes/{id}"), None).0, 204);
    wait_until("nothing of it is kept", || entries(&layers.0) == 0);
    let tag = server.text("host_tag").to_owned();
    server.stop();
    assert_eq!(left_in(data.path(), &tag), Vec::<String>::new());
    drop(layers);
    assert_clean(&before).await;
}
