//! Pausing, resuming, copying and forking on the fake runtime: what is kept, what a failure leaves,
//! and what is left on disk afterwards.

#[path = "support/mod.rs"]
mod support;

use std::time::Duration;

use belljar_daemon::Scope;
use belljar_domain::lifecycle::EndReason;
use belljar_domain::{BuildId, ExecutionId, Kind, SandboxId};
use belljar_runtime::fake::{Fault, Step};
use belljar_sandbox::{
    AutoPause, CreateError, CreateSandbox, DeleteSnapshotError, Ended, KeepError, KeepSandbox,
    SandboxInfo, Sandboxes,
};
use support::{PATIENCE, Rig};
use tokio::sync::broadcast::Receiver;

const HOUR: Duration = Duration::from_secs(3600);
/// Where the tests write in a guest's memory: across two pages.
const PLACE: u64 = 40_000;

fn order() -> KeepSandbox {
    KeepSandbox {
        snapshot_id: BuildId::random(),
        filesystem_only: false,
        require_healthy_guest: true,
    }
}

async fn next_end(ends: &mut Receiver<Ended>) -> Ended {
    tokio::time::timeout(PATIENCE, ends.recv()).await.expect("an end in time").expect("no lag")
}

impl Rig {
    async fn created(&self, sandboxes: &Sandboxes) -> SandboxInfo {
        let later = self.clock.now().plus(HOUR);
        sandboxes.create(self.request(later)).await.expect("create")
    }

    /// A start of `sandbox` from a snapshot.
    fn resume(&self, sandbox: &SandboxId, snapshot: &BuildId) -> CreateSandbox {
        CreateSandbox {
            sandbox_id: sandbox.clone(),
            execution_id: ExecutionId::random(),
            build_id: snapshot.clone(),
            ..self.request(self.clock.now().plus(HOUR))
        }
    }

    fn write(&self, sandbox: &SandboxId, bytes: &[u8]) {
        let machine = format!("test-{sandbox}");
        self.runtime.write_memory(&machine, PLACE, bytes).expect("it runs");
    }

    fn read(&self, sandbox: &SandboxId, len: usize) -> Vec<u8> {
        self.runtime.read_memory(&format!("test-{sandbox}"), PLACE, len).expect("it runs")
    }

    /// Snapshots and layers on disk. The folder of layers is made with the first one.
    fn kept(&self) -> (usize, usize) {
        let any_layer = self.dir.path().join("layers").exists();
        (self.count("snapshots"), if any_layer { self.count("layers") } else { 0 })
    }
}

#[tokio::test]
async fn a_paused_sandbox_goes_on_where_it_was_ten_times() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let mut ends = sandboxes.watch();
    let id = rig.created(&sandboxes).await.sandbox_id;
    let mut written = Vec::new();
    let mut before: Option<BuildId> = None;
    for round in 0..10_u8 {
        written.extend([round; 700]);
        rig.write(&id, &written);
        let order = order();
        let kept = sandboxes.pause(&id, order.clone()).await.expect("pause");
        assert!(kept.paused && !kept.guest_unresponsive && kept.sandbox_id == id);
        assert_eq!(sandboxes.list(None).len(), 0, "it takes nothing");
        assert_eq!((rig.slots.leased().len(), rig.runtime.live_machines()), (0, 0));
        let end = next_end(&mut ends).await;
        assert_eq!((end.reason, end.snapshot.as_deref()), (EndReason::Paused, Some(&*kept)));
        if let Some(before) = before.replace(order.snapshot_id.clone()) {
            sandboxes.delete_snapshot(&before).await.expect("superseded");
        }
        let resumed = sandboxes.create(rig.resume(&id, &order.snapshot_id)).await.expect("resume");
        assert_ne!(resumed.execution_id, kept.execution_id);
        assert_eq!(rig.read(&id, written.len()), written, "round {round}");
    }
    sandboxes.kill(&id).await.expect("kill");
    sandboxes.delete_snapshot(&before.expect("ten rounds")).await.expect("delete");
    assert!(scope.close(PATIENCE).await);
    assert_eq!(rig.kept(), (0, 0));
    rig.assert_nothing_left();
}

#[tokio::test]
async fn forks_have_what_the_source_had_and_go_their_own_ways() {
    let (rig, scope) = (Rig::new(8).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let source = rig.created(&sandboxes).await.sandbox_id;
    rig.write(&source, b"common");
    let kept = sandboxes.snapshot(&source, order()).await.expect("snapshot");
    assert!(!kept.paused);
    rig.write(&source, b"source");
    let forks: Vec<SandboxId> = (0..4).map(|_| SandboxId::random()).collect();
    let starts = forks.iter().map(|fork| sandboxes.create(rig.resume(fork, &kept.snapshot_id)));
    for start in futures::future::join_all(starts).await {
        start.expect("fork");
    }
    for (n, fork) in forks.iter().enumerate() {
        assert_eq!(rig.read(fork, 6), b"common");
        rig.write(fork, format!("fork {n}").as_bytes());
    }
    // A fork of a fork, after what both come from is no snapshot any more.
    let deeper = sandboxes.snapshot(&forks[2], order()).await.expect("snapshot");
    sandboxes.delete_snapshot(&kept.snapshot_id).await.expect("delete");
    let last = SandboxId::random();
    sandboxes.create(rig.resume(&last, &deeper.snapshot_id)).await.expect("fork");
    assert_eq!(rig.read(&last, 6), b"fork 2");
    assert_eq!(rig.read(&source, 6), b"source");
    for (n, fork) in forks.iter().enumerate() {
        assert_eq!(rig.read(fork, 6), format!("fork {n}").as_bytes());
    }
    sandboxes.delete_snapshot(&deeper.snapshot_id).await.expect("delete");
    assert!(scope.close(PATIENCE).await);
    assert_eq!(rig.kept(), (0, 0), "layers go with the last that has them open");
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_step_that_fails_leaves_a_running_sandbox_and_no_snapshot() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let id = rig.created(&sandboxes).await.sandbox_id;
    rig.write(&id, b"precious");
    for step in [Step::GuestPrepare, Step::Freeze, Step::Snapshot] {
        for paused in [true, false] {
            rig.faults.once(step, Fault::Fail);
            let error = match paused {
                true => sandboxes.pause(&id, order()).await,
                false => sandboxes.snapshot(&id, order()).await,
            };
            let error = error.expect_err("injected");
            let kind = if step == Step::GuestPrepare { Kind::Conflict } else { Kind::Internal };
            assert_eq!(error.kind(), kind, "{step:?}: {error}");
            assert_eq!(rig.read(&id, 8), b"precious", "{step:?}");
            assert_eq!(sandboxes.list(None).len(), 1, "{step:?}");
            assert_eq!(rig.kept(), (0, 0), "{step:?} leaves something");
        }
    }
    // Its guest was told each time that it goes on.
    assert_eq!(rig.faults.reached(Step::GuestContinue), 6);
    // It can be kept all the same afterwards.
    let kept = sandboxes.pause(&id, order()).await.expect("pause");
    sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(&id, 8), b"precious");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_machine_that_dies_while_it_is_kept_has_crashed() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let mut ends = sandboxes.watch();
    for step in [Step::GuestPrepare, Step::Freeze, Step::Snapshot] {
        let id = rig.created(&sandboxes).await.sandbox_id;
        rig.faults.once(step, Fault::Crash);
        sandboxes.pause(&id, order()).await.expect_err("it died");
        let end = next_end(&mut ends).await;
        assert_eq!((end.sandbox_id, end.reason), (id, EndReason::Crashed), "{step:?}");
        assert_eq!(rig.kept(), (0, 0), "{step:?} leaves something");
    }
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_resume_that_fails_can_be_tried_again() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let id = rig.created(&sandboxes).await.sandbox_id;
    rig.write(&id, b"precious");
    let kept = sandboxes.pause(&id, order()).await.expect("pause");
    for (step, fault) in [
        (Step::Restore, Fault::Fail),
        (Step::Restore, Fault::Crash),
        (Step::GuestInit, Fault::Fail),
        (Step::GuestInit, Fault::Crash),
    ] {
        rig.faults.once(step, fault);
        let failed = sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await;
        assert!(failed.is_err(), "{step:?} {fault:?} went unnoticed");
        rig.assert_nothing_left();
    }
    sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(&id, 8), b"precious");
    assert!(scope.close(PATIENCE).await);
}

#[tokio::test]
async fn a_sandbox_is_paused_when_its_time_is_up() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let mut ends = sandboxes.watch();
    let pause = AutoPause { snapshot_id: BuildId::random(), filesystem_only: false };
    let end_at = rig.clock.now().plus(HOUR);
    let request = CreateSandbox { auto_pause: Some(pause.clone()), ..rig.request(end_at) };
    let id = sandboxes.create(request).await.expect("create").sandbox_id;
    rig.write(&id, b"precious");
    // The first time something goes wrong: it lives on a minute longer.
    rig.faults.once(Step::Snapshot, Fault::Fail);
    rig.clock.set(end_at);
    let moved = async {
        while sandboxes.list(None)[0].end_at <= end_at {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, moved).await.expect("it got more time");
    assert_eq!(rig.read(&id, 8), b"precious");
    rig.clock.set(end_at.plus(HOUR));
    let end = next_end(&mut ends).await;
    assert_eq!((&end.sandbox_id, end.reason), (&id, EndReason::Paused));
    let kept = end.snapshot.expect("it was paused");
    assert_eq!((&kept.snapshot_id, kept.terms.as_str()), (&pause.snapshot_id, "whose it is"));
    sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(&id, 8), b"precious");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn what_is_paused_outlives_the_server_and_half_of_one_does_not() {
    let rig = Rig::new(4).await;
    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let id = rig.created(&sandboxes).await.sandbox_id;
    rig.write(&id, b"precious");
    let kept = sandboxes.pause(&id, order()).await.expect("pause");
    assert!(scope.close(PATIENCE).await);
    drop(sandboxes);
    // What a server that was killed leaves: a draft, and a layer that nothing is made of.
    let folder = |name: &str| rig.dir.path().join(name);
    std::fs::create_dir(folder("snapshots").join(".draft-x")).expect("mkdir");
    std::fs::write(folder("layers").join("0".repeat(32)), vec![1; 4096]).expect("write");

    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    assert_eq!(rig.kept(), (1, 1));
    assert_eq!(sandboxes.snapshots(None), std::slice::from_ref(&kept));
    assert_eq!(sandboxes.snapshots(Some(&kept.snapshot_id)), []);
    sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(&id, 8), b"precious");
    sandboxes.kill(&id).await.expect("kill");
    sandboxes.delete_snapshot(&kept.snapshot_id).await.expect("delete");
    let gone = sandboxes.delete_snapshot(&kept.snapshot_id).await;
    assert!(matches!(gone, Err(DeleteSnapshotError::NotFound(_))));
    let missing = sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await;
    assert!(matches!(missing, Err(CreateError::NoTemplate { .. })));
    assert!(scope.close(PATIENCE).await);
    assert_eq!(rig.kept(), (0, 0));
}

#[tokio::test]
async fn a_damaged_snapshot_is_never_started_and_costs_the_others_nothing() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let mut kept = Vec::new();
    for _ in 0..2 {
        let id = rig.created(&sandboxes).await.sandbox_id;
        rig.write(&id, b"precious");
        kept.push(sandboxes.pause(&id, order()).await.expect("pause"));
    }
    assert!(scope.close(PATIENCE).await);
    drop(sandboxes);
    let map = |n: usize| {
        let snapshot = rig.dir.path().join("snapshots").join(kept[n].snapshot_id.as_str());
        snapshot.join("memory.map")
    };
    let whole = std::fs::read(map(0)).expect("read");
    std::fs::write(map(0), &whole[..whole.len() - 1]).expect("cut it");
    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    assert_eq!(sandboxes.snapshots(None), [kept[1].clone()]);
    // The other can be used and removed; no layer goes that the damaged one may need.
    sandboxes.delete_snapshot(&kept[1].snapshot_id).await.expect("delete");
    assert_eq!(rig.kept(), (1, 2));
    assert!(scope.close(PATIENCE).await);
    drop(sandboxes);
    std::fs::write(map(0), whole).expect("mend it");
    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    assert_eq!(rig.kept(), (1, 1));
    let id = &kept[0].sandbox_id;
    sandboxes.create(rig.resume(id, &kept[0].snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(id, 8), b"precious");
    assert!(scope.close(PATIENCE).await);
}

#[tokio::test]
async fn a_snapshot_without_one_of_its_layers_costs_the_others_nothing() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let mut kept = Vec::new();
    let mut layers = Vec::new();
    for _ in 0..2 {
        let id = rig.created(&sandboxes).await.sandbox_id;
        rig.write(&id, b"precious");
        kept.push(sandboxes.pause(&id, order()).await.expect("pause"));
        let found = std::fs::read_dir(rig.dir.path().join("layers")).expect("its layer");
        let found = found.map(|entry| entry.expect("readable").path());
        layers.extend(found.filter(|path| !layers.contains(path)).collect::<Vec<_>>());
    }
    assert!(scope.close(PATIENCE).await);
    drop(sandboxes);
    let aside = rig.dir.path().join("aside");
    std::fs::rename(&layers[0], &aside).expect("rename");
    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    assert_eq!(sandboxes.snapshots(None), [kept[1].clone()]);
    sandboxes.delete_snapshot(&kept[1].snapshot_id).await.expect("delete");
    assert_eq!(rig.kept(), (1, 0), "what only the other was made of is gone");
    assert!(scope.close(PATIENCE).await);
    drop(sandboxes);
    std::fs::rename(&aside, &layers[0]).expect("mend it");
    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let id = &kept[0].sandbox_id;
    sandboxes.create(rig.resume(id, &kept[0].snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(id, 8), b"precious");
    assert!(scope.close(PATIENCE).await);
}

#[tokio::test]
async fn what_is_not_there_cannot_be_kept_and_nothing_is_kept_twice() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let missing = sandboxes.pause(&SandboxId::random(), order()).await;
    assert!(matches!(missing, Err(KeepError::NotFound { .. })));
    let id = rig.created(&sandboxes).await.sandbox_id;
    let once = order();
    sandboxes.snapshot(&id, once.clone()).await.expect("snapshot");
    let twice = sandboxes.pause(&id, once.clone()).await;
    assert!(matches!(twice, Err(KeepError::Exists { .. })), "{twice:?}");
    // Two pauses at once: one of them finds it gone.
    let (one, two) = tokio::join!(sandboxes.pause(&id, order()), sandboxes.pause(&id, order()));
    assert!(one.is_ok() != two.is_ok(), "{one:?} {two:?}");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_disk_alone_is_booted_and_has_no_memory() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let id = rig.created(&sandboxes).await.sandbox_id;
    rig.write(&id, b"precious");
    let disk_only = KeepSandbox { filesystem_only: true, ..order() };
    let kept = sandboxes.pause(&id, disk_only).await.expect("pause");
    assert!(kept.filesystem_only);
    sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await.expect("boot");
    assert_eq!(rig.faults.reached(Step::Boot), 2, "the template, and this");
    assert_eq!(rig.read(&id, 8), [0; 8]);
    // Booted, it is kept with its memory like any other; and that one can be booted, too.
    rig.write(&id, b"again");
    let kept = sandboxes.pause(&id, order()).await.expect("pause");
    sandboxes.create(rig.resume(&id, &kept.snapshot_id)).await.expect("resume");
    assert_eq!(rig.read(&id, 5), b"again");
    sandboxes.pause(&id, order()).await.expect("pause");
    let cold = CreateSandbox { cold_boot: true, ..rig.resume(&id, &kept.snapshot_id) };
    sandboxes.create(cold).await.expect("boot");
    assert_eq!(rig.read(&id, 5), [0; 5]);
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
    // Without its template's kernel it says what to do.
    let kernel = rig.dir.path().join("templates").join(rig.build_id.as_str()).join("kernel");
    std::fs::remove_file(kernel).expect("remove");
    let scope = Scope::root("test");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let cold = CreateSandbox { cold_boot: true, ..rig.resume(&id, &kept.snapshot_id) };
    let error = sandboxes.create(cold).await.expect_err("no kernel");
    assert!(error.to_string().contains("must be built again"), "{error}");
    assert!(scope.close(PATIENCE).await);
}
