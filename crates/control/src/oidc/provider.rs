//! One provider: its keys as they are known, and when to ask for them again.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use reqwest::Client;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::{info, warn};

use super::fetch::{self, FetchError};
use super::keys::{Key, KeySet};
use super::token::Unverified;
use super::{OidcIssuer, VerifyError};

/// When keys are fetched.
#[derive(Debug, Clone)]
pub(crate) struct Timing {
    /// A key nobody has heard of asks the provider again at most this often.
    pub(crate) unknown_key: Duration,
    /// After a failure the provider is left alone this long, if no keys are known at all.
    pub(crate) after_failure: Duration,
    /// Keys older than this are fetched again, behind the answer.
    pub(crate) refresh: Duration,
    /// Keys older than this are not believed: a provider withdraws a stolen key by leaving it out.
    pub(crate) max_age: Duration,
    /// Both documents together.
    pub(crate) fetch_limit: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            unknown_key: Duration::from_secs(30),
            after_failure: Duration::from_secs(2),
            refresh: Duration::from_secs(3600),
            max_age: Duration::from_secs(6 * 3600),
            fetch_limit: Duration::from_secs(5),
        }
    }
}

/// A trusted issuer and what is known of it.
pub(crate) struct Provider {
    issuer: OidcIssuer,
    client: Client,
    scope: Scope,
    timing: Timing,
    known: Mutex<Known>,
    /// One fetch at a time.
    turn: Arc<Semaphore>,
}

#[derive(Default)]
struct Known {
    keys: Option<(Arc<KeySet>, Instant)>,
    /// The last fetch: when it began, and how it failed if it did.
    tried: Option<(Instant, Option<Arc<FetchError>>)>,
}

impl Provider {
    pub(crate) fn new(issuer: OidcIssuer, client: Client, scope: Scope, timing: Timing) -> Self {
        let turn = Arc::new(Semaphore::new(1));
        Provider { issuer, client, scope, timing, known: Mutex::default(), turn }
    }

    pub(crate) fn issuer(&self) -> &OidcIssuer {
        &self.issuer
    }

    /// The key `token` says it is signed with. Cancel-safe.
    ///
    /// # Errors
    /// [`VerifyError::Key`], [`VerifyError::Algorithm`], [`VerifyError::Provider`].
    pub(crate) async fn key(self: &Arc<Self>, token: &Unverified<'_>) -> Result<Key, VerifyError> {
        let find = |keys: &KeySet| keys.find(token.key_id(), token.algorithm()).cloned();
        let asked = Instant::now();
        if let Some((keys, since)) = self.believed() {
            match find(&keys) {
                Err(VerifyError::Key) => {}
                found => {
                    if since.elapsed() > self.timing.refresh {
                        self.refresh_behind();
                    }
                    return found;
                }
            }
        }
        self.refresh(asked).await?;
        let (keys, _) = self.believed().ok_or(VerifyError::Key)?;
        find(&keys)
    }

    /// The keys, as long as they are to be believed.
    fn believed(&self) -> Option<(Arc<KeySet>, Instant)> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.keys.clone().filter(|(_, since)| since.elapsed() < self.timing.max_age)
    }

    /// Whether the provider may be asked now.
    fn may_ask(&self) -> bool {
        let pause = match self.believed() {
            Some(_) => self.timing.unknown_key,
            None => self.timing.after_failure,
        };
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.tried.as_ref().is_none_or(|(at, _)| at.elapsed() >= pause)
    }

    /// Fetches the keys unless somebody did since `asked`, or lately.
    async fn refresh(self: &Arc<Self>, asked: Instant) -> Result<(), VerifyError> {
        let turn = Arc::clone(&self.turn).acquire_owned();
        // Who waits here waits for one fetch, which has its own limit.
        let turn = tokio::time::timeout(self.timing.fetch_limit * 2, turn).await;
        let Some(turn) = turn.ok().and_then(Result::ok) else {
            let (issuer, limit) = (self.issuer.url().to_owned(), self.timing.fetch_limit);
            return Err(VerifyError::Provider(Arc::new(FetchError::Late { issuer, limit })));
        };
        let fetched_meanwhile = self.believed().is_some_and(|(_, since)| since >= asked);
        if fetched_meanwhile {
            return Ok(());
        }
        if self.may_ask() {
            let (done, outcome) = tokio::sync::oneshot::channel();
            self.spawn_fetch(turn, Some(done));
            // The sender is dropped when the server stops in between.
            let _ended = outcome.await;
        }
        self.verdict()
    }

    /// Fetches the keys without anybody waiting, unless somebody does already.
    fn refresh_behind(self: &Arc<Self>) {
        let Ok(turn) = Arc::clone(&self.turn).try_acquire_owned() else { return };
        if self.may_ask() {
            self.spawn_fetch(turn, None);
        }
    }

    fn spawn_fetch(
        self: &Arc<Self>,
        turn: OwnedSemaphorePermit,
        done: Option<tokio::sync::oneshot::Sender<()>>,
    ) {
        let provider = Arc::clone(self);
        self.scope.spawn("fetch provider keys", OnError::Log, async move {
            provider.fetch().await;
            drop(turn);
            if let Some(done) = done {
                // Who asked may have left.
                let _unheard = done.send(());
            }
            Ok::<(), Infallible>(())
        });
    }

    async fn fetch(&self) {
        let began = Instant::now();
        let outcome = fetch::keys(&self.client, &self.issuer, self.timing.fetch_limit).await;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(keys) => {
                info!(issuer = self.issuer.url(), "fetched the identity provider's keys");
                known.keys = Some((Arc::new(keys), Instant::now()));
                known.tried = Some((began, None));
            }
            Err(e) => {
                let reason = std::error::Error::source(&e).map(ToString::to_string);
                warn!(error = %e, reason, "the identity provider's keys were not fetched");
                known.tried = Some((began, Some(Arc::new(e))));
            }
        }
    }

    /// After a fetch, or instead of one: whether there are keys to look into.
    ///
    /// A token with an unknown key is refused while the known keys are fresh; it is not known to be
    /// bad while the provider cannot be asked.
    fn verdict(&self) -> Result<(), VerifyError> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &known.tried {
            Some((_, Some(failure))) => Err(VerifyError::Provider(Arc::clone(failure))),
            _ => Ok(()),
        }
    }
}
