//! Ranges of addresses, as operators write them: `10.0.0.0/8`, `2001:db8::/32`, or one address.
//!
//! An IPv4 address that arrives mapped into IPv6 (`::ffff:10.0.0.1`, which a dual-stack listener
//! sees for every IPv4 peer) is the IPv4 address, in a range as well as in what is looked up.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Bits of the prefix `::ffff:0:0/96` under which IPv4 is mapped into IPv6. Source: RFC 4291,
/// section 2.5.5.2.
const MAPPED_BITS: u8 = 96;

/// The text is no range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read a range of addresses: {text:?} {problem}")]
pub struct CidrError {
    text: String,
    problem: &'static str,
}

/// A range of addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    base: IpAddr,
    prefix_bits: u8,
}

/// `ip` as IPv4 if it is IPv4 in any spelling.
pub(crate) fn plain(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

fn bits(ip: IpAddr) -> (u128, u8) {
    match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)), 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    }
}

/// The low `width - prefix_bits` bits set.
fn host_mask(width: u8, prefix_bits: u8) -> u128 {
    let host_bits = u32::from(width - prefix_bits);
    if host_bits == 128 { u128::MAX } else { (1 << host_bits) - 1 }
}

impl Cidr {
    /// Whether `ip` lies in the range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ((ip, width), (base, base_width)) = (bits(plain(ip)), bits(self.base));
        width == base_width && (ip ^ base) & !host_mask(width, self.prefix_bits) == 0
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    /// Reads `ADDRESS/BITS`, or an address alone for itself.
    ///
    /// # Errors
    /// [`CidrError`] for anything else, and for a base address with bits after its prefix: whoever
    /// wrote `10.1.2.3/8` meant something else than `10.0.0.0/8`, and guessing would open it.
    fn from_str(text: &str) -> Result<Self, CidrError> {
        let error = |problem| CidrError { text: text.to_owned(), problem };
        let (base, prefix) = match text.split_once('/') {
            Some((base, prefix)) => (base, Some(prefix)),
            None => (text, None),
        };
        let base: IpAddr =
            base.parse().map_err(|_| error("is not ADDRESS/BITS, such as 10.0.0.0/8"))?;
        let (_, width) = bits(base);
        let prefix_bits = match prefix {
            None => width,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits
                .parse()
                .ok()
                .filter(|bits| *bits <= width)
                .ok_or_else(|| error("has a prefix longer than its address"))?,
            Some(_) => return Err(error("has a prefix that is not a number")),
        };
        let (base, prefix_bits) = match base {
            IpAddr::V6(ip) => unmapped(ip, prefix_bits),
            v4 @ IpAddr::V4(_) => (v4, prefix_bits),
        };
        let (value, width) = bits(base);
        if value & host_mask(width, prefix_bits) != 0 {
            return Err(error("has bits of its address after the prefix"));
        }
        Ok(Cidr { base, prefix_bits })
    }
}

/// A range inside the mapped one, as the range of IPv4 addresses it stands for.
fn unmapped(ip: Ipv6Addr, prefix_bits: u8) -> (IpAddr, u8) {
    match ip.to_ipv4_mapped() {
        Some(v4) if prefix_bits >= MAPPED_BITS => (IpAddr::V4(v4), prefix_bits - MAPPED_BITS),
        _ => (IpAddr::V6(ip), prefix_bits),
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Cidr {
        text.parse().expect(text)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn a_range_holds_what_its_prefix_says() {
        for (text, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("192.168.1.7", "192.168.1.7", "192.168.1.8"),
            ("0.0.0.0/0", "203.0.113.9", "2001:db8::1"),
            ("::/0", "2001:db8::1", "203.0.113.9"),
            ("2001:db8::/33", "2001:db8:7fff::1", "2001:db8:8000::1"),
            ("::1", "::1", "127.0.0.1"),
            // Dual-stack listeners see IPv4 this way, and operators may write it so.
            ("10.0.0.0/8", "::ffff:10.1.1.1", "::ffff:11.1.1.1"),
            ("::ffff:10.0.0.0/104", "10.1.1.1", "::10.1.1.1"),
        ] {
            assert!(range(text).contains(ip(inside)), "{inside} is not in {text}");
            assert!(!range(text).contains(ip(outside)), "{outside} is in {text}");
        }
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/+8",
            "10.0.0/8",
            "::/129",
            "10.1.2.3/8",
            "2001:db8::1/64",
            "::ffff:10.1.2.3/104",
            "localhost",
            "10.0.0.0/8/8",
            "10.0.0.0/256",
            " 10.0.0.0/8",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_range_survives_its_text_form() {
        for text in ["10.0.0.0/8", "2001:db8::/33", "::/0", "192.0.2.1/32"] {
            assert_eq!(range(text).to_string(), text);
        }
        assert_eq!(range("::ffff:10.0.0.0/104").to_string(), "10.0.0.0/8");
        assert_eq!(range("192.0.2.1").to_string(), "192.0.2.1/32");
    }
}
