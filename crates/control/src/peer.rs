//! Where a request comes from: the address of its peer, or what a proxy in front of this server
//! says about it.
//!
//! `X-Forwarded-For` is anybody's to write. It is read only on connections from the proxies the
//! operator named, and from its end: each proxy appends whom it heard, so the last entry that is
//! not itself a named proxy is the client.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName};

use crate::cidr::{Cidr, plain};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The address a request counts for, IPv4 never in its mapped form. An extension of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer(pub(crate) IpAddr);

impl Peer {
    /// Who asks, on a connection from `other_end`, when `proxies` are the ones to believe.
    pub(crate) fn of(other_end: IpAddr, headers: &HeaderMap, proxies: &[Cidr]) -> Peer {
        let is_proxy = |ip: IpAddr| proxies.iter().any(|range| range.contains(ip));
        let mut client = plain(other_end);
        let lines = headers.get_all(FORWARDED_FOR).iter().rev();
        let hops = lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        for hop in hops {
            if !is_proxy(client) {
                break;
            }
            // What a named proxy wrote is an address. Anything else was there before it.
            let Some(ip) = address(hop.trim()) else { break };
            client = plain(ip);
        }
        Peer(client)
    }
}

/// An address, with a port or in brackets too, as some proxies write it.
fn address(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    bare.parse().ok().or_else(|| hop.parse::<SocketAddr>().ok().map(|socket| socket.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(peer: &str, lines: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(FORWARDED_FOR, line.parse().expect("a header value"));
        }
        let proxies: Vec<Cidr> =
            ["10.0.0.0/8", "fd00::/8"].map(|range| range.parse().expect("a range")).to_vec();
        Peer::of(peer.parse().expect("an address"), &headers, &proxies).0.to_string()
    }

    #[test]
    fn only_named_proxies_are_believed() {
        assert_eq!(seen("192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
        assert_eq!(seen("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(seen("::ffff:10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(seen("::ffff:192.0.2.1", &[]), "192.0.2.1");
    }

    #[test]
    fn the_last_hop_that_is_no_proxy_counts() {
        // The client wrote the first entry itself.
        assert_eq!(seen("10.0.0.1", &["203.0.113.1, 198.51.100.7"]), "198.51.100.7");
        assert_eq!(seen("10.0.0.1", &["203.0.113.1", "198.51.100.7, 10.0.0.2"]), "198.51.100.7");
        assert_eq!(seen("10.0.0.1", &["10.9.9.9"]), "10.9.9.9");
        assert_eq!(seen("fd00::1", &["[2001:db8::5]:4711"]), "2001:db8::5");
        assert_eq!(seen("10.0.0.1", &["198.51.100.7:80"]), "198.51.100.7");
    }

    #[test]
    fn nonsense_ends_the_search_at_the_proxy_that_sent_it() {
        for line in ["", "unknown", ",", "198.51.100.7, x"] {
            assert_eq!(seen("10.0.0.1", &[line]), "10.0.0.1", "{line:?}");
        }
        assert_eq!(seen("10.0.0.1", &[]), "10.0.0.1");
    }
}
