//! The table of live sandboxes: what every request is answered from.
//!
//! One mutex guards it, held for short synchronous sections only and never across a wait. The nodes
//! own the truth; this table follows them through answers, watch streams and reconciles, each
//! sandbox through the phases of [`phase`]. Every team has an index of its own ([`index`]).
//!
//! A sandbox whose end has passed is not visible any more, even before its node has said so; one that
//! is paused at its end is seen as paused from then on.

mod index;
mod metadata;
mod phase;
mod sandbox;
mod sleep;
mod slot;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_domain::{ExecutionId, SandboxId, UnixMillis};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::nodes::NodeIx;
use crate::team::TeamId;
use index::TeamIndex;
use phase::{Denied, Event, Next, Phase};

pub(crate) use index::{Key, Order, Range, States};
pub(crate) use metadata::Metadata;
pub(crate) use sandbox::{EnvVars, Kept, Lifecycle, Observed, OnEnd, Sandbox, Saved, Terms};
pub(crate) use sleep::{Ended, Heard, Pausing, Rousing, Standing};
pub(crate) use slot::{AtLimit, EndedEarly, Slot};

/// What was known of one node when a reconcile of it began: the revision of each of its sandboxes,
/// `None` while starting.
pub(crate) type Marks = HashMap<SandboxId, Option<u64>>;

/// What a reconcile changed, and what it found that nobody here knows.
#[derive(Debug, Default)]
pub(crate) struct Difference {
    /// Hidden: the node does not have them any more, and may be about to say why.
    pub(crate) missing: Vec<Arc<Sandbox>>,
    /// They have been missing for [`NOTICE_WAIT`], and nobody said why; in the table until that is
    /// followed.
    pub(crate) gone: Vec<Arc<Sandbox>>,
    /// Corrected to what the node says.
    pub(crate) moved: Vec<Arc<Sandbox>>,
    /// On the node, not here.
    pub(crate) unknown: Vec<Observed>,
}

/// How long a sandbox may be missing on its node before that counts as its end. A node says why a
/// sandbox ended right after it stops listing it, and that notice may be on its way, or be read only
/// after the list.
pub(crate) const NOTICE_WAIT: Duration = Duration::from_secs(2);

/// What stands under an id that a caller wants to end.
#[derive(Debug)]
pub(crate) enum Ending {
    /// It is hidden now, and this caller ends it; a paused one by removing its snapshot.
    Mine(Arc<Sandbox>),
    /// Its start, pause or resume is under way; the channel closes when that is over.
    Busy(watch::Receiver<()>),
    /// There is nothing the team may end.
    Nothing,
}

/// See the module's own words.
#[derive(Debug, Default)]
pub(crate) struct Live {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    starting: HashMap<SandboxId, Starting>,
    started: HashMap<SandboxId, Started>,
    /// Paused ones as the store has them, of sandboxes that run according to it. Whichever turns out
    /// first decides: their run, or that it is gone.
    resumed: HashMap<SandboxId, Arc<Sandbox>>,
    teams: HashMap<TeamId, TeamIndex>,
    /// Counts changes, so that a reconcile can tell whether its picture of a sandbox is stale.
    revision: u64,
}

#[derive(Debug)]
struct Starting {
    phase: Phase,
    team: TeamId,
    node: NodeIx,
    /// Dropped when the start is over, which those who wait for it notice.
    over: watch::Sender<()>,
}

#[derive(Debug)]
struct Started {
    phase: Phase,
    sandbox: Arc<Sandbox>,
    revision: u64,
    /// One change of this sandbox at a time; made when the first one is.
    turn: Option<Arc<Semaphore>>,
    /// Since when its node does not list it.
    missing_since: Option<Instant>,
    /// Dropped at the next change of phase, which those who wait for it notice; made for the first.
    over: Option<watch::Sender<()>>,
    /// The run a resume has asked for.
    resuming: Option<ExecutionId>,
}

impl Inner {
    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn team(&mut self, team: &TeamId) -> &mut TeamIndex {
        if !self.teams.contains_key(team) {
            self.teams.insert(team.clone(), TeamIndex::default());
        }
        self.teams.get_mut(team).expect("it was just put there")
    }

    /// The index of `team`, if it has anything, as of `now`.
    fn settled(&mut self, team: &TeamId, now: UnixMillis) -> Option<&TeamIndex> {
        let index = self.teams.get_mut(team)?;
        index.settle(now);
        Some(index)
    }

    fn forget_team_if_empty(&mut self, team: &TeamId) {
        if self.teams.get(team).is_some_and(TeamIndex::is_empty) {
            self.teams.remove(team);
        }
    }

    fn start(&mut self, sandbox: Arc<Sandbox>) {
        self.put(sandbox, Phase::Running);
    }

    /// Adds `sandbox`, which is seen in `phase`.
    fn put(&mut self, sandbox: Arc<Sandbox>, phase: Phase) {
        let revision = self.next_revision();
        self.team(&sandbox.team).insert(Arc::clone(&sandbox));
        let started = Started {
            phase,
            sandbox,
            revision,
            turn: None,
            missing_since: None,
            over: None,
            resuming: None,
        };
        self.started.insert(started.sandbox.id.clone(), started);
    }

    /// Applies `event` to the run `execution` of `id`. `None` when it is not here or takes no such
    /// event; the run otherwise.
    fn apply(
        &mut self,
        id: &SandboxId,
        execution: &ExecutionId,
        event: Event,
    ) -> Option<Arc<Sandbox>> {
        self.started.get(id).filter(|s| s.sandbox.execution == *execution)?;
        self.apply_as(id, event, None).map(|(sandbox, _)| sandbox)
    }

    /// Applies `event` to `id`, which is `becomes` afterwards. Answers what it was, and what follows.
    fn apply_as(
        &mut self,
        id: &SandboxId,
        event: Event,
        becomes: Option<Arc<Sandbox>>,
    ) -> Option<(Arc<Sandbox>, Next)> {
        let revision = self.next_revision();
        let started = self.started.get_mut(id)?;
        let next = phase::next(started.phase, event).ok()?;
        let was_seen = started.phase.is_seen();
        let before = Arc::clone(&started.sandbox);
        let after = becomes.unwrap_or_else(|| Arc::clone(&before));
        match next {
            Next::In(phase) => {
                started.phase = phase;
                started.revision = revision;
                started.sandbox = Arc::clone(&after);
                started.over = None;
            }
            Next::Gone => {
                self.started.remove(id);
            }
        }
        let is_seen = matches!(next, Next::In(phase) if phase.is_seen());
        let index = self.team(&before.team);
        if was_seen {
            index.remove(&before);
        }
        if is_seen {
            index.insert(after);
        }
        self.forget_team_if_empty(&before.team);
        Some((before, next))
    }

    /// A node does not list the run `execution` of `id`, as of `now`.
    fn miss(
        &mut self,
        id: &SandboxId,
        execution: &ExecutionId,
        now: Instant,
        difference: &mut Difference,
    ) {
        let Some(started) = self.started.get_mut(id) else { return };
        let since = *started.missing_since.get_or_insert(now);
        if now.duration_since(since) >= NOTICE_WAIT {
            difference.gone.push(Arc::clone(&started.sandbox));
            return;
        }
        let sandbox = Arc::clone(&started.sandbox);
        // Denied when it is hidden already, because somebody ends it.
        let _hidden = self.apply(id, execution, Event::NotThere).is_some();
        difference.missing.push(sandbox);
    }

    /// Gives the run of `id` another end.
    fn move_end(&mut self, id: &SandboxId, end_at: UnixMillis) -> Option<Arc<Sandbox>> {
        let revision = self.next_revision();
        let started = self.started.get_mut(id)?;
        if started.phase.is_asleep() {
            return None;
        }
        let moved = Arc::new(Sandbox { end_at, ..(*started.sandbox).clone() });
        let before = std::mem::replace(&mut started.sandbox, Arc::clone(&moved));
        started.revision = revision;
        if started.phase == Phase::Running {
            let index = self.team(&moved.team);
            index.remove(&before);
            index.insert(Arc::clone(&moved));
        }
        Some(moved)
    }
}

impl Started {
    /// Whether `team` sees it run.
    fn is_visible(&self, team: &TeamId, now: UnixMillis) -> bool {
        self.phase == Phase::Running && self.sandbox.team == *team && self.sandbox.end_at > now
    }

    /// Whether its node is pausing it because its time was up at `now`, as far as is known.
    fn is_falling_asleep(&self, now: UnixMillis) -> bool {
        let is_over = self.phase == Phase::Running && self.sandbox.end_at <= now;
        (is_over || self.phase == Phase::Missing) && self.sandbox.pauses_at_end()
    }

    /// As `team` sees it, running or paused.
    fn seen(&self, team: &TeamId, now: UnixMillis) -> Option<Arc<Sandbox>> {
        if self.sandbox.team != *team {
            None
        } else if self.is_falling_asleep(now) {
            self.sandbox.falling_asleep().map(Arc::new)
        } else if self.phase.is_asleep() || self.is_visible(team, now) {
            Some(Arc::clone(&self.sandbox))
        } else {
            None
        }
    }

    /// A channel that closes when its phase changes.
    fn wait(&mut self) -> watch::Receiver<()> {
        self.over.get_or_insert_with(|| watch::channel(()).0).subscribe()
    }
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every section leaves the table whole before anything in it can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox `id`, running or paused, if `team` may see it.
    pub(crate) fn find(
        &self,
        id: &SandboxId,
        team: &TeamId,
        now: UnixMillis,
    ) -> Option<Arc<Sandbox>> {
        self.lock().started.get(id)?.seen(team, now)
    }

    /// The sandbox `id`, if it runs and `team` may see it.
    pub(crate) fn find_running(
        &self,
        id: &SandboxId,
        team: &TeamId,
        now: UnixMillis,
    ) -> Option<Arc<Sandbox>> {
        let inner = self.lock();
        let started = inner.started.get(id).filter(|s| s.is_visible(team, now))?;
        Some(Arc::clone(&started.sandbox))
    }

    /// Every sandbox of `team` in `range` and in `states`, in its order. Costs what it answers.
    pub(crate) fn list(
        &self,
        team: &TeamId,
        now: UnixMillis,
        range: &Range,
        states: States,
    ) -> Vec<Arc<Sandbox>> {
        self.page(team, now, range, states, usize::MAX).0
    }

    /// The first `limit` sandboxes of `team` in `range` and in `states`, and how many of the team run
    /// in all. Costs what it answers.
    pub(crate) fn page(
        &self,
        team: &TeamId,
        now: UnixMillis,
        range: &Range,
        states: States,
        limit: usize,
    ) -> (Vec<Arc<Sandbox>>, usize) {
        let mut inner = self.lock();
        let Some(index) = inner.settled(team, now) else { return (Vec::new(), 0) };
        (index.range(range, states).take(limit).cloned().collect(), index.visible())
    }

    /// What `team` has running and starting: what its limit counts.
    pub(crate) fn count(&self, team: &TeamId, now: UnixMillis) -> usize {
        self.lock().settled(team, now).map_or(0, |index| index.starting + index.visible())
    }

    /// Moves the end of a run, and answers what it then is. `None` when that run is not here.
    pub(crate) fn move_end(
        &self,
        id: &SandboxId,
        execution: &ExecutionId,
        end_at: UnixMillis,
    ) -> Option<Arc<Sandbox>> {
        let mut inner = self.lock();
        inner.started.get(id).filter(|s| s.sandbox.execution == *execution)?;
        inner.move_end(id, end_at)
    }

    /// Whose turn it is to change the sandbox `id`: whoever holds the one permit. `None` when `team`
    /// may not see it.
    pub(crate) fn turn(
        &self,
        id: &SandboxId,
        team: &TeamId,
        now: UnixMillis,
    ) -> Option<Arc<Semaphore>> {
        let mut inner = self.lock();
        let started = inner.started.get_mut(id).filter(|s| s.is_visible(team, now))?;
        let turn = started.turn.get_or_insert_with(|| Arc::new(Semaphore::new(1)));
        Some(Arc::clone(turn))
    }

    /// Hides the sandbox `id` because its end has been asked for; only the first caller gets it.
    pub(crate) fn begin_end(&self, id: &SandboxId, team: &TeamId, now: UnixMillis) -> Ending {
        let mut inner = self.lock();
        if let Some(starting) = inner.starting.get(id)
            && starting.team == *team
        {
            return Ending::Busy(starting.over.subscribe());
        }
        let Some(started) = inner.started.get_mut(id) else { return Ending::Nothing };
        if started.seen(team, now).is_none() {
            return Ending::Nothing;
        }
        if phase::next(started.phase, Event::EndAsked) == Err(Denied::Changing) {
            return Ending::Busy(started.wait());
        }
        let ended = inner.apply_as(id, Event::EndAsked, None);
        ended.map_or(Ending::Nothing, |(sandbox, _)| Ending::Mine(sandbox))
    }

    /// Hides a run that its node turned out not to have, until the node says why. True for the
    /// first to find out.
    pub(crate) fn hide_missing(&self, id: &SandboxId, execution: &ExecutionId) -> bool {
        self.lock().apply(id, execution, Event::NotThere).is_some()
    }

    /// Shows a sandbox again whose end could not be brought about.
    pub(crate) fn abort_end(&self, id: &SandboxId, execution: &ExecutionId) {
        // It may have ended meanwhile; then there is nothing to show.
        let _ended = self.lock().apply(id, execution, Event::EndFailed).is_none();
    }

    /// What is known now of `node`. Take it before asking the node, so that what changes meanwhile
    /// is not undone by an answer that is older.
    pub(crate) fn marks(&self, node: NodeIx) -> Marks {
        let inner = self.lock();
        // A paused one may turn out to run on any node.
        let here = |s: &Started| s.sandbox.node == node || !s.phase.has_run();
        let started = inner.started.iter().filter(|(_, s)| here(s));
        let started = started.map(|(id, s)| (id.clone(), Some(s.revision)));
        let starting = inner.starting.iter().filter(|(_, s)| s.node == node);
        starting.map(|(id, _)| (id.clone(), None)).chain(started).collect()
    }

    /// Follows `seen`, everything `node` holds, as asked for after `before` was taken. It is `now`.
    pub(crate) fn observe(
        &self,
        node: NodeIx,
        before: &Marks,
        seen: Vec<Observed>,
        now: Instant,
    ) -> Difference {
        let mut difference = Difference::default();
        let mut inner = self.lock();
        let on_node: HashMap<&SandboxId, &Observed> = seen.iter().map(|o| (&o.id, o)).collect();
        let is_missing = |id: &SandboxId, started: &Started| {
            let known_before = before.get(id).is_some_and(|&mark| mark == Some(started.revision));
            let held = on_node.get(id).is_some_and(|o| o.execution == started.sandbox.execution);
            // The call that pauses one says what becomes of it.
            let is_settled = started.phase.has_run() && started.phase != Phase::Pausing;
            is_settled && started.sandbox.node == node && known_before && !held
        };
        let missing: Vec<_> = inner
            .started
            .iter()
            .filter(|(id, started)| is_missing(id, started))
            .map(|(id, started)| (id.clone(), started.sandbox.execution.clone()))
            .collect();
        for (id, execution) in missing {
            inner.miss(&id, &execution, now, &mut difference);
        }
        for observed in seen {
            let Some(started) = inner.started.get(&observed.id) else {
                // Known when the node was asked, and not here now: it has ended in between.
                let starting = inner.starting.contains_key(&observed.id);
                if !starting && !before.contains_key(&observed.id) {
                    difference.unknown.push(observed);
                }
                continue;
            };
            if !started.phase.has_run() {
                // A resume whose answer was lost; one that is under way has a newer revision, or
                // answers itself.
                let unchanged = before.get(&observed.id) == Some(&Some(started.revision));
                if unchanged && started.phase == Phase::Paused {
                    difference.unknown.push(observed);
                }
                continue;
            }
            if started.sandbox.node != node {
                // Another node has it under this id; this one's is nobody's.
                difference.unknown.push(observed);
                continue;
            }
            let stale = before.get(&observed.id) != Some(&Some(started.revision));
            // Only the end of a run can change; its address and size stay.
            if !stale && started.sandbox.end_at != observed.end_at {
                difference.moved.extend(inner.move_end(&observed.id, observed.end_at));
            }
        }
        difference
    }

    /// Whether `id` is in the table, whoever owns it and however far it is.
    pub(crate) fn contains(&self, id: &SandboxId) -> bool {
        let inner = self.lock();
        inner.started.contains_key(id) || inner.starting.contains_key(id)
    }

    /// Every run in the table, whoever owns it, those on their way out included.
    pub(crate) fn all(&self) -> Vec<Arc<Sandbox>> {
        let inner = self.lock();
        let runs = inner.started.values().filter(|s| s.phase.has_run());
        runs.map(|s| Arc::clone(&s.sandbox)).collect()
    }

    /// Everything in the table that has no run, whoever owns it: the paused ones.
    pub(crate) fn all_paused(&self) -> Vec<Arc<Sandbox>> {
        let inner = self.lock();
        let paused = inner.started.values().filter(|s| !s.phase.has_run());
        paused.map(|s| Arc::clone(&s.sandbox)).collect()
    }
}
