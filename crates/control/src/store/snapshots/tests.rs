use std::collections::BTreeMap;
use std::sync::Arc;

use belljar_domain::Secret;

use super::super::testing::{Bench, on_both};
use super::super::{EventsWanted, TeamError};
use super::*;
use crate::event::tests::run;
use crate::live::Saved;
use crate::live::tests::sandbox_at;
use crate::writer::{Change, Noted};

const START: UnixMillis = UnixMillis(1_000);
const END: UnixMillis = UnixMillis(9_000);

fn kept(team: &TeamId, at: i64) -> Kept {
    let sandbox = sandbox_at(team, START, END);
    Kept {
        id: BuildId::random(),
        sandbox: sandbox.id.clone(),
        execution: sandbox.execution.clone(),
        template: sandbox.template.clone(),
        build: sandbox.build.clone(),
        is_pause: false,
        filesystem_only: true,
        guest_unresponsive: false,
        vcpus: Vcpus(2),
        memory: MiB(512),
        disk: MiB(1024),
        envd_version: "0.6.13".into(),
        terms: "{}".to_owned(),
        started_at: START,
        created_at: UnixMillis(at),
        own_bytes: 1 << 40,
        uploaded: false,
    }
}

fn record(team: &TeamId, name: Option<(&str, &str)>, at: i64) -> SnapshotRecord {
    let name = name.map(|(name, tag)| SnapshotName { name: name.to_owned(), tag: tag.to_owned() });
    let template = TemplateId::random();
    SnapshotRecord { team: team.clone(), template, name, kept: kept(team, at) }
}

/// A running sandbox with a secret, and the same as it is paused.
fn pair(team: &TeamId) -> (Arc<Sandbox>, Arc<Sandbox>) {
    let env_vars = BTreeMap::from([("KEY".to_owned(), "secret".to_owned())]);
    let env_vars = Arc::new(Secret::new(env_vars));
    let running = Arc::new(Sandbox { env_vars, ..(*sandbox_at(team, START, END)).clone() });
    let paused = Arc::new(running.asleep_as(saved(5_000)));
    (running, paused)
}

fn saved(at: i64) -> Arc<Saved> {
    Arc::new(Saved {
        snapshot: BuildId::random(),
        at: UnixMillis(at),
        filesystem_only: false,
        guest_unresponsive: true,
        own_bytes: 7,
    })
}

async fn write(store: &Store, changes: impl IntoIterator<Item = Change>) {
    let noted = changes.into_iter().map(|change| Noted { at: UnixMillis(5_000), change });
    store.apply(&noted.collect::<Vec<_>>()).await.expect("they are written");
}

async fn labels(store: &Store, team: &TeamId) -> Vec<&'static str> {
    let wanted = EventsWanted {
        sandbox: None,
        kinds: Vec::new(),
        oldest_first: true,
        offset: 0,
        limit: 100,
    };
    let events = store.events(team, &wanted).await.expect("events");
    let mut events: Vec<_> = events.iter().map(|event| (event.at, event.kind.label())).collect();
    events.sort_unstable();
    events.into_iter().map(|(_, label)| label).collect()
}

#[tokio::test]
async fn a_pause_is_kept_with_what_a_resume_needs() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let team = store.ensure_team("default").await.expect("a team").id;
        let (running, paused) = pair(&team);
        let changes = [Change::Started(Arc::clone(&running)), Change::Paused(Arc::clone(&paused))];
        write(&store, changes.clone()).await;
        write(&store, changes).await;
        assert_eq!(labels(&store, &team).await, ["create", "pause"]);
        assert!(store.running().await.expect("rows").is_empty());
        assert_eq!(
            store.end_of(&running.execution).await.expect("a reason"),
            Some(Some("paused".to_owned()))
        );
        assert_eq!(store.end_of(&ExecutionId::random()).await.expect("none"), None);
        store.close().await;

        let store = bench.store().await;
        let rows = store.paused().await.expect("rows");
        let [row] = rows.as_slice() else { panic!("one row: {rows:?}") };
        assert!(!row.runs);
        let terms = terms::read(&row.kept.terms).expect("its terms").terms;
        assert_eq!(terms.env_vars.expose()["KEY"], "secret");
        assert_eq!(
            Sandbox::paused(running.node, &row.kept, terms),
            Sandbox {
                ip: std::net::Ipv4Addr::UNSPECIFIED.into(),
                end_at: UnixMillis(5_000),
                ..(*paused).clone()
            }
        );
        // What is paused outlives the row of its run.
        assert_eq!(store.prune_runs(UnixMillis(i64::MAX), 100).await.expect("it prunes"), 1);
        assert_eq!(store.paused().await.expect("rows").len(), 1);
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_resumed_run_keeps_the_row_it_came_from_until_its_next_pause_or_its_end() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let team = store.ensure_team("default").await.expect("a team").id;
        let (running, paused) = pair(&team);
        let first = paused.saved.clone().expect("a pause");
        let again = |start: i64| {
            let execution = ExecutionId::random();
            let started_at = UnixMillis(start);
            Arc::new(Sandbox { execution, started_at, asleep_since: None, ..(*paused).clone() })
        };
        let resumed = again(6_000);
        write(&store, [Change::Started(running), Change::Paused(Arc::clone(&paused))]).await;
        write(&store, [Change::Started(Arc::clone(&resumed))]).await;
        let rows = store.paused().await.expect("rows");
        assert!(matches!(rows.as_slice(), [row] if row.runs && row.kept.id == first.snapshot));
        // Lost with its node: what it came from stands for it again.
        let (execution, at) = (resumed.execution.clone(), UnixMillis(7_000));
        write(&store, [Change::Lapsed { execution, at, reason: "lost" }]).await;
        let rows = store.paused().await.expect("rows");
        assert!(matches!(rows.as_slice(), [row] if !row.runs && row.kept.id == first.snapshot));
        // The next pause replaces it.
        let next = again(7_500);
        let second = saved(8_000);
        let paused_again = Arc::new(next.asleep_as(Arc::clone(&second)));
        write(&store, [Change::Started(Arc::clone(&next)), Change::Paused(paused_again)]).await;
        let ids = store.snapshot_ids().await.expect("ids");
        assert_eq!(ids.into_iter().collect::<Vec<_>>(), [second.snapshot.to_string()]);
        let labels = labels(&store, &team).await;
        assert_eq!(labels, ["create", "pause", "resume", "pause", "resume", "pause"]);
        // The end for good of a run takes what it came from with it.
        let last = again(8_500);
        let (execution, at) = (last.execution.clone(), UnixMillis(8_600));
        let end = Change::Ended { execution, at, reason: "killed" };
        write(&store, [Change::Started(last), end]).await;
        assert!(store.paused().await.expect("rows").is_empty());
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_paused_sandbox_is_killed_once_and_keeps_its_team() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let team = store.ensure_team("default").await.expect("a team").id;
        let (running, paused) = pair(&team);
        write(&store, [Change::Started(running), Change::Paused(Arc::clone(&paused))]).await;
        let refused = store.delete_team(&team).await;
        assert!(matches!(refused, Err(TeamError::HasSandboxes { running: 1 })), "{refused:?}");
        let at = UnixMillis(6_000);
        let discarded = Change::Discarded { sandbox: paused, at, reason: "killed" };
        write(&store, [discarded.clone(), discarded]).await;
        assert_eq!(labels(&store, &team).await, ["create", "pause", "kill"]);
        assert!(store.paused().await.expect("rows").is_empty());
        store.delete_team(&team).await.expect("nothing is left");
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_is_found_by_id_and_name_and_a_newer_one_takes_the_name() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let team = store.ensure_team("default").await.expect("a team").id;
        let other = store.ensure_team("other").await.expect("a team").id;
        let old = record(&team, Some(("work", "v1")), 1);
        let new = record(&team, Some(("work", "v1")), 2);
        for record in [&old, &new] {
            assert!(store.add_snapshot(record, run(&team)).await.expect("it is written"));
        }
        let foreign = record(&other, Some(("work", "v1")), 3);
        assert!(store.add_snapshot(&foreign, run(&other)).await.expect("another team's name"));
        let named = SnapshotKey::Name { name: "work", tag: "v1" };
        let find = async |team: &TeamId, key| store.snapshot(team, key).await.expect("a lookup");
        assert_eq!(find(&team, named).await, Some(new.clone()));
        let by_id = find(&team, SnapshotKey::Template(old.template.as_str())).await;
        assert_eq!(by_id, Some(SnapshotRecord { name: None, ..old.clone() }));
        assert_eq!(find(&other, SnapshotKey::Template(old.template.as_str())).await, None);
        assert_eq!(find(&team, SnapshotKey::Name { name: "work", tag: "v2" }).await, None);
        assert_eq!(labels(&store, &team).await, ["checkpoint", "checkpoint"]);
        assert!(store.delete_snapshot(&new.kept.id).await.expect("it is removed"));
        assert!(!store.delete_snapshot(&new.kept.id).await.expect("once"));
        assert_eq!(find(&team, named).await, None);
        let gone = record(&TeamId::random(), None, 4);
        assert!(!store.add_snapshot(&gone, run(&team)).await.expect("no such team"));
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn snapshots_are_listed_newest_first_in_pages_and_by_what_they_are_of() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let team = store.ensure_team("default").await.expect("a team").id;
        let mut made = Vec::new();
        for (at, name) in [(1, None), (2, Some(("a", "x"))), (2, Some(("a", "y"))), (3, None)] {
            let record = record(&team, name, at);
            assert!(store.add_snapshot(&record, run(&team)).await.expect("it is written"));
            made.push(record);
        }
        let list = async |wanted: SnapshotsWanted| {
            let found = store.snapshots(&team, &wanted).await.expect("a page");
            found.into_iter().map(|record| record.kept.id).collect::<Vec<_>>()
        };
        let all = list(SnapshotsWanted { limit: 9, ..SnapshotsWanted::default() }).await;
        assert_eq!(all.len(), 4);
        assert_eq!((&all[0], &all[3]), (&made[3].kept.id, &made[0].kept.id));
        let (mut after, mut paged) = (None, Vec::new());
        loop {
            let wanted = SnapshotsWanted { after, limit: 1, ..SnapshotsWanted::default() };
            let [id] = list(wanted).await.try_into().unwrap_or_else(|_| [BuildId::random()]);
            let Some(found) = made.iter().find(|record| record.kept.id == id) else { break };
            after = Some((found.kept.created_at, id.to_string()));
            paged.push(id);
        }
        assert_eq!(paged, all);
        let base = SnapshotsWanted { limit: 9, ..SnapshotsWanted::default() };
        let sandbox = Some(made[0].kept.sandbox.clone());
        assert_eq!(list(SnapshotsWanted { sandbox, ..base.clone() }).await.len(), 1);
        let name = Some("a".to_owned());
        assert_eq!(list(SnapshotsWanted { name: name.clone(), ..base.clone() }).await.len(), 2);
        let tag = Some("y".to_owned());
        assert_eq!(list(SnapshotsWanted { name, tag, ..base }).await, [made[2].kept.id.clone()]);
        store.close().await;
    })
    .await;
}
