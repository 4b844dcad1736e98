//! The courier: takes deliveries that are due and sends them, some at a time.
//!
//! Each round asks the store which webhooks have something due, takes as much for each as it has
//! free hands for, and leaves the rest there. A receiver that is slow holds its own hands only:
//! every webhook has its own few, every team some more, and all together have many.

use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use belljar_daemon::{OnError, Scope, clock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use super::attempt::{self, Patience};
use super::guard::Guard;
use super::send::{Parcel, Sender};
use crate::config::WebhookConfig;
use crate::metrics::{Delivery, DeliveryCounts};
use crate::store::{Store, StoreError, Taken, Waiting};
use crate::team::TeamId;

/// Deliveries on their way to one webhook at the same time.
const HANDS_PER_WEBHOOK: usize = 4;
/// Deliveries on their way to the webhooks of one team at the same time.
const HANDS_PER_TEAM: usize = 32;
/// Deliveries on their way at the same time.
const HANDS: usize = 512;
/// Webhooks looked at by one statement.
const PAGE: u32 = 64;
/// What a lease is longer than a try: time to write what became of it.
const LEASE_MARGIN: Duration = Duration::from_secs(5);

/// See the module's own words.
#[derive(Debug)]
pub(crate) struct Courier {
    store: Store,
    counts: DeliveryCounts,
    scope: Scope,
    sender: Sender,
    patience: Patience,
    poll_interval: Duration,
    lease: Duration,
    hands: Arc<Semaphore>,
    busy: Mutex<Busy>,
}

/// Deliveries on their way; none of 0.
#[derive(Debug, Default)]
struct Busy {
    webhooks: HashMap<String, usize>,
    teams: HashMap<TeamId, usize>,
}

impl Courier {
    /// Sends nothing yet. Tries run in `scope`, which gives those back that it interrupts.
    pub(crate) fn new(
        store: Store,
        config: &WebhookConfig,
        counts: DeliveryCounts,
        scope: &Scope,
    ) -> Arc<Courier> {
        let guard = Guard { allow_private: config.allow_private };
        Arc::new(Courier {
            store,
            counts,
            scope: scope.clone(),
            sender: Sender::new(guard, config.deadline),
            patience: Patience { retries: config.retries, wait: config.retry_wait },
            poll_interval: config.poll_interval,
            lease: config.deadline + LEASE_MARGIN,
            hands: Arc::new(Semaphore::new(HANDS)),
            busy: Mutex::default(),
        })
    }

    /// Delivers until dropped.
    pub(crate) async fn run(self: Arc<Self>) -> Result<(), Infallible> {
        loop {
            if let Err(e) = self.round().await {
                let reason = std::error::Error::source(&e).map(ToString::to_string);
                debug!(error = %e, reason, "deliveries were not looked for; the next round does");
            }
            // What other servers write, and what is tried again, is found by looking.
            let _told_or_due =
                tokio::time::timeout(self.poll_interval, self.store.deliveries_due().notified())
                    .await;
        }
    }

    async fn round(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut after = String::new();
        loop {
            let page = self.store.waiting(&after, clock::now(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.webhook);
            for waiting in &page {
                // The trouble of one webhook is not that of those after it.
                if let Err(e) = self.serve(waiting).await {
                    let reason = std::error::Error::source(&e).map(ToString::to_string);
                    debug!(webhook = waiting.webhook, error = %e, reason, "nothing was taken");
                }
            }
        }
    }

    /// Takes what there are hands for and sends each on a task of its own.
    async fn serve(self: &Arc<Self>, waiting: &Waiting) -> Result<(), StoreError> {
        let mut hands = Vec::new();
        while let Some(hand) = self.hand(waiting) {
            hands.push(hand);
        }
        if hands.is_empty() {
            return Ok(());
        }
        let limit = u32::try_from(hands.len()).unwrap_or(u32::MAX);
        let now = clock::now();
        let taken = self.store.take_deliveries(&waiting.webhook, limit, now, self.lease).await?;
        for (delivery, hand) in taken.into_iter().zip(hands) {
            let (this, waiting) = (Arc::clone(self), waiting.clone());
            self.scope.spawn_shielded("webhook delivery", OnError::Log, async move {
                let outcome = this.deliver(&waiting, delivery).await;
                drop(hand);
                // The next one for the same sandbox waits for this one.
                this.store.deliveries_due().notify_one();
                outcome
            });
        }
        Ok(())
    }

    /// A free hand for a webhook.
    fn hand(self: &Arc<Self>, waiting: &Waiting) -> Option<Hand> {
        let permit = Arc::clone(&self.hands).try_acquire_owned().ok()?;
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let of_webhook = busy.webhooks.get(&waiting.webhook).copied().unwrap_or_default();
        let of_team = busy.teams.get(&waiting.team).copied().unwrap_or_default();
        if of_webhook >= HANDS_PER_WEBHOOK || of_team >= HANDS_PER_TEAM {
            return None;
        }
        busy.webhooks.insert(waiting.webhook.clone(), of_webhook + 1);
        busy.teams.insert(waiting.team.clone(), of_team + 1);
        Some(Hand {
            courier: Arc::clone(self),
            webhook: waiting.webhook.clone(),
            team: waiting.team.clone(),
            _permit: permit,
        })
    }

    async fn deliver(&self, waiting: &Waiting, taken: Taken) -> Result<(), StoreError> {
        let body =
            serde_json::to_vec(&taken.event.to_wire()).expect("times and words have a JSON form");
        let parcel = Parcel {
            webhook_id: waiting.webhook.clone(),
            delivery_id: taken.id.clone(),
            url: waiting.url.clone(),
            secret: waiting.secret.clone(),
            body,
        };
        let outcome = tokio::select! {
            outcome = self.sender.send(parcel) => outcome,
            () = self.scope.cancelled() => {
                return self.store.release_delivery(&taken.id, taken.leased_until).await;
            }
        };
        let now = clock::now();
        let after = attempt::after(taken.attempts, outcome, now, self.patience);
        self.counts.add(match after.state {
            attempt::Next::Delivered => Delivery::Delivered,
            attempt::Next::Pending { .. } => Delivery::Retried,
            attempt::Next::Dead => Delivery::Dead,
        });
        if after.state == attempt::Next::Dead {
            warn!(
                webhook = waiting.webhook,
                delivery = taken.id,
                reason = after.last_error,
                "a delivery is given up"
            );
        }
        self.store.finish_delivery(&taken.id, taken.leased_until, &after, now).await
    }
}

/// The right to send one delivery.
#[derive(Debug)]
struct Hand {
    courier: Arc<Courier>,
    webhook: String,
    team: TeamId,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Hand {
    fn drop(&mut self) {
        let mut busy = self.courier.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = &mut *busy;
        one_less(&mut busy.webhooks, &self.webhook);
        one_less(&mut busy.teams, &self.team);
    }
}

fn one_less<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::Bench;
    use belljar_domain::Secret;

    #[tokio::test]
    async fn a_webhook_has_few_hands_and_its_team_not_all() {
        let (bench, scope) = (Bench::sqlite(), Scope::root("test"));
        let store = bench.store().await;
        let counts = DeliveryCounts::default();
        let courier = Courier::new(store.clone(), &WebhookConfig::default(), counts, &scope);
        let waiting = |team: &TeamId, webhook: usize| Waiting {
            webhook: format!("{team}-{webhook}"),
            team: team.clone(),
            url: String::new(),
            secret: Secret::new(String::new()),
        };
        let (greedy, other) = (TeamId::random(), TeamId::random());
        let mut hands = Vec::new();
        for webhook in 0..100 {
            let before = hands.len();
            hands.extend(std::iter::from_fn(|| courier.hand(&waiting(&greedy, webhook))));
            assert!(hands.len() - before <= HANDS_PER_WEBHOOK);
        }
        assert_eq!(hands.len(), HANDS_PER_TEAM);
        assert!(courier.hand(&waiting(&other, 0)).is_some(), "another team has its own");
        hands.pop();
        let freed = courier.hand(&waiting(&greedy, 100));
        assert!(freed.is_some(), "what comes back is free again");
        drop((hands, freed));
        let nobody_busy = || {
            let busy = courier.busy.lock().expect("no panic holds it");
            busy.webhooks.is_empty() && busy.teams.is_empty()
        };
        assert!(nobody_busy());
        store.close().await;
    }
}
