//! Sandboxes that are paused, on their way there, or on their way back.
//!
//! A paused sandbox stays in the table under its id with its last run's particulars and what it has
//! kept ([`Sandbox::saved`]). One that was resumed remembers that too until its next pause is known:
//! should its run be lost with its node, it is paused again.

use std::sync::Arc;

use belljar_domain::{BuildId, ExecutionId, SandboxId, UnixMillis};
use tokio::sync::watch;

use super::phase::{self, Denied, Event, Next, Phase};
use super::{Live, Sandbox, Saved, Slot};
use crate::team::TeamId;

/// What stands under an id that a caller wants to pause.
#[derive(Debug)]
pub(crate) enum Pausing {
    /// It is seen as paused now, and this caller pauses it.
    Mine(Arc<Sandbox>),
    /// It is paused already.
    Already,
    /// Another change is under way; the channel closes when that is over.
    Busy(watch::Receiver<()>),
    /// There is nothing the team may pause.
    Nothing,
}

/// What stands under an id that a caller wants to run.
#[derive(Debug)]
pub(crate) enum Rousing {
    /// It runs.
    Runs(Arc<Sandbox>),
    /// It is paused.
    Paused(Arc<Sandbox>),
    /// Another change is under way; the channel closes when that is over.
    Busy(watch::Receiver<()>),
    /// There is nothing the team may run.
    Nothing,
}

/// How a run left the table.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The sandbox is gone.
    Gone(Arc<Sandbox>),
    /// It is again what it was resumed from: that.
    Paused(Arc<Sandbox>),
    /// It was not here, or its start or resume is still under way and hears of it.
    NotHere,
}

/// The id stands for another sandbox, or for a later state of this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Occupied;

/// What stands under an id that a node has a snapshot of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    Unknown,
    /// A call about it is under way, which decides.
    Changing,
    /// This run, or its end.
    Runs(ExecutionId),
    /// It is paused since then.
    Paused(UnixMillis),
}

/// Whose run a snapshot turned out to be the pause of.
#[derive(Debug)]
pub(crate) enum Heard {
    /// The sandbox is paused as of now: as it was, and as it is.
    Paused { was: Arc<Sandbox>, is: Arc<Sandbox> },
    /// Its end had been asked for: the snapshot is nobody's.
    Unwanted(Arc<Sandbox>),
    /// That run is not here.
    NotHere,
}

impl Live {
    /// Begins to pause the sandbox `id`.
    pub(crate) fn begin_pause(&self, id: &SandboxId, team: &TeamId, now: UnixMillis) -> Pausing {
        let mut inner = self.lock();
        if let Some(starting) = inner.starting.get(id).filter(|s| s.team == *team) {
            return Pausing::Busy(starting.over.subscribe());
        }
        let Some(started) = inner.started.get_mut(id) else { return Pausing::Nothing };
        if started.seen(team, now).is_none() {
            return Pausing::Nothing;
        }
        // Its node pauses it by itself; who asked for that has it.
        if started.is_falling_asleep(now) {
            return Pausing::Already;
        }
        match phase::next(started.phase, Event::PauseAsked) {
            Err(Denied::IsPaused) => return Pausing::Already,
            Err(Denied::Changing) if started.phase == Phase::Pausing => return Pausing::Already,
            Err(Denied::Changing) => return Pausing::Busy(started.wait()),
            Err(_) => return Pausing::Nothing,
            Ok(_) => {}
        }
        let asleep = Sandbox { asleep_since: Some(now), ..(*started.sandbox).clone() };
        let begun = inner.apply_as(id, Event::PauseAsked, Some(Arc::new(asleep)));
        begun.map_or(Pausing::Nothing, |(sandbox, _)| Pausing::Mine(sandbox))
    }

    /// Shows a sandbox as running again whose pause could not be brought about.
    pub(crate) fn abort_pause(&self, sandbox: &Arc<Sandbox>) {
        let mut inner = self.lock();
        let is_same = |s: &super::Started| s.sandbox.execution == sandbox.execution;
        if inner.started.get(&sandbox.id).is_some_and(is_same) {
            // It may have ended meanwhile; then there is nothing to show.
            let running = Some(Arc::clone(sandbox));
            let _ended = inner.apply_as(&sandbox.id, Event::PauseFailed, running).is_none();
        }
    }

    /// The run `execution` of `id` has become `saved`.
    pub(crate) fn paused(
        &self,
        id: &SandboxId,
        execution: &ExecutionId,
        saved: Arc<Saved>,
    ) -> Heard {
        let mut inner = self.lock();
        if let Some(starting) = inner.starting.get_mut(id) {
            if let Ok(Next::In(phase)) = phase::next(starting.phase, Event::PauseHeard) {
                starting.phase = phase;
            }
            return Heard::NotHere;
        }
        let Some(started) = inner.started.get(id) else { return Heard::NotHere };
        let is_resuming = started.resuming.as_ref() == Some(execution);
        if is_resuming && matches!(started.phase, Phase::Resuming | Phase::Relapsing) {
            // What it has left is found by the next reconcile, when its resume is over.
            let _heard = inner.apply_as(id, Event::PauseHeard, None).is_some();
            return Heard::NotHere;
        }
        // Told twice, by a call's answer and by the node's stream: the second may find it resuming.
        let is_known = !started.phase.has_run();
        if started.sandbox.execution != *execution || is_known {
            return Heard::NotHere;
        }
        let is = Arc::new(started.sandbox.asleep_as(saved));
        match inner.apply_as(id, Event::PauseHeard, Some(Arc::clone(&is))) {
            Some((was, Next::In(Phase::Paused))) => Heard::Paused { was, is },
            Some(_) => Heard::Unwanted(is),
            None => Heard::NotHere,
        }
    }

    /// What stands under `id` for a caller who wants it to run.
    pub(crate) fn rouse(&self, id: &SandboxId, team: &TeamId, now: UnixMillis) -> Rousing {
        let mut inner = self.lock();
        if let Some(starting) = inner.starting.get(id).filter(|s| s.team == *team) {
            return Rousing::Busy(starting.over.subscribe());
        }
        let Some(started) = inner.started.get_mut(id) else { return Rousing::Nothing };
        match started.seen(team, now) {
            None => Rousing::Nothing,
            Some(_) if started.is_falling_asleep(now) => Rousing::Busy(started.wait()),
            Some(sandbox) => match started.phase {
                Phase::Running => Rousing::Runs(sandbox),
                Phase::Paused => Rousing::Paused(sandbox),
                _ => Rousing::Busy(started.wait()),
            },
        }
    }

    /// Whose sandbox `id` is, and whether traffic may resume it.
    pub(crate) fn owner(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        let inner = self.lock();
        let started = inner.started.get(id).filter(|s| s.phase.is_seen())?;
        Some(Arc::clone(&started.sandbox))
    }

    /// Begins to resume `sandbox` as the run `execution`. False when it is not what it was.
    pub(crate) fn begin_resume(&self, sandbox: &Arc<Sandbox>, execution: &ExecutionId) -> bool {
        let mut inner = self.lock();
        let is_same = |s: &super::Started| Arc::ptr_eq(&s.sandbox, sandbox);
        if !inner.started.get(&sandbox.id).is_some_and(is_same) {
            return false;
        }
        let begun = inner.apply_as(&sandbox.id, Event::ResumeAsked, None).is_some();
        if begun && let Some(started) = inner.started.get_mut(&sandbox.id) {
            started.resuming = Some(execution.clone());
        }
        begun
    }

    /// The resume that `slot` is for went through: `sandbox` runs. False when its run had ended
    /// before that; it is paused again then.
    pub(crate) fn resumed(&self, mut slot: Slot, sandbox: &Arc<Sandbox>) -> bool {
        let mut inner = self.lock();
        let Some(started) = inner.started.get(&sandbox.id) else { return false };
        let becomes = match phase::next(started.phase, Event::Answered) {
            Ok(Next::In(Phase::Running)) => Some(Arc::clone(sandbox)),
            _ => None,
        };
        let runs = becomes.is_some();
        let done = inner.apply_as(&sandbox.id, Event::Answered, becomes).is_some();
        // In one section, so that the sandbox is never counted twice or not at all.
        slot.give_back_in(&mut inner);
        runs && done
    }

    /// A resume did not go through: the sandbox is paused as before.
    pub(crate) fn abort_resume(&self, id: &SandboxId) {
        // Nothing else takes it out of these phases.
        let _there = self.lock().apply_as(id, Event::Failed, None).is_some();
    }

    /// A run has ended. With `may_lapse` it is what it was resumed from again, if there is such.
    pub(crate) fn ended(&self, id: &SandboxId, execution: &ExecutionId, may_lapse: bool) -> Ended {
        let mut inner = self.lock();
        if let Some(starting) = inner.starting.get_mut(id) {
            if let Ok(Next::In(phase)) = phase::next(starting.phase, Event::EndHeard) {
                starting.phase = phase;
            }
            return Ended::NotHere;
        }
        let Some(started) = inner.started.get(id) else {
            // The store knows it as one that runs.
            let Some(paused) = inner.resumed.remove(id) else { return Ended::NotHere };
            if may_lapse {
                inner.put(Arc::clone(&paused), Phase::Paused);
                return Ended::Paused(paused);
            }
            return Ended::Gone(paused);
        };
        let is_resuming = started.resuming.as_ref() == Some(execution);
        if is_resuming && matches!(started.phase, Phase::Resuming | Phase::Relapsing) {
            let _heard = inner.apply_as(id, Event::EndHeard, None).is_some();
            return Ended::NotHere;
        }
        if started.sandbox.execution != *execution || !started.phase.has_run() {
            return Ended::NotHere;
        }
        let saved = started.sandbox.saved.clone().filter(|_| may_lapse);
        let asleep = saved.map(|saved| Arc::new(started.sandbox.asleep_as(saved)));
        let event = if asleep.is_some() { Event::Lapsed } else { Event::EndHeard };
        match (inner.apply_as(id, event, asleep.clone()), asleep) {
            (Some((_, Next::In(_))), Some(asleep)) => Ended::Paused(asleep),
            (Some((sandbox, _)), _) => Ended::Gone(sandbox),
            (None, _) => Ended::NotHere,
        }
    }

    /// Removes a paused sandbox whose snapshot is gone. `None` when it was not here.
    pub(crate) fn discarded(&self, id: &SandboxId, snapshot: &BuildId) -> Option<Arc<Sandbox>> {
        let mut inner = self.lock();
        let started = inner.started.get(id)?;
        let is_it = started.sandbox.saved.as_ref().is_some_and(|s| s.snapshot == *snapshot);
        if !is_it || started.phase.has_run() {
            return None;
        }
        inner.apply_as(id, Event::EndHeard, None).map(|(sandbox, _)| sandbox)
    }

    /// Adds a sandbox of an earlier life of this process, which runs; one that was thought paused
    /// runs again. Answers it with what it was resumed from; `None` when its id stands for another.
    pub(crate) fn adopt(&self, sandbox: Sandbox) -> Option<Arc<Sandbox>> {
        let mut inner = self.lock();
        if inner.starting.contains_key(&sandbox.id) {
            return None;
        }
        let id = sandbox.id.clone();
        let Some(started) = inner.started.get(&id) else {
            let saved = inner.resumed.remove(&id).and_then(|paused| paused.saved.clone());
            let sandbox = Arc::new(Sandbox { saved, ..sandbox });
            inner.start(Arc::clone(&sandbox));
            return Some(sandbox);
        };
        if started.phase != Phase::Paused {
            return None;
        }
        let sandbox = Arc::new(Sandbox { saved: started.sandbox.saved.clone(), ..sandbox });
        inner.apply_as(&id, Event::Answered, Some(Arc::clone(&sandbox)))?;
        Some(sandbox)
    }

    /// Adds a paused sandbox of an earlier life of this process, or a newer pause of one that is
    /// paused. Answers what stood for it before.
    ///
    /// # Errors
    /// [`Occupied`] when its id stands for something else.
    pub(crate) fn adopt_paused(
        &self,
        sandbox: Arc<Sandbox>,
    ) -> Result<Option<Arc<Saved>>, Occupied> {
        let mut inner = self.lock();
        let id = sandbox.id.clone();
        if inner.starting.contains_key(&id) {
            return Err(Occupied);
        }
        let Some(started) = inner.started.get(&id) else {
            let before = inner.resumed.remove(&id).and_then(|paused| paused.saved.clone());
            inner.put(sandbox, Phase::Paused);
            return Ok(before);
        };
        let is_newer = started.sandbox.asleep_since < sandbox.asleep_since;
        if started.phase != Phase::Paused || !is_newer {
            return Err(Occupied);
        }
        let (before, _) = inner.apply_as(&id, Event::PauseHeard, Some(sandbox)).ok_or(Occupied)?;
        Ok(before.saved.clone())
    }

    /// Whether a run of `id` that turns up may be adopted: nothing stands there, or a paused sandbox.
    pub(crate) fn takes(&self, id: &SandboxId) -> bool {
        let inner = self.lock();
        let is_free = inner.started.get(id).is_none_or(|s| s.phase == Phase::Paused);
        is_free && !inner.starting.contains_key(id)
    }

    /// What stands under `id`.
    pub(crate) fn standing(&self, id: &SandboxId) -> Standing {
        let inner = self.lock();
        match inner.started.get(id) {
            None if inner.starting.contains_key(id) => Standing::Changing,
            None => Standing::Unknown,
            Some(started) => match started.phase {
                Phase::Running | Phase::Missing | Phase::Ending => {
                    Standing::Runs(started.sandbox.execution.clone())
                }
                Phase::Paused => match started.sandbox.asleep_since {
                    Some(at) => Standing::Paused(at),
                    None => Standing::Changing,
                },
                _ => Standing::Changing,
            },
        }
    }

    /// Remembers what a sandbox was resumed from that runs according to the store.
    pub(crate) fn remember_resumed(&self, paused: Arc<Sandbox>) {
        self.lock().resumed.insert(paused.id.clone(), paused);
    }

    /// Whether a sandbox that runs according to the store was to be paused at its end.
    pub(crate) fn was_to_pause(&self, id: &SandboxId) -> bool {
        self.lock().resumed.get(id).is_some_and(|paused| paused.pauses_at_end())
    }

    /// Every snapshot that stands for a sandbox, or that a run was resumed from, with whose it is.
    pub(crate) fn saved(&self) -> Vec<(BuildId, SandboxId)> {
        let inner = self.lock();
        let here = inner.started.values().map(|s| &s.sandbox).chain(inner.resumed.values());
        here.filter_map(|s| Some((s.saved.as_ref()?.snapshot.clone(), s.id.clone()))).collect()
    }
}
