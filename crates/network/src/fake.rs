//! Slots without root: loopback addresses, for rigs whose machines are processes of the host.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;

use crate::slots::{EgressPolicy, LeaseError, ReleaseError, Slot, Slots};
use crate::{GUEST_MAC, TAP};

/// 127.0.0.0/8 leaves 24 bits. So many of them number the slots of a process with few; the others
/// tell processes apart.
const SLOT_BITS: u32 = 12;
/// So many at most; the 8 that are left still tell a handful of processes apart.
const SLOT_BITS_MAX: u32 = 16;

/// The first address no fake of this process has yet.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Slots on loopback addresses, each unique among the fakes of this process and, as far as 12
/// bits of its process number go (8 for a fake of many slots), of the others on the host.
///
/// It isolates nothing: [`Slot::netns`] is `None`, and policies are only remembered.
#[derive(Debug)]
pub struct FakeSlots {
    capacity: u32,
    first: u32,
    slot_bits: u32,
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    leased: BTreeMap<u32, EgressPolicy>,
    /// Given back, to be leased again.
    free: Vec<u32>,
    /// No slot from this one on was ever leased.
    untouched: u32,
    closed: bool,
    failing_leases: u32,
    failing_releases: u32,
}

impl FakeSlots {
    /// A fake with `capacity` slots.
    ///
    /// # Panics
    /// With more than 65,534 slots; there are no addresses for them.
    pub fn new(capacity: u32) -> FakeSlots {
        let most = (1 << SLOT_BITS_MAX) - 2;
        assert!(capacity <= most, "a process has {most} addresses for fake slots");
        let slot_bits = if capacity <= (1 << SLOT_BITS) - 2 { SLOT_BITS } else { SLOT_BITS_MAX };
        let first = NEXT.fetch_add(capacity, Ordering::Relaxed);
        FakeSlots { capacity, first, slot_bits, books: Mutex::default() }
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

    /// 127.x.y.z: the process in the upper bits, the slot in the lower. Both are kept off 0, so
    /// that 127.0.0.1 and whatever else listens in 127.0.0.0/20 stay out of it.
    fn address(&self, index: u32) -> Ipv4Addr {
        let process = std::process::id() % ((1 << (24 - self.slot_bits)) - 1) + 1;
        let place = (self.first.wrapping_add(index)) % ((1 << self.slot_bits) - 2) + 1;
        Ipv4Addr::from_bits(127 << 24 | process << self.slot_bits | place)
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
        let untouched = books.untouched;
        let index = match books.free.last() {
            Some(index) => *index,
            None if untouched < self.capacity => untouched,
            None => return Err(LeaseError::Exhausted { capacity: self.capacity }),
        };
        if due(&mut books.failing_leases) {
            let reason = "a fault was asked for".to_owned();
            return Err(LeaseError::Setup { index, step: "make a tap", reason });
        }
        if books.free.pop().is_none() {
            books.untouched += 1;
        }
        books.leased.insert(index, policy);
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
        match books.leased.remove(&index) {
            Some(_) => {
                books.free.push(index);
                Ok(())
            }
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
    async fn thousands_have_addresses_of_their_own_and_are_leased_again() {
        let many = FakeSlots::new(10_000);
        let mut slots = Vec::new();
        let mut addresses = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let slot = many.lease(EgressPolicy::None).await.expect("it is free");
            assert!(addresses.insert(slot.host_ip), "{} is leased twice", slot.host_ip);
            slots.push(slot);
        }
        let full = many.lease(EgressPolicy::None).await;
        assert!(matches!(full, Err(LeaseError::Exhausted { capacity: 10_000 })));
        let index = slots[5_000].index;
        many.release(slots.swap_remove(5_000)).await.expect("it was leased");
        let again = many.lease(EgressPolicy::None).await.expect("one is free");
        assert_eq!(again.index, index);
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
