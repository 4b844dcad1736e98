//! Slots without root: loopback addresses, for rigs whose machines are processes of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;

use crate::slots::{EgressPolicy, LeaseError, ReleaseError, Slot, Slots};
use crate::{GUEST_MAC, TAP};

/// Addresses of one block: 127.0.0.0/8 leaves 24 bits, of which 12 number blocks. A process begins
/// in a block of its own and goes on in the next ones.
const ADDRESSES: u32 = 1 << 12;
/// Most slots of one fake: some blocks, and what a port number could tell apart.
const CAPACITY_MAX: u32 = 1 << 16;

/// The first address no fake of this process has yet.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Slots on loopback addresses, each unique among the fakes of this process and, as far as 12
/// bits of its process number go, of the others on the host.
///
/// It isolates nothing: [`Slot::netns`] is `None`, and policies are only remembered.
#[derive(Debug)]
pub struct FakeSlots {
    capacity: u32,
    first: u32,
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    leased: BTreeMap<u32, EgressPolicy>,
    /// Indices that were given back; all from `never_leased` on are free as well.
    free: BTreeSet<u32>,
    never_leased: u32,
    closed: bool,
    failing_leases: u32,
    failing_releases: u32,
}

impl FakeSlots {
    /// A fake with `capacity` slots.
    ///
    /// # Panics
    /// With more than 65,536 slots; there are no addresses for them.
    pub fn new(capacity: u32) -> FakeSlots {
        assert!(capacity <= CAPACITY_MAX, "there are addresses for {CAPACITY_MAX} fake slots");
        let first = NEXT.fetch_add(capacity, Ordering::Relaxed);
        FakeSlots { capacity, first, books: Mutex::default() }
    }

    /// Makes the next `count` leases fail with [`LeaseError::Setup`].
    pub fn fail_leases(&self, count: u32) {
        self.books().failing_leases = count;
    }

    /// Makes the next `count` releases fail; their slots stay leased.
    pub fn fail_releases(&self, count: u32) {
        self.books().failing_releases = count;
    }

    /// The slots that are leased now, with their policies.
    pub fn leased(&self) -> Vec<(u32, EgressPolicy)> {
        self.books().leased.iter().map(|(&index, &policy)| (index, policy)).collect()
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics while it holds the books")
    }

    /// 127.x.y.z: the block in the upper 12 bits, the slot in the lower. Both are kept off 0, so that
    /// 127.0.0.1 and whatever else listens in 127.0.0.0/20 stay out of it.
    fn address(&self, index: u32) -> Ipv4Addr {
        let place = self.first.wrapping_add(index);
        let block = std::process::id().wrapping_add(place / (ADDRESSES - 2));
        let (block, place) = (block % (ADDRESSES - 1) + 1, place % (ADDRESSES - 2) + 1);
        Ipv4Addr::from_bits(127 << 24 | block << 12 | place)
    }
}

impl Books {
    /// Takes the lowest free index.
    fn take(&mut self, capacity: u32, policy: EgressPolicy) -> Option<u32> {
        let index = match self.free.pop_first() {
            Some(index) => index,
            None if self.never_leased < capacity => {
                self.never_leased += 1;
                self.never_leased - 1
            }
            None => return None,
        };
        self.leased.insert(index, policy);
        Some(index)
    }

    fn give_back(&mut self, index: u32) -> Option<EgressPolicy> {
        let policy = self.leased.remove(&index)?;
        self.free.insert(index);
        Some(policy)
    }
}

/// Whether a fault that was asked for is due.
fn due(count: &mut u32) -> bool {
    let due = *count > 0;
    *count = count.saturating_sub(1);
    due
}

#[async_trait]
impl Slots for FakeSlots {
    async fn lease(&self, policy: EgressPolicy) -> Result<Slot, LeaseError> {
        let mut books = self.books();
        if books.closed {
            return Err(LeaseError::Closed);
        }
        let index = books.take(self.capacity, policy);
        let index = index.ok_or(LeaseError::Exhausted { capacity: self.capacity })?;
        if due(&mut books.failing_leases) {
            books.give_back(index);
            let reason = "a fault was asked for".to_owned();
            return Err(LeaseError::Setup { index, step: "make a tap", reason });
        }
        Ok(Slot {
            index,
            netns: None,
            tap: TAP.to_owned(),
            guest_mac: GUEST_MAC,
            host_ip: self.address(index),
        })
    }

    async fn release(&self, slot: Slot) -> Result<(), ReleaseError> {
        let index = slot.index;
        let mut books = self.books();
        let failed =
            |step, reason: &str| Err(ReleaseError::Slot { index, step, reason: reason.to_owned() });
        if due(&mut books.failing_releases) {
            return failed("take everything apart", "a fault was asked for");
        }
        match books.give_back(index) {
            Some(_) => Ok(()),
            None => failed("find the lease", "it is not leased from this pool"),
        }
    }

    async fn close(&self) -> Result<(), ReleaseError> {
        self.books().closed = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[tokio::test]
    async fn the_fake_keeps_the_contract() {
        crate::contract::check(async |capacity| FakeSlots::new(capacity)).await;
    }

    #[tokio::test]
    async fn its_addresses_can_be_listened_on_and_differ_between_fakes() {
        let (one, other) = (FakeSlots::new(3), FakeSlots::new(3));
        let a = one.lease(EgressPolicy::Internet).await.expect("it is free");
        let b = other.lease(EgressPolicy::Internet).await.expect("it is free");
        assert_ne!(a.host_ip, b.host_ip);
        for slot in [&a, &b] {
            TcpListener::bind((slot.host_ip, 0)).expect("loopback needs no set-up");
        }
    }

    #[tokio::test]
    async fn ten_thousand_slots_have_addresses_of_their_own() {
        let slots = FakeSlots::new(10_000);
        let mut addresses = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let slot = slots.lease(EgressPolicy::None).await.expect("it is free");
            assert!(slot.host_ip.is_loopback());
            addresses.insert(slot.host_ip);
        }
        assert_eq!(addresses.len(), 10_000);
        assert!(slots.lease(EgressPolicy::None).await.is_err());
    }

    #[tokio::test]
    async fn faults_fail_as_often_as_asked() {
        let slots = FakeSlots::new(2);
        slots.fail_leases(1);
        assert!(matches!(
            slots.lease(EgressPolicy::None).await,
            Err(LeaseError::Setup { index: 0, .. })
        ));
        let slot = slots.lease(EgressPolicy::None).await.expect("one fault only");
        assert_eq!(slots.leased(), [(slot.index, EgressPolicy::None)]);
        slots.fail_releases(1);
        assert!(slots.release(slot).await.is_err());
        assert_eq!(slots.leased().len(), 1, "a failed release leaves it leased");
    }
}
