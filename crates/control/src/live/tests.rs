use std::net::Ipv4Addr;
use std::time::Duration;

use belljar_domain::{BuildId, MiB, TemplateId, Vcpus};

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

fn all(order: Order) -> Range {
    Range { order, after: None, started_from: None }
}

fn ids(live: &Live, team: &TeamId, now: UnixMillis) -> Vec<SandboxId> {
    let listed = live.list(team, now, &all(Order::OldestFirst));
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
    live.remove(&s.id, &s.execution).expect("it was there");
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
    assert!(live.remove(&s.id, &s.execution).is_some());
}

#[test]
fn a_start_under_way_can_be_waited_for_by_its_team() {
    let (live, team) = (Arc::new(Live::default()), team());
    let s = sandbox(&team);
    let mut slot = starting(&live, &team, &s.id);
    assert!(matches!(live.begin_end(&s.id, &TeamId::random(), NOW), Ending::Nothing));
    let Ending::StillStarting(first) = live.begin_end(&s.id, &team, NOW) else {
        panic!("it is starting")
    };
    assert!(first.has_changed().is_ok(), "the attempt goes on");
    let again = sandbox(&team);
    slot.attempt(&again.id, NODE);
    assert!(first.has_changed().is_err(), "the first attempt is over");
    let Ending::StillStarting(second) = live.begin_end(&again.id, &team, NOW) else {
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
    assert!(live.remove(&s.id, &s.execution).is_none());
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
    live.remove(&s.id, &s.execution).expect("it is there");
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
        let (page, total) = live.page(&team, NOW, &range, 100);
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
    assert_eq!(live.remove(&s.id, &s.execution), Some(s), "whoever killed it says so");
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
    live.remove(&ended.id, &ended.execution).expect("it was there");
    let difference = live.observe(NODE, &before, answer, Instant::now());
    assert!(difference.gone.is_empty(), "{difference:?}");
    assert!(difference.moved.is_empty(), "{difference:?}");
    assert!(difference.unknown.is_empty(), "{difference:?}");
    assert!(live.find(&born.id, &team, NOW).is_some());
    assert_eq!(live.find(&moved.id, &team, NOW).expect("kept").end_at, UnixMillis(9_000));
    slot.commit(first).expect("it did not end");
}
