//! The whole life of one sandbox: its turn to start, its start, and then its owner.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{OnError, clock};
use belljar_domain::UnixMillis;
use belljar_domain::lifecycle::{EndReason, State};
use tokio::sync::{SemaphorePermit, oneshot};
use tracing::{info, warn};

use crate::admission::Refused;
use crate::boot::{Booted, CreateError, boot};
use crate::inbox::Inbox;
use crate::info::{CreateSandbox, Ended, SandboxInfo};
use crate::log::SandboxLog;
use crate::metrics::Samples;
use crate::owner::{AtItsEnd, End, Owner, Starts, give_back};
use crate::probe::Target;
use crate::registry::{Inner, chain};
use crate::settings::MetricsFrom;
use crate::source::Source;
use crate::table::Running;

impl Inner {
    /// The whole life of one sandbox, of which `promised` says whether it gets a machine that stands ready.
    /// Run it shielded. Who waits for the last of it waits until the
    /// inbox is dropped.
    pub(crate) fn live(
        self: Arc<Self>,
        request: CreateSandbox,
        source: Arc<Source>,
        promised: bool,
        inbox: Inbox,
        answer: oneshot::Sender<Result<SandboxInfo, CreateError>>,
    ) -> impl Future<Output = Result<(), Infallible>> + Send + 'static {
        // Start and end are large and short: on the heap, so that a sandbox that lives has neither.
        let begin = Box::pin(Arc::clone(&self).begin(request, source, promised, inbox, answer));
        async move {
            let Some(mut owner) = begin.await else { return Ok(()) };
            let end = owner.own(&self).await;
            Box::pin(self.end(owner, end)).await;
            Ok(())
        }
    }

    /// Ends the sandbox and tells everybody.
    async fn end(&self, owner: Owner, end: End) {
        let (running, leaves_layers) = (Arc::clone(&owner.running), owner.held.leaves_layers);
        let End { reason, paused } = end;
        let inbox = owner.end(&self.untold, reason).await;
        let info = &running.info;
        // Before it leaves the table: who listens from now on and does not find it there, finds this.
        if self.ended.receiver_count() == 0 {
            self.note_unheard(info, reason);
        }
        self.table().leave(&info.sandbox_id);
        if leaves_layers {
            self.sweep_layers();
        }
        let (sandbox_id, execution_id) = (info.sandbox_id.clone(), info.execution_id.clone());
        let snapshot = paused.as_ref().map(|(snapshot, _)| Arc::clone(snapshot));
        reach(Point::OwnerBeforeNotice);
        let ended = Ended { sandbox_id, execution_id, reason, snapshot };
        if self.ended.send(ended).is_err() {
            // The last listener left meanwhile; what is noted already stands.
            self.note_unheard(info, reason);
        }
        reach(Point::OwnerNoticeSent);
        if let Some((snapshot, Some(asked))) = paused {
            let _caller_gone = asked.send(Ok(snapshot)).is_err();
        }
        drop(inbox);
    }

    /// Notes an end for who asks later. Of a paused one its snapshot tells.
    fn note_unheard(&self, info: &SandboxInfo, reason: EndReason) {
        if reason == EndReason::Paused {
            return;
        }
        if let Err(e) = self.untold.note_ended(info, reason, clock::now()) {
            let sandbox_id = &info.sandbox_id;
            warn!(%sandbox_id, error = %e, "the end is not noted: who asks later will not find it");
        }
    }

    /// Removes layers that only this sandbox had open, on a thread that may block.
    fn sweep_layers(&self) {
        let shelf = self.shelf.clone();
        self.scope.spawn_shielded("sweep layers", OnError::Log, async move {
            tokio::task::spawn_blocking(move || shelf.sweep()).await
        });
    }

    /// Starts the sandbox and tells everybody; `None` when it did not start.
    async fn begin(
        self: Arc<Self>,
        mut request: CreateSandbox,
        source: Arc<Source>,
        promised: bool,
        mut inbox: Inbox,
        answer: oneshot::Sender<Result<SandboxInfo, CreateError>>,
    ) -> Option<Owner> {
        reach(Point::BootIdTaken);
        let booted = match self.start(&source, &mut request, promised, &mut inbox).await {
            Err(e) => {
                self.not_started(&request, e, answer);
                return None;
            }
            Ok(booted) => booted,
        };
        let Booted { machine, control, undo, info, held } = booted;
        inbox.set_end_at(info.end_at);
        let target = match self.settings.metrics {
            MetricsFrom::Guests => {
                let access_token = request.envd_access_token.take();
                Some(Target { address: info.route_ip, access_token })
            }
            MetricsFrom::Made(_) => None,
        };
        let (log, samples) = (SandboxLog::default(), Samples::default());
        let running = Arc::new(Running { info, log, samples });
        let info = &running.info;
        self.table().runs(&info.sandbox_id, Arc::clone(&running));
        self.created.fetch_add(1, Ordering::Relaxed);
        info!(sandbox_id = %info.sandbox_id, build_id = %info.build_id, "sandbox runs");
        reach(Point::BootBeforeAnswer);
        let _caller_gone = answer.send(Ok(info.clone())).is_err();
        let at_its_end = request.auto_pause.take().map(AtItsEnd::pause);
        let state = State::Starting { end_at: running.info.end_at };
        Some(Owner { machine, control, undo, inbox, running, target, held, at_its_end, state })
    }

    fn not_started(
        &self,
        request: &CreateSandbox,
        error: CreateError,
        answer: oneshot::Sender<Result<SandboxInfo, CreateError>>,
    ) {
        match &error {
            CreateError::Refused { .. } | CreateError::Killed { .. } | CreateError::Closing => {
                info!(sandbox_id = %request.sandbox_id, reason = %error, "sandbox does not start");
            }
            error => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                let error = chain(error);
                warn!(sandbox_id = %request.sandbox_id, error, "sandbox did not start");
            }
        }
        self.table().leave(&request.sandbox_id);
        let _caller_gone = answer.send(Err(error)).is_err();
    }

    /// Takes what stands ready, or waits for a turn and boots; and does what was asked of the sandbox
    /// meanwhile.
    async fn start(
        &self,
        source: &Arc<Source>,
        request: &mut CreateSandbox,
        promised: bool,
        inbox: &mut Inbox,
    ) -> Result<Booted, CreateError> {
        let warm = if promised { self.take_warm(request).await } else { None };
        let mut booted = match warm {
            Some(booted) => booted,
            None => self.boot_in_turn(source, request, inbox).await?,
        };
        let info = &mut booted.info;
        let asked_to_end = std::iter::from_fn(|| inbox.try_next())
            .any(|command| command.while_starting(&mut info.end_at) == Starts::Not);
        if !asked_to_end {
            return Ok(booted);
        }
        let Booted { machine, control, undo, .. } = booted;
        drop(control);
        give_back(&request.sandbox_id, machine, undo, EndReason::Killed).await;
        Err(CreateError::Killed { sandbox_id: request.sandbox_id.clone() })
    }

    async fn boot_in_turn(
        &self,
        source: &Arc<Source>,
        request: &mut CreateSandbox,
        inbox: &mut Inbox,
    ) -> Result<Booted, CreateError> {
        let killed = || CreateError::Killed { sandbox_id: request.sandbox_id.clone() };
        let _turn = self.turn(&mut request.end_at, inbox).await?.ok_or_else(killed)?;
        boot(&self.deps, &self.settings, &self.ledger, &self.scope, source, request).await
    }

    /// Waits until this sandbox may start; `None` when it was killed first.
    async fn turn(
        &self,
        end_at: &mut UnixMillis,
        inbox: &mut Inbox,
    ) -> Result<Option<SemaphorePermit<'_>>, CreateError> {
        let limits = &self.settings.limits;
        let deadline = tokio::time::sleep(limits.starting_wait_max);
        let turn = self.starting.acquire();
        tokio::pin!(deadline, turn);
        loop {
            tokio::select! {
                biased;
                turn = &mut turn => return turn.map(Some).map_err(|_| CreateError::Closing),
                () = self.scope.cancelled() => return Err(CreateError::Closing),
                command = inbox.next() => {
                    if command.while_starting(end_at) == Starts::Not {
                        return Ok(None);
                    }
                }
                () = &mut deadline => {
                    let waited_ms = limits.starting_wait_max.as_millis();
                    let waited_ms = u64::try_from(waited_ms).unwrap_or(u64::MAX);
                    let limit = Refused::StartingSlots { limit: limits.starting_max, waited_ms };
                    return Err(CreateError::Refused { limit });
                }
            }
        }
    }
}
