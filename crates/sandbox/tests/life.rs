//! Lives of sandboxes on the fake runtime: admission, ends by the clock, kills, and what is told of
//! them afterwards.

#[path = "support/mod.rs"]
mod support;

use std::time::Duration;

use belljar_daemon::Scope;
use belljar_domain::lifecycle::EndReason;
use belljar_domain::{SandboxId, UnixMillis};
use belljar_runtime::fake::{Fault, Step};
use belljar_sandbox::admission::{Allocated, Limits, Refused, Status};
use belljar_sandbox::metrics::MetricsQuery;
use belljar_sandbox::{CreateError, Ended, Sandboxes, UntoldHow};
use support::{PATIENCE, Rig};
use tokio::sync::broadcast::Receiver;

const HOUR: Duration = Duration::from_secs(3600);

async fn next_end(ends: &mut Receiver<Ended>) -> Ended {
    tokio::time::timeout(PATIENCE, ends.recv()).await.expect("an end in time").expect("no lag")
}

async fn refused(sandboxes: &Sandboxes, rig: &Rig) -> Refused {
    let later = rig.clock.now().plus(HOUR);
    match sandboxes.create(rig.request(later)).await {
        Err(CreateError::Refused { limit }) => limit,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_clock_set_forward_ends_sandboxes_and_one_set_back_prolongs_them() {
    let (rig, scope) = (Rig::new(4).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let mut ends = sandboxes.watch();
    let start = rig.clock.now();
    let soon = sandboxes.create(rig.request(start.plus(HOUR))).await.expect("create");
    let late = sandboxes.create(rig.request(start.plus(3 * HOUR))).await.expect("create");
    rig.clock.set(start.plus(2 * HOUR));
    let end = next_end(&mut ends).await;
    assert_eq!((end.sandbox_id, end.reason), (soon.sandbox_id, EndReason::Expired));
    // Set back, the other one gets its time again: its end is nearer by the clock, not here.
    rig.clock.set(start);
    sandboxes.set_end(&late.sandbox_id, start.plus(HOUR)).await.expect("set the end");
    assert_eq!(sandboxes.list(None)[0].end_at, start.plus(HOUR));
    assert!(ends.try_recv().is_err(), "it has an hour left");
    rig.clock.set(start.plus(HOUR));
    assert_eq!(next_end(&mut ends).await.sandbox_id, late.sandbox_id);
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn what_is_given_away_comes_back_on_every_way_out() {
    let (rig, scope) = (Rig::new(8).await, Scope::root("test"));
    let limits = Limits { vcpus: 4, sandboxes_max: 3, ..rig.limits() };
    let (sandboxes, _) = rig.open(limits, &scope).await;
    let mut ends = sandboxes.watch();
    let later = rig.clock.now().plus(HOUR);
    for (step, fault) in [
        (Step::Restore, Fault::Fail),
        (Step::Restore, Fault::Crash),
        (Step::GuestInit, Fault::Fail),
        (Step::GuestInit, Fault::Crash),
    ] {
        rig.faults.once(step, fault);
        let failed = sandboxes.create(rig.request(later)).await;
        assert!(failed.is_err(), "{step:?} {fault:?} went unnoticed");
        assert_eq!(sandboxes.usage().allocated, Allocated::default(), "{step:?} {fault:?}");
    }
    rig.slots.fail_leases(1);
    assert!(sandboxes.create(rig.request(later)).await.is_err());
    assert_eq!(sandboxes.usage().failed, 5);
    let one = sandboxes.create(rig.request(later)).await.expect("create");
    let two = sandboxes.create(rig.request(later)).await.expect("create");
    let both = Allocated { vcpus: 4, memory_mib: 32, disk_mib: 2 };
    assert_eq!(sandboxes.usage().allocated, both);
    assert_eq!(refused(&sandboxes, &rig).await, Refused::Cpu { wanted: 2, free: 0 });
    sandboxes.kill(&one.sandbox_id).await.expect("kill");
    let three = sandboxes.create(rig.request(later)).await.expect("room again");
    assert_eq!(next_end(&mut ends).await.sandbox_id, one.sandbox_id);
    for id in [&two.sandbox_id, &three.sandbox_id] {
        sandboxes.kill(id).await.expect("kill");
    }
    let usage = sandboxes.usage();
    assert_eq!((usage.running, usage.starting, usage.created), (0, 0, 3));
    assert_eq!(usage.allocated, Allocated::default());
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn refusals_name_their_limit() {
    let (mut rig, scope) = (Rig::new(8).await, Scope::root("test"));
    rig.ready_deadline = Duration::from_secs(1);
    let limits = Limits {
        starting_max: 1,
        starting_wait_max: Duration::from_millis(50),
        sandboxes_max: 2,
        ..rig.limits()
    };
    let (sandboxes, _) = rig.open(limits, &scope).await;
    for status in [Status::Draining, Status::Standby] {
        sandboxes.set_status(status);
        assert_eq!(refused(&sandboxes, &rig).await, Refused::Status { status });
    }
    sandboxes.set_status(Status::Ready);
    rig.faults.once(Step::GuestInit, Fault::Hang);
    let stuck = rig.request(rig.clock.now().plus(HOUR));
    let id = stuck.sandbox_id.clone();
    let starts = async { sandboxes.create(stuck).await };
    let meanwhile = async {
        until(|| sandboxes.starting().len() == 1 && rig.faults.reached(Step::GuestInit) == 1).await;
        let limit = Refused::StartingSlots { limit: 1, waited_ms: 50 };
        assert_eq!(refused(&sandboxes, &rig).await, limit);
        assert_eq!(sandboxes.starting()[0].sandbox_id, id);
        assert_eq!(&*sandboxes.starting()[0].terms, "whose it is");
        assert!(sandboxes.list(None).is_empty());
    };
    let (started, ()) = tokio::join!(starts, meanwhile);
    assert!(matches!(started, Err(CreateError::Guest { .. })), "{started:?}");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

/// Waits until something is so.
async fn until(so: impl Fn() -> bool) {
    let waiting = async {
        while !so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("in time");
}

#[tokio::test]
async fn a_sandbox_that_waits_to_start_or_starts_can_be_killed() {
    let (rig, scope) = (Rig::new(8).await, Scope::root("test"));
    let limits = Limits { starting_max: 1, ..rig.limits() };
    let (sandboxes, _) = rig.open(limits, &scope).await;
    let later = rig.clock.now().plus(HOUR);
    let requests = [rig.request(later), rig.request(later), rig.request(later)];
    let ids = requests.each_ref().map(|request| request.sandbox_id.clone());
    let [first, second, third] = requests;
    let kill = |id: SandboxId| {
        let sandboxes = sandboxes.clone();
        async move {
            until(|| sandboxes.starting().iter().any(|starting| starting.sandbox_id == id)).await;
            sandboxes.kill(&id).await
        }
    };
    let [a, b, c] = ids.clone();
    let (first, second, third, killed_a, killed_b, moved) = tokio::join!(
        biased;
        sandboxes.create(first),
        sandboxes.create(second),
        sandboxes.create(third),
        kill(a),
        kill(b),
        sandboxes.set_end(&c, later.plus(HOUR)),
    );
    assert!(matches!(first, Err(CreateError::Killed { .. })), "{first:?}");
    assert!(matches!(second, Err(CreateError::Killed { .. })), "{second:?}");
    killed_a.and(killed_b).and(moved).expect("they are there");
    let third = third.expect("it was left alone");
    assert_eq!(sandboxes.list(None)[0].end_at, later.plus(HOUR));
    sandboxes.kill(&third.sandbox_id).await.expect("kill");
    assert_eq!(sandboxes.usage().failed, 0);
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_stop_and_a_crash_are_told_of_afterwards() {
    let (rig, scope) = (Rig::new(8).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let listener = sandboxes.watch();
    let later = rig.clock.now().plus(HOUR);
    let stopped = sandboxes.create(rig.request(later)).await.expect("create");
    let killed = sandboxes.create(rig.request(later)).await.expect("create");
    assert_eq!(&*killed.terms, "whose it is");
    sandboxes.kill(&killed.sandbox_id).await.expect("kill");
    // What a server that dies leaves: the entry of one that runs, and no task that could clean up.
    let lost = sandboxes.create(rig.request(later)).await.expect("create");
    let entry = rig.dir.path().join(format!("ledger/{}.json", lost.sandbox_id));
    let left = std::fs::read(&entry).expect("an entry");
    assert!(scope.close(PATIENCE).await);
    drop(listener);
    rig.assert_nothing_left();
    std::fs::write(&entry, left).expect("put it back");
    let told = rig.dir.path().join(format!("untold/{}.json", lost.execution_id));
    std::fs::remove_file(told).expect("a crash tells nobody");

    let scope = Scope::root("test");
    let (sandboxes, reclaimed) = rig.open(rig.limits(), &scope).await;
    assert_eq!(reclaimed.sandboxes, [lost.sandbox_id.to_string()]);
    let mut ends = sandboxes.untold().await.expect("list");
    ends.sort_by_key(|end| end.how.as_str());
    let [lost_end, stopped_end] = &ends[..] else { panic!("two ends: {ends:?}") };
    assert_eq!((&lost_end.sandbox_id, lost_end.how), (&lost.sandbox_id, UntoldHow::Lost));
    assert_eq!(stopped_end.sandbox_id, stopped.sandbox_id);
    assert_eq!(stopped_end.how, UntoldHow::Ended(EndReason::Shutdown));
    for end in &ends {
        assert_eq!((&*end.terms, end.end_at), ("whose it is", later));
        assert_eq!((end.vcpus.0, end.memory.0, end.disk.0), (2, 16, 1));
    }
    let executions = ends.into_iter().map(|end| end.execution_id).collect();
    sandboxes.forget_untold(executions).await.expect("forget");
    assert!(sandboxes.untold().await.expect("list").is_empty());
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn ends_that_nobody_listens_to_are_told_of_afterwards() {
    let (rig, scope) = (Rig::new(8).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let (now, listener) = (rig.clock.now(), sandboxes.watch());
    let heard = sandboxes.create(rig.request(now.plus(HOUR))).await.expect("create");
    sandboxes.kill(&heard.sandbox_id).await.expect("kill");
    drop(listener);
    let killed = sandboxes.create(rig.request(now.plus(HOUR))).await.expect("create");
    sandboxes.kill(&killed.sandbox_id).await.expect("kill");
    let expired = sandboxes.create(rig.request(now.plus(HOUR))).await.expect("create");
    rig.clock.set(now.plus(2 * HOUR));
    until(|| sandboxes.list(None).is_empty()).await;
    let mut ends = sandboxes.untold().await.expect("list");
    ends.sort_by_key(|end| end.how.as_str());
    let found: Vec<_> = ends.iter().map(|end| (&end.sandbox_id, end.how)).collect();
    let ended = UntoldHow::Ended;
    let expected = [
        (&expired.sandbox_id, ended(EndReason::Expired)),
        (&killed.sandbox_id, ended(EndReason::Killed)),
    ];
    assert_eq!(found, expected);
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn sandboxes_are_listed_in_order_and_have_figures() {
    let (rig, scope) = (Rig::new(8).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let later = rig.clock.now().plus(HOUR);
    for _ in 0..5 {
        sandboxes.create(rig.request(later)).await.expect("create");
    }
    let all = sandboxes.list(None);
    assert!(all.is_sorted_by_key(|info| info.sandbox_id.to_string()) && all.len() == 5);
    let rest = sandboxes.list(Some(&all[1].sandbox_id));
    assert_eq!(rest.len(), 3);
    assert_eq!(rest[0].sandbox_id, all[2].sandbox_id);
    let query = MetricsQuery { latest_only: true, ..MetricsQuery::default() };
    let samples = sandboxes.metrics(&all[0].sandbox_id, query).expect("it runs");
    assert_eq!((samples.len(), samples[0].figures.mem_total_bytes), (1, 16 << 20));
    assert_eq!(sandboxes.metrics_of_all(query).len(), 5);
    assert!(sandboxes.metrics(&SandboxId::random(), query).is_err());
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn a_damaged_template_does_not_stop_the_others() {
    let (rig, scope) = (Rig::new(1).await, Scope::root("test"));
    std::fs::create_dir(rig.dir.path().join("templates/broken")).expect("mkdir");
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    assert_eq!(sandboxes.templates().len(), 1);
    sandboxes.create(rig.request(UnixMillis(i64::MAX))).await.expect("create");
    assert!(scope.close(PATIENCE).await);
    rig.assert_nothing_left();
}
