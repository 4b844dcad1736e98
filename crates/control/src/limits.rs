//! What a team may have and do at most: its tier's limits, and where the team differs from them.

use std::time::Duration;

use belljar_domain::{Kind, MiB, Vcpus};
use serde::{Deserialize, Serialize};

/// The tier a team gets that names none. Source of its numbers: contract section 9.
pub(crate) const DEFAULT_TIER: &str = "base";
/// The tier of the server's own first team: `belljar up` writes its flags there.
pub(crate) const LOCAL_TIER: &str = "local";

/// Limits that hold. Also how the store keeps a tier, field by column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sandboxes running or starting at the same time.
    pub max_concurrent_sandboxes: u32,
    /// Longest time to live one request may ask for, seconds.
    pub max_length_seconds: u32,
    /// Virtual processors of one sandbox.
    pub max_vcpus: Vcpus,
    /// Memory of one sandbox.
    pub max_memory: MiB,
    /// Root disk of one sandbox.
    pub max_disk: MiB,
    /// Sandboxes begun a second, on average.
    pub creates_per_second: u32,
    /// Template builds at the same time.
    pub max_concurrent_builds: u32,
    /// Days events are kept.
    pub events_ttl_days: u32,
}

/// Where a team differs from its tier. Its JSON form is what the store keeps, with the names of the
/// tiers' columns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct LimitOverrides {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_concurrent_sandboxes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_length_seconds: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_memory_mib: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_disk_mib: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) creates_per_second: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_concurrent_builds: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) events_ttl_days: Option<u32>,
}

impl Limits {
    /// Longest time to live one request may ask for.
    pub fn max_length(&self) -> Duration {
        Duration::from_secs(u64::from(self.max_length_seconds))
    }

    pub(crate) fn with(self, own: &LimitOverrides) -> Limits {
        Limits {
            max_concurrent_sandboxes: own
                .max_concurrent_sandboxes
                .unwrap_or(self.max_concurrent_sandboxes),
            max_length_seconds: own.max_length_seconds.unwrap_or(self.max_length_seconds),
            max_vcpus: own.max_vcpus.map_or(self.max_vcpus, Vcpus),
            max_memory: own.max_memory_mib.map_or(self.max_memory, MiB),
            max_disk: own.max_disk_mib.map_or(self.max_disk, MiB),
            creates_per_second: own.creates_per_second.unwrap_or(self.creates_per_second),
            max_concurrent_builds: own.max_concurrent_builds.unwrap_or(self.max_concurrent_builds),
            events_ttl_days: own.events_ttl_days.unwrap_or(self.events_ttl_days),
        }
    }

    /// Whether a sandbox of this size is within the limits.
    ///
    /// # Errors
    /// [`TooBig`] names the first limit it is not within.
    pub(crate) fn allow_size(&self, vcpus: Vcpus, memory: MiB, disk: MiB) -> Result<(), TooBig> {
        [
            ("virtual processors", vcpus.0, self.max_vcpus.0),
            ("MiB of memory", memory.0, self.max_memory.0),
            ("MiB of disk", disk.0, self.max_disk.0),
        ]
        .into_iter()
        .find(|(_, wanted, limit)| wanted > limit)
        .map_or(Ok(()), |(what, wanted, limit)| Err(TooBig { what, wanted, limit }))
    }
}

/// The template's machine is bigger than the team may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the template has {wanted} {what} and this team's sandboxes may have {limit}: use a smaller \
     template, or ask who runs this server for a higher limit"
)]
pub(crate) struct TooBig {
    what: &'static str,
    wanted: u32,
    limit: u32,
}

impl TooBig {
    pub(crate) fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// A length as the API's texts have it: `24 hours`, `0.50 hours`.
pub(crate) fn hours(length: Duration) -> String {
    let seconds = length.as_secs();
    let whole = seconds / 3600;
    match seconds % 3600 {
        0 => format!("{whole} hours"),
        rest => format!("{whole}.{:02} hours", rest * 100 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIER: Limits = Limits {
        max_concurrent_sandboxes: 20,
        max_length_seconds: 3600,
        max_vcpus: Vcpus(8),
        max_memory: MiB(8192),
        max_disk: MiB(25_600),
        creates_per_second: 1,
        max_concurrent_builds: 20,
        events_ttl_days: 7,
    };

    #[test]
    fn a_team_differs_where_it_says_so() {
        let own: LimitOverrides =
            serde_json::from_str(r#"{"max_vcpus":2,"events_ttl_days":30,"later":1}"#)
                .expect("overrides, with one of a newer version");
        let limits = TIER.with(&own);
        assert_eq!(
            limits,
            Limits { max_vcpus: Vcpus(2), events_ttl_days: 30, ..TIER },
            "nothing else changes"
        );
        let text = serde_json::to_string(&own).expect("JSON");
        assert_eq!(text, r#"{"max_vcpus":2,"events_ttl_days":30}"#);
        let all = LimitOverrides {
            max_concurrent_sandboxes: Some(1),
            max_length_seconds: Some(2),
            max_vcpus: Some(3),
            max_memory_mib: Some(4),
            max_disk_mib: Some(5),
            creates_per_second: Some(6),
            max_concurrent_builds: Some(7),
            events_ttl_days: Some(8),
        };
        let limits = Limits {
            max_concurrent_sandboxes: 1,
            max_length_seconds: 2,
            max_vcpus: Vcpus(3),
            max_memory: MiB(4),
            max_disk: MiB(5),
            creates_per_second: 6,
            max_concurrent_builds: 7,
            events_ttl_days: 8,
        };
        assert_eq!(TIER.with(&all), limits);
    }

    #[test]
    fn what_is_too_big_is_named() {
        assert_eq!(TIER.allow_size(Vcpus(8), MiB(8192), MiB(25_600)), Ok(()));
        for (vcpus, memory, disk, word) in [
            (9, 1, 1, "9 virtual processors"),
            (1, 8193, 1, "8193 MiB of memory"),
            (1, 1, 25_601, "25601 MiB of disk"),
        ] {
            let error = TIER.allow_size(Vcpus(vcpus), MiB(memory), MiB(disk)).expect_err(word);
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn lengths_read_as_hours() {
        for (seconds, text) in [(86_400, "24 hours"), (3600, "1 hours"), (1800, "0.50 hours")] {
            assert_eq!(hours(Duration::from_secs(seconds)), text);
        }
    }
}
