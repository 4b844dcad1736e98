//! Where webhooks may reach: the public internet, and nothing else unless the operator says so.
//!
//! A webhook's address is chosen by a team, and the request comes from the server, which stands
//! where a team must not: beside databases, metadata services and other sandboxes. Names are
//! resolved and checked in one step, so that a name cannot mean one address when it is looked at
//! and another when it is connected to. Addresses in the URL itself are not resolved; they are
//! checked before every request.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// The URL or name leads where webhooks may not go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the address is not public; webhooks to private, loopback and link-local addresses must be \
     allowed by who runs this server (--webhook-allow-private)"
)]
pub(crate) struct NotPublic;

/// Which addresses are let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guard {
    /// Lets every address through: the operator trusts the teams.
    pub(crate) allow_private: bool,
}

impl Guard {
    fn lets_through(self, ip: IpAddr) -> bool {
        self.allow_private || is_public(ip)
    }

    /// Checks the host of `url` when it is an address. A name is checked when it is resolved.
    pub(crate) fn check(self, url: &Url) -> Result<(), NotPublic> {
        let host = url.host_str().unwrap_or_default();
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        match bare.parse() {
            Ok(ip) if !self.lets_through(ip) => Err(NotPublic),
            _ => Ok(()),
        }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = *self;
        Box::pin(async move {
            // The port is the connector's business; 0 means "that of the scheme".
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|a| guard.lets_through(a.ip())).collect();
            if public.is_empty() {
                return Err(NotPublic.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

/// Whether `ip` is an ordinary address of the public internet.
///
/// Source: the IANA registries of special-purpose addresses.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let special = match ip.octets() {
        [0 | 10 | 127, ..] | [169, 254, ..] | [192, 168, ..] => true,
        // Shared by carriers, private, benchmarks.
        [100, b, ..] => b & 0xc0 == 64,
        [172, b, ..] => b & 0xf0 == 16,
        [198, b, ..] if b & 0xfe == 18 => true,
        // Protocol assignments, documentation, the 6to4 relay.
        [192, 0, 0 | 2, _] | [192, 88, 99, _] | [198, 51, 100, _] | [203, 0, 113, _] => true,
        // Multicast, reserved, broadcast.
        [a, ..] => a >= 224,
    };
    !special
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    // Only 2000::/3 is handed out; loopback, unique-local, link-local, multicast, addresses that
    // stand for IPv4 ones and translation prefixes are outside of it.
    let special = match ip.segments() {
        [0x2001, b, ..] => b < 0x0200 || b == 0x0db8,
        // 6to4 leads to the IPv4 address inside.
        [0x2002, ..] => true,
        [0x3fff, b, ..] => b < 0x1000,
        [a, ..] => a & 0xe000 != 0x2000,
    };
    !special
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: Guard = Guard { allow_private: false };
    const LENIENT: Guard = Guard { allow_private: true };

    #[test]
    fn only_public_addresses_pass() {
        for ip in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:8.8.8.8",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff:0::1",
            "5f00::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!is_public(ip.parse().expect("an address")), "{ip} passed");
        }
        for ip in [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.1.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.1",
            "2001:4860:4860::8888",
            "2606:4700::1111",
            "2a00::1",
            "3fff:1000::1",
        ] {
            assert!(is_public(ip.parse().expect("an address")), "{ip} did not pass");
        }
    }

    #[test]
    fn addresses_in_urls_are_seen_in_any_spelling() {
        for url in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.0.0.1:80/",
            "http://0177.0.0.01/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/x",
            "https://169.254.169.254/latest/meta-data",
            "http://%31%32%37.0.0.1/",
            "http://\u{ff11}27.0.0.1/",
            "http://0/",
        ] {
            let url: Url = url.parse().expect("a URL");
            assert_eq!(STRICT.check(&url), Err(NotPublic), "{url}");
            assert_eq!(LENIENT.check(&url), Ok(()), "{url}");
        }
        for url in ["http://8.8.8.8/", "https://[2606:4700::1111]/", "http://example.com/"] {
            assert_eq!(STRICT.check(&url.parse().expect("a URL")), Ok(()), "{url}");
        }
    }

    #[tokio::test]
    async fn names_are_checked_by_what_they_mean() {
        let name = || "localhost".parse::<Name>().expect("a name");
        let Err(refused) = STRICT.resolve(name()).await else { panic!("localhost passed") };
        assert!(refused.is::<NotPublic>(), "{refused}");
        let mut found = LENIENT.resolve(name()).await.expect("localhost is known");
        assert!(found.next().expect("an address").ip().is_loopback());
    }
}
