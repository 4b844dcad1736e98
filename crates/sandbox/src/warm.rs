//! Machines that stand ready for creates that fit: one task keeps those of one template.
//!
//! ```text
//!            made                    promised, taken
//!   making ────────► ready ─────────────────────────► a sandbox
//!      │               │
//!      └─ failed       └─ died, or made room ──► taken apart
//! ```
//!
//! They count against the host's limits, and make room for sandboxes that would not fit otherwise.
//! Nobody sees them. One is made at a time, in the same queue as sandboxes that start.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use belljar_daemon::OnError;
use belljar_domain::BuildId;
use belljar_domain::stock::{Demand, Levels, Stock};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::admission::Refused;
use crate::boot::{Booted, CreateError};
use crate::info::CreateSandbox;
use crate::ready::Ready;
use crate::registry::{Inner, OpenError, chain};
use crate::settings::Warm;
use crate::source::Source;
use crate::spare::{Spare, share_of};
use crate::table::Entry;

/// How long nothing is made after something failed: twice as long each time, up to the second figure.
const REST: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(60);
/// How long nothing is made after one made room, or found none.
const FULL_REST: Duration = Duration::from_secs(10);
/// Made at a time, of each template: sandboxes that are waited for come first.
const AT_ONCE: u32 = 1;
/// What may be asked of a keeper at once; more wait.
const ASKS_MAX: usize = 64;

/// What is asked of a keeper.
enum Ask {
    /// The spare that was promised; `None` when it died meanwhile.
    Take(oneshot::Sender<Option<Spare>>),
    /// To take one apart; answered when nothing of it is left, and dropped when there is none.
    MakeRoom(oneshot::Sender<()>),
}

/// The doors to the keepers, by build.
#[derive(Default)]
pub(crate) struct Keepers {
    asks: HashMap<BuildId, mpsc::Sender<Ask>>,
}

/// A keeper that is not at work yet.
pub(crate) struct Unstarted {
    source: Arc<Source>,
    levels: Levels,
    asks: mpsc::Receiver<Ask>,
}

impl Keepers {
    /// Finds what is to stand ready among the templates of this host.
    ///
    /// # Errors
    /// [`OpenError::Warm`].
    pub(crate) fn plan(
        warm: &[Warm],
        templates: &HashMap<BuildId, Ready>,
    ) -> Result<(Keepers, Vec<Unstarted>), OpenError> {
        let (mut keepers, mut unstarted) = (Keepers::default(), Vec::new());
        for Warm { template, count } in warm {
            let source = find(template, templates).ok_or_else(|| OpenError::Warm {
                template: template.clone(),
                known: names(templates),
            })?;
            let levels =
                Levels::new(*count, *count, AT_ONCE).expect("a number is not above itself");
            let (door, asks) = mpsc::channel(ASKS_MAX);
            if *count > 0 && keepers.asks.insert(source.build_id.clone(), door).is_none() {
                unstarted.push(Unstarted { source, levels, asks });
            }
        }
        Ok((keepers, unstarted))
    }

    /// The build whose spares fit what is asked for, if any are kept.
    pub(crate) fn fits<'a>(&self, request: &'a CreateSandbox) -> Option<&'a BuildId> {
        let plain = request.allow_internet_access && !request.cold_boot;
        (plain && self.asks.contains_key(&request.build_id)).then_some(&request.build_id)
    }
}

/// The newest build a name means.
fn find(name: &str, templates: &HashMap<BuildId, Ready>) -> Option<Arc<Source>> {
    let called = |ready: &&Ready| {
        let meta = &ready.template.meta;
        let ids = [meta.template_id.as_str(), meta.build_id.as_str()];
        ids.contains(&name) || meta.aliases.iter().any(|alias| alias == name)
    };
    let newest =
        templates.values().filter(called).max_by_key(|ready| ready.template.meta.created_at);
    newest.map(|ready| Arc::clone(&ready.source))
}

fn names(templates: &HashMap<BuildId, Ready>) -> String {
    let mut names: Vec<&str> = templates
        .values()
        .flat_map(|ready| ready.template.meta.aliases.iter().map(String::as_str))
        .collect();
    names.sort_unstable();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

impl Inner {
    /// Has the keepers go to work.
    pub(crate) fn keep_warm(self: &Arc<Inner>, unstarted: Vec<Unstarted>) {
        for Unstarted { source, levels, asks } in unstarted {
            let (made, hear_made) = mpsc::channel(1);
            let keeper = Keeper {
                host: Arc::clone(self),
                source,
                levels,
                demand: Demand::default(),
                since: Instant::now(),
                ready: VecDeque::new(),
                making: 0,
                refilling: false,
                failures: 0,
                rest_until: None,
                made,
            };
            let work = keeper.run(asks, hear_made);
            self.scope.spawn_shielded("keep sandboxes warm", OnError::Log, work);
        }
    }

    /// Takes an id and its share of the host for a sandbox, where spares make room for it. Says whether it
    /// was promised one of them. Cancel-safe.
    pub(crate) async fn enter(
        &self,
        request: &CreateSandbox,
        entry: &Entry,
    ) -> Result<bool, CreateError> {
        let fits = self.keepers.fits(request);
        let limits = &self.settings.limits;
        loop {
            let disk_free_mib = self.disk_free_mib();
            let entered =
                self.table().enter(&request.sandbox_id, entry, fits, limits, disk_free_mib);
            let Err(CreateError::Refused { limit }) = &entered else { return entered };
            let makes_way = matches!(
                limit,
                Refused::Cpu { .. } | Refused::Memory { .. } | Refused::SandboxesMax { .. }
            );
            if !makes_way || !self.make_room().await {
                return entered;
            }
        }
    }

    /// Has one spare taken apart, of whatever build; `false` when there is none.
    async fn make_room(&self) -> bool {
        let ready = |build_id: &&BuildId| self.table().spares_of(build_id) > 0;
        let Some(build_id) = self.keepers.asks.keys().find(ready) else { return false };
        let (answer, answered) = oneshot::channel();
        let Some(keeper) = self.keepers.asks.get(build_id) else { return false };
        keeper.send(Ask::MakeRoom(answer)).await.is_ok() && answered.await.is_ok()
    }

    /// Makes the spare that was promised a sandbox into it; `None` when that does not work out, and then it
    /// is to start like any other. Not cancel-safe: run it shielded.
    pub(crate) async fn take_warm(&self, request: &CreateSandbox) -> Option<Booted> {
        let (answer, answered) = oneshot::channel();
        self.keepers.asks.get(&request.build_id)?.send(Ask::Take(answer)).await.ok()?;
        let spare = answered.await.ok()??;
        match spare.hand_over(self, request).await {
            Ok(booted) => Some(booted),
            Err(e) => {
                let (sandbox_id, error) = (&request.sandbox_id, chain(&e));
                warn!(%sandbox_id, error, "a sandbox that stood ready was of no use");
                None
            }
        }
    }
}

/// Keeps the spares of one template.
struct Keeper {
    host: Arc<Inner>,
    source: Arc<Source>,
    levels: Levels,
    demand: Demand,
    /// When `demand` began to count.
    since: Instant,
    ready: VecDeque<Spare>,
    making: u32,
    refilling: bool,
    /// In a row.
    failures: u32,
    /// Nothing is made until then.
    rest_until: Option<Instant>,
    made: mpsc::Sender<Option<Spare>>,
}

impl Keeper {
    /// Until the host closes; nothing is left then.
    async fn run(
        mut self,
        mut asks: mpsc::Receiver<Ask>,
        mut made: mpsc::Receiver<Option<Spare>>,
    ) -> Result<(), Infallible> {
        loop {
            self.begin_making();
            let rest_until = self.rest_until;
            let rested = async {
                match rest_until {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.host.scope.cancelled() => break,
                Some(ask) = asks.recv() => self.obey(ask),
                Some(spare) = made.recv() => self.is_made(spare),
                place = first_ended(&mut self.ready) => self.lost(place),
                () = rested => self.rest_until = None,
            }
        }
        asks.close();
        // Whoever was promised one hears that there is none, and that the host closes.
        while asks.recv().await.is_some() {}
        while self.making > 0 {
            let Some(spare) = made.recv().await else { break };
            self.is_made(spare);
        }
        while let Some(spare) = self.ready.pop_front() {
            let withdrawn = self.withdraw();
            spare.give_back().await;
            self.gone(withdrawn);
        }
        Ok(())
    }

    fn begin_making(&mut self) {
        if self.rest_until.is_some() {
            return;
        }
        let ready = u32::try_from(self.ready.len()).unwrap_or(u32::MAX);
        let stock = Stock { ready, making: self.making, waiting: 0, room: u32::MAX };
        let demand = self.demand.lately(self.since.elapsed());
        let count = self.levels.to_make(stock, demand, self.refilling);
        self.refilling = count > 0 || self.making > 0;
        for _ in 0..count {
            let (limits, share) = (&self.host.settings.limits, share_of(&self.source));
            let disk_free_mib = self.host.disk_free_mib();
            let entered = self.host.table().enter_spare(share, limits, disk_free_mib);
            if let Err(limit) = entered {
                debug!(build_id = %self.source.build_id, %limit, "no room for one more to stand ready");
                self.rest(FULL_REST);
                return;
            }
            self.making += 1;
            let making = make(Arc::clone(&self.host), Arc::clone(&self.source), self.made.clone());
            self.host.scope.spawn_shielded("make a warm sandbox", OnError::Log, making);
        }
    }

    fn is_made(&mut self, spare: Option<Spare>) {
        self.making -= 1;
        match spare {
            Some(spare) => {
                self.failures = 0;
                self.ready.push_back(spare);
                self.host.table().offer_spare(&self.source.build_id);
                debug!(build_id = %self.source.build_id, ready = self.ready.len(), "one more is warm");
            }
            None => {
                self.failed();
                self.gone(true);
            }
        }
    }

    fn failed(&mut self) {
        let rest = REST.saturating_mul(2_u32.saturating_pow(self.failures)).min(REST_MAX);
        self.failures = self.failures.saturating_add(1);
        self.rest(rest);
    }

    fn rest(&mut self, how_long: Duration) {
        self.rest_until = Some(Instant::now() + how_long);
    }

    fn obey(&mut self, ask: Ask) {
        match ask {
            Ask::Take(answer) => {
                self.demand.took(self.since.elapsed());
                let spare = self.ready.pop_front();
                if let Err(Some(spare)) = answer.send(spare) {
                    // Its share went with the promise.
                    self.take_apart(spare, false, None);
                }
            }
            Ask::MakeRoom(answer) => {
                if !self.withdraw() {
                    return;
                }
                self.rest(FULL_REST);
                match self.ready.pop_back() {
                    Some(spare) => self.take_apart(spare, true, Some(answer)),
                    None => self.gone(true),
                }
            }
        }
    }

    /// One is of no use any more.
    fn lost(&mut self, place: usize) {
        let Some(spare) = self.ready.remove(place) else { return };
        info!(build_id = %self.source.build_id, "a warm sandbox ended by itself");
        self.failed();
        let withdrawn = self.withdraw();
        self.take_apart(spare, withdrawn, None);
    }

    fn withdraw(&self) -> bool {
        self.host.table().withdraw_spare(&self.source.build_id)
    }

    /// Nothing is left of one that was promised to nobody.
    fn gone(&self, withdrawn: bool) {
        if withdrawn {
            self.host.table().spare_is_gone(share_of(&self.source));
        }
    }

    fn take_apart(&self, spare: Spare, withdrawn: bool, answer: Option<oneshot::Sender<()>>) {
        let (host, share) = (Arc::clone(&self.host), share_of(&self.source));
        self.host.scope.spawn_shielded("take a warm sandbox apart", OnError::Log, async move {
            spare.give_back().await;
            if withdrawn {
                host.table().spare_is_gone(share);
            }
            let _asker_gone = answer.is_some_and(|answer| answer.send(()).is_err());
            Ok::<(), Infallible>(())
        });
    }
}

/// Makes one when it is its turn.
async fn make(
    host: Arc<Inner>,
    source: Arc<Source>,
    made: mpsc::Sender<Option<Spare>>,
) -> Result<(), Infallible> {
    let turn = tokio::select! {
        turn = host.starting.acquire() => turn.ok(),
        () = host.scope.cancelled() => None,
    };
    let spare = match turn {
        None => None,
        Some(_turn) => match Spare::make(&host, &source).await {
            Ok(spare) => Some(spare),
            Err(e) => {
                warn!(build_id = %source.build_id, error = chain(&e), "no sandbox was made warm");
                None
            }
        },
    };
    if let Err(unheard) = made.send(spare).await
        && let Some(spare) = unheard.0
    {
        spare.give_back().await;
    }
    Ok(())
}

/// Which of them ends first. Cancel-safe.
async fn first_ended(ready: &mut VecDeque<Spare>) -> usize {
    let mut ends: Vec<_> = ready.iter_mut().map(|spare| Box::pin(spare.ended())).collect();
    let first = std::future::poll_fn(|context| {
        let over = ends.iter_mut().position(|end| end.as_mut().poll(context).is_ready());
        over.map_or(Poll::Pending, Poll::Ready)
    });
    pin!(first).await
}
