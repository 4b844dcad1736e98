//! Creates that went astray: a node was asked, and nobody knows whether it did it.
//!
//! The next reconcile of that node finds out. What is there is taken over when somebody can still
//! ask for it by its idempotency key, and killed otherwise; what is not there is forgotten, and its
//! key with it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use belljar_domain::SandboxId;

use crate::idempotency::Ticket;
use crate::nodes::NodeIx;

/// Astray creates remembered. One beyond it is adopted by the terms on its node, and ends when its
/// time is up.
const MAX: usize = 10_000;

/// See the module's own words.
#[derive(Debug, Default)]
pub(crate) struct Unsettled {
    astray: Mutex<HashMap<SandboxId, Astray>>,
}

#[derive(Debug)]
struct Astray {
    node: NodeIx,
    claim: Claim,
}

/// Who still wants what went astray.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Nobody knows its id.
    Nobody,
    /// Whoever asks again with the same key.
    Key(Ticket),
}

impl Unsettled {
    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Astray>> {
        // One map operation each.
        self.astray.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `node` was asked for `id`, and did not answer.
    pub(crate) fn add(&self, id: &SandboxId, node: NodeIx) {
        let mut astray = self.lock();
        if astray.len() < MAX {
            astray.insert(id.clone(), Astray { node, claim: Claim::Nobody });
        }
    }

    /// `ticket` waits for what became of `id`. When that is known already, the key is vacant.
    pub(crate) fn claim(&self, id: &SandboxId, ticket: Ticket) {
        if let Some(astray) = self.lock().get_mut(id) {
            ticket.unknown();
            astray.claim = Claim::Key(ticket);
        }
    }

    /// What went astray on `node`.
    pub(crate) fn on(&self, node: NodeIx) -> Vec<SandboxId> {
        let astray = self.lock();
        let here = astray.iter().filter(|(_, astray)| astray.node == node);
        here.map(|(id, _)| id.clone()).collect()
    }

    /// Who wants `id`, which turned out to be there. A ticket is handed out once; what nobody wants
    /// stays on the list until it is gone from its node. `None` when it is not on the list.
    pub(crate) fn take(&self, id: &SandboxId) -> Option<Claim> {
        let mut astray = self.lock();
        match astray.get(id)?.claim {
            Claim::Nobody => Some(Claim::Nobody),
            Claim::Key(_) => astray.remove(id).map(|astray| astray.claim),
        }
    }

    /// `id` turned out not to be there; the key that waits for it is vacant.
    pub(crate) fn forget(&self, id: &SandboxId) {
        // The ticket is dropped after the lock.
        let _astray = self.lock().remove(id);
    }
}
