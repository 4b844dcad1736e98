//! Creates that were asked for before: the same key of the same team with the same body means the
//! same sandbox. Source: contract sections 1.2 and 10.
//!
//! ```text
//!            begin                 done
//!  (vacant) ───────► in progress ────────► done ── an hour old and ended ──► (vacant)
//!     ▲                  │  │                ▲
//!     │  dropped: failed │  │ nobody knows   │ a reconcile found it
//!     └──────────────────┘  ▼                │
//!     ▲                  unknown ────────────┘
//!     └── it is not there ──┘
//! ```
//!
//! In memory only. A restarted control plane learns the keys of sandboxes that live or start again
//! from their terms; what starts is unknown at first. Those of ended ones are forgotten with the
//! process.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_domain::UnixMillis;
use sha2::{Digest as _, Sha256};

use crate::live::{Metadata, Sandbox};
use crate::team::TeamId;

/// How long a key is remembered at least, whatever becomes of its sandbox.
const MEMORY: Duration = Duration::from_secs(3600);
/// Keys remembered for one team. Of more, those that were not used for longest go first.
const KEYS_MAX: usize = 10_000;
/// Old keys looked at when a new one comes, so that forgetting keeps pace and costs no walk.
const SWEEP: usize = 2;

/// A SHA-256 digest.
pub(crate) type Digest = [u8; 32];

/// A key and what was asked for with it, both as digests: the texts are the caller's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) key: Digest,
    pub(crate) body: Digest,
}

impl Key {
    /// `body` is what is asked for in a form that is the same whenever that is.
    pub(crate) fn new(key: &str, body: &[u8]) -> Key {
        Key { key: Sha256::digest(key).into(), body: Sha256::digest(body).into() }
    }
}

/// The key cannot be used for this create, now or at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeyTaken {
    #[error("create the sandbox: its idempotency key was used for another request")]
    Mismatch,
    #[error("create the sandbox: the request with its idempotency key is still running")]
    InProgress,
    #[error("create the sandbox: what became of the request with its idempotency key is unknown")]
    OutcomeUnknown,
}

/// What a key that may be used leads to.
#[derive(Debug)]
pub(crate) enum Begin {
    /// Nothing was asked for with it.
    Fresh(Ticket),
    /// This was.
    Same(Arc<Sandbox>),
}

/// A create that is under way. Dropping it means that it failed, and makes the key vacant.
#[derive(Debug)]
pub(crate) struct Ticket {
    keys: Arc<Keys>,
    team: TeamId,
    key: Digest,
}

/// Every key in use.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    teams: Mutex<HashMap<TeamId, OfTeam>>,
}

#[derive(Debug, Default)]
struct OfTeam {
    entries: HashMap<Digest, Entry>,
    /// Keys by when they were last used.
    used: BTreeMap<u64, Digest>,
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    body: Digest,
    /// Its place in [`OfTeam::used`].
    use_number: u64,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    InProgress,
    Unknown,
    Done { sandbox: Arc<Sandbox>, since: UnixMillis },
}

impl OfTeam {
    fn touch(&mut self, key: &Digest) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.used.remove(&entry.use_number);
        self.uses += 1;
        entry.use_number = self.uses;
        self.used.insert(self.uses, *key);
    }

    fn put(&mut self, key: Key, stage: Stage) {
        self.remove(&key.key);
        self.uses += 1;
        self.entries.insert(key.key, Entry { body: key.body, use_number: self.uses, stage });
        self.used.insert(self.uses, key.key);
    }

    fn remove(&mut self, key: &Digest) {
        if let Some(entry) = self.entries.remove(key) {
            self.used.remove(&entry.use_number);
        }
    }

    /// Forgets a few that nobody needs, and more when there are too many.
    fn sweep(&mut self, now: UnixMillis, lives: &impl Fn(&Sandbox) -> bool) {
        for _ in 0..SWEEP {
            let Some((_, key)) = self.used.first_key_value() else { return };
            let key = *key;
            match &self.entries[&key].stage {
                Stage::Done { sandbox, since } if is_over(sandbox, *since, now, lives) => {
                    self.remove(&key);
                }
                Stage::Done { .. } if self.entries.len() >= KEYS_MAX => self.remove(&key),
                // Creates under way are as many as the team's limit lets through.
                Stage::Done { .. } | Stage::InProgress | Stage::Unknown => self.touch(&key),
            }
        }
    }
}

fn is_over(
    sandbox: &Sandbox,
    since: UnixMillis,
    now: UnixMillis,
    lives: &impl Fn(&Sandbox) -> bool,
) -> bool {
    now.since(since) >= MEMORY && !lives(sandbox)
}

impl Keys {
    fn lock(&self) -> MutexGuard<'_, HashMap<TeamId, OfTeam>> {
        // Every section leaves the entries and their order in step.
        self.teams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a create with `key`. `lives` says whether a sandbox is still there.
    ///
    /// # Errors
    /// [`KeyTaken`] when the key stands for something else, or for something that is not through.
    pub(crate) fn begin(
        self: &Arc<Self>,
        team: &TeamId,
        key: Key,
        now: UnixMillis,
        lives: impl Fn(&Sandbox) -> bool,
    ) -> Result<Begin, KeyTaken> {
        let mut teams = self.lock();
        let keys = teams.entry(team.clone()).or_default();
        if let Some(entry) = keys.entries.get(&key.key) {
            let answer = match &entry.stage {
                Stage::Done { sandbox, since } if is_over(sandbox, *since, now, &lives) => None,
                _ if entry.body != key.body => Some(Err(KeyTaken::Mismatch)),
                Stage::InProgress => Some(Err(KeyTaken::InProgress)),
                Stage::Unknown => Some(Err(KeyTaken::OutcomeUnknown)),
                Stage::Done { sandbox, .. } => Some(Ok(Begin::Same(Arc::clone(sandbox)))),
            };
            if let Some(answer) = answer {
                keys.touch(&key.key);
                return answer;
            }
        }
        keys.sweep(now, &lives);
        keys.put(key, Stage::InProgress);
        Ok(Begin::Fresh(Ticket { keys: Arc::clone(self), team: team.clone(), key: key.key }))
    }

    /// Learns the key of a create that an earlier life of this process began, and whose outcome is
    /// unknown until the ticket is done or dropped. `None` when the key stands for something here.
    pub(crate) fn learn_unknown(self: &Arc<Self>, team: &TeamId, key: Key) -> Option<Ticket> {
        let mut teams = self.lock();
        let keys = teams.entry(team.clone()).or_default();
        if keys.entries.contains_key(&key.key) {
            return None;
        }
        keys.put(key, Stage::Unknown);
        Some(Ticket { keys: Arc::clone(self), team: team.clone(), key: key.key })
    }

    /// Learns the key of a sandbox from an earlier life of this process. Where two have the same
    /// one, the later counts: it is the one that was answered.
    pub(crate) fn learn(&self, key: Key, sandbox: &Arc<Sandbox>) {
        let mut teams = self.lock();
        let keys = teams.entry(sandbox.team.clone()).or_default();
        let is_newer = keys.entries.get(&key.key).is_none_or(|entry| match &entry.stage {
            Stage::Done { since, .. } => *since < sandbox.started_at,
            // The ticket's holder decides.
            Stage::InProgress | Stage::Unknown => false,
        });
        if is_newer {
            let since = sandbox.started_at;
            keys.put(key, Stage::Done { sandbox: Arc::clone(sandbox), since });
        }
    }
}

impl Ticket {
    fn set(&self, stage: Stage) {
        let mut teams = self.keys.lock();
        let entry = teams.get_mut(&self.team).and_then(|keys| keys.entries.get_mut(&self.key));
        if let Some(entry) = entry {
            entry.stage = stage;
        }
    }

    /// The create made `sandbox`.
    pub(crate) fn done(self, sandbox: &Arc<Sandbox>) {
        let since = sandbox.started_at;
        // No answer to a create shows the labels, and they may be large.
        let sandbox = Arc::new(Sandbox { metadata: Metadata::default(), ..(**sandbox).clone() });
        self.set(Stage::Done { sandbox, since });
    }

    /// Nobody knows what the create made, until this ticket is done or dropped.
    pub(crate) fn unknown(&self) {
        self.set(Stage::Unknown);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut teams = self.keys.lock();
        if let Some(keys) = teams.get_mut(&self.team)
            && let Some(entry) = keys.entries.get(&self.key)
            && !matches!(entry.stage, Stage::Done { .. })
        {
            keys.remove(&self.key);
            if keys.entries.is_empty() {
                teams.remove(&self.team);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::tests::{sandbox_at, team};

    const NOW: UnixMillis = UnixMillis(1_000_000);

    fn begin(keys: &Arc<Keys>, team: &TeamId, key: Key) -> Result<Begin, KeyTaken> {
        keys.begin(team, key, NOW, |_| true)
    }

    fn fresh(keys: &Arc<Keys>, team: &TeamId, key: Key) -> Ticket {
        match begin(keys, team, key) {
            Ok(Begin::Fresh(ticket)) => ticket,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_key_stands_for_one_create_of_one_team() {
        let (keys, team) = (Arc::new(Keys::default()), team());
        let (key, other) = (Key::new("a", b"1"), Key::new("a", b"2"));
        let ticket = fresh(&keys, &team, key);
        assert_eq!(begin(&keys, &team, key).expect_err("it runs"), KeyTaken::InProgress);
        assert_eq!(begin(&keys, &team, other).expect_err("another body"), KeyTaken::Mismatch);
        drop(fresh(&keys, &TeamId::random(), other));
        drop(fresh(&keys, &team, Key::new("b", b"1")));
        let sandbox = sandbox_at(&team, NOW, NOW.plus(MEMORY));
        ticket.done(&sandbox);
        match begin(&keys, &team, key) {
            Ok(Begin::Same(same)) => assert_eq!(same, sandbox),
            other => panic!("{other:?}"),
        }
        assert_eq!(begin(&keys, &team, other).expect_err("another body"), KeyTaken::Mismatch);
    }

    #[test]
    fn what_failed_or_was_settled_frees_the_key() {
        let (keys, team, key) = (Arc::new(Keys::default()), team(), Key::new("a", b"1"));
        drop(fresh(&keys, &team, key));
        let ticket = fresh(&keys, &team, key);
        ticket.unknown();
        assert_eq!(begin(&keys, &team, key).expect_err("unknown"), KeyTaken::OutcomeUnknown);
        drop(ticket);
        assert!(keys.lock().is_empty(), "a team without keys costs nothing");
        drop(fresh(&keys, &team, key));
    }

    #[test]
    fn what_an_earlier_process_began_is_unknown_until_it_is_settled() {
        let (keys, team, key) = (Arc::new(Keys::default()), team(), Key::new("a", b"1"));
        let ticket = keys.learn_unknown(&team, key).expect("a vacant key");
        assert!(keys.learn_unknown(&team, key).is_none(), "it is learned once");
        assert_eq!(begin(&keys, &team, key).expect_err("unknown"), KeyTaken::OutcomeUnknown);
        drop(ticket);
        assert!(keys.lock().is_empty());
        drop(fresh(&keys, &team, key));
    }

    #[test]
    fn a_key_is_kept_for_an_hour_and_while_its_sandbox_lives() {
        let (keys, team, key) = (Arc::new(Keys::default()), team(), Key::new("a", b"1"));
        fresh(&keys, &team, key).done(&sandbox_at(&team, NOW, NOW));
        let later = NOW.plus(MEMORY);
        let almost = UnixMillis(later.0 - 1);
        assert!(matches!(keys.begin(&team, key, almost, |_| false), Ok(Begin::Same(_))));
        assert!(matches!(keys.begin(&team, key, later, |_| true), Ok(Begin::Same(_))));
        assert!(matches!(keys.begin(&team, key, later, |_| false), Ok(Begin::Fresh(_))));
    }

    #[test]
    fn a_key_is_learned_from_the_later_sandbox() {
        let (keys, team, key) = (Arc::new(Keys::default()), team(), Key::new("a", b"1"));
        let (first, later) =
            (sandbox_at(&team, NOW, NOW), sandbox_at(&team, NOW.plus(MEMORY), NOW));
        for sandbox in [&first, &later, &first] {
            keys.learn(key, sandbox);
        }
        match begin(&keys, &team, key) {
            Ok(Begin::Same(same)) => assert_eq!(same.id, later.id),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn of_too_many_keys_the_least_used_go() {
        let (keys, team) = (Arc::new(Keys::default()), team());
        let sandbox = sandbox_at(&team, NOW, NOW);
        let key = |n: usize| Key::new(&n.to_string(), b"");
        for n in 0..KEYS_MAX {
            fresh(&keys, &team, key(n)).done(&sandbox);
        }
        for n in KEYS_MAX..KEYS_MAX + 50 {
            fresh(&keys, &team, key(n)).done(&sandbox);
        }
        let teams = keys.lock();
        let kept = &teams[&team];
        assert!(kept.entries.len() <= KEYS_MAX, "{} are kept", kept.entries.len());
        assert_eq!(kept.entries.len(), kept.used.len());
    }
}
