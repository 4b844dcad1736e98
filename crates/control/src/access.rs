//! Who is behind a credential: answers of the store, believed for some seconds.
//!
//! What was found is believed for [`BELIEVED`] without asking the store again, so that a busy key
//! costs one lookup in ten seconds. What changes here (a key removed, a team blocked) is
//! forgotten at once; a second control plane on the same database hears of it that much later.

use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use belljar_daemon::{OnError, Scope, clock};
use belljar_domain::UnixMillis;
use tracing::warn;

use crate::creation_rate::CreationRate;
use crate::keys::{AccessToken, AdminToken, ApiKey, KeyHash};
use crate::store::{Identity, Store, StoreError, Used, UserError};
use crate::team::{CredentialId, Team, TeamId, UserId};

/// How long what was found is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// Entries of one memory after which those not believed any more are dropped. Only what exists is
/// kept, so callers cannot fill it beyond that with guesses.
const SWEEP_AT: usize = 4096;
/// How often the times credentials were used last are written.
const WRITE_EVERY: Duration = Duration::from_secs(30);

/// How a user said who they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum SignIn {
    Token(KeyHash),
    Provider { issuer: String, subject: String },
}

/// The door to who is behind a credential.
pub(crate) struct Access {
    store: Store,
    admin: Option<AdminToken>,
    keys: Memory<KeyHash, (CredentialId, Arc<Team>)>,
    users: Memory<SignIn, (Option<CredentialId>, UserId)>,
    /// Teams, as one user may act for them, or the operator.
    teams: Memory<(Option<UserId>, TeamId), Arc<Team>>,
    used: Mutex<HashMap<CredentialId, (Used, UnixMillis)>>,
    /// How fast each team begins sandboxes.
    pub(crate) creation_rate: CreationRate,
}

impl Access {
    pub(crate) fn new(store: Store, admin: Option<AdminToken>) -> Access {
        Access {
            store,
            admin,
            keys: Memory::default(),
            users: Memory::default(),
            teams: Memory::default(),
            used: Mutex::default(),
            creation_rate: CreationRate::default(),
        }
    }

    /// Whether `text` is the operator's token. Never, when none is configured.
    pub(crate) fn is_operator(&self, text: &[u8]) -> bool {
        self.admin.as_ref().is_some_and(|token| token.is(text))
    }

    /// The team `key` acts for.
    pub(crate) async fn team_of_key(&self, key: &ApiKey) -> Result<Option<Arc<Team>>, StoreError> {
        let hash = key.hash();
        let found = match self.keys.recall(&hash) {
            Ok(known) => Some(known),
            Err(asked) => {
                let found = self.store.team_of_key(&hash).await?;
                let found = found.map(|(id, team)| (id, Arc::new(team)));
                self.keys.remember(asked, hash, found.as_ref());
                found
            }
        };
        Ok(found.map(|(id, team)| {
            self.note(Used::Key(id.clone()), id);
            team
        }))
    }

    /// The user `token` acts for.
    pub(crate) async fn user_of_token(
        &self,
        token: &AccessToken,
    ) -> Result<Option<UserId>, StoreError> {
        let sign_in = SignIn::Token(token.hash());
        let found = match self.users.recall(&sign_in) {
            Ok(known) => Some(known),
            Err(asked) => {
                let found = self.store.user_of_token(&token.hash()).await?;
                let found = found.map(|(id, user)| (Some(id), user));
                self.users.remember(asked, sign_in, found.as_ref());
                found
            }
        };
        let Some((id, user)) = found else { return Ok(None) };
        if let Some(id) = id {
            self.note(Used::Token(id.clone()), id);
        }
        Ok(Some(user))
    }

    /// The user a provider means by `identity`, made at first sight: without a team they may act
    /// for, they can do nothing.
    pub(crate) async fn user_of_identity(
        &self,
        identity: &Identity,
        email: Option<&str>,
    ) -> Result<UserId, StoreError> {
        let sign_in =
            SignIn::Provider { issuer: identity.issuer.clone(), subject: identity.subject.clone() };
        let asked = match self.users.recall(&sign_in) {
            Ok((_, user)) => return Ok(user),
            Err(asked) => asked,
        };
        let user = match self.store.user_of_identity(identity).await? {
            Some(user) => user,
            None => self.first_sight(identity, email).await?,
        };
        self.users.remember(asked, sign_in, Some(&(None, user.clone())));
        Ok(user)
    }

    /// Users are never found by their address: a provider may let people choose it.
    async fn first_sight(
        &self,
        identity: &Identity,
        email: Option<&str>,
    ) -> Result<UserId, StoreError> {
        let unique = format!("{}#{}", identity.issuer, identity.subject);
        for name in email.into_iter().chain([unique.as_str()]) {
            match self.store.create_user(name, Some(identity)).await {
                Ok(user) => return Ok(user.id),
                Err(UserError::Store(e)) => return Err(e),
                // Another request was first, or the address is taken.
                Err(_) => {
                    if let Some(user) = self.store.user_of_identity(identity).await? {
                        return Ok(user);
                    }
                }
            }
        }
        Err(StoreError::Corrupt { what: "a user's name", value: unique })
    }

    /// The team `id`, if `user` is one of its members.
    pub(crate) async fn team_of_member(
        &self,
        user: &UserId,
        id: &TeamId,
    ) -> Result<Option<Arc<Team>>, StoreError> {
        let name = (Some(user.clone()), id.clone());
        let asked = match self.teams.recall(&name) {
            Ok(team) => return Ok(Some(team)),
            Err(asked) => asked,
        };
        let teams = self.store.teams_of(user).await?;
        let found = teams.into_iter().find(|(team, _)| team.id == *id);
        let found = found.map(|(team, _)| Arc::new(team));
        self.teams.remember(asked, name, found.as_ref());
        Ok(found)
    }

    /// The team `id`, as the operator acts for it.
    pub(crate) async fn team(&self, id: &TeamId) -> Result<Option<Arc<Team>>, StoreError> {
        let name = (None, id.clone());
        let asked = match self.teams.recall(&name) {
            Ok(team) => return Ok(Some(team)),
            Err(asked) => asked,
        };
        let found = self.store.team(id).await?.map(|record| Arc::new(record.team));
        self.teams.remember(asked, name, found.as_ref());
        Ok(found)
    }

    /// Forgets everything, because something of it has changed. Changes are rare and lookups
    /// cheap, so nothing tries to be clever about what.
    pub(crate) fn forget(&self) {
        self.keys.clear();
        self.users.clear();
        self.teams.clear();
    }

    fn note(&self, used: Used, id: CredentialId) {
        let mut all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(id, (used, clock::now()));
    }

    async fn write_used(&self) {
        let all: Vec<_> = {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            used.drain().map(|(_, entry)| entry).collect()
        };
        if all.is_empty() {
            return;
        }
        if let Err(e) = self.store.write_last_used(&all).await {
            // Only a display is older than it could be.
            let reason = std::error::Error::source(&e).map(ToString::to_string);
            warn!(error = %e, reason, "when keys were used was not written");
        }
    }

    /// Writes behind, until `scope` is cancelled; then once more.
    pub(crate) fn start(self: &Arc<Self>, scope: &Scope) {
        let (this, ending) = (Arc::clone(self), scope.clone());
        scope.spawn_shielded("last use of keys", OnError::Log, async move {
            while !ending.is_cancelled() {
                tokio::select! {
                    () = ending.cancelled() => {}
                    () = tokio::time::sleep(WRITE_EVERY) => {}
                }
                this.write_used().await;
            }
            Ok::<(), Infallible>(())
        });
    }
}

/// Answers by question, each with when it was given.
#[derive(Debug)]
struct Memory<K, V> {
    inner: Mutex<Inner<K, V>>,
}

#[derive(Debug)]
struct Inner<K, V> {
    /// Counts the times everything was forgotten.
    generation: u64,
    found: HashMap<K, (V, Instant)>,
}

/// Which generation a question was asked in: an answer that was on its way while everything was
/// forgotten may be older than the change, and is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked(u64);

impl<K, V> Default for Memory<K, V> {
    fn default() -> Self {
        Memory { inner: Mutex::new(Inner { generation: 0, found: HashMap::new() }) }
    }
}

impl<K: Eq + Hash, V: Clone> Memory<K, V> {
    fn recall(&self, question: &K) -> Result<V, Asked> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        match inner.found.get(question) {
            Some((answer, since)) if since.elapsed() < BELIEVED => Ok(answer.clone()),
            _ => Err(Asked(inner.generation)),
        }
    }

    fn remember(&self, asked: Asked, question: K, answer: Option<&V>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.generation != asked.0 {
            return;
        }
        if inner.found.len() >= SWEEP_AT {
            inner.found.retain(|_, (_, since)| since.elapsed() < BELIEVED);
        }
        match answer {
            Some(answer) => inner.found.insert(question, (answer.clone(), Instant::now())),
            None => inner.found.remove(&question),
        };
    }

    fn clear(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.generation += 1;
        inner.found.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::{Bench, on_both};

    #[test]
    fn what_changed_meanwhile_is_not_believed() {
        let memory: Memory<&str, u32> = Memory::default();
        let asked = memory.recall(&"key").expect_err("nothing is known");
        memory.clear();
        memory.remember(asked, "key", Some(&1));
        let asked = memory.recall(&"key").expect_err("the answer was older than the change");
        memory.remember(asked, "key", Some(&2));
        assert_eq!(memory.recall(&"key"), Ok(2));
        memory.remember(asked, "key", None);
        assert!(memory.recall(&"key").is_err());
    }

    #[tokio::test]
    async fn a_removed_key_opens_nothing_at_once() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team").id;
            let key = ApiKey::random();
            let made = store.insert_key(&team, &key, "ci", None).await.expect("a key");
            let access = Access::new(store.clone(), None);
            assert!(access.team_of_key(&key).await.expect("a lookup").is_some());
            access.write_used().await;
            let keys = store.keys_of(&team).await.expect("a list");
            assert!(keys[0].last_used.is_some(), "its use is written");

            assert!(store.delete_key(&team, &made.id).await.expect("removed"));
            assert!(access.team_of_key(&key).await.expect("a lookup").is_some(), "believed");
            access.forget();
            assert_eq!(access.team_of_key(&key).await.expect("a lookup"), None);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_provider_s_user_is_made_once_whatever_its_address() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let other = store.create_user("ada@x.org", None).await.expect("a user").id;
            let identity = Identity { issuer: "https://id".to_owned(), subject: "1".to_owned() };
            let access = Access::new(store.clone(), None);
            let made = access.user_of_identity(&identity, Some("ada@x.org")).await.expect("made");
            assert_ne!(made, other, "an address alone opens nobody's teams");
            access.forget();
            let again = access.user_of_identity(&identity, None).await.expect("known");
            assert_eq!(again, made);
            let email = store.user(&made).await.expect("a lookup").expect("it is there").email;
            assert_eq!(email, "https://id#1");

            let team = store.ensure_team("default").await.expect("a team").id;
            assert_eq!(access.team_of_member(&made, &team).await.expect("a lookup"), None);
            store.put_member(&team, &made, false).await.expect("a member");
            assert!(access.team_of_member(&made, &team).await.expect("a lookup").is_some());
            assert_eq!(access.team_of_member(&other, &team).await.expect("a lookup"), None);
            store.close().await;
        })
        .await;
    }
}
