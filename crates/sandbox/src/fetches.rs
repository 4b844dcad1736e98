//! Snapshots on their way here from the blob store: each is fetched once, whoever asks for it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use belljar_daemon::{OnError, Scope};
use belljar_domain::BuildId;
use tokio::sync::{Semaphore, watch};
use tracing::warn;

use crate::archive::{Archive, FetchError, Templates};
use crate::boot::CreateError;
use crate::registry::chain;
use crate::shelf::Shelf;
use crate::uploads::on_thread;

/// Fetches at the same time: each writes a disk and a memory.
const AT_ONCE: usize = 2;

/// Whether the store had it; `None` while it is under way.
type Outcome = Option<Result<bool, Arc<FetchError>>>;

pub(crate) struct Fetches {
    archive: Arc<Archive>,
    templates: Arc<Templates>,
    flying: Arc<Mutex<HashMap<BuildId, watch::Receiver<Outcome>>>>,
    places: Arc<Semaphore>,
}

fn lock(
    flying: &Mutex<HashMap<BuildId, watch::Receiver<Outcome>>>,
) -> MutexGuard<'_, HashMap<BuildId, watch::Receiver<Outcome>>> {
    // Inserts and removals are single steps: the table is whole after a panic elsewhere.
    flying.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fetches {
    /// What the templates of this host have is not fetched.
    pub(crate) fn new(archive: Arc<Archive>, templates: Templates) -> Fetches {
        let (templates, places) = (Arc::new(templates), Arc::new(Semaphore::new(AT_ONCE)));
        Fetches { archive, templates, flying: Arc::default(), places }
    }

    /// Fetches a snapshot, or waits for whoever does. False when the store does not have it. A fetch goes on
    /// when nobody waits for it any more.
    ///
    /// # Errors
    /// [`CreateError::Fetch`], and [`CreateError::Closing`].
    pub(crate) async fn fetch(
        &self,
        id: &BuildId,
        shelf: &Shelf,
        scope: &Scope,
    ) -> Result<bool, CreateError> {
        let mut outcome = self.join(id, shelf, scope);
        let landed = outcome.wait_for(Option::is_some).await.map_err(|_| CreateError::Closing)?;
        match landed.as_ref().expect("it was waited for") {
            Ok(found) => Ok(*found),
            Err(e) => Err(CreateError::Fetch { snapshot_id: id.clone(), source: Arc::clone(e) }),
        }
    }

    fn join(&self, id: &BuildId, shelf: &Shelf, scope: &Scope) -> watch::Receiver<Outcome> {
        let mut flying = lock(&self.flying);
        if let Some(outcome) = flying.get(id) {
            return outcome.clone();
        }
        let (land, outcome) = watch::channel(None);
        flying.insert(id.clone(), outcome.clone());
        let (archive, shelf, id) = (Arc::clone(&self.archive), shelf.clone(), id.clone());
        let (places, table) = (Arc::clone(&self.places), Arc::clone(&self.flying));
        let templates = Arc::clone(&self.templates);
        scope.spawn("fetch snapshot", OnError::Log, async move {
            let _place = places.acquire().await;
            let wanted = id.clone();
            let fetched =
                on_thread("fetch", move || fetch(&archive, &wanted, &shelf, &templates)).await;
            // Off the table first: who comes later finds it here, or tries again.
            lock(&table).remove(&id);
            if let Some(fetched) = fetched {
                let _nobody_waits = land.send(Some(fetched)).is_err();
            }
            Ok::<(), Infallible>(())
        });
        outcome
    }
}

fn fetch(
    archive: &Archive,
    id: &BuildId,
    shelf: &Shelf,
    templates: &Templates,
) -> Result<bool, Arc<FetchError>> {
    // Another fetch has landed between the caller's look and this.
    if shelf.get(id).is_some() {
        return Ok(true);
    }
    archive.fetch(id, shelf, templates).map_err(|e| {
        warn!(error = %chain(&e), "a stored snapshot was not fetched");
        Arc::new(e)
    })
}
