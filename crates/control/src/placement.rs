//! Which node gets a new sandbox: the least busy of a few taken at random.
//!
//! A few, because control planes and requests that all took the one least busy node would flood it
//! before it can say so; random ones spread by themselves. What is pure is here; [`crate::nodes`]
//! keeps the figures.

use rand::seq::IndexedRandom as _;

use belljar_domain::{MiB, Vcpus};

use crate::nodes::NodeIx;

/// Nodes compared for one sandbox.
const CANDIDATES: usize = 3;

/// What a sandbox takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
}

/// Sums over sandboxes. Memory and disk are mebibytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) sandboxes: u64,
    pub(crate) vcpus: u64,
    pub(crate) memory_mib: u64,
    pub(crate) disk_mib: u64,
}

impl Taken {
    /// With one sandbox more.
    pub(crate) fn with(self, need: Need) -> Taken {
        Taken {
            sandboxes: self.sandboxes.saturating_add(1),
            vcpus: self.vcpus.saturating_add(need.vcpus.0.into()),
            memory_mib: self.memory_mib.saturating_add(need.memory.0.into()),
            disk_mib: self.disk_mib.saturating_add(need.disk.0.into()),
        }
    }

    /// With one sandbox less.
    pub(crate) fn without(self, need: Need) -> Taken {
        Taken {
            sandboxes: self.sandboxes.saturating_sub(1),
            vcpus: self.vcpus.saturating_sub(need.vcpus.0.into()),
            memory_mib: self.memory_mib.saturating_sub(need.memory.0.into()),
            disk_mib: self.disk_mib.saturating_sub(need.disk.0.into()),
        }
    }

    /// Both together.
    pub(crate) fn plus(self, other: Taken) -> Taken {
        Taken {
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_mib: self.disk_mib.saturating_add(other.disk_mib),
        }
    }
}

/// How busy a node would be: the part of its scarcest resource that is taken, 1.0 for all of it.
///
/// A capacity of 0 is one the node did not tell, and counts for nothing. Above 1.0 the node will
/// most likely refuse; it is asked all the same when no better one is there, because it alone knows.
#[expect(clippy::cast_precision_loss, reason = "a ratio of small numbers, to be compared only")]
pub(crate) fn busyness(taken: Taken, capacity: Taken) -> f64 {
    let parts = [
        (taken.sandboxes, capacity.sandboxes),
        (taken.vcpus, capacity.vcpus),
        (taken.memory_mib, capacity.memory_mib),
        (taken.disk_mib, capacity.disk_mib),
    ];
    let known = parts.into_iter().filter(|(_, all)| *all > 0);
    known.map(|(taken, all)| taken as f64 / all as f64).fold(0.0, f64::max)
}

/// The node to ask, of `nodes` with how busy each would be. `None` when there are none.
pub(crate) fn choose(nodes: &[(NodeIx, f64)], rng: &mut impl rand::Rng) -> Option<NodeIx> {
    let candidates = nodes.sample(rng, CANDIDATES);
    candidates.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(node, _)| *node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    const NEED: Need = Need { vcpus: Vcpus(2), memory: MiB(512), disk: MiB(1024) };
    const ROOM: Taken = Taken { sandboxes: 100, vcpus: 32, memory_mib: 8192, disk_mib: 102_400 };

    #[test]
    fn the_scarcest_resource_decides() {
        assert_eq!(busyness(Taken::default(), ROOM), 0.0);
        let one = Taken::default().with(NEED);
        // 2 of 32 processors and 512 of 8192 MiB are the same part.
        assert_eq!(busyness(one, ROOM), 0.0625);
        assert_eq!(busyness(one, Taken { memory_mib: 1024, ..ROOM }), 0.5);
        assert_eq!(busyness(one, Taken { sandboxes: 1, ..ROOM }), 1.0);
        assert_eq!(busyness(one, Taken::default()), 0.0, "nothing is known of it");
    }

    #[test]
    fn what_is_taken_is_given_back() {
        let two = Taken::default().with(NEED).with(NEED);
        assert_eq!(two, Taken::default().with(NEED).plus(Taken::default().with(NEED)));
        assert_eq!(two.without(NEED).without(NEED).without(NEED), Taken::default());
    }

    #[test]
    fn of_a_few_the_least_busy_is_taken() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        assert_eq!(choose(&[], &mut rng), None);
        let nodes: Vec<_> = [0.9, 0.1, 0.5].into_iter().enumerate().collect();
        let nodes: Vec<_> =
            nodes.iter().map(|&(n, busy)| (NodeIx(u16::try_from(n).expect("few")), busy)).collect();
        for _ in 0..100 {
            assert_eq!(choose(&nodes, &mut rng), Some(NodeIx(1)));
        }
    }

    #[test]
    fn the_load_spreads_and_the_busiest_of_many_is_left_alone() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        let nodes: Vec<_> = (0..10_u16).map(|n| (NodeIx(n), f64::from(n))).collect();
        let mut asked = [0_u32; 10];
        for _ in 0..1_000 {
            let node = choose(&nodes, &mut rng).expect("there are some");
            asked[usize::from(node.0)] += 1;
        }
        assert_eq!(asked[8] + asked[9], 0, "{asked:?}");
        assert!(asked[..8].iter().all(|n| *n > 0), "{asked:?}");
    }
}
