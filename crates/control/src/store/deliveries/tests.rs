use super::*;
use crate::event::Run;
use crate::event::tests::run as a_run;
use crate::store::WebhookChange;
use crate::store::testing::{Bench, on_both};

const NOW: UnixMillis = UnixMillis(2_000_000_000_000);
const LEASE: Duration = Duration::from_secs(15);
const ALL: DeliveriesWanted =
    DeliveriesWanted { state: None, oldest_first: true, offset: 0, limit: 100 };

fn later(seconds: u64) -> UnixMillis {
    NOW.plus(Duration::from_secs(seconds))
}

fn after(state: Next, attempts: u32) -> After {
    After { state, attempts, last_status: Some(500), last_error: Some("it broke".to_owned()) }
}

async fn team_with_webhook(store: &Store) -> (TeamId, String) {
    let team = store.ensure_team("default").await.expect("a team").id;
    let webhook = store.a_webhook(&team).await;
    (team, webhook)
}

/// Starts and ends a run: two events.
async fn live_and_die(store: &Store, run: &Run) {
    store.record(&Event::created(run.clone())).await;
    store.record(&Event::killed(run.clone(), NOW, "killed")).await;
}

async fn take(store: &Store, webhook: &str, now: UnixMillis) -> Vec<Taken> {
    store.take_deliveries(webhook, 10, now, LEASE).await.expect("a look")
}

fn kinds(taken: &[Taken]) -> Vec<EventType> {
    taken.iter().map(|taken| taken.event.kind).collect()
}

#[tokio::test]
async fn a_sandboxs_events_go_one_after_the_other_and_others_beside_them() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let (team, webhook) = team_with_webhook(&store).await;
        let (one, other) = (a_run(&team), a_run(&team));
        live_and_die(&store, &one).await;
        live_and_die(&store, &other).await;
        let first = take(&store, &webhook, NOW).await;
        assert_eq!(kinds(&first), [EventType::Created, EventType::Created]);
        assert_eq!(first[0].event, Event::created(one.clone()));
        assert!(take(&store, &webhook, NOW).await.is_empty(), "they are taken");
        let retried = after(Next::Pending { due: later(10) }, 1);
        store
            .finish_delivery(&first[0].id, first[0].leased_until, &retried, NOW)
            .await
            .expect("a note");
        store
            .finish_delivery(&first[1].id, first[1].leased_until, &after(Next::Delivered, 1), NOW)
            .await
            .expect("a note");
        let second = take(&store, &webhook, NOW).await;
        assert_eq!(second.len(), 1, "the first sandbox waits for its retry: {second:?}");
        assert_eq!(second[0].event.sandbox, other.sandbox);
        let retry = take(&store, &webhook, later(10)).await;
        assert_eq!((retry.len(), retry[0].attempts), (1, 1));
        assert_eq!(retry[0].id, first[0].id);
        store
            .finish_delivery(&retry[0].id, retry[0].leased_until, &after(Next::Dead, 4), NOW)
            .await
            .expect("a note");
        assert_eq!(kinds(&take(&store, &webhook, later(10)).await), [EventType::Killed]);
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn what_a_dead_server_had_is_free_when_its_lease_is_over() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let (team, webhook) = team_with_webhook(&store).await;
        store.record(&Event::created(a_run(&team))).await;
        let first = take(&store, &webhook, NOW).await;
        assert!(store.waiting("", later(14), 10).await.expect("a look").is_empty());
        assert!(take(&store, &webhook, later(14)).await.is_empty());
        assert_eq!(store.waiting("", later(15), 10).await.expect("a look").len(), 1);
        let second = take(&store, &webhook, later(15)).await;
        assert_eq!((&second[0].id, &second[0].event), (&first[0].id, &first[0].event));
        // The server that was thought dead has nothing to say about what another one took.
        let (id, lost) = (&first[0].id, first[0].leased_until);
        store.release_delivery(id, lost).await.expect("no harm");
        store.finish_delivery(id, lost, &after(Next::Dead, 1), NOW).await.expect("no harm");
        assert!(take(&store, &webhook, later(15)).await.is_empty(), "it is the second one's");
        store.release_delivery(id, second[0].leased_until).await.expect("given back");
        let first = take(&store, &webhook, later(16)).await;
        assert_eq!(first[0].id, second[0].id);
        store
            .finish_delivery(&first[0].id, first[0].leased_until, &after(Next::Delivered, 1), NOW)
            .await
            .expect("a note");
        // The server that was thought dead comes back late with another story.
        store
            .finish_delivery(&first[0].id, first[0].leased_until, &after(Next::Dead, 1), NOW)
            .await
            .expect("no harm");
        let shown = store.deliveries(&webhook, &ALL).await.expect("a list");
        assert_eq!(shown[0].state, DeliveryState::Delivered);
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_clock_set_back_holds_nothing_up() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let (team, webhook) = team_with_webhook(&store).await;
        store.record(&Event::created(a_run(&team))).await;
        assert_eq!(take(&store, &webhook, later(86_400)).await.len(), 1);
        assert_eq!(take(&store, &webhook, NOW).await.len(), 1);
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn of_two_servers_each_takes_its_own() {
    on_both(async |bench: Bench| {
        let (store, second) = (bench.store().await, bench.store().await);
        let (team, webhook) = team_with_webhook(&store).await;
        for _ in 0..40 {
            store.record(&Event::created(a_run(&team))).await;
        }
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10 {
            let (a, b) = tokio::join!(
                store.take_deliveries(&webhook, 3, NOW, LEASE),
                second.take_deliveries(&webhook, 3, NOW, LEASE),
            );
            for taken in a.expect("a look").into_iter().chain(b.expect("a look")) {
                assert!(seen.insert(taken.id), "one delivery was taken twice");
            }
        }
        // Of two looks at the same moment, one may find its choice taken.
        let rest = take(&store, &webhook, NOW).await.len();
        assert!(seen.len() >= 30 && seen.len() + rest == 40, "{} and {rest}", seen.len());
        store.close().await;
        second.close().await;
    })
    .await;
}

#[tokio::test]
async fn only_wanted_events_of_the_own_team_are_queued_once() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let (team, webhook) = team_with_webhook(&store).await;
        let other = store.ensure_team("other").await.expect("a team").id;
        let kills = store.a_webhook(&team).await;
        let only_kills =
            WebhookChange { kinds: Some(vec![EventType::Killed]), ..Default::default() };
        store.change_webhook(&team, &kills, &only_kills, NOW).await.expect("a change");
        let off = store.a_webhook(&team).await;
        let switched_off = WebhookChange { enabled: Some(false), ..Default::default() };
        store.change_webhook(&team, &off, &switched_off, NOW).await.expect("a change");
        let run = a_run(&team);
        live_and_die(&store, &run).await;
        live_and_die(&store, &run).await;
        store.record(&Event::created(a_run(&other))).await;
        for (id, expected) in [(&webhook, 2), (&kills, 1), (&off, 0)] {
            let queued = store.deliveries(id, &ALL).await.expect("a list");
            assert_eq!(queued.len(), expected, "{queued:?}");
        }
        // What waits for a webhook that is switched off is given up, and can be asked for again.
        store.change_webhook(&team, &kills, &switched_off, NOW).await.expect("a change");
        let dead = store.deliveries(&kills, &ALL).await.expect("a list").remove(0);
        assert_eq!(dead.state, DeliveryState::Dead);
        assert!(store.revive(&kills, &dead.id, NOW).await.expect("it works"));
        assert!(!store.revive(&kills, &dead.id, NOW).await.expect("it works"));
        assert!(!store.revive(&webhook, &dead.id, NOW).await.expect("it works"));
        assert!(store.remove_webhook(&team, &kills).await.expect("it works"));
        assert!(store.deliveries(&kills, &ALL).await.expect("a list").is_empty());
        assert!(!store.remove_webhook(&other, &webhook).await.expect("it works"));
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn lists_are_filtered_ordered_and_paged() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let (team, webhook) = team_with_webhook(&store).await;
        for _ in 0..3 {
            live_and_die(&store, &a_run(&team)).await;
        }
        let all = store.deliveries(&webhook, &ALL).await.expect("a list");
        assert_eq!(all.len(), 6);
        store
            .finish_delivery(&all[1].id, UnixMillis(0), &after(Next::Dead, 4), NOW)
            .await
            .expect("a note");
        let dead = DeliveriesWanted { state: Some(DeliveryState::Dead), ..ALL };
        let dead = store.deliveries(&webhook, &dead).await.expect("a list");
        assert_eq!(dead.len(), 1);
        let one = store.delivery(&webhook, &all[1].id).await.expect("a look").expect("it is there");
        assert_eq!(dead[0], one);
        assert_eq!((one.attempts, one.last_status), (4, Some(500)));
        assert_eq!(one.last_error.as_deref(), Some("it broke"));
        let page = DeliveriesWanted { oldest_first: false, offset: 4, limit: 1, ..ALL };
        let page = store.deliveries(&webhook, &page).await.expect("a list");
        assert_eq!((page.len(), &page[0]), (1, &one));
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_webhook_far_behind_loses_its_oldest() {
    on_both(async |bench: Bench| {
        let store = bench.store().await;
        let (team, webhook) = team_with_webhook(&store).await;
        for _ in 0..5 {
            store.record(&Event::created(a_run(&team))).await;
        }
        assert!(store.far_behind(5).await.expect("a look").is_empty());
        let behind = store.far_behind(4).await.expect("a look");
        assert_eq!(behind, std::slice::from_ref(&webhook));
        assert_eq!(store.drop_backlog(&webhook, 4, NOW).await.expect("it works"), 1);
        let all = store.deliveries(&webhook, &ALL).await.expect("a list");
        let dead: Vec<bool> = all.iter().map(|d| d.state == DeliveryState::Dead).collect();
        assert_eq!(dead, [true, false, false, false, false]);
        assert_eq!(store.drop_backlog(&webhook, 4, NOW).await.expect("it works"), 0);
        store.close().await;
    })
    .await;
}
