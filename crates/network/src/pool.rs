//! The pool of real slots: made ahead of time, handed out at once, taken apart when given back.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use belljar_daemon::{OnError, Scope};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::config::{OpenError, Plan, SlotsConfig};
use crate::host::{TagLock, clear, prepare};
use crate::make::{Made, close_egress, destroy_batch, make_batch};
use crate::slots::{EgressPolicy, LeaseError, ReleaseError, Slot, Slots};
use crate::state::{State, Taken};
use crate::step::{StepFailed, on_own_thread};
use crate::{GUEST_MAC, TAP};

/// How long a lease waits for a slot to be made. Making one takes some 20 ms.
const LEASE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a slot may take to go. Taking a batch apart takes some 30 ms.
const RELEASE_DEADLINE: Duration = Duration::from_secs(15);
/// How long a pool may take to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(30);
/// How long the host may take to get ready, leftovers of an earlier process included.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);

/// How long a tag may still be taken, and how often it is tried meanwhile.
const TAG_DEADLINE: Duration = Duration::from_millis(500);
const TAG_RETRY: Duration = Duration::from_millis(20);

/// Network slots of this host. Needs root (`CAP_NET_ADMIN` and `CAP_SYS_ADMIN`), `/dev/net/tun`
/// and the program `nft`.
///
/// Close it when its scope ends. A pool that is dropped unclosed, as after a crash, leaves its slots
/// to the next [`SlotPool::open`] with the same tag.
#[derive(Debug)]
pub struct SlotPool {
    inner: Arc<Inner>,
    reclaimed: u32,
}

#[derive(Debug)]
struct Inner {
    plan: Plan,
    scope: Scope,
    books: Mutex<Books>,
    /// Told after every change that a waiting lease or close could be waiting for.
    changed: Notify,
    /// What the books count time from.
    opened: Instant,
}

#[derive(Debug)]
struct Books {
    slots: State,
    /// Slots that wait to be taken apart, with who wants to know the outcome.
    doomed: Vec<Doomed>,
    /// Whether a task works on them.
    destroying: bool,
    host: HostShare,
}

/// What the pool holds on the host besides its slots.
#[derive(Debug)]
enum HostShare {
    /// The tag, and the pool's rules.
    Held(TagLock),
    /// A task is giving it back.
    Clearing,
    /// Nothing.
    Cleared,
}

#[derive(Debug)]
struct Doomed {
    index: u32,
    answer: Option<oneshot::Sender<Result<(), StepFailed>>>,
}

impl SlotPool {
    /// Removes what an earlier process with this tag left, puts the pool's rules on the host, and
    /// starts making slots. All tasks of the pool run in `scope`; cancelling it closes the pool to
    /// leases, while giving back goes on working.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(config: SlotsConfig, scope: &Scope) -> Result<SlotPool, OpenError> {
        let plan = Arc::new(Plan::new(config)?);
        let tag = take_tag(&plan.config().tag).await?;
        let preparing = {
            let plan = plan.clone();
            on_own_thread("network-open", move || prepare(&plan))
        };
        let reclaimed =
            timeout(OPEN_DEADLINE, preparing).await.map_err(|_| OpenError::Host {
                step: "get the host ready",
                reason: format!("it took longer than {} s", OPEN_DEADLINE.as_secs()),
            })???;
        let plan = Arc::into_inner(plan).expect("the thread that shared it has ended");
        if reclaimed > 0 {
            warn!(reclaimed, tag = plan.config().tag, "removed slots an earlier process had left");
        }
        let SlotsConfig { capacity, ready_low, ready_high, .. } = *plan.config();
        let books = Books {
            slots: State::new(capacity, ready_low, ready_high),
            doomed: Vec::new(),
            destroying: false,
            host: HostShare::Held(tag),
        };
        let inner = Arc::new(Inner {
            plan,
            scope: scope.clone(),
            books: Mutex::new(books),
            changed: Notify::new(),
            opened: Instant::now(),
        });
        inner.refill_if_low();
        Ok(SlotPool { inner, reclaimed })
    }

    /// How many slots an earlier process with the same tag had left on the host.
    pub fn reclaimed(&self) -> u32 {
        self.reclaimed
    }
}

#[async_trait]
impl Slots for SlotPool {
    async fn lease(&self, policy: EgressPolicy) -> Result<Slot, LeaseError> {
        let held = Inner::take(&self.inner).await?;
        let index = held.index;
        let netns = self.inner.plan.netns(index);
        if policy == EgressPolicy::None {
            let path = netns.clone();
            let closing = on_own_thread("network-policy", move || close_egress(&path));
            let closed = match timeout(LEASE_DEADLINE, closing).await {
                Ok(closed) => closed.and_then(|closed| closed),
                Err(_) => Err(StepFailed {
                    step: "close the egress",
                    reason: format!("it took longer than {} s", LEASE_DEADLINE.as_secs()),
                }),
            };
            closed.map_err(|StepFailed { step, reason }| LeaseError::Setup {
                index,
                step,
                reason,
            })?;
        }
        held.keep();
        Ok(Slot {
            index,
            netns: Some(netns),
            tap: TAP.to_owned(),
            guest_mac: GUEST_MAC,
            host_ip: self.inner.plan.slot_side(index),
        })
    }

    /// When the caller leaves, the slot is taken apart all the same.
    async fn release(&self, slot: Slot) -> Result<(), ReleaseError> {
        let index = slot.index;
        let failed = |step, reason| ReleaseError::Slot { index, step, reason };
        let (answer, answered) = oneshot::channel();
        if !self.inner.doom(index, Some(answer)) {
            return Err(failed("find the lease", "it is not leased from this pool".to_owned()));
        }
        match timeout(RELEASE_DEADLINE, answered).await {
            Ok(Ok(outcome)) => outcome.map_err(|e| failed(e.step, e.reason)),
            Ok(Err(_)) => {
                Err(failed("take everything apart", "the runtime is shutting down".to_owned()))
            }
            Err(_) => {
                let seconds = RELEASE_DEADLINE.as_secs();
                Err(failed("take everything apart", format!("it took longer than {seconds} s")))
            }
        }
    }

    /// Leased slots stay with those who lease them; the pool's rules on the host stay as long as
    /// they do. Idempotent. When the caller leaves, the pool is closed all the same.
    async fn close(&self) -> Result<(), ReleaseError> {
        let failed = |reason| ReleaseError::Pool { step: "take ready slots apart", reason };
        let (answer, answered) = oneshot::channel();
        let inner = self.inner.clone();
        self.inner.scope.spawn_shielded("close network slots", OnError::Log, async move {
            // A caller that left is no reason to do anything here.
            drop(answer.send(Inner::close(&inner).await));
            Ok::<(), Infallible>(())
        });
        match timeout(CLOSE_DEADLINE, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(failed("the runtime is shutting down".to_owned())),
            Err(_) => Err(failed(format!("it took longer than {} s", CLOSE_DEADLINE.as_secs()))),
        }
    }
}

/// Takes the tag, trying again for [`TAG_DEADLINE`].
///
/// A process that ends, or a child of this one between its fork and its exec, holds a tag some
/// milliseconds longer than its pool.
async fn take_tag(tag: &str) -> Result<TagLock, OpenError> {
    let deadline = Instant::now() + TAG_DEADLINE;
    loop {
        match TagLock::take(tag) {
            Err(OpenError::InUse { .. }) if Instant::now() < deadline => sleep(TAG_RETRY).await,
            outcome => return outcome,
        }
    }
}

/// A slot on its way to its caller. Dropped on the way, it is taken apart.
struct Held {
    inner: Arc<Inner>,
    index: u32,
    kept: bool,
}

impl Held {
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.kept {
            self.inner.doom(self.index, None);
        }
    }
}

/// A lease that waits, for as long as it does.
struct Waiting<'a>(&'a Inner);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.books().slots.stop_waiting();
    }
}

impl Inner {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics while it holds the books")
    }

    async fn take(inner: &Arc<Inner>) -> Result<Held, LeaseError> {
        let start = Instant::now();
        let seen = inner.books().slots.failures();
        let mut waiting = None;
        loop {
            let mut changed = Box::pin(inner.changed.notified());
            changed.as_mut().enable();
            if inner.scope.is_cancelled() {
                return Err(LeaseError::Closed);
            }
            let taken = inner.books().slots.take(inner.opened.elapsed());
            match taken {
                Taken::Slot(index) => {
                    inner.refill_if_low();
                    return Ok(Held { inner: inner.clone(), index, kept: false });
                }
                Taken::Closed => return Err(LeaseError::Closed),
                Taken::Exhausted => {
                    let capacity = inner.plan.config().capacity;
                    return Err(LeaseError::Exhausted { capacity });
                }
                Taken::Wait => {}
            }
            let failure = inner.books().slots.failure_after(seen);
            if let Some(failure) = failure {
                let StepFailed { step, reason } = failure.error;
                return Err(LeaseError::Setup { index: failure.index, step, reason });
            }
            if waiting.is_none() {
                inner.books().slots.start_waiting();
                waiting = Some(Waiting(inner));
            }
            inner.refill_if_low();
            timeout_at(start + LEASE_DEADLINE, changed)
                .await
                .map_err(|_| LeaseError::Slow { waited_ms: LEASE_DEADLINE.as_millis() as u64 })?;
        }
    }

    /// Starts a task that makes slots, if there are too few and none is at it.
    fn refill_if_low(self: &Arc<Self>) {
        if self.scope.is_cancelled() || !self.books().slots.start_refill(self.opened.elapsed()) {
            return;
        }
        let inner = self.clone();
        self.scope.spawn_shielded("make network slots", OnError::Log, inner.refill());
    }

    async fn refill(self: Arc<Self>) -> Result<(), StepFailed> {
        loop {
            let seen = self.books().slots.failures();
            let batch = if self.scope.is_cancelled() {
                Vec::new()
            } else {
                self.books().slots.next_batch(self.opened.elapsed())
            };
            if batch.is_empty() {
                break;
            }
            let start = Instant::now();
            let count = batch.len();
            let inner = self.clone();
            let making = on_own_thread("network-make", move || {
                make_batch(&inner.plan, &batch, |index, made| inner.settle(index, made));
            });
            let ended = making.await;
            let failure = self.books().slots.failure_after(seen).map(|failure| failure.error);
            debug!(count, elapsed_us = start.elapsed().as_micros() as u64, "made network slots");
            if let Some(e) = ended.err().or(failure) {
                self.stop_refill();
                return Err(e);
            }
        }
        self.stop_refill();
        Ok(())
    }

    fn stop_refill(&self) {
        self.books().slots.stop_refill();
        self.changed.notify_waiters();
    }

    fn settle(&self, index: u32, made: Made) {
        {
            let mut books = self.books();
            match made {
                Made::Ready => books.slots.made(index),
                Made::Failed(e) => books.slots.not_made(index, e, false),
                Made::Lost(e) => books.slots.not_made(index, e, true),
            }
        }
        self.changed.notify_waiters();
    }

    /// Has a leased slot taken apart; false if it is not leased.
    fn doom(
        self: &Arc<Self>,
        index: u32,
        answer: Option<oneshot::Sender<Result<(), StepFailed>>>,
    ) -> bool {
        {
            let mut books = self.books();
            if !books.slots.start_end(index) {
                return false;
            }
            books.doomed.push(Doomed { index, answer });
        }
        self.destroy_if_doomed();
        true
    }

    /// Starts a task that takes doomed slots apart, if there are any and none is at it. Slots that
    /// are doomed meanwhile go together in its next round: the kernel makes one wait of it.
    fn destroy_if_doomed(self: &Arc<Self>) {
        if Handle::try_current().is_err() {
            warn!("a network slot was dropped outside a runtime; the next start reclaims it");
            return;
        }
        {
            let mut books = self.books();
            if books.destroying || books.doomed.is_empty() {
                return;
            }
            books.destroying = true;
        }
        let inner = self.clone();
        // Not bound to the scope's end: giving back is how a scope ends cleanly.
        self.scope.spawn_shielded("remove network slots", OnError::Log, inner.destroy());
    }

    async fn destroy(self: Arc<Self>) -> Result<(), StepFailed> {
        let mut outcome = Ok(());
        loop {
            let doomed = {
                let mut books = self.books();
                let doomed = std::mem::take(&mut books.doomed);
                books.destroying = !doomed.is_empty();
                doomed
            };
            if doomed.is_empty() {
                break;
            }
            let indexes: Vec<u32> = doomed.iter().map(|d| d.index).collect();
            let start = Instant::now();
            let inner = self.clone();
            let destroyed =
                on_own_thread("network-remove", move || destroy_batch(&inner.plan, &indexes)).await;
            let count = doomed.len();
            debug!(count, elapsed_us = start.elapsed().as_micros() as u64, "removed network slots");
            for (place, Doomed { index, answer }) in doomed.into_iter().enumerate() {
                let gone = match &destroyed {
                    Ok(each) => each[place].1.clone(),
                    Err(e) => Err(e.clone()),
                };
                self.books().slots.ended(index, gone.is_ok());
                outcome = outcome.and(gone.clone());
                // A caller that left is no reason to do anything here.
                let _left = answer.map(|answer| answer.send(gone));
            }
            self.changed.notify_waiters();
        }
        if let Err(e) = self.clear_host_if_over().await {
            outcome = outcome.and(Err(e));
        }
        self.refill_if_low();
        self.changed.notify_waiters();
        outcome
    }

    /// Takes the pool's rules off the host and frees its tag, when the pool is closed and its last
    /// slot is gone.
    async fn clear_host_if_over(self: &Arc<Self>) -> Result<(), StepFailed> {
        let tag = loop {
            {
                let mut books = self.books();
                if !books.slots.is_over() {
                    return Ok(());
                }
                match std::mem::replace(&mut books.host, HostShare::Clearing) {
                    HostShare::Held(tag) => break tag,
                    HostShare::Clearing => {}
                    HostShare::Cleared => {
                        books.host = HostShare::Cleared;
                        return Ok(());
                    }
                }
            }
            self.wait_until(|books| !matches!(books.host, HostShare::Clearing)).await;
        };
        let inner = self.clone();
        let cleared = on_own_thread("network-close", move || clear(&inner.plan)).await;
        let cleared = cleared.and_then(|cleared| cleared);
        self.books().host = if cleared.is_ok() { HostShare::Cleared } else { HostShare::Held(tag) };
        self.changed.notify_waiters();
        cleared
    }

    async fn close(inner: &Arc<Inner>) -> Result<(), ReleaseError> {
        inner.books().slots.close();
        inner.changed.notify_waiters();
        inner.wait_until(|books| !books.slots.is_refilling()).await;
        let mut answers = Vec::new();
        {
            let mut books = inner.books();
            for index in books.slots.end_ready() {
                let (answer, answered) = oneshot::channel();
                answers.push((index, answered));
                books.doomed.push(Doomed { index, answer: Some(answer) });
            }
        }
        inner.destroy_if_doomed();
        let mut outcome = Ok(());
        for (index, answered) in answers {
            let gone = match answered.await {
                Ok(gone) => gone,
                Err(_) => Err(StepFailed {
                    step: "take everything apart",
                    reason: "the runtime is shutting down".to_owned(),
                }),
            };
            outcome = outcome.and(gone.map_err(|StepFailed { step, reason }| ReleaseError::Slot {
                index,
                step,
                reason,
            }));
        }
        inner.wait_until(|books| !books.destroying).await;
        let cleared = inner.clear_host_if_over().await;
        outcome
            .and(cleared.map_err(|StepFailed { step, reason }| ReleaseError::Pool { step, reason }))
    }

    /// Waits for a change of the books; every change that matters is told.
    async fn wait_until(&self, reached: impl Fn(&Books) -> bool) {
        loop {
            let mut changed = Box::pin(self.changed.notified());
            changed.as_mut().enable();
            if reached(&self.books()) {
                return;
            }
            changed.await;
        }
    }
}
