//! Teams and users: who owns keys, sandboxes and template names, and who may act for them.

use std::fmt;
use std::net::IpAddr;

use crate::cidr::Cidr;
use crate::limits::Limits;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// A new random id.
            pub fn random() -> Self {
                $name(uuid::Uuid::new_v4())
            }

            /// The id `text` spells, or `None` when it is not a UUID.
            pub(crate) fn parse(text: &str) -> Option<Self> {
                uuid::Uuid::try_parse(text).ok().map($name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id!(
    /// A team. A UUID.
    TeamId
);
uuid_id!(
    /// A user. A UUID.
    UserId
);
uuid_id!(
    /// An API key or an access token, as it is named once its text is not known any more. A UUID.
    CredentialId
);

/// A team: the name its templates live under, and what holds for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Team {
    /// Never changes.
    pub id: TeamId,
    /// Namespace of its template names. Never changes.
    pub slug: String,
    /// For people.
    pub name: String,
    /// Its tier's limits, and its own.
    pub limits: Limits,
    /// Where its requests must come from; empty lets everybody in.
    pub allowed: Vec<Cidr>,
    /// Why nobody may act for it at the moment.
    pub blocked: Option<String>,
}

impl Team {
    /// Whether requests from `address` may act for the team.
    pub(crate) fn admits(&self, address: IpAddr) -> bool {
        self.allowed.is_empty() || self.allowed.iter().any(|range| range.contains(address))
    }
}

#[cfg(test)]
impl Team {
    /// A team nothing is known of but its name.
    pub(crate) fn called(slug: &str) -> Team {
        use belljar_domain::{MiB, Vcpus};
        let limits = Limits {
            max_concurrent_sandboxes: 100,
            max_length_seconds: 86_400,
            max_vcpus: Vcpus(32),
            max_memory: MiB(65_536),
            max_disk: MiB(51_200),
            creates_per_second: 10_000,
            max_concurrent_builds: 20,
            events_ttl_days: 7,
        };
        let (slug, name) = (slug.to_owned(), slug.to_owned());
        Team { id: TeamId::random(), slug, name, limits, allowed: Vec::new(), blocked: None }
    }
}
