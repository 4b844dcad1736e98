//! Whether this host takes one more sandbox: a pure function of what it may give, what it has given
//! away, and what is asked for.
//!
//! Processors and memory are counted as templates say, over sandboxes that start, run and end:
//! what is given away comes back when nothing of a sandbox is left. Disks are thin, so what counts
//! is the room that is really left.

use std::time::Duration;

use belljar_domain::{Kind, MiB, Vcpus};

/// What sandboxes may take together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Virtual processors, with overcommitment.
    pub vcpus: u64,
    /// Memory of guests, MiB.
    pub memory_mib: u64,
    /// Room that must be left where private disks are, MiB.
    pub disk_reserve_mib: u64,
    /// Most sandboxes held at once.
    pub sandboxes_max: usize,
    /// Most sandboxes that start at once; more wait their turn.
    pub starting_max: usize,
    /// How long one may wait for its turn to start.
    pub starting_wait_max: Duration,
}

/// What sandboxes have taken together, as their templates say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allocated {
    /// Virtual processors.
    pub vcpus: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Disks, MiB, however much of them is written.
    pub disk_mib: u64,
}

impl Allocated {
    /// What one sandbox of this shape takes.
    pub(crate) fn one(vcpus: Vcpus, memory: MiB, disk: MiB) -> Allocated {
        let (vcpus, memory_mib, disk_mib) = (vcpus.0.into(), memory.0.into(), disk.0.into());
        Allocated { vcpus, memory_mib, disk_mib }
    }

    pub(crate) fn plus(self, other: Allocated) -> Allocated {
        Allocated {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_mib: self.disk_mib.saturating_add(other.disk_mib),
        }
    }

    pub(crate) fn minus(self, other: Allocated) -> Allocated {
        Allocated {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            disk_mib: self.disk_mib.saturating_sub(other.disk_mib),
        }
    }
}

/// Whether a host takes new sandboxes. Those it has live on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It does.
    Ready,
    /// It does not, and is on its way out.
    Draining,
    /// It does not for now.
    Standby,
}

impl Status {
    /// The word in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ready => "ready",
            Status::Draining => "draining",
            Status::Standby => "on standby",
        }
    }
}

/// A host as one create finds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host<'a> {
    pub(crate) limits: &'a Limits,
    pub(crate) status: Status,
    /// Sandboxes held, whatever they do.
    pub(crate) sandboxes: usize,
    pub(crate) allocated: Allocated,
    /// Where private disks are; `None` where that cannot be known.
    pub(crate) disk_free_mib: Option<u64>,
}

/// Which limit a create has met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The host takes none now.
    #[error("this node is {}", status.as_str())]
    Status {
        /// What it is instead of ready.
        status: Status,
    },
    /// It holds as many as it may.
    #[error("this node holds its limit of {limit} sandboxes")]
    SandboxesMax {
        /// The limit.
        limit: usize,
    },
    /// Not enough processors are left.
    #[error("this node has {free} of the {wanted} vCPU left")]
    Cpu {
        /// What is asked for.
        wanted: u64,
        /// What is left.
        free: u64,
    },
    /// Not enough memory is left.
    #[error("this node has {free_mib} of the {wanted_mib} MiB of memory left")]
    Memory {
        /// What is asked for, MiB.
        wanted_mib: u64,
        /// What is left, MiB.
        free_mib: u64,
    },
    /// Not enough room is left on disk.
    #[error("this node has {free_mib} MiB of disk left and keeps {reserve_mib}")]
    Disk {
        /// What is left, MiB.
        free_mib: u64,
        /// What must be, MiB.
        reserve_mib: u64,
    },
    /// Too many start, and none got done in time.
    #[error("this node starts {limit} sandboxes at once, and none got done in {waited_ms} ms")]
    StartingSlots {
        /// How many start at once.
        limit: usize,
        /// How long this one waited.
        waited_ms: u64,
    },
}

impl Refused {
    /// What a caller should do.
    pub fn kind(self) -> Kind {
        match self {
            Refused::SandboxesMax { .. }
            | Refused::Cpu { .. }
            | Refused::Memory { .. }
            | Refused::Disk { .. } => Kind::Quota,
            Refused::Status { .. } | Refused::StartingSlots { .. } => Kind::Unavailable,
        }
    }
}

/// Whether `host` takes a sandbox of the shape `wanted`.
///
/// # Errors
/// [`Refused`]: the first limit it meets.
pub(crate) fn admit(host: Host<'_>, wanted: Allocated) -> Result<(), Refused> {
    let limits = host.limits;
    if host.status != Status::Ready {
        return Err(Refused::Status { status: host.status });
    }
    if host.sandboxes >= limits.sandboxes_max {
        return Err(Refused::SandboxesMax { limit: limits.sandboxes_max });
    }
    let free = limits.vcpus.saturating_sub(host.allocated.vcpus);
    if wanted.vcpus > free {
        return Err(Refused::Cpu { wanted: wanted.vcpus, free });
    }
    let free_mib = limits.memory_mib.saturating_sub(host.allocated.memory_mib);
    if wanted.memory_mib > free_mib {
        return Err(Refused::Memory { wanted_mib: wanted.memory_mib, free_mib });
    }
    let reserve_mib = limits.disk_reserve_mib;
    match host.disk_free_mib {
        Some(free_mib) if free_mib < reserve_mib => Err(Refused::Disk { free_mib, reserve_mib }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Allocated = Allocated { vcpus: 2, memory_mib: 512, disk_mib: 1024 };

    fn limits() -> Limits {
        Limits {
            vcpus: 8,
            memory_mib: 4096,
            disk_reserve_mib: 100,
            sandboxes_max: 10,
            starting_max: 2,
            starting_wait_max: Duration::from_secs(1),
        }
    }

    fn host(limits: &Limits) -> Host<'_> {
        Host {
            limits,
            status: Status::Ready,
            sandboxes: 0,
            allocated: Allocated::default(),
            disk_free_mib: Some(100),
        }
    }

    #[test]
    fn the_last_of_everything_is_given_and_no_more() {
        let limits = limits();
        let mut allocated = Allocated::default();
        for sandboxes in 0..4 {
            let host = Host { sandboxes, allocated, ..host(&limits) };
            assert_eq!(admit(host, ONE), Ok(()));
            allocated = allocated.plus(ONE);
        }
        let full = Host { sandboxes: 4, allocated, ..host(&limits) };
        assert_eq!(admit(full, ONE), Err(Refused::Cpu { wanted: 2, free: 0 }));
        let one_less = Host { allocated: allocated.minus(ONE), ..full };
        assert_eq!(admit(one_less, ONE), Ok(()));
    }

    #[test]
    fn every_limit_is_named() {
        let limits = limits();
        let host = host(&limits);
        for status in [Status::Draining, Status::Standby] {
            let refused = admit(Host { status, ..host }, ONE);
            assert_eq!(refused, Err(Refused::Status { status }));
        }
        let refused = admit(Host { sandboxes: 10, ..host }, ONE);
        assert_eq!(refused, Err(Refused::SandboxesMax { limit: 10 }));
        let much = Allocated { memory_mib: 3585, ..Allocated::default() };
        let refused = admit(Host { allocated: much, ..host }, ONE);
        assert_eq!(refused, Err(Refused::Memory { wanted_mib: 512, free_mib: 511 }));
        let refused = admit(Host { disk_free_mib: Some(99), ..host }, ONE);
        assert_eq!(refused, Err(Refused::Disk { free_mib: 99, reserve_mib: 100 }));
        // More than there ever is must not wrap around.
        let huge = Allocated { vcpus: u64::MAX, ..ONE };
        assert_eq!(admit(host, huge), Err(Refused::Cpu { wanted: u64::MAX, free: 8 }));
        let over = Host { allocated: huge.plus(ONE), ..host };
        assert_eq!(admit(over, ONE), Err(Refused::Cpu { wanted: 2, free: 0 }));
        assert_eq!(admit(Host { disk_free_mib: None, ..host }, ONE), Ok(()));
    }

    #[test]
    fn what_a_caller_should_do_follows_from_the_limit() {
        assert_eq!(Refused::Cpu { wanted: 1, free: 0 }.kind(), Kind::Quota);
        assert_eq!(Refused::Status { status: Status::Draining }.kind(), Kind::Unavailable);
        let slow = Refused::StartingSlots { limit: 2, waited_ms: 5 };
        assert_eq!(slow.kind(), Kind::Unavailable);
    }
}
