//! Sandboxes that stand ready, on the fake runtime: handed out, replaced, in nobody's way, and gone.

#[path = "support/mod.rs"]
mod support;

use std::time::Duration;

use belljar_daemon::Scope;
use belljar_domain::SandboxId;
use belljar_runtime::Runtime as _;
use belljar_runtime::fake::{Fault, Step};
use belljar_sandbox::admission::{Allocated, Limits};
use belljar_sandbox::{CreateSandbox, KeepSandbox, OpenError, Sandboxes, Warm};
use support::{PATIENCE, Rig};

const HOUR: Duration = Duration::from_secs(3600);

async fn rig(warm: u32) -> Rig {
    let mut rig = Rig::new(8).await;
    rig.warm = vec![Warm { template: "base".to_owned(), count: warm }];
    rig
}

fn request(rig: &Rig) -> CreateSandbox {
    rig.request(rig.clock.now().plus(HOUR))
}

/// Waits until it is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let waiting = async {
        while !so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what} in time"));
}

/// Waits until so many stand ready.
async fn warm(sandboxes: &Sandboxes, count: u32) {
    until("warm ones", || sandboxes.usage().spares == count).await;
}

/// The machines in the ledger.
fn machines(rig: &Rig) -> Vec<String> {
    let entries = std::fs::read_dir(rig.dir.path().join("ledger")).expect("list");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(entry.ok()?.path()).ok()?;
        let entry: serde_json::Value = serde_json::from_str(&text).ok()?;
        Some(entry["machine"].as_str()?.to_owned())
    };
    entries.filter_map(name).collect()
}

/// Who a sandbox's guest thinks it is: a frozen fake guest writes it into its memory.
async fn says(rig: &Rig, sandboxes: &Sandboxes, machine: &str, id: &SandboxId) -> String {
    let order = KeepSandbox {
        snapshot_id: belljar_domain::BuildId::random(),
        filesystem_only: false,
        require_healthy_guest: true,
    };
    sandboxes.snapshot(id, order).await.expect("snapshot");
    let page = rig.runtime.read_memory(machine, 0, 64).expect("a machine");
    String::from_utf8(page.into_iter().take_while(|byte| *byte != 0).collect()).expect("an id")
}

#[tokio::test]
async fn a_create_takes_one_that_is_ready_and_another_is_made() {
    let (rig, scope) = (rig(2).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    warm(&sandboxes, 2).await;
    let usage = sandboxes.usage();
    assert_eq!((usage.running, usage.starting, usage.created), (0, 0, 0), "nobody sees them");
    assert_eq!(usage.allocated, Allocated::default(), "what they hold is there for the asking");
    assert!(sandboxes.list(None).is_empty() && sandboxes.starting().is_empty());
    let before = machines(&rig);
    // Nothing is restored on the way: it would fail.
    rig.faults.always(Step::Restore, Fault::Fail);
    let request = request(&rig);
    let (id, terms) = (request.sandbox_id.clone(), request.terms.clone());
    let info = sandboxes.create(request).await.expect("create");
    assert_eq!((&info.sandbox_id, &info.terms), (&id, &terms));
    rig.faults.clear();
    let entry = std::fs::read_to_string(rig.dir.path().join(format!("ledger/{id}.json")));
    let entry = entry.expect("an entry under its own id");
    let machine: serde_json::Value = serde_json::from_str(&entry).expect("an entry");
    let machine = machine["machine"].as_str().expect("a name");
    assert!(before.iter().any(|name| name == machine), "{machine}");
    assert_eq!(says(&rig, &sandboxes, machine, &id).await, id.to_string());
    assert_eq!(sandboxes.usage().running, 1);
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn one_that_is_taken_or_dies_is_replaced() {
    let (rig, scope) = (rig(1).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    warm(&sandboxes, 1).await;
    let first = machines(&rig).pop().expect("one");
    rig.runtime.reclaim(&first).await.expect("as if it had been killed");
    until("another", || {
        let now = machines(&rig);
        now.len() == 1 && now[0] != first && sandboxes.usage().spares == 1
    })
    .await;
    let taken = sandboxes.create(request(&rig)).await.expect("create");
    // Told who they are: the two, the one that was taken once more, and a third.
    until("a third", || rig.faults.reached(Step::GuestInit) == 4).await;
    sandboxes.kill(&taken.sandbox_id).await.expect("kill");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn what_does_not_fit_and_what_does_not_work_out_starts_as_ever() {
    let (rig, scope) = (rig(1).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    warm(&sandboxes, 1).await;
    let spare = machines(&rig).pop().expect("one");
    for shut_in in [
        CreateSandbox { allow_internet_access: false, ..request(&rig) },
        CreateSandbox { cold_boot: true, ..request(&rig) },
    ] {
        let info = sandboxes.create(shut_in).await.expect("create");
        assert!(machines(&rig).contains(&spare), "it was not for this one");
        sandboxes.kill(&info.sandbox_id).await.expect("kill");
    }
    // Its guest fails to become somebody: the sandbox starts all the same.
    rig.faults.once(Step::GuestInit, Fault::Fail);
    let info = sandboxes.create(request(&rig)).await.expect("create");
    assert!(!machines(&rig).contains(&spare));
    sandboxes.kill(&info.sandbox_id).await.expect("kill");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn they_count_and_make_room() {
    let (rig, scope) = (rig(3).await, Scope::root("test"));
    // Two fit, of two processors each.
    let limits = Limits { vcpus: 5, ..rig.limits() };
    let (sandboxes, _) = rig.open(limits, &scope).await;
    warm(&sandboxes, 2).await;
    let shut_in = || CreateSandbox { allow_internet_access: false, ..request(&rig) };
    let one = sandboxes.create(shut_in()).await.expect("one makes room");
    let two = sandboxes.create(request(&rig)).await.expect("and one is taken");
    assert_eq!(sandboxes.usage().spares, 0);
    assert_eq!(sandboxes.usage().allocated.vcpus, 4);
    assert!(sandboxes.create(request(&rig)).await.is_err(), "the host is full");
    for id in [one.sandbox_id, two.sandbox_id] {
        sandboxes.kill(&id).await.expect("kill");
    }
    assert_eq!(sandboxes.usage().allocated, Allocated::default());
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_host_that_closes_while_one_is_made_keeps_nothing() {
    let (rig, scope) = (rig(4).await, Scope::root("test"));
    rig.faults.once(Step::GuestInit, Fault::Fail);
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    until("a rehearsal", || rig.faults.reached(Step::GuestInit) >= 1).await;
    assert_eq!(sandboxes.usage().failed, 0, "no sandbox failed");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_killed_server_leaves_them_to_the_next_which_tells_nobody() {
    let (mut rig, scope) = (rig(1).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    warm(&sandboxes, 1).await;
    let folder = rig.dir.path().join("ledger");
    let entry = std::fs::read_dir(&folder).expect("list").next().expect("one").expect("an entry");
    let kept = (entry.path(), std::fs::read(entry.path()).expect("read"));
    assert!(scope.close(PATIENCE).await);
    // What a killed one leaves of it.
    std::fs::write(&kept.0, &kept.1).expect("write");
    std::fs::create_dir(rig.dir.path().join("run/left")).expect("mkdir");
    rig.warm.clear();
    let scope = Scope::root("next");
    let (sandboxes, reclaimed) = rig.open(rig.limits(), &scope).await;
    assert_eq!(reclaimed.sandboxes, [""; 0]);
    assert!(sandboxes.untold().await.expect("list").is_empty());
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_template_that_is_not_there_is_named() {
    let mut rig = rig(1).await;
    rig.warm[0].template = "bass".to_owned();
    let error = rig.try_open(rig.limits(), &Scope::root("test")).await.err().expect("refused");
    assert!(matches!(error, OpenError::Warm { .. }));
    let text = error.to_string();
    assert!(text.contains("\"bass\"") && text.ends_with("are: base"), "{text}");
}
