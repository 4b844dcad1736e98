//! What is too old or too much goes: events after their team's days, with their deliveries, and
//! the oldest deliveries of a webhook that is far behind.

use std::convert::Infallible;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::UnixMillis;
use tracing::{debug, info, warn};

use crate::store::{Store, StoreError};

/// Events removed by one statement, so that writers never wait long.
const BATCH: u32 = 500;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(20);
/// Deliveries that may wait for one webhook: days of a busy team, minutes of a flood.
const MAX_WAITING: u32 = 10_000;

/// Removes what is due, now and every `interval`, until dropped.
pub(crate) async fn run(store: Store, interval: Duration) -> Result<(), Infallible> {
    let mut due = tokio::time::interval(interval);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if let Err(e) = prune(&store, clock::now()).await {
            let reason = std::error::Error::source(&e).map(ToString::to_string);
            debug!(error = %e, reason, "old events were not removed; the next time does");
        }
    }
}

async fn prune(store: &Store, now: UnixMillis) -> Result<(), StoreError> {
    for (team, keep) in store.event_retention().await? {
        let keep_ms = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        let before = UnixMillis(now.0.saturating_sub(keep_ms));
        let mut removed = 0;
        loop {
            let batch = store.remove_events(&team, before, BATCH).await?;
            removed += batch;
            if batch < u64::from(BATCH) {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        if removed > 0 {
            info!(%team, removed, "removed old events");
        }
    }
    for webhook in store.far_behind(MAX_WAITING).await? {
        let dropped = store.drop_backlog(&webhook, MAX_WAITING, now).await?;
        warn!(webhook, dropped, "a webhook is too far behind; its oldest deliveries are given up");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use crate::event::tests::run as a_run;
    use crate::store::testing::{Bench, on_both};
    use crate::store::{DeliveriesWanted, EventsWanted};

    const DAY_MS: i64 = 86_400_000;

    #[tokio::test]
    async fn events_go_after_their_teams_days_with_their_deliveries() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let short = store.ensure_team("short").await.expect("a team").id;
            let long = store.ensure_team("long").await.expect("a team").id;
            store.set_limits_text(&long, r#"{"events_ttl_days":400}"#).await;
            let webhook = store.a_webhook(&short).await;
            let now = UnixMillis(1_700_000_000_000);
            for team in [&short, &long] {
                for days in [0, 6, 8, 364, 366] {
                    let mut run = a_run(team);
                    run.started_at = UnixMillis(now.0 - days * DAY_MS);
                    store.record(&Event::created(run)).await;
                }
            }
            prune(&store, now).await.expect("it works");
            let wanted = EventsWanted {
                sandbox: None,
                kinds: Vec::new(),
                oldest_first: false,
                offset: 0,
                limit: 100,
            };
            let left = |events: Vec<Event>| -> Vec<i64> {
                events.iter().map(|event| (now.0 - event.at.0) / DAY_MS).collect()
            };
            let short = store.events(&short, &wanted).await.expect("a list");
            assert_eq!(left(short), [0, 6]);
            let long = store.events(&long, &wanted).await.expect("a list");
            assert_eq!(left(long), [0, 6, 8, 364]);
            let all = DeliveriesWanted { state: None, oldest_first: true, offset: 0, limit: 100 };
            assert_eq!(store.deliveries(&webhook, &all).await.expect("a list").len(), 2);
            store.close().await;
        })
        .await;
    }
}
