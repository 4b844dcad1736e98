//! Network slots: namespace, veth, tap and NAT for one sandbox each, pre-made and pooled.
//!
//! Every guest has the same address ([`GUEST_IP`]); a slot maps it to an address of its own on the
//! host side. A sandbox may reach out; it may not reach the host, another sandbox, or link-local
//! and private ranges.

pub mod slots;

pub use slots::{EgressPolicy, LeaseError, ReleaseError, Slot, Slots};

use std::net::Ipv4Addr;

/// The guest's address, the same in every sandbox.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's gateway: the tap's address.
pub const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Prefix length of the guest's link.
pub const GUEST_PREFIX_LEN: u8 = 30;
/// The guest card's hardware address, the same in every sandbox.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xbe, 0x11, 0x00, 0x00, 0x15];
