//! The table of live sandboxes: what every request is answered from.
//!
//! One mutex guards it, held for short synchronous sections only and never across a wait. The node
//! owns the truth; this table follows it through answers, the watch stream and reconciles:
//!
//! ```text
//!            reserve            commit              begin_end         remove
//!  (nothing) ───────► starting ───────► visible ───────────► ending ────────► (nothing)
//!                        │                 │  ▲    abort_end    │
//!                        ▼ slot dropped    │  └─────────────────┘
//!                     (nothing)            └── remove (the node said it ended) ──► (nothing)
//! ```
//!
//! A sandbox whose end has passed is not visible any more, even before the node has said so.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, UnixMillis, Vcpus};

use crate::team::TeamId;

/// One live sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    pub(crate) execution: ExecutionId,
    pub(crate) team: TeamId,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    pub(crate) alias: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// Whether its guest daemon asks for a token.
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
    pub(crate) started_at: UnixMillis,
    pub(crate) end_at: UnixMillis,
    pub(crate) ip: IpAddr,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: String,
}

/// What a node says of one sandbox it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) id: SandboxId,
    pub(crate) execution: ExecutionId,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    pub(crate) ip: IpAddr,
    pub(crate) started_at: UnixMillis,
    pub(crate) end_at: UnixMillis,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: String,
}

/// What a node does not know of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) team: TeamId,
    pub(crate) alias: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
}

impl Sandbox {
    pub(crate) fn new(observed: Observed, terms: Terms) -> Sandbox {
        Sandbox {
            id: observed.id,
            execution: observed.execution,
            team: terms.team,
            template: observed.template,
            build: observed.build,
            alias: terms.alias,
            metadata: terms.metadata,
            secure: terms.secure,
            allow_internet: terms.allow_internet,
            started_at: observed.started_at,
            end_at: observed.end_at,
            ip: observed.ip,
            vcpus: observed.vcpus,
            memory: observed.memory,
            disk: observed.disk,
            envd_version: observed.envd_version,
        }
    }
}

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

/// What was known when a reconcile began: the revision of each sandbox, `None` while starting.
pub(crate) type Marks = HashMap<SandboxId, Option<u64>>;

/// What a reconcile changed, and what it found that nobody here knows.
#[derive(Debug, Default)]
pub(crate) struct Difference {
    /// Removed: the node does not have them any more.
    pub(crate) gone: Vec<Arc<Sandbox>>,
    /// Corrected to what the node says.
    pub(crate) moved: Vec<Arc<Sandbox>>,
    /// On the node, not here.
    pub(crate) unknown: Vec<Observed>,
}

/// See the module's own words.
#[derive(Debug, Default)]
pub(crate) struct Live {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    starting: HashMap<SandboxId, Starting>,
    running: HashMap<SandboxId, Entry>,
    /// Counts changes, so that a reconcile can tell whether its picture of a sandbox is stale.
    revision: u64,
}

#[derive(Debug)]
struct Starting {
    team: TeamId,
    ended: bool,
}

#[derive(Debug)]
struct Entry {
    sandbox: Arc<Sandbox>,
    revision: u64,
    ending: bool,
}

impl Inner {
    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }
}

impl Entry {
    fn is_visible(&self, team: &TeamId, now: UnixMillis) -> bool {
        !self.ending && self.sandbox.team == *team && self.sandbox.end_at > now
    }
}

/// A place for a sandbox that is being created. Dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Slot {
    live: Arc<Live>,
    id: SandboxId,
}

impl Slot {
    /// Makes the created sandbox visible.
    ///
    /// # Errors
    /// [`EndedEarly`] when its end was seen before its start; nothing is added then.
    pub(crate) fn commit(self, sandbox: Arc<Sandbox>) -> Result<(), EndedEarly> {
        let mut inner = self.live.lock();
        let ended = inner.starting.get(&self.id).is_some_and(|starting| starting.ended);
        if ended {
            return Err(EndedEarly);
        }
        let revision = inner.next_revision();
        inner.running.insert(sandbox.id.clone(), Entry { sandbox, revision, ending: false });
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.live.lock().starting.remove(&self.id);
    }
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every section leaves the table whole before anything in it can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for `id` among the `limit` sandboxes `team` may have running or starting.
    ///
    /// # Errors
    /// [`AtLimit`] when all places are taken.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        id: &SandboxId,
        team: &TeamId,
        limit: u32,
        now: UnixMillis,
    ) -> Result<Slot, AtLimit> {
        let mut inner = self.lock();
        let starting = inner.starting.values().filter(|s| s.team == *team).count();
        let running = inner.running.values().filter(|e| e.is_visible(team, now)).count();
        if starting + running >= usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(AtLimit { limit });
        }
        inner.starting.insert(id.clone(), Starting { team: team.clone(), ended: false });
        Ok(Slot { live: Arc::clone(self), id: id.clone() })
    }

    /// The sandbox `id`, if `team` may see it.
    pub(crate) fn find(
        &self,
        id: &SandboxId,
        team: &TeamId,
        now: UnixMillis,
    ) -> Option<Arc<Sandbox>> {
        let inner = self.lock();
        let entry = inner.running.get(id).filter(|e| e.is_visible(team, now))?;
        Some(Arc::clone(&entry.sandbox))
    }

    /// Every sandbox `team` may see, in no order.
    pub(crate) fn list(&self, team: &TeamId, now: UnixMillis) -> Vec<Arc<Sandbox>> {
        let inner = self.lock();
        let visible = inner.running.values().filter(|e| e.is_visible(team, now));
        visible.map(|e| Arc::clone(&e.sandbox)).collect()
    }

    /// Moves the end of a run. Nothing happens when that run is not here.
    pub(crate) fn move_end(&self, id: &SandboxId, execution: &ExecutionId, end_at: UnixMillis) {
        let mut inner = self.lock();
        let revision = inner.next_revision();
        if let Some(entry) = inner.running.get_mut(id)
            && entry.sandbox.execution == *execution
        {
            entry.sandbox = Arc::new(Sandbox { end_at, ..(*entry.sandbox).clone() });
            entry.revision = revision;
        }
    }

    /// Hides the sandbox `id` because its end has been asked for; only the first caller gets it.
    pub(crate) fn begin_end(
        &self,
        id: &SandboxId,
        team: &TeamId,
        now: UnixMillis,
    ) -> Option<Arc<Sandbox>> {
        let mut inner = self.lock();
        let revision = inner.next_revision();
        let entry = inner.running.get_mut(id).filter(|e| e.is_visible(team, now))?;
        entry.ending = true;
        entry.revision = revision;
        Some(Arc::clone(&entry.sandbox))
    }

    /// Shows a sandbox again whose end could not be brought about.
    pub(crate) fn abort_end(&self, id: &SandboxId, execution: &ExecutionId) {
        if let Some(entry) = self.lock().running.get_mut(id)
            && entry.sandbox.execution == *execution
        {
            entry.ending = false;
        }
    }

    /// Removes a run that has ended. `None` when it was not here, or is still starting.
    pub(crate) fn remove(&self, id: &SandboxId, execution: &ExecutionId) -> Option<Arc<Sandbox>> {
        let mut inner = self.lock();
        if let Some(starting) = inner.starting.get_mut(id) {
            starting.ended = true;
        }
        if inner.running.get(id)?.sandbox.execution != *execution {
            return None;
        }
        inner.running.remove(id).map(|entry| entry.sandbox)
    }

    /// What is known now. Take it before asking the node, so that what changes meanwhile is not
    /// undone by an answer that is older.
    pub(crate) fn marks(&self) -> Marks {
        let inner = self.lock();
        let running = inner.running.iter().map(|(id, e)| (id.clone(), Some(e.revision)));
        let starting = inner.starting.keys().map(|id| (id.clone(), None));
        starting.chain(running).collect()
    }

    /// Follows `seen`, everything the node holds, as asked for after `before` was taken.
    pub(crate) fn observe(&self, before: &Marks, seen: Vec<Observed>) -> Difference {
        let mut difference = Difference::default();
        let mut inner = self.lock();
        let on_node: HashMap<&SandboxId, &Observed> = seen.iter().map(|o| (&o.id, o)).collect();
        inner.running.retain(|id, entry| {
            let known_before = before.get(id).is_some_and(|&mark| mark == Some(entry.revision));
            let held = on_node.get(id).is_some_and(|o| o.execution == entry.sandbox.execution);
            let stays = held || !known_before;
            if !stays {
                difference.gone.push(Arc::clone(&entry.sandbox));
            }
            stays
        });
        for observed in seen {
            let revision = inner.next_revision();
            let Some(entry) = inner.running.get_mut(&observed.id) else {
                // Known when the node was asked, and not here now: it has ended in between.
                let starting = inner.starting.contains_key(&observed.id);
                if !starting && !before.contains_key(&observed.id) {
                    difference.unknown.push(observed);
                }
                continue;
            };
            let stale = before.get(&observed.id) != Some(&Some(entry.revision));
            // Only the end of a run can change; its address and size stay.
            if !stale && entry.sandbox.end_at != observed.end_at {
                let end_at = observed.end_at;
                entry.sandbox = Arc::new(Sandbox { end_at, ..(*entry.sandbox).clone() });
                entry.revision = revision;
                difference.moved.push(Arc::clone(&entry.sandbox));
            }
        }
        difference
    }

    /// Adds a sandbox of an earlier life of this process. False when its id is known already.
    pub(crate) fn adopt(&self, sandbox: Arc<Sandbox>) -> bool {
        let mut inner = self.lock();
        let id = sandbox.id.clone();
        if inner.running.contains_key(&id) || inner.starting.contains_key(&id) {
            return false;
        }
        let revision = inner.next_revision();
        inner.running.insert(id, Entry { sandbox, revision, ending: false });
        true
    }

    /// Every run in the table, whoever owns it, those on their way out included.
    pub(crate) fn all(&self) -> Vec<Arc<Sandbox>> {
        self.lock().running.values().map(|e| Arc::clone(&e.sandbox)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const NOW: UnixMillis = UnixMillis(1_000);
    const LATER: UnixMillis = UnixMillis(2_000);

    fn sandbox(team: &TeamId) -> Arc<Sandbox> {
        Arc::new(Sandbox {
            id: SandboxId::random(),
            execution: ExecutionId::random(),
            team: team.clone(),
            template: TemplateId::random(),
            build: BuildId::random(),
            alias: None,
            metadata: BTreeMap::new(),
            secure: true,
            allow_internet: true,
            started_at: NOW,
            end_at: LATER,
            ip: Ipv4Addr::LOCALHOST.into(),
            vcpus: Vcpus(2),
            memory: MiB(512),
            disk: MiB(512),
            envd_version: "0.6.13".to_owned(),
        })
    }

    fn observed(s: &Sandbox) -> Observed {
        Observed {
            id: s.id.clone(),
            execution: s.execution.clone(),
            template: s.template.clone(),
            build: s.build.clone(),
            ip: s.ip,
            started_at: s.started_at,
            end_at: s.end_at,
            vcpus: s.vcpus,
            memory: s.memory,
            disk: s.disk,
            envd_version: s.envd_version.clone(),
        }
    }

    fn add(live: &Arc<Live>, team: &TeamId) -> Arc<Sandbox> {
        let s = sandbox(team);
        let slot = live.reserve(&s.id, team, 10, NOW).expect("a free place");
        slot.commit(Arc::clone(&s)).expect("it did not end");
        s
    }

    #[test]
    fn the_limit_counts_running_and_starting_and_frees_places() {
        let (live, team) = (Arc::new(Live::default()), TeamId::random());
        let s = add(&live, &team);
        let slot = live.reserve(&SandboxId::random(), &team, 2, NOW).expect("the second place");
        let full = live.reserve(&SandboxId::random(), &team, 2, NOW).expect_err("no third place");
        assert_eq!(full, AtLimit { limit: 2 });
        live.reserve(&SandboxId::random(), &TeamId::random(), 2, NOW).expect("another team");
        drop(slot);
        drop(live.reserve(&SandboxId::random(), &team, 2, NOW).expect("given back"));
        live.remove(&s.id, &s.execution).expect("it was there");
        drop(live.reserve(&SandboxId::random(), &team, 1, NOW).expect("the last one is gone"));
    }

    #[test]
    fn others_and_the_late_see_nothing() {
        let (live, team) = (Arc::new(Live::default()), TeamId::random());
        let s = add(&live, &team);
        assert!(live.find(&s.id, &team, NOW).is_some());
        assert!(live.find(&s.id, &TeamId::random(), NOW).is_none());
        assert!(live.find(&s.id, &team, LATER).is_none());
        assert!(live.list(&team, LATER).is_empty());
    }

    #[test]
    fn one_caller_ends_a_sandbox() {
        let (live, team) = (Arc::new(Live::default()), TeamId::random());
        let s = add(&live, &team);
        assert!(live.begin_end(&s.id, &team, NOW).is_some());
        assert!(live.begin_end(&s.id, &team, NOW).is_none());
        live.abort_end(&s.id, &s.execution);
        assert!(live.find(&s.id, &team, NOW).is_some());
    }

    #[test]
    fn an_end_seen_before_the_start_wins() {
        let (live, team) = (Arc::new(Live::default()), TeamId::random());
        let s = sandbox(&team);
        let slot = live.reserve(&s.id, &team, 1, NOW).expect("a free place");
        assert!(live.remove(&s.id, &s.execution).is_none());
        assert_eq!(slot.commit(Arc::clone(&s)), Err(EndedEarly));
        assert!(live.marks().is_empty());
    }

    #[test]
    fn a_reconcile_follows_the_node() {
        let (live, team) = (Arc::new(Live::default()), TeamId::random());
        let (kept, lost, stranger) = (add(&live, &team), add(&live, &team), sandbox(&team));
        let before = live.marks();
        let mut moved = observed(&kept);
        moved.end_at = UnixMillis(9_000);
        let difference = live.observe(&before, vec![moved, observed(&stranger)]);
        assert_eq!(difference.gone, [lost]);
        assert_eq!(difference.moved.len(), 1);
        assert_eq!(difference.unknown, [observed(&stranger)]);
        assert_eq!(live.find(&kept.id, &team, NOW).expect("kept").end_at, UnixMillis(9_000));
    }

    #[test]
    fn a_stale_answer_undoes_nothing() {
        let (live, team) = (Arc::new(Live::default()), TeamId::random());
        let (moved, ended) = (add(&live, &team), add(&live, &team));
        let starting = sandbox(&team);
        let slot = live.reserve(&starting.id, &team, 10, NOW).expect("a free place");
        let before = live.marks();
        let answer = vec![observed(&moved), observed(&ended), observed(&starting)];
        let born = add(&live, &team);
        live.move_end(&moved.id, &moved.execution, UnixMillis(9_000));
        live.remove(&ended.id, &ended.execution).expect("it was there");
        let difference = live.observe(&before, answer);
        assert!(difference.gone.is_empty(), "{difference:?}");
        assert!(difference.moved.is_empty(), "{difference:?}");
        assert!(difference.unknown.is_empty(), "{difference:?}");
        assert!(live.find(&born.id, &team, NOW).is_some());
        assert_eq!(live.find(&moved.id, &team, NOW).expect("kept").end_at, UnixMillis(9_000));
        slot.commit(starting).expect("it did not end");
    }
}
