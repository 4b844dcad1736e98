//! The QEMU driver on this host: the contract, confinement, and the network card.
//!
//! Needs root, QEMU and the guest assets. The contract runs twice: with a guest of a hundred lines
//! on a raw file, and with the real guest daemon on its real root disk, served over NBD.

#[path = "fixtures/rig.rs"]
mod rig;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_domain::MiB;
use belljar_runtime::contract::{self, Harness, KeptPages};
use belljar_runtime::{
    GuestControl, Identity, Machine, MachineSpec, NetworkAttachment, SaveError, SavedMachine,
    SavedMemory, SnapshotTarget, StartError,
};
use belljar_testkit::{HostSnapshot, LogOracle, Sight, assert_clean};
use belljar_wire::guest::Init;
use rig::{DiskKind, QemuHarness};

/// Long enough for a test's log, too long for anything else.
fn limit() -> Duration {
    belljar_testkit::patience(Duration::from_secs(120))
}

/// A test of its own, so that it can be had without the others: see [`rig::tiny_guest`].
#[test]
fn the_tiny_guest_compiles() {
    assert!(rig::tiny_guest().is_file());
}

fn oracle(tag: &str) -> HostSnapshot {
    HostSnapshot::take_with(Sight { tag: Some(tag.to_owned()), ..Sight::default() })
}

#[tokio::test]
async fn the_tiny_guest_passes_the_contract_on_a_raw_file() {
    let Some(harness) = QemuHarness::new("rtqraw", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqraw");
    let log = LogOracle::install();
    contract::run(&harness).await;
    drop(harness);
    assert_clean(&before).await;
    log.assert_quiet(&[]);
}

#[tokio::test]
async fn the_real_guest_passes_the_contract_over_nbd() {
    let Some(harness) = QemuHarness::new("rtqnbd", DiskKind::RealNbd).await else { return };
    let before = oracle("rtqnbd");
    let log = LogOracle::install();
    contract::run(&harness).await;
    drop(harness);
    assert_clean(&before).await;
    log.assert_quiet(&[]);
}

/// A machine that was booted, saved and killed.
async fn template(harness: &QemuHarness) -> (MachineSpec, PathBuf) {
    template_named(harness, "template").await
}

async fn template_named(harness: &QemuHarness, name: &str) -> (MachineSpec, PathBuf) {
    let spec = harness.spec(name, None).await;
    let (source, artifacts) = harness.source(name);
    let mut machine =
        harness.runtime().boot(spec.clone(), source).await.expect("boot the template");
    let mut control = GuestControl::new(machine.take_control().expect("a new machine"));
    control.booted(limit()).await.expect("the guest boots");
    control.prepare_snapshot(limit()).await.expect("the guest prepares");
    machine.save().await.expect("save the template");
    machine.kill().await.expect("kill the template");
    (spec, artifacts)
}

async fn ready(machine: &mut Box<dyn Machine>) -> GuestControl {
    let mut control = GuestControl::new(machine.take_control().expect("a new machine"));
    if let Err(e) = control.init(Init { nonce: 1, ..Init::default() }, limit()).await {
        drop(machine.kill().await);
        panic!("the guest is not ready: {e}; its machine: {:?}", machine.exited().await);
    }
    control
}

/// Of a frozen machine over the memory of `artifacts`.
async fn snapshot(
    machine: &mut Box<dyn Machine>,
    folder: PathBuf,
    artifacts: &Path,
) -> SavedMachine {
    let pages = KeptPages::default();
    let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(pages.clone()) };
    drop(machine.snapshot(target).await.expect("snapshot a frozen machine"));
    let memory = SavedMemory { base: Some(artifacts.join("memory")), pages: Some(Arc::new(pages)) };
    SavedMachine { folder, memory }
}

fn status_field(process_id: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{process_id}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a known field");
    line.trim_start_matches(':').split_whitespace().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_machine_is_confined_as_its_own_user() {
    let Some(harness) = QemuHarness::new("rtqcon", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqcon");
    let (saved, artifacts) = template(&harness).await;
    // The user must reach the saved files and its own disk, and nothing else.
    harness.open_folders();
    let mut spec = harness.spec("confined", Some(&saved)).await;
    spec.identity = Some(Identity { uid: 64_001, gid: 64_001 });
    rig::give_disk(&spec, 64_001);
    let machine = harness.runtime().restore(spec.clone(), SavedMachine::template(&artifacts)).await;
    let mut machine = machine.expect("restore as a user");
    // Kept until the snapshot is taken: the tiny guest ends with its host's connection.
    let control = ready(&mut machine).await;
    let id = machine.process_id().expect("QEMU is a process");
    assert_eq!(status_field(id, "Uid"), "64001");
    assert_eq!(status_field(id, "Gid"), "64001");
    assert_eq!(status_field(id, "NoNewPrivs"), "1");
    assert_eq!(status_field(id, "Seccomp"), "2");
    assert_eq!(status_field(id, "CapEff"), "0000000000000000");
    let groups = fs::read_to_string(format!("/proc/{id}/cgroup")).expect("it runs");
    let ours = format!("/{}/{}", harness.cgroup_parent(), spec.name);
    if harness.bounded() {
        assert!(groups.contains(&ours), "{groups}");
    } else {
        belljar_testkit::skip("the cgroup of a machine: this host lets nobody make one");
    }

    // Its process writes its state into a file that is handed to it, and reads that of its clone.
    machine.freeze().await.expect("freeze it");
    let folder = harness.folder("confined-snapshot").await;
    let saved = snapshot(&mut machine, folder, &artifacts).await;
    drop(control);
    let mut twin = harness.fork("twin", &spec).await;
    machine.kill().await.expect("kill it");
    twin.identity = Some(Identity { uid: 64_002, gid: 64_002 });
    rig::give_disk(&twin, 64_002);
    let mut machine = harness.runtime().restore(twin, saved).await.expect("restore as another");
    let _control = ready(&mut machine).await;
    let id = machine.process_id().expect("QEMU is a process");
    assert_eq!(status_field(id, "Uid"), "64002");
    machine.kill().await.expect("kill it");

    // The same user boots and saves, and does not own what it saved.
    let mut spec = harness.spec("booted-as-user", None).await;
    spec.identity = Some(Identity { uid: 64_001, gid: 64_001 });
    rig::give_disk(&spec, 64_001);
    let (source, folder) = harness.source("booted-as-user");
    let mut machine = harness.runtime().boot(spec, source).await.expect("boot as a user");
    let mut control = GuestControl::new(machine.take_control().expect("a new machine"));
    control.booted(limit()).await.expect("the guest boots");
    machine.save().await.expect("save as a user");
    for name in ["memory", "state", "machine.json"] {
        use std::os::unix::fs::MetadataExt as _;
        let file = fs::metadata(folder.join(name)).expect("it was saved");
        assert_eq!((file.uid(), file.permissions().mode() & 0o777), (0, 0o444), "{name}");
    }
    machine.kill().await.expect("kill it");
    drop(harness);
    assert_clean(&before).await;
}

#[tokio::test]
async fn a_card_is_plugged_into_a_tap_of_another_namespace() {
    let Some(harness) = QemuHarness::new("rtqnet", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqnet");
    let Some(netns) = rig::Netns::create("rtqnet") else {
        return belljar_testkit::skip("needs iproute2 to make a network namespace");
    };
    let network = NetworkAttachment {
        netns: Some("/run/netns/rtqnet".into()),
        tap: "tap0".into(),
        guest_mac: [2, 0, 0, 0, 0, 1],
        host_ip: std::net::Ipv4Addr::LOCALHOST,
    };
    let mut spec = harness.spec("carded", None).await;
    spec.network = Some(network.clone());
    let (source, _) = harness.source("carded");
    let mut machine = harness.runtime().boot(spec, source).await.expect("boot with a card");
    let mut control = GuestControl::new(machine.take_control().expect("a new machine"));
    control.booted(limit()).await.expect("the guest boots");
    let id = machine.process_id().expect("QEMU is a process");
    let namespace = |path: &str| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(path).expect("a namespace").ino()
    };
    assert_eq!(namespace(&format!("/proc/{id}/ns/net")), namespace("/run/netns/rtqnet"));
    assert_eq!(rig::tap_carrier("rtqnet", "tap0"), "1");

    let mut second = harness.spec("second", None).await;
    second.network = Some(network.clone());
    let (source, _) = harness.source("second");
    let busy = harness.runtime().boot(second, source).await.err();
    assert!(matches!(busy, Some(StartError::Io { .. })), "a tap in use says {busy:?}");
    machine.kill().await.expect("kill it");
    assert_eq!(rig::tap_carrier("rtqnet", "tap0"), "0");

    let mut lost = harness.spec("lost", None).await;
    lost.network = Some(NetworkAttachment { netns: Some("/run/netns/none".into()), ..network });
    let (source, _) = harness.source("lost");
    let missing = harness.runtime().boot(lost, source).await.err();
    assert!(matches!(missing, Some(StartError::Missing { .. })), "{missing:?}");
    drop(netns);
    drop(harness);
    assert_clean(&before).await;
}

/// Prints, and asserts nothing about durations: see the numbers with `--nocapture`.
#[tokio::test]
async fn restoring_ten_times_is_measured() {
    let Some(harness) = QemuHarness::new("rtqtim", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqtim");
    let (saved, artifacts) = template(&harness).await;
    let mut times: Vec<[Duration; 3]> = Vec::new();
    for round in 0..10 {
        let spec = harness.spec(&format!("timed-{round}"), Some(&saved)).await;
        let began = Instant::now();
        let saved = SavedMachine::template(&artifacts);
        let mut machine = harness.runtime().restore(spec, saved).await.expect("restore a machine");
        let running = began.elapsed();
        ready(&mut machine).await;
        let answered = began.elapsed();
        let killing = Instant::now();
        machine.kill().await.expect("kill it");
        times.push([running, answered, killing.elapsed()]);
    }
    for (place, what) in ["running", "ready", "kill"].into_iter().enumerate() {
        let mut column: Vec<Duration> = times.iter().map(|row| row[place]).collect();
        column.sort();
        println!("{what}: median {:?} [{:?} to {:?}]", column[5], column[0], column[9]);
    }
    drop(harness);
    assert_clean(&before).await;
}

#[tokio::test]
async fn a_full_disk_ends_a_snapshot_and_not_the_machine() {
    let Some(harness) = QemuHarness::new("rtqful", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqful");
    let (saved, artifacts) = template(&harness).await;
    let spec = harness.spec("full", Some(&saved)).await;
    let from = SavedMachine::template(&artifacts);
    let mut machine = harness.runtime().restore(spec, from).await.expect("restore a machine");
    let mut control = ready(&mut machine).await;
    let folder = harness.folder("full-snapshot").await;
    let disk = rig::TinyDisk::mount(&folder);
    control.prepare_snapshot(limit()).await.expect("the guest prepares");
    machine.freeze().await.expect("freeze it");
    let target = SnapshotTarget { folder: folder.clone(), pages: Box::<KeptPages>::default() };
    let error = machine.snapshot(target).await.err();
    let full = matches!(&error, Some(SaveError::Io { path, source })
        if source.kind() == ErrorKind::StorageFull && path.starts_with(&folder));
    assert!(full, "a full disk says {error:?}");
    assert_eq!(fs::read_dir(&folder).expect("it is there").count(), 0);
    machine.thaw().await.expect("thaw it");
    control.continue_after_snapshot(limit()).await.expect("the guest goes on");
    machine.kill().await.expect("kill it");
    drop(disk);
    drop(harness);
    assert_clean(&before).await;
}

/// Prints, and asserts nothing about durations. `BELLJAR_BENCH=1` has it measure larger memories.
#[tokio::test]
async fn snapshots_are_measured() {
    let Some(mut harness) = QemuHarness::new("rtqmes", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqmes");
    let whole = std::env::var_os("BELLJAR_BENCH").is_some();
    let (memories, written, rounds) =
        if whole { (&[512, 2048][..], &[16, 64, 256][..], 5) } else { (&[512][..], &[16][..], 1) };
    for memory in memories {
        harness.set_memory(MiB(*memory));
        let (spec, artifacts) = template_named(&harness, &format!("template-{memory}")).await;
        for written in written {
            let mut times: Vec<[Duration; 3]> = Vec::new();
            let mut own = 0;
            for round in 0..rounds {
                let name = format!("m{memory}-w{written}-{round}");
                let took = measured(&harness, &name, (&spec, &artifacts), MiB(*written)).await;
                own = took.0;
                times.push(took.1);
            }
            let mut line = format!("{written} MiB written of {memory}, {} MiB own", own >> 20);
            for (place, what) in ["snapshot", "restored", "ready"].into_iter().enumerate() {
                let mut column: Vec<Duration> = times.iter().map(|row| row[place]).collect();
                column.sort();
                let [least, middle, most] =
                    [0, column.len() / 2, column.len() - 1].map(|place| column[place]);
                line.push_str(&format!("; {what} {middle:.1?} [{least:.1?} to {most:.1?}]"));
            }
            println!("{line}");
        }
    }
    drop(harness);
    assert_clean(&before).await;
}

/// The bytes of a snapshot's pages; how long it took, and how long its restored machine took to run
/// and to answer.
async fn measured(
    harness: &QemuHarness,
    name: &str,
    (saved, artifacts): (&MachineSpec, &Path),
    written: MiB,
) -> (u64, [Duration; 3]) {
    let spec = harness.spec(name, Some(saved)).await;
    let from = SavedMachine::template(artifacts);
    let mut machine = harness.runtime().restore(spec.clone(), from).await.expect("restore");
    let mut control = ready(&mut machine).await;
    let digest = harness.fill(&mut control, written).await;
    control.prepare_snapshot(limit()).await.expect("the guest prepares");
    machine.freeze().await.expect("freeze it");
    let folder = harness.folder(&format!("{name}-snapshot")).await;
    let pages = KeptPages::default();
    let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(pages.clone()) };
    let began = Instant::now();
    drop(machine.snapshot(target).await.expect("snapshot a frozen machine"));
    let taken = began.elapsed();
    let child = harness.fork(&format!("{name}-child"), &spec).await;
    machine.kill().await.expect("kill it");

    let own = pages.size_bytes();
    let memory = SavedMemory { base: Some(artifacts.join("memory")), pages: Some(Arc::new(pages)) };
    let began = Instant::now();
    let saved = SavedMachine { folder, memory };
    let mut machine = harness.runtime().restore(child.clone(), saved).await.expect("restore");
    let restored = began.elapsed();
    let mut control = ready(&mut machine).await;
    let answered = began.elapsed();
    assert_eq!(harness.recall(&child, &mut control).await, digest, "{name}");
    machine.kill().await.expect("kill it");
    (own, [taken, restored, answered])
}

#[tokio::test]
async fn a_machine_that_cannot_start_says_why() {
    let Some(harness) = QemuHarness::new("rtqbad", DiskKind::TinyRaw).await else { return };
    let before = oracle("rtqbad");
    let spec = harness.spec("no-elf", None).await;
    let (mut source, artifacts) = harness.source("no-elf");
    source.kernel = artifacts.join("kernel");
    fs::write(&source.kernel, b"this is no kernel").expect("write a file");
    let error = harness.runtime().boot(spec, source).await.err();
    let Some(StartError::Died { detail }) = error else { panic!("a bad kernel says {error:?}") };
    assert!(detail.contains("exit status 1") && detail.contains("kernel"), "{detail}");
    assert!(!artifacts.join("memory").exists());
    drop(harness);
    assert_clean(&before).await;
}
