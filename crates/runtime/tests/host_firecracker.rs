//! The Firecracker driver on this host: the contract, its calls, its jail and its ends.
//!
//! Needs root. A program of the fixtures stands in for Firecracker, so that all of it runs without KVM.
//! The contract runs again with the program that `BELLJAR_FIRECRACKER` names, where KVM runs guests.

#[path = "fixtures/firecracker_rig.rs"]
mod rig;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use belljar_runtime::contract::{self, Harness, KeptPages};
use belljar_runtime::firecracker::{DetectError, FirecrackerConfig, FirecrackerRuntime};
use belljar_runtime::{
    ExitCause, GuestControl, Machine, NetworkAttachment, Runtime, SavedMachine, SavedMemory,
    SnapshotTarget, StartError,
};
use belljar_testkit::{HostSnapshot, LogOracle, Sight, assert_clean};
use belljar_wire::guest::Init;
use rig::FirecrackerHarness;

fn limit() -> Duration {
    belljar_testkit::patience(Duration::from_secs(60))
}

fn oracle(tag: &str) -> HostSnapshot {
    HostSnapshot::take_with(Sight { tag: Some(tag.to_owned()), ..Sight::default() })
}

#[tokio::test]
async fn the_stand_in_passes_the_contract() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfcon").await else { return };
    let before = oracle("rtfcon");
    let log = LogOracle::install();
    contract::run(&harness).await;
    drop(harness);
    assert_clean(&before).await;
    log.assert_quiet(&[]);
}

#[tokio::test]
async fn a_real_firecracker_passes_the_contract() {
    let Some(harness) = FirecrackerHarness::real("rtfreal").await else { return };
    let before = oracle("rtfreal");
    contract::run(&harness).await;
    drop(harness);
    assert_clean(&before).await;
}

async fn ready(machine: &mut Box<dyn Machine>) -> GuestControl {
    let mut control = GuestControl::new(machine.take_control().expect("a new machine"));
    control.init(Init { nonce: 1, ..Init::default() }, limit()).await.expect("the guest is ready");
    control
}

#[tokio::test]
async fn every_call_is_made_in_order_and_as_described() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfcal").await else { return };
    let before = oracle("rtfcal");
    let (spec, artifacts) = harness.template("template").await;
    let calls = harness.calls(&spec);
    let wanted = [
        r#"PUT /logger {"level":"Warning","log_path":"/out/log","show_level":true,"show_log_origin":false}"#,
        r#"PUT /metrics {"metrics_path":"/out/figures"}"#,
        r#"PUT /machine-config {"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"vcpu_count":1}"#,
        r#"PUT /boot-source {"boot_args":"quiet panic=-1 reboot=k console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd rootfstype=ext4 init=/usr/sbin/belljar-envd","kernel_image_path":"/kernel"}"#,
        r#"PUT /drives/root {"cache_type":"Writeback","drive_id":"root","is_read_only":false,"is_root_device":true,"path_on_host":"/disk"}"#,
        r#"PUT /vsock {"guest_cid":3,"uds_path":"/run/vsock"}"#,
        "PUT /entropy {}",
        r#"PUT /actions {"action_type":"InstanceStart"}"#,
        r#"PATCH /vm {"state":"Paused"}"#,
        r#"PUT /snapshot/create {"mem_file_path":"/out/memory","snapshot_path":"/out/state","snapshot_type":"Full"}"#,
    ];
    assert_eq!(calls, wanted);

    let spec = harness.spec("restored", Some(&spec)).await;
    let saved = SavedMachine::template(&artifacts);
    let mut machine = harness.runtime().restore(spec.clone(), saved).await.expect("restore");
    let mut control = ready(&mut machine).await;
    control.prepare_snapshot(limit()).await.expect("the guest prepares");
    machine.freeze().await.expect("freeze it");
    let target = SnapshotTarget {
        folder: harness.folder("restored-snapshot").await,
        pages: Box::<KeptPages>::default(),
    };
    drop(machine.snapshot(target).await.expect("snapshot it"));
    machine.thaw().await.expect("thaw it");
    control.continue_after_snapshot(limit()).await.expect("the guest goes on");
    let wanted = [
        wanted[0],
        wanted[1],
        r#"PUT /snapshot/load {"mem_backend":{"backend_path":"/memory","backend_type":"File"},"resume_vm":true,"snapshot_path":"/state","track_dirty_pages":true}"#,
        r#"PATCH /vm {"state":"Paused"}"#,
        r#"PUT /snapshot/create {"mem_file_path":"/out/memory","snapshot_path":"/out/state","snapshot_type":"Diff"}"#,
        r#"PATCH /vm {"state":"Resumed"}"#,
    ];
    assert_eq!(rig::live_calls(&spec), wanted);
    machine.kill().await.expect("kill it");
    drop(machine);
    drop(harness);
    assert_clean(&before).await;
}

#[tokio::test]
async fn a_machine_is_alone_in_its_jail() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfjai").await else { return };
    let before = oracle("rtfjai");
    let (saved, artifacts) = harness.template("template").await;
    let spec = harness.spec("jailed", Some(&saved)).await;
    let from = SavedMachine::template(&artifacts);
    let mut machine = harness.runtime().restore(spec.clone(), from).await.expect("restore");
    ready(&mut machine).await;
    let id = machine.process_id().expect("a process");
    let identity = spec.identity.expect("the rig gives one");
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
        line.trim_start_matches(':').split_whitespace().next().unwrap_or_default().to_owned()
    };
    assert_eq!(field("Uid"), identity.uid.to_string());
    assert_eq!(field("Gid"), identity.gid.to_string());
    assert_eq!((field("NoNewPrivs"), field("CapEff")), ("1".into(), "0000000000000000".into()));
    for namespace in ["mnt", "ipc", "uts"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).expect("one");
        assert_ne!(of("self"), of(&id.to_string()), "{namespace}");
    }
    // Of the host's files it sees those it was shown.
    let root = format!("/proc/{id}/root");
    let mut seen: Vec<String> = fs::read_dir(&root)
        .expect("root may look")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    seen.sort();
    assert_eq!(seen, ["dev", "disk", "firecracker", "memory", "out", "run", "state"]);
    let mounts = fs::read_to_string(format!("/proc/{id}/mounts")).expect("it runs");
    for place in ["/firecracker", "/memory", "/state"] {
        let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(place));
        let line = line.expect("it is bound");
        assert!(line.split(' ').nth(3).is_some_and(|flags| flags.starts_with("ro")), "{line}");
    }
    assert!(!fs::read_to_string("/proc/self/mounts").expect("ours").contains("rtfjai"));
    let kvm = fs::metadata(format!("{root}/dev/kvm"));
    if let (Ok(theirs), Ok(ours)) = (kvm, fs::metadata("/dev/kvm")) {
        assert_eq!((theirs.rdev(), theirs.uid()), (ours.rdev(), identity.uid));
    }
    assert_eq!(harness.figures(&spec, &mut machine).await.as_deref(), Some("{\"uptime\":1}"));
    machine.kill().await.expect("kill it");
    drop(machine);
    assert!(!spec.run_dir.join("jail").exists(), "a jail goes with its machine");
    drop(harness);
    assert_clean(&before).await;
}

#[tokio::test]
async fn a_crash_has_its_code_its_meaning_and_its_last_words() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfcra").await else { return };
    let before = oracle("rtfcra");
    let (saved, artifacts) = harness.template("template").await;
    let spec = harness.spec("crashed", Some(&saved)).await;
    let from = SavedMachine::template(&artifacts);
    let mut machine = harness.runtime().restore(spec, from).await.expect("restore");
    let mut control = ready(&mut machine).await;
    let init = Init { env_vars: [("CRASH".into(), "148".into())].into(), ..Init::default() };
    assert!(control.init(init, limit()).await.is_err(), "a guest that is gone says nothing");
    let cause = tokio::time::timeout(limit(), machine.exited()).await.expect("it ends");
    let ExitCause::Crashed { detail } = cause else { panic!("a crash is told as {cause:?}") };
    for part in ["exit status 148", "a system call its filter forbids", "a stand-in runs"] {
        assert!(detail.contains(part), "{detail}");
    }
    machine.kill().await.expect("nothing is left");
    drop(machine);

    // Refused by name, and the process that refuses ends by itself.
    let spec = harness.spec("refused", Some(&saved)).await;
    let folder = harness.folder("odd").await;
    for name in ["machine.json", "memory"] {
        fs::copy(artifacts.join(name), folder.join(name)).expect("copy a file");
    }
    let length = fs::metadata(artifacts.join("state")).expect("a state").len();
    fs::write(folder.join("state"), vec![b'?'; usize::try_from(length).expect("short")])
        .expect("write a file");
    let error = harness.runtime().restore(spec, SavedMachine::template(&folder)).await.err();
    let Some(StartError::Refused { answer, .. }) = &error else { panic!("{error:?}") };
    assert!(answer.contains("PUT /snapshot/load: Failed to get snapshot state"), "{answer}");
    drop(harness);
    assert_clean(&before).await;
}

#[tokio::test]
async fn releases_stand_side_by_side_and_restore_their_own() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfver").await else { return };
    let before = oracle("rtfver");
    let (saved, artifacts) = harness.template("template").await;
    let (newer, older) = (harness.program.clone(), rig::stand_in("1.12.1"));
    let config = |programs| FirecrackerConfig {
        cgroup_parent: "belljar-rtfver".to_owned(),
        ..FirecrackerConfig::new(programs)
    };
    // What boots now is another release than what saved this.
    let runtime = FirecrackerRuntime::detect(config(vec![older.clone(), newer.clone()])).await;
    let runtime = runtime.expect("two releases");
    assert_eq!(runtime.versions(), ["1.12.1", "1.17.0"]);
    assert!(runtime.fingerprint().starts_with("firecracker 1.12.1 layout 1, kvm on "));
    assert!(runtime.restores(&harness.runtime().fingerprint()) && !runtime.restores("qemu 10"));
    let spec = harness.spec("of-the-newer", Some(&saved)).await;
    let from = SavedMachine::template(&artifacts);
    let mut machine = runtime.restore(spec.clone(), from).await.expect("restore by the newer");
    ready(&mut machine).await;
    assert!(rig::live_calls(&spec)[2].contains("track_dirty_pages"));
    machine.kill().await.expect("kill it");

    let (spec, artifacts) = harness.template_on(&runtime, "old-template").await;
    let spec = harness.spec("of-the-older", Some(&spec)).await;
    let from = SavedMachine::template(&artifacts);
    let mut machine = runtime.restore(spec.clone(), from).await.expect("restore by the older");
    ready(&mut machine).await;
    assert!(rig::live_calls(&spec)[2].contains(r#""enable_diff_snapshots":true"#));
    machine.kill().await.expect("kill it");

    let from = SavedMachine::template(&artifacts);
    let spec = harness.spec("of-neither", Some(&saved)).await;
    let error = harness.runtime().restore(spec, from).await.err();
    assert!(matches!(error, Some(StartError::Incompatible { .. })), "{error:?}");
    let twice = FirecrackerRuntime::detect(config(vec![newer.clone(), newer])).await.err();
    assert!(matches!(twice, Some(DetectError::Twice { .. })), "{twice:?}");
    let none = FirecrackerRuntime::detect(config(Vec::new())).await.err();
    assert!(matches!(none, Some(DetectError::NoneNamed)), "{none:?}");
    drop((machine, harness));
    assert_clean(&before).await;
}

#[tokio::test]
async fn memory_that_is_in_no_file_is_served_by_a_handler() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfuff").await else { return };
    let before = oracle("rtfuff");
    let (saved, artifacts) = harness.template("template").await;
    let runtime = harness.with_handler(rig::Streaming).await;
    let spec = harness.spec("origin", Some(&saved)).await;
    let from = SavedMachine::template(&artifacts);
    let mut machine = runtime.restore(spec.clone(), from).await.expect("restore");
    let mut control = ready(&mut machine).await;
    let digest = harness.scribble(&spec, &mut control, 5).await;
    let keep = async |machine: &mut Box<dyn Machine>, control: &mut GuestControl, name| {
        control.prepare_snapshot(limit()).await.expect("the guest prepares");
        machine.freeze().await.expect("freeze it");
        let pages = KeptPages::default();
        let folder = harness.folder(name).await;
        let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(pages.clone()) };
        drop(machine.snapshot(target).await.expect("snapshot it"));
        machine.kill().await.expect("kill it");
        let base = Some(artifacts.join("memory"));
        let memory = SavedMemory { base, pages: Some(Arc::new(pages)) };
        SavedMachine { folder, memory }
    };
    let first = keep(&mut machine, &mut control, "first").await;

    let spec = harness.spec("served", Some(&spec)).await;
    let mut machine = runtime.restore(spec.clone(), first).await.expect("restore by a handler");
    let mut control = ready(&mut machine).await;
    assert_eq!(harness.recall(&spec, &mut control).await, digest);
    let load = &rig::live_calls(&spec)[2];
    assert!(load.contains(r#"{"backend_path":"/run/memory","backend_type":"Uffd"}"#), "{load}");
    assert!(load.contains(r#""track_dirty_pages":false"#), "{load}");
    let digest = harness.scribble(&spec, &mut control, 6).await;
    let second = keep(&mut machine, &mut control, "second").await;

    // Its snapshot is whole, though its memory was never a file's.
    let spec = harness.spec("again", Some(&spec)).await;
    let mut machine = runtime.restore(spec.clone(), second).await.expect("restore once more");
    let mut control = ready(&mut machine).await;
    assert_eq!(harness.recall(&spec, &mut control).await, digest);
    machine.kill().await.expect("kill it");
    drop((machine, control, runtime, harness));
    assert_clean(&before).await;
}

#[tokio::test]
async fn a_tap_is_given_to_the_machines_user_in_its_namespace() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfnet").await else { return };
    let before = oracle("rtfnet");
    let Some(netns) = rig::Netns::create("rtfnet") else {
        return belljar_testkit::skip("needs iproute2 to make a network namespace");
    };
    let mut spec = harness.spec("carded", None).await;
    spec.network = Some(NetworkAttachment {
        netns: Some("/run/netns/rtfnet".into()),
        tap: "tap0".into(),
        guest_mac: [2, 0, 0, 0, 0, 1],
        host_ip: std::net::Ipv4Addr::LOCALHOST,
    });
    let (source, _) = harness.source("carded");
    let mut machine = harness.runtime().boot(spec.clone(), source).await.expect("boot");
    let mut control = GuestControl::new(machine.take_control().expect("a new machine"));
    control.booted(limit()).await.expect("the guest boots");
    let id = machine.process_id().expect("a process");
    let namespace = |path: &str| fs::metadata(path).expect("a namespace").ino();
    assert_eq!(namespace(&format!("/proc/{id}/ns/net")), namespace("/run/netns/rtfnet"));
    let owner = rig::tap_owner("rtfnet", "tap0");
    assert_eq!(owner, spec.identity.expect("the rig gives one").uid.to_string());
    let wanted = r#"PUT /network-interfaces/eth0 {"guest_mac":"02:00:00:00:00:01","host_dev_name":"tap0","iface_id":"eth0"}"#;
    assert!(rig::live_calls(&spec).iter().any(|call| call == wanted));
    machine.kill().await.expect("kill it");
    drop((machine, netns, harness));
    assert_clean(&before).await;
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    let Some(harness) = FirecrackerHarness::stand_in("rtfbad").await else { return };
    let before = oracle("rtfbad");
    let (source, artifacts) = harness.source("bad");
    let mut spec = harness.spec("no-disk", None).await;
    spec.root_disk = vec![belljar_runtime::DiskExport::NbdSocket("/nonexistent".into())];
    let error = harness.runtime().boot(spec.clone(), source.clone()).await.err();
    assert!(matches!(error, Some(StartError::NoUsableDisk { .. })), "{error:?}");
    assert!(!spec.run_dir.join("jail").exists());

    // Its user may not write the disk.
    let spec = harness.spec("foreign-disk", None).await;
    let disk = spec.run_dir.join("disk");
    std::os::unix::fs::chown(&disk, Some(0), Some(0)).expect("root may");
    let error = harness.runtime().boot(spec.clone(), source).await.err();
    let Some(StartError::Refused { answer, .. }) = &error else { panic!("{error:?}") };
    assert!(answer.starts_with("PUT /drives/root: Drive config error"), "{answer}");
    assert_eq!(fs::read_dir(&artifacts).expect("a folder").count(), 0);
    assert!(!spec.run_dir.join("jail").exists());
    drop(harness);
    assert_clean(&before).await;
}
