//! The task that owns one sandbox: next event, apply, repeat.
//!
//! Nobody else touches its machine, its resources or its state. Legality is decided by
//! `domain::lifecycle::next`; this file only turns effects into work.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{Teardown, clock};
use belljar_domain::lifecycle::{Effect, EndReason, Event, Goal, State, next};
use belljar_domain::{SandboxId, UnixMillis};
use belljar_runtime::control::GuestControl;
use belljar_runtime::{ExitCause, Machine};
use belljar_wire::guest::FromGuest;
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::freeze::{Guest, Held, KeepError, KeepSandbox, Subject, keep};
use crate::inbox::Inbox;
use crate::info::AutoPause;
use crate::log::SandboxLog;
use crate::probe::{self, Target};
use crate::registry::{Inner, chain};
use crate::snapshot::SnapshotMeta;
use crate::table::Running;
use crate::untold::UntoldEnds;

/// How long a sandbox that could not be paused at its end lives on before that is tried again, and how
/// often: a full disk or a busy host may be over then. After that it ends as expired.
const PAUSE_RETRY: Duration = Duration::from_secs(60);
const PAUSE_TRIES: u32 = 5;

/// Whoever waits for a snapshot.
pub(crate) type KeepAnswer = oneshot::Sender<Result<Arc<SnapshotMeta>, KeepError>>;

/// What callers ask of a running sandbox.
#[derive(Debug)]
pub(crate) enum Command {
    /// Move its end. Answers when done; a sandbox on its way out drops the sender.
    SetEnd(UnixMillis, oneshot::Sender<()>),
    /// Keep it as a snapshot, and go on or not. A pause is answered when nothing of it is left.
    Keep(Box<KeepSandbox>, Goal, KeepAnswer),
    /// End it. The answer is the end of the owner itself.
    Kill,
}

/// Whether a sandbox that is asked for something before it runs still starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Starts {
    /// It does.
    Still,
    /// It was killed.
    Not,
}

impl Command {
    /// Whether nobody waits for its answer any more. A kill and a pause stand: what they do can be seen
    /// otherwise.
    pub(crate) fn is_abandoned(&self) -> bool {
        match self {
            Command::SetEnd(_, done) => done.is_closed(),
            Command::Keep(_, Goal::Copy, done) => done.is_closed(),
            Command::Keep(_, Goal::Pause, _) | Command::Kill => false,
        }
    }

    /// Does what can be done to a sandbox that starts, whose end is `end_at` so far.
    pub(crate) fn while_starting(self, end_at: &mut UnixMillis) -> Starts {
        match self {
            Command::SetEnd(to, done) => {
                *end_at = to;
                // The caller may have left; the move stands all the same.
                let _caller_gone = done.send(()).is_err();
                Starts::Still
            }
            // Its sender goes with it: there is nothing to keep yet.
            Command::Keep(..) => Starts::Still,
            Command::Kill => Starts::Not,
        }
    }
}

/// A sandbox that runs, in the hands of the one task that may touch it.
pub(crate) struct Owner {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) control: GuestControl,
    pub(crate) undo: Teardown,
    pub(crate) inbox: Inbox,
    pub(crate) running: Arc<Running>,
    /// Whom to ask for figures; `None` where guests have none.
    pub(crate) target: Option<Target>,
    pub(crate) held: Held,
    /// `None`: it is killed.
    pub(crate) at_its_end: Option<AtItsEnd>,
    pub(crate) state: State,
}

/// A pause at the end of a sandbox's time.
pub(crate) struct AtItsEnd {
    pause: Box<AutoPause>,
    tries_left: u32,
}

impl AtItsEnd {
    pub(crate) fn pause(pause: AutoPause) -> AtItsEnd {
        AtItsEnd { pause: Box::new(pause), tries_left: PAUSE_TRIES }
    }

    fn order(&self) -> Box<KeepSandbox> {
        Box::new(KeepSandbox {
            snapshot_id: self.pause.snapshot_id.clone(),
            filesystem_only: self.pause.filesystem_only,
            require_healthy_guest: false,
        })
    }

    /// What is done if this time it goes wrong.
    fn once_more(self) -> Option<AtItsEnd> {
        let tries_left = self.tries_left.checked_sub(1)?;
        Some(AtItsEnd { tries_left, ..self })
    }
}

/// How a sandbox's run ended.
pub(crate) struct End {
    pub(crate) reason: EndReason,
    /// What a paused one left, and who asked for it.
    pub(crate) paused: Option<(Arc<SnapshotMeta>, Option<KeepAnswer>)>,
}

/// What an owner hears.
enum Heard {
    Asked(Command),
    Over(EndReason),
    TimeIsUp,
}

/// What an owner does next.
enum Next {
    Wait,
    Keep(Box<KeepSandbox>, Goal, Option<KeepAnswer>),
    End(EndReason),
}

impl Owner {
    /// Does what is asked of the sandbox until its run ends; answers how. This wait is what a sandbox
    /// costs while nothing happens, so nothing rare is kept in it.
    pub(crate) async fn own(&mut self, host: &Inner) -> End {
        let running = Arc::clone(&self.running);
        let sandbox_id = &running.info.sandbox_id;
        let mut sampling = sampling(self.target.take(), &running, host);
        self.happened(Event::Started, None);
        loop {
            let end_at = self.inbox.end_at();
            let heard = tokio::select! {
                command = self.inbox.next() => Heard::Asked(command),
                () = host.deps.clock.until(end_at) => Heard::TimeIsUp,
                cause = self.machine.exited() => {
                    log_exit(sandbox_id, &cause);
                    Heard::Over(EndReason::Crashed)
                }
                () = closed(&mut self.control, &running.log) => Heard::Over(EndReason::Crashed),
                () = host.scope.cancelled() => Heard::Over(EndReason::Shutdown),
                never = &mut sampling => match never {},
            };
            match self.next(heard) {
                Next::Wait => {}
                Next::Keep(order, goal, answer) => {
                    if let Some(end) = Box::pin(self.keep(host, &order, goal, answer)).await {
                        return end;
                    }
                }
                Next::End(reason) => {
                    self.happened(Event::End(reason), None);
                    return End { reason, paused: None };
                }
            }
        }
    }

    fn next(&mut self, heard: Heard) -> Next {
        match heard {
            Heard::Asked(Command::SetEnd(to, done)) => {
                self.happened(Event::SetEnd(to), Some(done));
                Next::Wait
            }
            Heard::Asked(Command::Keep(order, goal, done)) => {
                self.happened(Event::Freeze(goal), None);
                Next::Keep(order, goal, Some(done))
            }
            Heard::Asked(Command::Kill) => Next::End(EndReason::Killed),
            Heard::TimeIsUp => match self.at_its_end.take() {
                None => Next::End(EndReason::Expired),
                Some(at_its_end) => {
                    self.happened(Event::Freeze(Goal::Pause), None);
                    let order = at_its_end.order();
                    self.at_its_end = at_its_end.once_more();
                    Next::Keep(order, Goal::Pause, None)
                }
            },
            Heard::Over(reason) => Next::End(reason),
        }
    }

    /// Moves the state, and shows what callers see of it.
    fn happened(&mut self, event: Event, moved: Option<oneshot::Sender<()>>) -> Option<Effect> {
        match next(self.state, event) {
            Ok((to, effect)) => {
                self.state = to;
                if let Effect::Arm(at) = effect {
                    self.inbox.set_end_at(at);
                    if let Some(done) = moved {
                        reach(Point::OwnerEndMoved);
                        // The caller may have left; the move stands all the same.
                        let _caller_gone = done.send(()).is_err();
                    }
                }
                Some(effect)
            }
            Err(denied) => {
                let sandbox_id = &self.running.info.sandbox_id;
                warn!(%sandbox_id, ?denied, ?event, "event refused");
                None
            }
        }
    }

    /// Keeps the sandbox; says how its run ended if that was its end.
    async fn keep(
        &mut self,
        host: &Inner,
        order: &KeepSandbox,
        goal: Goal,
        answer: Option<KeepAnswer>,
    ) -> Option<End> {
        let subject = Subject {
            info: &self.running.info,
            held: &self.held,
            shelf: &host.shelf,
            guest_deadline: host.settings.ready_deadline,
        };
        let mut guest = Guest { machine: &mut *self.machine, control: &mut self.control };
        let kept = keep(&subject, &mut guest, order, goal).await;
        self.held.leaves_layers = true;
        let outcome = if kept.is_ok() { Event::Kept } else { Event::NotKept };
        match (self.happened(outcome, None), kept) {
            (Some(Effect::Teardown), Ok(meta)) => {
                return Some(End { reason: EndReason::Paused, paused: Some((meta, answer)) });
            }
            (_, kept) => {
                if let Err(e) = &kept {
                    self.not_kept(host, e, answer.is_none());
                }
                let _caller_gone = answer.is_some_and(|answer| answer.send(kept).is_err());
            }
        }
        None
    }

    /// Says why it was not kept. One whose time is up gets more of it.
    fn not_kept(&mut self, host: &Inner, error: &KeepError, at_its_end: bool) {
        let (sandbox_id, error) = (&self.running.info.sandbox_id, chain(error));
        warn!(%sandbox_id, error, at_its_end, "sandbox was not kept");
        if at_its_end {
            let end_at = host.deps.clock.now().plus(PAUSE_RETRY);
            self.happened(Event::SetEnd(end_at), None);
        }
    }

    /// Gives everything back that the sandbox has. Answers with its inbox, for who waits until nothing
    /// is left. Not cancel-safe: run it shielded.
    pub(crate) async fn end(self, untold: &UntoldEnds, reason: EndReason) -> Inbox {
        let Owner { machine, control, undo, mut inbox, running, .. } = self;
        let info = &running.info;
        reach(Point::OwnerEnding);
        inbox.close();
        drop(control);
        if reason == EndReason::Shutdown
            && let Err(e) = untold.note_ended(info, reason, clock::now())
        {
            let sandbox_id = &info.sandbox_id;
            warn!(%sandbox_id, error = %e, "the end is not noted: who asks later will not find it");
        }
        give_back(&info.sandbox_id, machine, undo, reason).await;
        inbox
    }
}

/// Kills the machine and runs the undo stack. Not cancel-safe: run it shielded.
pub(crate) async fn give_back(
    sandbox_id: &SandboxId,
    mut machine: Box<dyn Machine>,
    mut undo: Teardown,
    reason: EndReason,
) {
    if let Err(e) = machine.kill().await {
        undo.note_leak("machine", e.to_string());
    }
    drop(machine);
    reach(Point::OwnerMachineDead);
    let leaks = undo.run().await;
    info!(%sandbox_id, reason = reason.as_str(), leaks = leaks.len(), "sandbox ended");
}

/// Keeps figures for as long as it is polled. On the heap: most sandboxes of a host full of fake ones
/// have none.
fn sampling<'a>(
    target: Option<Target>,
    running: &'a Running,
    host: &'a Inner,
) -> Pin<Box<dyn Future<Output = Infallible> + Send + 'a>> {
    match target {
        Some(target) => Box::pin(probe::sample(running, target, &host.probes, &host.deps.clock)),
        None => Box::pin(std::future::pending()),
    }
}

fn log_exit(sandbox_id: &SandboxId, cause: &ExitCause) {
    match cause {
        ExitCause::Crashed { detail } => warn!(%sandbox_id, detail, "machine crashed"),
        ExitCause::Killed | ExitCause::GuestStopped => {
            info!(%sandbox_id, ?cause, "machine stopped")
        }
    }
}

/// Ends when the guest's control channel does: closed, or used for something that is no message.
/// Logs are kept; whatever else the guest says meanwhile answers nothing and is dropped.
/// Cancel-safe.
async fn closed(control: &mut GuestControl, log: &SandboxLog) {
    while let Ok(message) = control.receive().await {
        if let FromGuest::Log { lines } = message {
            log.add(lines, clock::now());
        }
    }
}
