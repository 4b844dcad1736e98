//! What a pool is told, and the names and addresses that follow from it.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use belljar_domain::Kind;

use crate::cidr::Ipv4Cidr;

/// Where named network namespaces live; the `ip netns` program uses the same folder.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// Destinations no guest reaches unless the host's configuration says so: this host's own
/// network, private and shared ranges, loopback, link-local (metadata services), multicast and
/// reserved. Source: the IANA special-purpose address registry.
pub(crate) const DENIED: [&str; 8] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "224.0.0.0/3",
];

/// Ranges that no configuration may open: "this network", loopback, link-local with its
/// metadata services and the guest's own link, multicast and reserved.
const NEVER_ALLOWED: [&str; 4] = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"];

/// The first of the device groups of pools; a tag of four characters reaches 37^4 further.
const DOOMED_GROUPS: u32 = 0x6265_0000;

/// What a pool of slots is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotsConfig {
    /// One to four of `[a-z0-9]`; part of the name of everything the pool makes, so that several
    /// pools live side by side on one host.
    pub tag: String,
    /// Where slot addresses come from, two for each slot. Nothing else on the host may use it.
    /// (The default is also the usual service range of Kubernetes: choose another beside that.)
    pub cidr: Ipv4Cidr,
    /// How many slots there are at most, leased and ready together.
    pub capacity: u32,
    /// With fewer ready slots than this the pool makes more, and sooner the more were taken lately.
    pub ready_low: u32,
    /// It stops at this many.
    pub ready_high: u32,
    /// Private ranges guests may reach all the same, such as a name server of the local network.
    /// Addresses of this host stay closed even when they are in one.
    pub allowed_private: Vec<Ipv4Cidr>,
}

impl SlotsConfig {
    /// The defaults: 10.96.0.0/16, 1,024 slots, four to twelve of them ready, no exceptions.
    pub fn new(tag: &str) -> SlotsConfig {
        let cidr = Ipv4Cidr::new(Ipv4Addr::new(10, 96, 0, 0), 16)
            .expect("10.96.0.0/16 has no bits after its prefix");
        SlotsConfig {
            tag: tag.to_owned(),
            cidr,
            capacity: 1024,
            ready_low: 4,
            ready_high: 12,
            allowed_private: Vec::new(),
        }
    }
}

/// Why no pool was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The tag cannot be part of device names.
    #[error("open network pool: tag {tag:?} must be one to four of a-z and 0-9")]
    BadTag {
        /// What was given.
        tag: String,
    },
    /// The range has no room for so many slots.
    #[error("open network pool: {cidr} has room for {room} slots, not {capacity}")]
    BadCapacity {
        /// What was given.
        capacity: u32,
        /// The range.
        cidr: Ipv4Cidr,
        /// How many fit.
        room: u32,
    },
    /// The watermarks are the wrong way round.
    #[error("open network pool: ready_low {low} is above ready_high {high}")]
    BadWatermarks {
        /// `ready_low`.
        low: u32,
        /// `ready_high`.
        high: u32,
    },
    /// An exception would open what must stay closed.
    #[error("open network pool: the exception {exception} overlaps {closed}, which stays closed")]
    BadException {
        /// What was given.
        exception: Ipv4Cidr,
        /// What it would open.
        closed: Ipv4Cidr,
    },
    /// Another process has a pool of this tag open.
    #[error("open network pool: another process on this host uses the tag {tag:?}")]
    InUse {
        /// The tag.
        tag: String,
    },
    /// An interface of the host already has an address from the range.
    #[error("open network pool: {address} of {interface} lies in {cidr}; configure another range")]
    RangeTaken {
        /// The range.
        cidr: Ipv4Cidr,
        /// The interface.
        interface: String,
        /// Its address.
        address: Ipv4Addr,
    },
    /// The kernel or `nft` refused; usually a missing privilege or program.
    #[error("open network pool: {step}: {reason}")]
    Host {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        reason: String,
    },
}

impl OpenError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            OpenError::BadTag { .. }
            | OpenError::BadCapacity { .. }
            | OpenError::BadWatermarks { .. }
            | OpenError::BadException { .. } => Kind::Invalid,
            OpenError::InUse { .. } | OpenError::RangeTaken { .. } => Kind::Conflict,
            OpenError::Host { .. } => Kind::Internal,
        }
    }
}

/// A checked configuration: names and addresses of everything the pool makes.
#[derive(Debug)]
pub(crate) struct Plan {
    config: SlotsConfig,
}

impl Plan {
    pub(crate) fn new(config: SlotsConfig) -> Result<Plan, OpenError> {
        let SlotsConfig { tag, cidr, capacity, ready_low, ready_high, allowed_private } = &config;
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if tag.is_empty() || tag.len() > 4 || !tag.bytes().all(good) {
            return Err(OpenError::BadTag { tag: tag.clone() });
        }
        let room = 1_u32.checked_shl(31_u32.saturating_sub(u32::from(cidr.prefix_bits())));
        let room = if cidr.prefix_bits() > 31 { 0 } else { room.unwrap_or(u32::MAX) };
        // Six digits of index are what a device name of 15 bytes has left: `bj` tag `-` index.
        let room = room.min(1_000_000);
        if *capacity == 0 || *capacity > room {
            return Err(OpenError::BadCapacity { capacity: *capacity, cidr: *cidr, room });
        }
        if ready_low > ready_high {
            return Err(OpenError::BadWatermarks { low: *ready_low, high: *ready_high });
        }
        for &exception in allowed_private {
            let closed = blocks(&NEVER_ALLOWED).chain([*cidr]).find(|c| c.overlaps(exception));
            if let Some(closed) = closed {
                return Err(OpenError::BadException { exception, closed });
            }
        }
        Ok(Plan { config })
    }

    pub(crate) fn config(&self) -> &SlotsConfig {
        &self.config
    }

    /// What guests may not reach, but for the exceptions.
    pub(crate) fn denied(&self) -> impl Iterator<Item = Ipv4Cidr> + '_ {
        blocks(&DENIED).chain([self.config.cidr])
    }

    /// The path that names a slot's namespace.
    pub(crate) fn netns(&self, index: u32) -> PathBuf {
        Path::new(NETNS_DIR).join(format!("{}{index}", self.netns_prefix()))
    }

    fn netns_prefix(&self) -> String {
        format!("belljar-{}-", self.config.tag)
    }

    /// The device on the host's side of a slot.
    pub(crate) fn veth(&self, index: u32) -> String {
        format!("{}{index}", self.veth_prefix())
    }

    /// What the names of all host side devices start with. The dash keeps tag `a1` slot 0 and tag
    /// `a` slot 10 apart.
    pub(crate) fn veth_prefix(&self) -> String {
        format!("bj{}-", self.config.tag)
    }

    /// The pool's nftables table on the host.
    pub(crate) fn table(&self) -> String {
        format!("belljar_{}", self.config.tag)
    }

    /// The address of the host's side of a slot.
    pub(crate) fn host_side(&self, index: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.config.cidr.network().to_bits() + 2 * index)
    }

    /// The address of the slot's side: where the host reaches the guest.
    pub(crate) fn slot_side(&self, index: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.config.cidr.network().to_bits() + 2 * index + 1)
    }

    /// The device group host side devices are put in to be deleted all at once. Each tag has its
    /// own, so two pools never delete each other's; all are far from the small numbers people use.
    pub(crate) fn doomed_group(&self) -> u32 {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => u32::from(byte - b'0') + 1,
            letter => u32::from(letter - b'a') + 11,
        };
        DOOMED_GROUPS + self.config.tag.bytes().fold(0, |group, byte| group * 37 + digit(byte))
    }

    /// The slot whose device or namespace is called `name`, if it is one of this pool's tag.
    pub(crate) fn index_of(&self, name: &str) -> Option<u32> {
        let rest = name
            .strip_prefix(&self.veth_prefix())
            .or_else(|| name.strip_prefix(&self.netns_prefix()))?;
        rest.parse().ok()
    }
}

fn blocks(texts: &'static [&'static str]) -> impl Iterator<Item = Ipv4Cidr> {
    texts.iter().map(|text| text.parse().expect("the constants above are good blocks"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> SlotsConfig {
        SlotsConfig::new("t1")
    }

    #[test]
    fn names_fit_and_come_back() {
        let plan = Plan::new(SlotsConfig { tag: "abcd".to_owned(), ..config() }).expect("good");
        assert!(plan.veth(999_999).len() <= 15);
        assert_eq!(plan.index_of(&plan.veth(37)), Some(37));
        let netns = plan.netns(5);
        let name = netns.file_name().and_then(|n| n.to_str()).expect("it has a name");
        assert_eq!(plan.index_of(name), Some(5));
        for other in ["bjabcd-", "bjabcde-1", "bjabc-1", "belljar-abcd-x", "eth0"] {
            assert_eq!(plan.index_of(other), None, "{other}");
        }
    }

    #[test]
    fn every_tag_has_a_device_group_of_its_own() {
        let group = |tag: &str| Plan::new(SlotsConfig::new(tag)).expect("good").doomed_group();
        let tags = ["0", "1", "a", "z", "00", "0a", "a0", "10", "zz", "zzz", "zzzz", "1000"];
        let groups: std::collections::HashSet<u32> = tags.into_iter().map(group).collect();
        assert_eq!(groups.len(), tags.len());
        assert!(groups.into_iter().all(|g| g > DOOMED_GROUPS && g < 1 << 31));
    }

    #[test]
    fn addresses_are_pairs_from_the_range() {
        let plan = Plan::new(config()).expect("good");
        assert_eq!(plan.host_side(0), Ipv4Addr::new(10, 96, 0, 0));
        assert_eq!(plan.slot_side(0), Ipv4Addr::new(10, 96, 0, 1));
        assert_eq!(plan.host_side(200), Ipv4Addr::new(10, 96, 1, 144));
    }

    #[test]
    fn bad_configurations_are_refused() {
        let cidr: Ipv4Cidr = "10.1.0.0/30".parse().expect("good");
        assert!(Plan::new(SlotsConfig { cidr, capacity: 2, ..config() }).is_ok());
        for bad in [
            SlotsConfig { tag: String::new(), ..config() },
            SlotsConfig { tag: "ABC".to_owned(), ..config() },
            SlotsConfig { tag: "abcde".to_owned(), ..config() },
            SlotsConfig { capacity: 0, ..config() },
            SlotsConfig { cidr, capacity: 3, ..config() },
            SlotsConfig { cidr: "10.1.0.0/32".parse().expect("good"), capacity: 1, ..config() },
            SlotsConfig { ready_low: 5, ready_high: 4, ..config() },
        ] {
            assert_eq!(Plan::new(bad).expect_err("bad").kind(), Kind::Invalid);
        }
    }

    #[test]
    fn exceptions_never_open_the_pool_or_metadata() {
        for (text, good) in [
            ("192.168.7.0/24", true),
            ("10.0.0.53/32", true),
            ("10.96.3.0/24", false),
            ("10.0.0.0/8", false),
            ("169.254.169.254/32", false),
            ("0.0.0.0/0", false),
        ] {
            let allowed_private = vec![text.parse().expect("a block")];
            let outcome = Plan::new(SlotsConfig { allowed_private, ..config() });
            assert_eq!(outcome.is_ok(), good, "{text}");
        }
    }
}
