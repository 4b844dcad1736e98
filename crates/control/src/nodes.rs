//! The nodes this control plane works with, what is known of each, and which one to ask.
//!
//! Nodes are independent of each other: one that is away costs its own sandboxes their changes and
//! new sandboxes one candidate, and nothing else.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::node::{Description, Node};
use crate::placement::{self, Need, Taken};

/// Which node, as a place in the list the control plane was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeIx(pub(crate) u16);

/// Every node, in the order of the list.
pub(crate) struct Nodes {
    members: Vec<Member>,
}

/// One node.
pub(crate) struct Member {
    pub(crate) ix: NodeIx,
    pub(crate) socket: PathBuf,
    pub(crate) rpc: Node,
    /// Asks for a reconcile of this node before the next one is due.
    pub(crate) reconcile_soon: Notify,
    known: Mutex<Known>,
}

/// What is known of a node besides its sandboxes.
#[derive(Debug, Default)]
struct Known {
    contact: Contact,
    description: Option<Description>,
    /// What its sandboxes take: what it said, and what has started and ended since.
    taken: Taken,
    /// What it was asked to start and has not answered.
    in_flight: Taken,
}

/// Whether a node answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Contact {
    /// It has not since this process started: what it holds is not known.
    #[default]
    Never,
    /// Its ends are followed.
    InTouch,
    /// It did, and does not now.
    Away,
}

/// What one creation takes of a node while it is under way. Dropping it gives that back.
pub(crate) struct Claim<'a> {
    member: &'a Member,
    need: Need,
}

impl Nodes {
    /// The nodes at `sockets`, none of which has been asked anything yet. Needs a runtime.
    pub(crate) fn at(sockets: Vec<PathBuf>) -> Nodes {
        let members = sockets.into_iter().zip(0..).map(|(socket, ix)| Member {
            ix: NodeIx(ix),
            rpc: Node::at(&socket),
            socket,
            reconcile_soon: Notify::new(),
            known: Mutex::default(),
        });
        Nodes { members: members.collect() }
    }

    /// The node `ix`, which came from this list.
    pub(crate) fn get(&self, ix: NodeIx) -> &Member {
        &self.members[usize::from(ix.0)]
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Member> {
        self.members.iter()
    }

    /// The node to ask for a sandbox that takes `need`, among `able` without `refused`. `None` when
    /// none of them takes sandboxes now.
    pub(crate) fn choose(
        &self,
        able: &[NodeIx],
        refused: &[NodeIx],
        need: Need,
    ) -> Option<&Member> {
        let open = able.iter().filter(|ix| !refused.contains(ix)).map(|ix| self.get(*ix));
        let open: Vec<_> =
            open.filter_map(|member| Some((member.ix, member.busyness_with(need)?))).collect();
        placement::choose(&open, &mut rand::rng()).map(|ix| self.get(ix))
    }
}

impl Member {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Only plain figures are written under it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn contact(&self) -> Contact {
        self.known().contact
    }

    /// Its ends are followed from now on, and the table holds what it holds.
    pub(crate) fn is_back(&self) {
        self.known().contact = Contact::InTouch;
    }

    /// It does not answer.
    pub(crate) fn is_lost(&self) {
        let mut known = self.known();
        if known.contact == Contact::InTouch {
            known.contact = Contact::Away;
        }
    }

    /// Takes what the node says of itself for the truth.
    pub(crate) fn describe(&self, description: Description) {
        let mut known = self.known();
        known.taken = description.taken;
        known.description = Some(description);
    }

    /// How busy the node would be with one sandbox more; `None` when it takes none.
    fn busyness_with(&self, need: Need) -> Option<f64> {
        let known = self.known();
        let takes = known.description.as_ref().is_none_or(|said| said.takes_sandboxes);
        let capacity = known.description.as_ref().map(|said| said.capacity).unwrap_or_default();
        let taken = known.taken.plus(known.in_flight).with(need);
        (known.contact == Contact::InTouch && takes).then(|| placement::busyness(taken, capacity))
    }

    /// Counts a creation that is about to be asked for.
    pub(crate) fn claim(&self, need: Need) -> Claim<'_> {
        let mut known = self.known();
        known.in_flight = known.in_flight.with(need);
        Claim { member: self, need }
    }

    /// Counts a sandbox that has ended.
    pub(crate) fn release(&self, need: Need) {
        let mut known = self.known();
        known.taken = known.taken.without(need);
    }
}

impl Claim<'_> {
    /// The sandbox runs.
    pub(crate) fn keep(self) {
        let mut known = self.member.known();
        known.taken = known.taken.with(self.need);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut known = self.member.known();
        known.in_flight = known.in_flight.without(self.need);
    }
}
