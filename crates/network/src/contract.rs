//! What every implementation of [`Slots`] must do: one suite, passed by the real pool and the fake.
//!
//! The checks panic where an implementation fails; call them from tests.

use std::collections::HashSet;

use crate::GUEST_MAC;
use crate::slots::{EgressPolicy, LeaseError, Slot, Slots};

/// Runs every check, each on slots of the capacity it asks `open` for. Every one is closed again
/// before the next is opened.
///
/// # Panics
/// Where the implementation breaks the contract.
pub async fn check<S: Slots>(open: impl AsyncFn(u32) -> S) {
    leases_are_distinct(&open(6).await).await;
    a_released_slot_can_be_leased_again(&open(1).await).await;
    concurrent_leases_share_nothing(&open(12).await).await;
    every_policy_is_accepted(&open(2).await).await;
    a_closed_pool_leases_nothing_but_takes_back(&open(2).await).await;
    a_foreign_slot_is_refused(&open(2).await).await;
}

async fn lease<S: Slots>(slots: &S, policy: EgressPolicy) -> Slot {
    slots.lease(policy).await.expect("a slot is free")
}

async fn release<S: Slots>(slots: &S, slot: Slot) {
    slots.release(slot).await.expect("nothing of it is left");
}

async fn close<S: Slots>(slots: &S) {
    slots.close().await.expect("nothing is left");
    slots.close().await.expect("closing again changes nothing");
}

fn assert_exhausted(leased: Result<Slot, LeaseError>, expected: u32) {
    match leased {
        Err(LeaseError::Exhausted { capacity }) => assert_eq!(capacity, expected),
        other => panic!("every slot is leased, yet lease says {other:?}"),
    }
}

async fn leases_are_distinct<S: Slots>(slots: &S) {
    let mut leased = Vec::new();
    for _ in 0..6 {
        let slot = lease(slots, EgressPolicy::Internet).await;
        assert_eq!(slot.guest_mac, GUEST_MAC, "the same in every sandbox");
        assert!(!slot.tap.is_empty());
        leased.push(slot);
    }
    let indexes: HashSet<u32> = leased.iter().map(|slot| slot.index).collect();
    let addresses: HashSet<_> = leased.iter().map(|slot| slot.host_ip).collect();
    assert_eq!((indexes.len(), addresses.len()), (6, 6), "{leased:?}");
    assert_exhausted(slots.lease(EgressPolicy::Internet).await, 6);
    for slot in leased {
        release(slots, slot).await;
    }
    close(slots).await;
}

async fn a_released_slot_can_be_leased_again<S: Slots>(slots: &S) {
    for _ in 0..3 {
        let slot = lease(slots, EgressPolicy::Internet).await;
        assert_exhausted(slots.lease(EgressPolicy::Internet).await, 1);
        release(slots, slot).await;
    }
    close(slots).await;
}

async fn concurrent_leases_share_nothing<S: Slots>(slots: &S) {
    let twice = async || {
        let slot = lease(slots, EgressPolicy::Internet).await;
        let index = slot.index;
        // Held while the others lease, so an index given out twice shows.
        tokio::task::yield_now().await;
        (slot, index)
    };
    let (a, b, c, d) = tokio::join!(twice(), twice(), twice(), twice());
    let indexes: HashSet<u32> = [a.1, b.1, c.1, d.1].into();
    assert_eq!(indexes.len(), 4);
    let released = tokio::join!(
        slots.release(a.0),
        slots.release(b.0),
        slots.release(c.0),
        slots.release(d.0)
    );
    assert_eq!(released, (Ok(()), Ok(()), Ok(()), Ok(())));
    close(slots).await;
}

async fn every_policy_is_accepted<S: Slots>(slots: &S) {
    for policy in [EgressPolicy::None, EgressPolicy::Internet, EgressPolicy::None] {
        let slot = lease(slots, policy).await;
        release(slots, slot).await;
    }
    close(slots).await;
}

async fn a_closed_pool_leases_nothing_but_takes_back<S: Slots>(slots: &S) {
    let slot = lease(slots, EgressPolicy::Internet).await;
    close(slots).await;
    let refused = slots.lease(EgressPolicy::Internet).await;
    assert!(matches!(refused, Err(LeaseError::Closed)), "{refused:?}");
    release(slots, slot).await;
    close(slots).await;
}

async fn a_foreign_slot_is_refused<S: Slots>(slots: &S) {
    let slot = lease(slots, EgressPolicy::Internet).await;
    let forged = Slot {
        index: slot.index + 1,
        netns: None,
        tap: slot.tap.clone(),
        guest_mac: slot.guest_mac,
        host_ip: slot.host_ip,
    };
    assert!(slots.release(forged).await.is_err(), "it was never leased");
    release(slots, slot).await;
    close(slots).await;
}
