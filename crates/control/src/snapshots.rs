//! Where snapshots are, and which of them a call is about now. The nodes have them, and say so at
//! every reconcile; who takes or removes one says it here at once.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use belljar_domain::BuildId;
use tokio::sync::Notify;

use crate::nodes::NodeIx;

/// See the module's own words.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    inner: Mutex<Inner>,
    /// Told when there is something given up.
    given_up: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// Where each is, and since which change.
    places: HashMap<BuildId, (NodeIx, u64)>,
    /// Those a node has said are in the blob store, too.
    uploaded: HashSet<BuildId>,
    /// Calls under way about each.
    busy: HashMap<BuildId, usize>,
    /// Those nobody needs any more, which are still to be removed, and how often that was tried.
    given_up: Vec<(BuildId, u32)>,
    changes: u64,
}

/// What was known when a node was asked: take it before asking.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(u64);

/// A call about a snapshot is under way, until this is dropped: no reconcile touches it.
#[derive(Debug)]
pub(crate) struct Busy<'a> {
    snapshots: &'a Snapshots,
    id: BuildId,
}

impl Snapshots {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every section leaves the maps whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call about `id` begins.
    pub(crate) fn busy(&self, id: &BuildId) -> Busy<'_> {
        *self.lock().busy.entry(id.clone()).or_default() += 1;
        Busy { snapshots: self, id: id.clone() }
    }

    /// Whether a call about `id` is under way, or it is about to be removed.
    pub(crate) fn is_busy(&self, id: &BuildId) -> bool {
        let inner = self.lock();
        inner.busy.contains_key(id) || inner.given_up.iter().any(|(given_up, _)| given_up == id)
    }

    /// Nobody needs `id` any more. It is removed once the store says so too.
    pub(crate) fn give_up(&self, id: &BuildId) {
        self.give_up_after(id, 0);
    }

    /// As [`Self::give_up`], once more after it was tried `tries` times.
    pub(crate) fn give_up_after(&self, id: &BuildId, tries: u32) {
        self.lock().given_up.push((id.clone(), tries));
        self.given_up.notify_one();
    }

    /// Waits for something that was given up, and answers it under calls that have begun, with how
    /// often each was tried before. Cancel-safe.
    pub(crate) async fn next_given_up(&self) -> Vec<(Busy<'_>, u32)> {
        loop {
            let given_up = std::mem::take(&mut self.lock().given_up);
            if !given_up.is_empty() {
                return given_up.iter().map(|(id, tries)| (self.busy(id), *tries)).collect();
            }
            self.given_up.notified().await;
        }
    }

    /// `node` keeps `id` now.
    pub(crate) fn is_on(&self, id: &BuildId, node: NodeIx) {
        let mut inner = self.lock();
        inner.changes += 1;
        let place = (node, inner.changes);
        inner.places.insert(id.clone(), place);
    }

    /// No node keeps `id` any more.
    pub(crate) fn is_gone(&self, id: &BuildId) {
        let mut inner = self.lock();
        inner.changes += 1;
        inner.places.remove(id);
        inner.uploaded.remove(id);
    }

    /// A node has said that `id` is in the blob store, too.
    pub(crate) fn is_uploaded(&self, id: &BuildId) {
        self.lock().uploaded.insert(id.clone());
    }

    /// Whether `id` can be had from the blob store when its node does not have it. What was said to an earlier
    /// process is not known.
    pub(crate) fn was_uploaded(&self, id: &BuildId) -> bool {
        self.lock().uploaded.contains(id)
    }

    /// Which node keeps `id`. `None` when none is known to: perhaps it is away.
    pub(crate) fn node_of(&self, id: &BuildId) -> Option<NodeIx> {
        self.lock().places.get(id).map(|(node, _)| *node)
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark(self.lock().changes)
    }

    /// Takes `held` for all that `node` keeps, as asked for after `mark`. Answers what it does not
    /// keep any more.
    pub(crate) fn observe<'a>(
        &self,
        node: NodeIx,
        mark: Mark,
        held: impl Iterator<Item = &'a BuildId>,
    ) -> Vec<BuildId> {
        let mut inner = self.lock();
        let held: HashSet<&BuildId> = held.collect();
        let is_over = |id: &BuildId, place: &(NodeIx, u64)| {
            place.0 == node && place.1 <= mark.0 && !held.contains(id)
        };
        let gone: Vec<_> = inner
            .places
            .iter()
            .filter(|(id, p)| is_over(id, p))
            .map(|(id, _)| id.clone())
            .collect();
        let gone: Vec<_> = gone.into_iter().filter(|id| !inner.busy.contains_key(id)).collect();
        for id in &gone {
            inner.places.remove(id);
        }
        for id in held {
            // One that was removed meanwhile stays until the next answer.
            inner.places.entry(id.clone()).or_insert((node, mark.0));
        }
        gone
    }
}

impl Busy<'_> {
    pub(crate) fn id(&self) -> &BuildId {
        &self.id
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut inner = self.snapshots.lock();
        if let Some(calls) = inner.busy.get_mut(&self.id) {
            *calls -= 1;
            if *calls == 0 {
                inner.busy.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeIx = NodeIx(0);

    #[test]
    fn a_node_says_what_it_keeps() {
        let snapshots = Snapshots::default();
        let (kept, lost, other) = (BuildId::random(), BuildId::random(), BuildId::random());
        snapshots.is_on(&lost, NODE);
        snapshots.is_on(&other, NodeIx(1));
        let gone = snapshots.observe(NODE, snapshots.mark(), [&kept].into_iter());
        assert_eq!(gone, std::slice::from_ref(&lost));
        let places = [&kept, &lost, &other].map(|id| snapshots.node_of(id));
        assert_eq!(places, [Some(NODE), None, Some(NodeIx(1))]);
    }

    #[test]
    fn an_old_answer_undoes_nothing() {
        let snapshots = Snapshots::default();
        let (taken, busy) = (BuildId::random(), BuildId::random());
        snapshots.is_on(&busy, NODE);
        let mark = snapshots.mark();
        snapshots.is_on(&taken, NODE);
        let call = snapshots.busy(&busy);
        assert!(snapshots.is_busy(&busy));
        assert!(snapshots.observe(NODE, mark, std::iter::empty()).is_empty());
        assert_eq!(snapshots.node_of(&taken), Some(NODE));
        drop(call);
        assert_eq!(snapshots.observe(NODE, mark, std::iter::empty()), [busy]);
    }
}
