//! The door of this crate: leasing and giving back a slot.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use async_trait::async_trait;
use belljar_domain::Kind;

/// Hands out network slots. The real pool and the fake pass one contract suite.
#[async_trait]
pub trait Slots: Send + Sync + 'static {
    /// Takes a slot from the pool and sets its egress policy.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing is held then.
    async fn lease(&self, policy: EgressPolicy) -> Result<Slot, LeaseError>;

    /// Gives a slot back: every connection, device and rule of it is gone afterwards.
    ///
    /// # Errors
    /// [`ReleaseError`] naming what may be left.
    async fn release(&self, slot: Slot) -> Result<(), ReleaseError>;

    /// Gives back every slot that waits in the pool and what the pool itself holds.
    ///
    /// # Errors
    /// [`ReleaseError`] naming what may be left.
    async fn close(&self) -> Result<(), ReleaseError>;
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressPolicy {
    /// Everything but the host, other sandboxes and private ranges.
    Internet,
    /// Nothing.
    None,
}

/// A leased slot.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its place in the pool's address range.
    pub index: u32,
    /// Path of its network namespace; `None` for slots of the fake.
    pub netns: Option<PathBuf>,
    /// Name of the tap device inside the namespace.
    pub tap: String,
    /// The guest card's hardware address.
    pub guest_mac: [u8; 6],
    /// Where the host reaches the guest, any port.
    pub host_ip: Ipv4Addr,
}

/// Why no slot was leased.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Every slot is in use.
    #[error("lease a network slot: all {capacity} are in use")]
    Exhausted {
        /// How many there are.
        capacity: u32,
    },
    /// The pool was closed.
    #[error("lease a network slot: the pool is closed")]
    Closed,
    /// No slot became ready in time.
    #[error("lease a network slot: none was ready within {waited_ms} ms")]
    Slow {
        /// How long the lease waited, in milliseconds.
        waited_ms: u64,
    },
    /// The kernel or `nft` refused.
    #[error("{step} for network slot {index}: {reason}")]
    Setup {
        /// The slot.
        index: u32,
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        reason: String,
    },
}

impl LeaseError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            LeaseError::Exhausted { .. } => Kind::Quota,
            LeaseError::Closed => Kind::Unavailable,
            LeaseError::Slow { .. } => Kind::Timeout,
            LeaseError::Setup { .. } => Kind::Internal,
        }
    }
}

/// Why something may be left on the host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    /// Something of a slot.
    #[error("{step} for network slot {index}: {reason}")]
    Slot {
        /// The slot.
        index: u32,
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        reason: String,
    },
    /// Something the pool itself holds.
    #[error("close the network slots: {step}: {reason}")]
    Pool {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        reason: String,
    },
}

impl ReleaseError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            ReleaseError::Slot { .. } | ReleaseError::Pool { .. } => Kind::Internal,
        }
    }
}
