//! Network slots: namespace, veth, tap and NAT for one sandbox each, pre-made and pooled.
//!
//! Every guest has the same address ([`GUEST_IP`]); a slot maps it to an address of its own on the
//! host side. A sandbox may reach out; it may not reach the host, another sandbox, or link-local
//! and private ranges.
//!
//! ```text
//!  host                          │ namespace /run/netns/belljar-<tag>-<index>
//!                                │
//!  bj<tag>-<index>  10.96.0.2n ──┼── uplink 10.96.0.2n+1      tap0 169.254.0.22 ── guest .21
//!    input:  answers only        │     to the guest: from 10.96.0.2n only
//!    forward: out only           │     from the guest: public addresses, or none
//!    masquerade                  │     source rewritten both ways
//! ```
//!
//! The host reaches any port of a guest at [`Slot::host_ip`]; the guest sees such connections come
//! from [`GATEWAY_IP`]. A guest restored from a snapshot needs no address resolution on its first
//! packet: its own table holds [`GATEWAY_MAC`], which is the same in every slot, and the
//! namespace's table holds [`GUEST_MAC`].
//!
//! What a pool changes on the host and does not undo: `net.ipv4.ip_forward` becomes 1, and
//! `/run/netns` is made if it is not there. What it cannot change: another rule set that drops
//! forwarded packets (Docker's `FORWARD` policy, a firewall) wins over the pool's; allow traffic
//! from and to devices called `bj*` there. The host's reverse path filter may be off, loose or
//! strict: every packet of a slot carries the address that its device routes back to. IPv6 is off
//! in slots.

pub mod cidr;
pub mod config;
pub mod contract;
pub mod fake;
mod host;
mod make;
mod namespace;
mod netlink;
pub mod pool;
mod rules;
pub mod slots;
mod state;
mod step;
mod sys;

pub use cidr::Ipv4Cidr;
pub use config::{OpenError, SlotsConfig};
pub use fake::FakeSlots;
pub use pool::SlotPool;
pub use slots::{EgressPolicy, LeaseError, ReleaseError, Slot, Slots};
pub use sys::attach_tap;

use std::net::Ipv4Addr;

/// The guest's address, the same in every sandbox.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's gateway: the tap's address.
pub const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Prefix length of the guest's link.
pub const GUEST_PREFIX_LEN: u8 = 30;
/// The guest card's hardware address, the same in every sandbox.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xbe, 0x11, 0x00, 0x00, 0x15];
/// The tap's hardware address, the same in every slot: a restored guest still knows it.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xbe, 0x11, 0x00, 0x00, 0x16];

/// The tap's name in every slot's namespace.
pub(crate) const TAP: &str = "tap0";
/// The name of the device that leads to the host, in every slot's namespace.
pub(crate) const UPLINK: &str = "uplink";
