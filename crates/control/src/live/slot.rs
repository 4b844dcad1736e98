//! A team's place for a sandbox that is being created.

use std::sync::Arc;

use belljar_domain::{SandboxId, UnixMillis};
use tokio::sync::watch;

use super::phase::{self, Event, Next, Phase};
use super::{Inner, Live, Sandbox, Starting};
use crate::nodes::NodeIx;
use crate::team::TeamId;

/// The team has as many sandboxes as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("reserve a place for a sandbox: all {limit} are taken")]
pub(crate) struct AtLimit {
    pub(crate) limit: u32,
}

/// The node said the sandbox ended before its creation was through here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("start the sandbox: it ended at once")]
pub(crate) struct EndedEarly;

/// A place for a sandbox that is being created. Dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Slot {
    live: Arc<Live>,
    /// `None` once it is given back.
    place: Option<Place>,
}

#[derive(Debug)]
struct Place {
    team: TeamId,
    /// What is being started in it: one attempt at a time, each under an id of its own.
    attempt: Option<SandboxId>,
}

impl Live {
    /// Takes a place among the `limit` sandboxes `team` may have running or starting.
    ///
    /// # Errors
    /// [`AtLimit`] when all places are taken.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        team: &TeamId,
        limit: u32,
        now: UnixMillis,
    ) -> Result<Slot, AtLimit> {
        let mut inner = self.lock();
        let index = inner.team(team);
        index.settle(now);
        let taken = index.starting + index.visible();
        if taken >= usize::try_from(limit).unwrap_or(usize::MAX) {
            inner.forget_team_if_empty(team);
            return Err(AtLimit { limit });
        }
        index.starting += 1;
        let place = Some(Place { team: team.clone(), attempt: None });
        Ok(Slot { live: Arc::clone(self), place })
    }
}

impl Slot {
    /// Begins an attempt to start `id` on `node`; the one before is over.
    pub(crate) fn attempt(&mut self, id: &SandboxId, node: NodeIx) {
        let mut inner = self.live.lock();
        let Some(place) = &mut self.place else { return };
        if let Some(before) = place.attempt.replace(id.clone()) {
            end_attempt(&mut inner, &before);
        }
        let (team, over) = (place.team.clone(), watch::channel(()).0);
        inner.starting.insert(id.clone(), Starting { phase: Phase::Starting, team, node, over });
    }

    /// Makes the created sandbox visible.
    ///
    /// # Errors
    /// [`EndedEarly`] when its end was seen before its start; nothing is added then.
    pub(crate) fn commit(mut self, sandbox: Arc<Sandbox>) -> Result<(), EndedEarly> {
        let live = Arc::clone(&self.live);
        let mut inner = live.lock();
        let phase = inner.starting.get(&sandbox.id).map(|starting| starting.phase);
        let next = phase.map(|phase| phase::next(phase, Event::Answered));
        // In one section, so that the sandbox is never counted twice or not at all.
        if next == Some(Ok(Next::In(Phase::Running))) {
            inner.start(sandbox);
            Self::give_back(self.place.take(), &mut inner);
            return Ok(());
        }
        Err(EndedEarly)
    }

    /// Gives the place back under the table's lock.
    pub(super) fn give_back_in(&mut self, inner: &mut Inner) {
        Self::give_back(self.place.take(), inner);
    }

    fn give_back(place: Option<Place>, inner: &mut Inner) {
        let Some(place) = place else { return };
        if let Some(attempt) = place.attempt {
            end_attempt(inner, &attempt);
        }
        let index = inner.team(&place.team);
        index.starting = index.starting.saturating_sub(1);
        inner.forget_team_if_empty(&place.team);
    }
}

/// The attempt to start `id` is over, and it is not in the table's starting part any more.
fn end_attempt(inner: &mut Inner, id: &SandboxId) {
    let phase = inner.starting.get(id).map(|starting| starting.phase);
    if phase.map(|phase| phase::next(phase, Event::Failed)) == Some(Ok(Next::Gone)) {
        inner.starting.remove(id);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        Self::give_back(self.place.take(), &mut self.live.lock());
    }
}
