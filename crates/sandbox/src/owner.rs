//! The task that owns one sandbox: next event, apply, repeat.
//!
//! Nobody else touches its machine, its resources or its state. Legality is decided by
//! `domain::lifecycle::next`; this file only turns effects into work.

use std::convert::Infallible;
use std::pin::Pin;

use belljar_daemon::clock::Clock;
use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{Scope, Teardown, clock};
use belljar_domain::lifecycle::{Effect, EndReason, Event, State, next};
use belljar_domain::{SandboxId, UnixMillis};
use belljar_runtime::control::GuestControl;
use belljar_runtime::{ExitCause, Machine};
use belljar_wire::guest::FromGuest;
use tokio::sync::{Semaphore, oneshot, watch};
use tracing::{info, warn};

use crate::boot::Booted;
use crate::inbox::Inbox;
use crate::log::SandboxLog;
use crate::metrics::Samples;
use crate::probe::{self, Target};
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

/// What is kept of a sandbox while it runs.
pub(crate) struct Kept {
    pub(crate) log: SandboxLog,
    pub(crate) samples: Samples,
    /// Whom to ask for figures; `None` where guests have none.
    pub(crate) target: Option<Target>,
}

/// What an owner is given besides its sandbox.
pub(crate) struct Post<'a> {
    pub(crate) clock: &'a Clock,
    pub(crate) kept: &'a Kept,
    /// Bounds how many are asked at once.
    pub(crate) probes: &'a Semaphore,
    pub(crate) untold: &'a UntoldEnds,
    pub(crate) scope: &'a Scope,
}

/// Owns a booted sandbox until nothing of it is left; answers why it ended.
pub(crate) async fn own(
    booted: Booted,
    mut commands: Inbox,
    end_at: &watch::Sender<UnixMillis>,
    post: Post<'_>,
) -> EndReason {
    let Booted { mut machine, mut control, undo, info } = booted;
    let sandbox_id = &info.sandbox_id;
    let mut sampling = sampling(sandbox_id, &post);
    let starting = State::Starting { end_at: info.end_at };
    let (mut state, _arm) =
        next(starting, Event::Started).expect("a starting sandbox may start: lifecycle table");
    let reason = loop {
        let mut moved = None;
        let event = tokio::select! {
            command = commands.next() => match command {
                Command::SetEnd(to, done) => {
                    moved = Some(done);
                    Event::SetEnd(to)
                }
                Command::Kill => Event::End(EndReason::Killed),
            },
            () = post.clock.until(*end_at.borrow()) => Event::End(EndReason::Expired),
            cause = machine.exited() => {
                log_exit(sandbox_id, &cause);
                Event::End(EndReason::Crashed)
            }
            () = closed(&mut control, &post.kept.log) => Event::End(EndReason::Crashed),
            () = post.scope.cancelled() => Event::End(EndReason::Shutdown),
            never = &mut sampling => match never {},
        };
        match next(state, event) {
            Ok((to, Effect::Arm(at))) => {
                state = to;
                end_at.send_replace(at);
                reach(Point::OwnerEndMoved);
                // The caller may have left; the move stands all the same.
                let _caller_gone = moved.is_some_and(|done| done.send(()).is_err());
            }
            Ok((_, Effect::Teardown)) => {
                let Event::End(reason) = event else {
                    unreachable!("only an end tears down: lifecycle table")
                };
                break reason;
            }
            Ok((to, Effect::None)) => state = to,
            Err(denied) => warn!(%sandbox_id, ?denied, ?event, "event refused"),
        }
    };
    reach(Point::OwnerEnding);
    // Callers queue no more; those who wait see their answers dropped.
    drop(commands);
    drop(control);
    drop(sampling);
    if reason == EndReason::Shutdown
        && let Err(e) = post.untold.note_shutdown(&info, clock::now())
    {
        warn!(%sandbox_id, error = %e, "the end is not noted: who asks later will not find it");
    }
    give_back(sandbox_id, machine, undo, reason).await;
    reason
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
    sandbox_id: &'a SandboxId,
    post: &'a Post<'_>,
) -> Pin<Box<dyn Future<Output = Infallible> + Send + 'a>> {
    match &post.kept.target {
        Some(target) => {
            Box::pin(probe::sample(sandbox_id, target, &post.kept.samples, post.probes, post.clock))
        }
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
