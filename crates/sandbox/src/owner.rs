//! The task that owns one sandbox: next event, apply, repeat.
//!
//! Nobody else touches its machine, its resources or its state. Legality is decided by
//! `domain::lifecycle::next`; this file only turns effects into work.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{Teardown, clock};
use belljar_domain::lifecycle::{Effect, EndReason, Event, State, next};
use belljar_domain::{SandboxId, UnixMillis};
use belljar_runtime::control::GuestControl;
use belljar_runtime::{ExitCause, Machine};
use belljar_wire::guest::FromGuest;
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::inbox::Inbox;
use crate::log::SandboxLog;
use crate::probe::{self, Target};
use crate::registry::Inner;
use crate::table::Running;
use crate::untold::UntoldEnds;

/// What callers ask of a running sandbox.
#[derive(Debug)]
pub(crate) enum Command {
    /// Move its end. Answers when done; a sandbox on its way out drops the sender.
    SetEnd(UnixMillis, oneshot::Sender<()>),
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
    /// Whether nobody waits for its answer any more. A kill stands: its answer is the sandbox's end.
    pub(crate) fn is_abandoned(&self) -> bool {
        match self {
            Command::SetEnd(_, done) => done.is_closed(),
            Command::Kill => false,
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
}

/// What an owner hears.
enum Heard {
    Asked(Command),
    Over(EndReason),
}

impl Owner {
    /// Does what is asked of the sandbox until it ends; answers why. This wait is what a sandbox costs
    /// while nothing happens, so nothing rare is kept in it.
    pub(crate) async fn own(&mut self, host: &Inner) -> EndReason {
        let sandbox_id = &self.running.info.sandbox_id;
        let mut sampling = sampling(self.target.take(), &self.running, host);
        let starting = State::Starting { end_at: self.inbox.end_at() };
        let (mut state, _arm) =
            next(starting, Event::Started).expect("a starting sandbox may start: lifecycle table");
        loop {
            let end_at = self.inbox.end_at();
            let heard = tokio::select! {
                command = self.inbox.next() => Heard::Asked(command),
                () = host.deps.clock.until(end_at) => Heard::Over(EndReason::Expired),
                cause = self.machine.exited() => {
                    log_exit(sandbox_id, &cause);
                    Heard::Over(EndReason::Crashed)
                }
                () = closed(&mut self.control, &self.running.log) => {
                    Heard::Over(EndReason::Crashed)
                }
                () = host.scope.cancelled() => Heard::Over(EndReason::Shutdown),
                never = &mut sampling => match never {},
            };
            let (event, moved) = match heard {
                Heard::Asked(Command::SetEnd(to, done)) => (Event::SetEnd(to), Some(done)),
                Heard::Asked(Command::Kill) => (Event::End(EndReason::Killed), None),
                Heard::Over(reason) => (Event::End(reason), None),
            };
            match next(state, event) {
                Ok((to, Effect::Arm(at))) => {
                    state = to;
                    self.inbox.set_end_at(at);
                    reach(Point::OwnerEndMoved);
                    // The caller may have left; the move stands all the same.
                    let _caller_gone = moved.is_some_and(|done| done.send(()).is_err());
                }
                Ok((_, Effect::Teardown)) => {
                    let Event::End(reason) = event else {
                        unreachable!("only an end tears down: lifecycle table")
                    };
                    return reason;
                }
                Ok((to, Effect::None)) => state = to,
                Err(denied) => warn!(%sandbox_id, ?denied, ?event, "event refused"),
            }
        }
    }

    /// Gives everything back that the sandbox has. Answers with its inbox, for who waits until nothing
    /// is left. Not cancel-safe: run it shielded.
    pub(crate) async fn end(self, untold: &UntoldEnds, reason: EndReason) -> Inbox {
        let Owner { machine, control, undo, mut inbox, running, target: _ } = self;
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
