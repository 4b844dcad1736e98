//! A block of IPv4 addresses.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A block of IPv4 addresses, written `10.96.0.0/16`. The bits after the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Cidr {
    network: Ipv4Addr,
    prefix_bits: u8,
}

/// Why a text or a pair is no block of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// Not `address/prefix`.
    #[error("read address block {text:?}: it must look like 10.96.0.0/16")]
    Malformed {
        /// What was given.
        text: String,
    },
    /// The prefix is longer than an address.
    #[error("read address block: a prefix has at most 32 bits, not {prefix_bits}")]
    PrefixTooLong {
        /// What was given.
        prefix_bits: u8,
    },
    /// Bits after the prefix are set, so it is unclear which block is meant.
    #[error("read address block: {address} has bits after its prefix of {prefix_bits}")]
    HostBits {
        /// What was given.
        address: Ipv4Addr,
        /// Its prefix length in bits.
        prefix_bits: u8,
    },
}

impl Ipv4Cidr {
    /// The block that starts at `network`.
    ///
    /// # Errors
    /// [`CidrError`] when the prefix is longer than 32 bits or `network` has bits after it.
    pub const fn new(network: Ipv4Addr, prefix_bits: u8) -> Result<Ipv4Cidr, CidrError> {
        if prefix_bits > 32 {
            return Err(CidrError::PrefixTooLong { prefix_bits });
        }
        if network.to_bits() & !mask(prefix_bits) != 0 {
            return Err(CidrError::HostBits { address: network, prefix_bits });
        }
        Ok(Ipv4Cidr { network, prefix_bits })
    }

    /// The first address.
    pub const fn network(self) -> Ipv4Addr {
        self.network
    }

    /// How many leading bits all its addresses share.
    pub const fn prefix_bits(self) -> u8 {
        self.prefix_bits
    }

    /// Whether `address` is one of its addresses.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix_bits) == self.network.to_bits()
    }

    /// Whether the two have an address in common.
    pub fn overlaps(self, other: Ipv4Cidr) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }
}

const fn mask(prefix_bits: u8) -> u32 {
    // A shift by all 32 bits is not defined, hence the detour.
    match prefix_bits {
        0 => 0,
        bits => u32::MAX << (32 - bits as u32),
    }
}

impl fmt::Display for Ipv4Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix_bits)
    }
}

impl FromStr for Ipv4Cidr {
    type Err = CidrError;

    /// Reads `a.b.c.d/n`; an address alone is a block of one.
    fn from_str(text: &str) -> Result<Ipv4Cidr, CidrError> {
        let malformed = || CidrError::Malformed { text: text.to_owned() };
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let address: Ipv4Addr = address.parse().map_err(|_| malformed())?;
        Ipv4Cidr::new(address, prefix.parse().map_err(|_| malformed())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> Ipv4Cidr {
        text.parse().expect("a good block")
    }

    #[test]
    fn text_round_trips() {
        for text in ["10.96.0.0/16", "0.0.0.0/0", "192.168.1.1/32", "224.0.0.0/3"] {
            assert_eq!(block(text).to_string(), text);
        }
        assert_eq!(block("192.168.1.1").to_string(), "192.168.1.1/32");
    }

    #[test]
    fn bad_text_is_refused() {
        for text in ["", "10.0.0.0/", "10.0.0/8", "10.0.0.0/33", "10.0.0.1/8", "::1/8", "a/8"] {
            assert!(text.parse::<Ipv4Cidr>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn overlap_is_containment_either_way() {
        assert!(block("10.0.0.0/8").overlaps(block("10.96.0.0/16")));
        assert!(block("10.96.0.0/16").overlaps(block("10.0.0.0/8")));
        assert!(block("0.0.0.0/0").overlaps(block("255.255.255.255/32")));
        assert!(!block("10.96.0.0/16").overlaps(block("10.97.0.0/16")));
    }
}
