//! Where a request comes from.

use std::net::IpAddr;

/// The address a request counts for, IPv4 never in its mapped form. An extension of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer(pub(crate) IpAddr);
