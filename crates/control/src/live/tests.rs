use std::net::Ipv4Addr;
use std::time::Duration;

use belljar_domain::{BuildId, MiB, TemplateId, Vcpus};

use super::sleep::Occupied;
use super::*;

const NOW: UnixMillis = UnixMillis(1_000);
const LATER: UnixMillis = UnixMillis(2_000);
const NODE: NodeIx = NodeIx(0);

pub(crate) fn team() -> TeamId {
    TeamId::random()
}

pub(crate) fn sandbox_at(team: &TeamId, start: UnixMillis, end: UnixMillis) -> Arc<Sandbox> {
    Arc::new(Sandbox {
        id: SandboxId::random(),
        execution: ExecutionId::random(),
        node: NODE,
        team: team.clone(),
        template: TemplateId::random(),
        build: BuildId::random(),
        alias: None,
        metadata: Metadata::default(),
        secure: true,
        allow_internet: true,
        started_at: start,
        end_at: end,
        ip: Ipv4Addr::LOCALHOST.into(),
        vcpus: Vcpus(2),
        memory: MiB(512),
        disk: MiB(512),
        envd_version: "0.6.13".into(),
        lifecycle: crate::terms::plain_lifecycle(),
        env_vars: Arc::default(),
        saved: None,
        asleep_since: None,
    })
}

fn sandbox(team: &TeamId) -> Arc<Sandbox> {
    sandbox_at(team, NOW, LATER)
}

fn observed(s: &Sandbox) -> Observed {
    Observed {
        id: s.id.clone(),
        execution: s.execution.clone(),
        template: s.template.clone(),
        build: s.build.clone(),
        ip: s.ip,
        started_at: s.started_at,
        end_at: s.end_at,
        vcpus: s.vcpus,
        memory: s.memory,
        disk: s.disk,
        envd_version: s.envd_version.clone(),
        terms: String::new(),
    }
}

fn place(live: &Arc<Live>, team: &TeamId, limit: u32) -> Result<Slot, AtLimit> {
    live.reserve(team, limit, NOW)
}

fn starting(live: &Arc<Live>, team: &TeamId, id: &SandboxId) -> Slot {
    let mut slot = place(live, team, 10_000).expect("a free place");
    slot.attempt(id, NODE);
    slot
}

fn add(live: &Arc<Live>, team: &TeamId) -> Arc<Sandbox> {
    let s = sandbox(team);
    starting(live, team, &s.id).commit(Arc::clone(&s)).expect("it did not end");
    s
}

const RUNNING: States = States { running: true, paused: false };
const PAUSED: States = States { running: false, paused: true };

/// The node says that a run has ended; whether that was news.
fn end(live: &Live, s: &Sandbox) -> bool {
    matches!(live.ended(&s.id, &s.execution, false), Ended::Gone(_))
}

fn all(order: Order) -> Range {
    Range { order, after: None, started_from: None }
}

fn ids(live: &Live, team: &TeamId, now: UnixMillis) -> Vec<SandboxId> {
    let listed = live.list(team, now, &all(Order::OldestFirst), RUNNING);
    listed.iter().map(|s| s.id.clone()).collect()
}

#[test]
fn the_limit_counts_running_and_starting_and_frees_places() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    let slot = place(&live, &team, 2).expect("the second place");
    assert_eq!(place(&live, &team, 2).expect_err("no third place"), AtLimit { limit: 2 });
    assert_eq!(live.count(&team, NOW), 2);
    drop(place(&live, &TeamId::random(), 1).expect("another team has its own"));
    drop(slot);
    drop(place(&live, &team, 2).expect("given back"));
    assert!(end(&live, &s));
    drop(place(&live, &team, 1).expect("the last one is gone"));
    assert_eq!(live.count(&team, NOW), 0);
    assert!(live.lock().teams.is_empty(), "a team with nothing costs nothing");
}

#[test]
fn whose_end_has_passed_takes_no_place() {
    let (live, team) = (Arc::new(Live::default()), team());
    add(&live, &team);
    assert!(live.reserve(&team, 1, NOW).is_err());
    drop(live.reserve(&team, 1, LATER).expect("its time is up"));
    assert!(live.reserve(&team, 1, NOW).is_err(), "the clock was set back");
}

#[test]
fn others_and_the_late_see_nothing() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    assert!(live.find(&s.id, &team, NOW).is_some());
    assert!(live.find(&s.id, &TeamId::random(), NOW).is_none());
    assert!(live.find(&s.id, &team, LATER).is_none());
    assert!(ids(&live, &team, LATER).is_empty());
    assert!(ids(&live, &TeamId::random(), NOW).is_empty());
    assert!(live.turn(&s.id, &TeamId::random(), NOW).is_none());
}

#[test]
fn one_caller_ends_a_sandbox() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    assert!(matches!(live.begin_end(&s.id, &TeamId::random(), NOW), Ending::Nothing));
    assert!(matches!(live.begin_end(&s.id, &team, NOW), Ending::Mine(_)));
    assert!(matches!(live.begin_end(&s.id, &team, NOW), Ending::Nothing));
    assert!(!live.hide_missing(&s.id, &s.execution));
    assert!(ids(&live, &team, NOW).is_empty());
    live.abort_end(&s.id, &s.execution);
    assert_eq!(ids(&live, &team, NOW), std::slice::from_ref(&s.id));
    assert!(live.hide_missing(&s.id, &s.execution));
    assert!(live.find(&s.id, &team, NOW).is_none());
    assert!(end(&live, &s));
}

#[test]
fn a_start_under_way_can_be_waited_for_by_its_team() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = sandbox(&team);
    let mut slot = starting(&live, &team, &s.id);
    assert!(matches!(live.begin_end(&s.id, &TeamId::random(), NOW), Ending::Nothing));
    let Ending::Busy(first) = live.begin_end(&s.id, &team, NOW) else { panic!("it is starting") };
    assert!(first.has_changed().is_ok(), "the attempt goes on");
    let again = sandbox(&team);
    slot.attempt(&again.id, NODE);
    assert!(first.has_changed().is_err(), "the first attempt is over");
    let Ending::Busy(second) = live.begin_end(&again.id, &team, NOW) else {
        panic!("it is starting")
    };
    slot.commit(again).expect("it did not end");
    assert!(second.has_changed().is_err(), "the start is over");
}

#[test]
fn an_end_seen_before_the_start_wins() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = sandbox(&team);
    let slot = starting(&live, &team, &s.id);
    assert!(!end(&live, &s));
    assert_eq!(slot.commit(Arc::clone(&s)), Err(EndedEarly));
    assert!(live.marks(NODE).is_empty());
    assert_eq!(live.count(&team, NOW), 0);
}

#[test]
fn a_moved_end_is_where_it_is_looked_for() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    assert!(live.move_end(&s.id, &ExecutionId::random(), UnixMillis(9_000)).is_none());
    let moved = live.move_end(&s.id, &s.execution, UnixMillis(9_000)).expect("it is there");
    assert_eq!(moved.end_at, UnixMillis(9_000));
    assert_eq!(live.count(&team, LATER), 1);
    assert_eq!(ids(&live, &team, LATER), std::slice::from_ref(&s.id));
    assert_eq!(live.count(&team, UnixMillis(9_000)), 0);
    assert!(end(&live, &s));
    assert!(live.lock().teams.is_empty());
}

#[test]
fn a_page_costs_what_it_shows() {
    const MANY: usize = 10_000;
    let (live, team) = (Arc::new(Live::default()), team());
    for n in 0..MANY {
        let at = UnixMillis(i64::try_from(n).expect("a small number"));
        let s = sandbox_at(&team, at, LATER.plus(Duration::from_secs(60)));
        starting(&live, &team, &s.id).commit(s).expect("it did not end");
    }
    let (mut after, mut seen) = (None, 0);
    loop {
        let range = Range { order: Order::NewestFirst, after, started_from: None };
        let (page, total) = live.page(&team, NOW, &range, RUNNING, 100);
        assert_eq!(total, MANY);
        let Some(last) = page.last() else { break };
        seen += page.len();
        after = Some((last.started_at, last.id.clone()));
    }
    assert_eq!(seen, MANY);
}

#[test]
fn a_reconcile_follows_the_node() {
    let (live, team) = (Arc::new(Live::default()), team());
    let (kept, lost, stranger) = (add(&live, &team), add(&live, &team), sandbox(&team));
    let before = live.marks(NODE);
    let mut moved = observed(&kept);
    moved.end_at = UnixMillis(9_000);
    let now = Instant::now();
    let difference = live.observe(NODE, &before, vec![moved, observed(&stranger)], now);
    assert_eq!(difference.missing, std::slice::from_ref(&lost));
    assert!(live.find(&lost.id, &team, NOW).is_none(), "hidden at once");
    assert_eq!(difference.moved.len(), 1);
    assert_eq!(difference.unknown, [observed(&stranger)]);
    assert_eq!(live.find(&kept.id, &team, NOW).expect("kept").end_at, UnixMillis(9_000));
    assert_eq!(live.count(&team, LATER), 1);

    let look = |now| {
        let kept = live.find(&kept.id, &team, NOW).expect("kept");
        live.observe(NODE, &live.marks(NODE), vec![observed(&kept)], now)
    };
    let early = look(now + NOTICE_WAIT / 2);
    assert_eq!((early.missing.len(), early.gone.len()), (1, 0), "the node may yet say why");
    let late = look(now + NOTICE_WAIT);
    assert_eq!((late.missing.len(), late.gone), (0, vec![lost]));
}

#[test]
fn who_is_missing_while_it_is_killed_waits_for_the_answer() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    assert!(matches!(live.begin_end(&s.id, &team, NOW), Ending::Mine(_)));
    let difference = live.observe(NODE, &live.marks(NODE), vec![], Instant::now());
    assert!(difference.gone.is_empty(), "{difference:?}");
    assert!(end(&live, &s), "whoever killed it says so");
}

#[test]
fn what_one_node_holds_is_not_asked_of_another() {
    let (live, team, other) = (Arc::new(Live::default()), team(), NodeIx(1));
    let s = add(&live, &team);
    assert!(live.marks(other).is_empty());
    let difference = live.observe(other, &live.marks(other), vec![], Instant::now());
    assert!(difference.gone.is_empty(), "{difference:?}");
    // The same id on another node is nobody's.
    let difference = live.observe(other, &live.marks(other), vec![observed(&s)], Instant::now());
    assert_eq!(difference.unknown, [observed(&s)]);
    assert!(live.find(&s.id, &team, NOW).is_some());
}

#[test]
fn a_stale_answer_undoes_nothing() {
    let (live, team) = (Arc::new(Live::default()), team());
    let (moved, ended) = (add(&live, &team), add(&live, &team));
    let first = sandbox(&team);
    let slot = starting(&live, &team, &first.id);
    let before = live.marks(NODE);
    let answer = vec![observed(&moved), observed(&ended), observed(&first)];
    let born = add(&live, &team);
    live.move_end(&moved.id, &moved.execution, UnixMillis(9_000)).expect("it was there");
    assert!(end(&live, &ended));
    let difference = live.observe(NODE, &before, answer, Instant::now());
    assert!(difference.gone.is_empty(), "{difference:?}");
    assert!(difference.moved.is_empty(), "{difference:?}");
    assert!(difference.unknown.is_empty(), "{difference:?}");
    assert!(live.find(&born.id, &team, NOW).is_some());
    assert_eq!(live.find(&moved.id, &team, NOW).expect("kept").end_at, UnixMillis(9_000));
    slot.commit(first).expect("it did not end");
}

fn saved(at: i64) -> Arc<Saved> {
    Arc::new(Saved {
        snapshot: BuildId::random(),
        at: UnixMillis(at),
        filesystem_only: false,
        guest_unresponsive: false,
        own_bytes: 4096,
    })
}

fn pause(live: &Live, team: &TeamId, s: &Sandbox, saved: &Arc<Saved>) -> Arc<Sandbox> {
    assert!(matches!(live.begin_pause(&s.id, team, NOW), Pausing::Mine(_)));
    match live.paused(&s.id, &s.execution, Arc::clone(saved)) {
        Heard::Paused { is, .. } => is,
        other => panic!("it is paused: {other:?}"),
    }
}

fn resume(live: &Arc<Live>, team: &TeamId, paused: &Arc<Sandbox>) -> Arc<Sandbox> {
    let slot = place(live, team, 10_000).expect("a free place");
    let execution = ExecutionId::random();
    assert!(live.begin_resume(paused, &execution));
    let run = Arc::new(Sandbox { execution, asleep_since: None, ..(**paused).clone() });
    assert!(live.resumed(slot, &run));
    run
}

#[test]
fn a_pause_and_a_resume_keep_the_id_and_free_the_place_meanwhile() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    assert!(matches!(live.begin_pause(&s.id, &team, NOW), Pausing::Mine(_)));
    assert!(matches!(live.begin_pause(&s.id, &team, NOW), Pausing::Already));
    assert_eq!(live.count(&team, NOW), 0, "it is seen as paused, and takes no place");
    let seen = live.find(&s.id, &team, NOW).expect("it is there");
    assert_eq!((seen.asleep_since, seen.pause()), (Some(NOW), None), "nothing is kept yet");
    live.abort_pause(&s);
    assert_eq!(live.find_running(&s.id, &team, NOW), Some(Arc::clone(&s)));

    let kept = saved(1_500);
    let paused = pause(&live, &team, &s, &kept);
    assert_eq!(paused.pause(), Some(&*kept));
    assert_eq!(live.count(&team, NOW), 0);
    assert!(live.find_running(&s.id, &team, NOW).is_none());
    // Long after its end would have been.
    let listed = live.list(&team, UnixMillis(9_999), &all(Order::OldestFirst), PAUSED);
    assert_eq!(listed, std::slice::from_ref(&paused));
    assert!(live.all().is_empty());
    let run = resume(&live, &team, &paused);
    assert_ne!(run.execution, s.execution);
    assert_eq!(live.find(&s.id, &team, NOW), Some(run));
    assert_eq!(live.count(&team, NOW), 1);
}

#[test]
fn of_two_resumes_one_goes_through_and_the_other_waits() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    let paused = pause(&live, &team, &s, &saved(1_500));
    assert!(live.begin_resume(&paused, &ExecutionId::random()));
    assert!(!live.begin_resume(&paused, &ExecutionId::random()));
    let Rousing::Busy(over) = live.rouse(&s.id, &team, NOW) else { panic!("it is resuming") };
    let Ending::Busy(kill) = live.begin_end(&s.id, &team, NOW) else { panic!("it is resuming") };
    live.abort_resume(&s.id);
    assert!(over.has_changed().is_err() && kill.has_changed().is_err(), "that is over");
    assert!(matches!(live.rouse(&s.id, &team, NOW), Rousing::Paused(_)));
    assert!(matches!(live.rouse(&s.id, &TeamId::random(), NOW), Rousing::Nothing));
}

#[test]
fn a_resumed_run_that_is_lost_leaves_what_it_came_from() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    let kept = saved(1_500);
    let paused = pause(&live, &team, &s, &kept);
    let run = resume(&live, &team, &paused);
    let Ended::Paused(again) = live.ended(&run.id, &run.execution, true) else {
        panic!("it is paused again")
    };
    assert_eq!(again.pause(), Some(&*kept));
    let run = resume(&live, &team, &again);
    assert!(matches!(live.ended(&run.id, &run.execution, false), Ended::Gone(_)));
    assert!(live.find(&s.id, &team, NOW).is_none());
}

#[test]
fn a_resumed_run_that_ends_before_its_answer_is_not_shown() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    let paused = pause(&live, &team, &s, &saved(1_500));
    let slot = place(&live, &team, 1).expect("a free place");
    let execution = ExecutionId::random();
    assert!(live.begin_resume(&paused, &execution));
    assert!(matches!(live.ended(&s.id, &execution, false), Ended::NotHere));
    let run = Arc::new(Sandbox { execution, asleep_since: None, ..(*paused).clone() });
    assert!(!live.resumed(slot, &run));
    assert_eq!(live.find(&s.id, &team, NOW), Some(paused));
    assert_eq!(live.count(&team, NOW), 0);
}

#[test]
fn a_pause_that_is_told_twice_disturbs_no_resume() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    let kept = saved(1_500);
    let paused = pause(&live, &team, &s, &kept);
    let again = || live.paused(&s.id, &s.execution, Arc::clone(&kept));
    assert!(matches!(again(), Heard::NotHere));
    let slot = place(&live, &team, 1).expect("a free place");
    let execution = ExecutionId::random();
    assert!(live.begin_resume(&paused, &execution));
    assert!(matches!(again(), Heard::NotHere));
    let run = Arc::new(Sandbox { execution, asleep_since: None, ..(*paused).clone() });
    assert!(live.resumed(slot, &run));
    assert!(matches!(again(), Heard::NotHere));
    assert_eq!(live.find_running(&s.id, &team, NOW), Some(run));
}

#[test]
fn what_was_missing_and_turns_out_to_be_paused_is_not_lost() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    assert!(live.hide_missing(&s.id, &s.execution));
    assert!(live.find(&s.id, &team, NOW).is_none());
    let heard = live.paused(&s.id, &s.execution, saved(1_500));
    assert!(matches!(heard, Heard::Paused { .. }), "{heard:?}");
    // A kill was asked for: then there is nothing to keep.
    let s = add(&live, &team);
    assert!(matches!(live.begin_end(&s.id, &team, NOW), Ending::Mine(_)));
    let kept = saved(1_500);
    let heard = live.paused(&s.id, &s.execution, Arc::clone(&kept));
    assert!(matches!(heard, Heard::Unwanted(_)), "{heard:?}");
    assert!(live.discarded(&s.id, &kept.snapshot).is_some());
}

#[test]
fn a_run_of_a_paused_sandbox_that_turns_up_is_taken_for_it() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = add(&live, &team);
    let kept = saved(1_500);
    let paused = pause(&live, &team, &s, &kept);
    let before = live.marks(NODE);
    let mut stray = observed(&s);
    stray.execution = ExecutionId::random();
    let difference = live.observe(NODE, &before, vec![stray.clone()], Instant::now());
    assert_eq!(difference.unknown, std::slice::from_ref(&stray));
    assert!(live.takes(&s.id));
    let run = live.adopt(Sandbox::new(NODE, stray, paused.terms())).expect("it is taken");
    assert_eq!(run.saved.as_deref(), Some(&*kept));
    assert!(live.find_running(&s.id, &team, NOW).is_some());
}

#[test]
fn what_the_store_thinks_is_running_is_paused_again_when_its_run_is_lost() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = sandbox(&team);
    let paused = Arc::new(s.asleep_as(saved(1_500)));
    live.remember_resumed(Arc::clone(&paused));
    assert!(live.find(&s.id, &team, NOW).is_none());
    assert_eq!(live.saved().len(), 1);
    let ended = live.ended(&s.id, &ExecutionId::random(), true);
    assert!(matches!(ended, Ended::Paused(_)), "{ended:?}");
    assert_eq!(live.find(&s.id, &team, NOW), Some(Arc::clone(&paused)));
    // A newer pause counts, an older one does not.
    assert_eq!(live.adopt_paused(Arc::new(s.asleep_as(saved(1_400)))), Err(Occupied));
    let newer = Arc::new(s.asleep_as(saved(1_600)));
    assert_eq!(live.adopt_paused(newer), Ok(paused.saved.clone()));
}
