//! A whole build on this host: QEMU, real network slots, the real kernel and root file system.
//!
//! Needs root and `BELLJAR_ASSETS`; skips loudly otherwise.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use belljar_builder::{BuildConfig, Deps, build, source_key};
use belljar_daemon::Scope;
use belljar_domain::{MiB, TemplateId, Vcpus};
use belljar_network::{SlotPool, Slots as _, SlotsConfig};
use belljar_runtime::{QemuConfig, QemuRuntime, Runtime as _};
use belljar_sandbox::template::load_all;
use belljar_testkit::{Assets, HostSnapshot, assert_clean, assets, is_root, skip};

/// What this test needs, or a reason said aloud.
fn ground() -> Option<Assets> {
    if !is_root() {
        skip("building a template needs root");
        return None;
    }
    let found = assets();
    if found.is_none() {
        skip("BELLJAR_ASSETS names no folder with vmlinux, rootfs.ext4 and belljar-envd");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_machine_becomes_a_template() {
    let Some(assets) = ground() else { return };
    let before = HostSnapshot::take();
    let dir = tempfile::tempdir().expect("temp folder");
    let run_dir = dir.path().join("run");
    std::fs::create_dir(&run_dir).expect("mkdir");
    let scope = Scope::root("test");
    let (runtime, reason) = QemuRuntime::detect(QemuConfig::default()).await.expect("qemu");
    let slots =
        SlotsConfig { capacity: 2, ready_low: 1, ready_high: 1, ..SlotsConfig::new("tbld") };
    let slots = SlotPool::open(slots, &scope).await.expect("slots");
    let (vcpus, memory) = (Vcpus(1), MiB(512));
    let key = source_key(&assets.vmlinux, &assets.rootfs, vcpus, memory, &runtime.fingerprint());
    let config = BuildConfig {
        templates_dir: dir.path().join("templates"),
        run_dir: run_dir.clone(),
        name_prefix: "tbld".to_owned(),
        kernel: assets.vmlinux,
        rootfs: assets.rootfs.clone(),
        template_id: TemplateId::random(),
        aliases: vec!["base".to_owned()],
        vcpus,
        memory,
        dns: [8, 8, 8, 8].into(),
        identity: None,
        source_key: key.expect("key"),
        warm_up: true,
    };
    let slots = Arc::new(slots);
    let deps = Deps { runtime: Arc::new(runtime), slots: slots.clone() };
    let started = std::time::Instant::now();
    let template = build(&config, &deps, &scope, &|event| {
        println!("{:6.2} s {event:?}", started.elapsed().as_secs_f64());
    })
    .await
    .unwrap_or_else(|e| panic!("failed to {e}: {:?}", std::error::Error::source(&e)));
    assert_eq!(template.meta.tier, reason.tier);
    assert_eq!(template.meta.envd_version, belljar_wire::ENVD_VERSION);
    assert_eq!(load_all(&config.templates_dir).expect("load"), std::slice::from_ref(&template));

    // The guest has flushed and nothing ran since: its disk needs no repair beyond its journal.
    let copy = dir.path().join("disk");
    std::fs::copy(template.rootfs(), &copy).expect("copy");
    let replayed = Command::new("e2fsck").arg("-fy").arg(&copy).status().expect("e2fsck runs");
    assert!(replayed.code().is_some_and(|code| code <= 1), "{replayed}");

    slots.close().await.expect("close slots");
    assert!(scope.close(Duration::from_secs(10)).await);
    assert_eq!(std::fs::read_dir(&run_dir).expect("list").count(), 0);
    drop(dir);
    assert_clean(&before).await;
}

#[test]
fn the_root_file_system_is_what_sandboxes_expect() {
    let Some(assets) = ground() else { return };
    let debugfs = |request: &str| {
        let output = Command::new("debugfs").args(["-R", request]).arg(&assets.rootfs).output();
        String::from_utf8_lossy(&output.expect("debugfs runs").stdout).into_owned()
    };
    assert!(debugfs("cat /etc/passwd").contains("user:x:1000:1000::/home/user:/bin/bash"));
    assert_eq!(debugfs("cat /etc/sudoers.d/user"), "user ALL=(ALL:ALL) NOPASSWD: ALL\n");
    assert_eq!(debugfs("cat /etc/hostname"), "sandbox\n");
    for file in ["/usr/sbin/belljar-envd", "/bin/bash", "/usr/bin/git", "/usr/bin/node"] {
        assert!(debugfs(&format!("stat {file}")).contains("Inode:"), "{file} is missing");
    }
    assert!(debugfs("stat /usr/sbin/belljar-envd").contains("Mode:  0755"));
    assert!(!debugfs("cat /etc/apt/apt.conf.d/99mmdebstrap").to_lowercase().contains("proxy"));
}
