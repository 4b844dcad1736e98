//! The all-in-one preset: where a single-machine server keeps things, and its defaults.
//!
//! This is the only place that knows "local". A fleet's roles are given the same settings from
//! their configuration instead.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use belljar_network::Ipv4Cidr;
use belljar_sandbox::admission::Limits;
use belljar_sandbox::metrics::Figures;
use belljar_sandbox::{MetricsFrom, Settings, Warm};
use sha2::{Digest as _, Sha256};

use crate::args::{HostOptions, Place, RuntimeChoice};

/// First user id of machine processes: above what Debian, systemd and container id maps hand out.
const MACHINE_UID_BASE: u32 = 2_140_000_000;

/// Virtual processors for each of the host's: sandboxes mostly wait for whoever
/// drives them, and what they have at a time is shared fairly among them.
const CPU_OVERCOMMIT: u64 = 64;
/// Of the host's memory, for guests; the rest is for the machines themselves and this server.
const MEMORY_PERCENT: u64 = 90;
/// Room that stays where private disks are, for the database and for sandboxes that already run.
const DISK_RESERVE_MIB: u64 = 1024;
/// What sandboxes of the fake runtime say they use.
const FAKE_FIGURES: Figures = Figures {
    cpu_count: 0,
    cpu_used_pct: 1.5,
    mem_used_bytes: 64 << 20,
    mem_total_bytes: 0,
    mem_cache_bytes: 16 << 20,
    disk_used_bytes: 256 << 20,
    disk_total_bytes: 0,
};
/// An emulated guest boots in 2 to 5 s on an idle host.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// Callers of a create give up after a minute; one that waited this long could still start.
const STARTING_WAIT_MAX: Duration = Duration::from_secs(15);

/// A single-machine server's folders and names.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) data_dir: PathBuf,
    /// Sockets and logs of machines: a place their users can pass.
    pub(crate) run_dir: PathBuf,
    /// Sets this server's host resources apart from another's, `[a-z0-9]{4}`.
    pub(crate) host_tag: String,
    pub(crate) is_root: bool,
}

impl Local {
    /// Works out the folders and makes the data folder.
    pub(crate) fn open(place: &Place, home: Option<&Path>) -> Result<Local> {
        let is_root = rustix::process::geteuid().is_root();
        let data_dir = match (&place.data_dir, is_root, home) {
            (Some(dir), _, _) => dir.clone(),
            (None, true, _) => PathBuf::from("/var/lib/belljar"),
            (None, false, Some(home)) => home.join(".local/share/belljar"),
            (None, false, None) => bail!("no home folder is known: name one with --data-dir"),
        };
        std::fs::create_dir_all(&data_dir)
            .with_context(|| format!("failed to make {}", data_dir.display()))?;
        let data_dir = data_dir
            .canonicalize()
            .with_context(|| format!("failed to resolve {}", data_dir.display()))?;
        let host_tag = host_tag(&data_dir);
        let run_dir =
            if is_root { Path::new("/run/belljar").join(&host_tag) } else { data_dir.join("run") };
        Ok(Local { data_dir, run_dir, host_tag, is_root })
    }

    /// Folders made for runs, innermost first. The outer one may hold other servers' folders.
    pub(crate) fn run_dirs(&self) -> impl Iterator<Item = &Path> {
        let outer = self.is_root.then(|| self.run_dir.parent()).flatten();
        std::iter::once(self.run_dir.as_path()).chain(outer)
    }

    pub(crate) fn templates_dir(&self) -> PathBuf {
        self.data_dir.join("templates")
    }

    /// Where images are stored, unless a command is told otherwise.
    pub(crate) fn blobs_dir(&self) -> PathBuf {
        self.data_dir.join("blobs")
    }

    /// What is kept near of a blob store.
    pub(crate) fn chunk_cache_dir(&self) -> PathBuf {
        self.data_dir.join("blob-cache")
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.data_dir.join("belljar.db")
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.data_dir.join("api-key")
    }

    pub(crate) fn admin_token_file(&self) -> PathBuf {
        self.data_dir.join("admin-token")
    }

    pub(crate) fn server_file(&self) -> PathBuf {
        self.data_dir.join("server.json")
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.data_dir.join("lock")
    }

    pub(crate) fn node_socket(&self) -> PathBuf {
        self.data_dir.join("node.sock")
    }

    /// The slot range this server tries first.
    pub(crate) fn first_range(&self) -> SlotRange {
        let sum = |sum: u8, b: u8| sum.wrapping_mul(31).wrapping_add(b);
        SlotRange(self.host_tag.bytes().fold(0, sum) % SlotRange::COUNT)
    }

    /// Machine processes get users of their own where that is possible.
    pub(crate) fn machine_uid_base(&self, range: SlotRange) -> Option<u32> {
        self.is_root.then(|| MACHINE_UID_BASE + u32::from(range.0) * SlotRange::ADDRESSES)
    }

    pub(crate) fn sandbox_settings(
        &self,
        options: &HostOptions,
        warm: Vec<Warm>,
        range: SlotRange,
    ) -> Settings {
        Settings {
            warm,
            host_tag: self.host_tag.clone(),
            ledger_dir: self.data_dir.join("ledger"),
            untold_dir: self.data_dir.join("untold-ends"),
            run_dir: self.run_dir.clone(),
            overlay_dir: self.data_dir.join("overlays"),
            data_dir: self.data_dir.clone(),
            boot_deadline: BOOT_DEADLINE,
            machine_uid_base: self.machine_uid_base(range),
            limits: limits(options),
            metrics: match options.runtime {
                RuntimeChoice::Fake => MetricsFrom::Made(FAKE_FIGURES),
                RuntimeChoice::Auto | RuntimeChoice::Emulated | RuntimeChoice::Firecracker => {
                    MetricsFrom::Guests
                }
            },
            ready_deadline: Duration::from_secs(30),
            teardown_step_deadline: Duration::from_secs(15),
        }
    }
}

/// One /16 of 10.64.0.0/10: where a server's slots have their addresses. The kernel gives it to one
/// server at a time, so what is numbered by it, such as users, is told apart as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotRange(u8);

impl SlotRange {
    const COUNT: u8 = 64;
    const ADDRESSES: u32 = 1 << 16;

    pub(crate) fn cidr(self) -> Ipv4Cidr {
        Ipv4Cidr::new(Ipv4Addr::new(10, 64 + self.0, 0, 0), 16)
            .expect("a /16 with two zero octets has no bits after its prefix")
    }

    /// Every range, this one first.
    pub(crate) fn all(self) -> impl Iterator<Item = SlotRange> {
        (0..Self::COUNT).map(move |step| SlotRange((self.0 + step) % Self::COUNT))
    }
}

/// What sandboxes may take of this host together.
fn limits(options: &HostOptions) -> Limits {
    let cpus = std::thread::available_parallelism().map_or(2, usize::from);
    // Machines of the fake runtime are no machines: they take neither processors nor memory.
    let (vcpus, memory_mib) = if options.runtime == RuntimeChoice::Fake {
        (u64::MAX, u64::MAX)
    } else {
        let vcpus = u64::try_from(cpus).unwrap_or(u64::MAX).saturating_mul(CPU_OVERCOMMIT);
        (vcpus, memory_mib() / 100 * MEMORY_PERCENT)
    };
    Limits {
        vcpus,
        memory_mib,
        disk_reserve_mib: DISK_RESERVE_MIB,
        sandboxes_max: usize::from(options.sandboxes_max),
        // Restores are bound by processor time: more at once only makes each one slower.
        starting_max: cpus * 4,
        starting_wait_max: STARTING_WAIT_MAX,
    }
}

/// This host's memory, MiB.
fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit).max(1)) >> 20
}

/// Four characters that differ between data folders.
fn host_tag(data_dir: &Path) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let digest = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
    digest.iter().take(4).map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_is_tried_once() {
        let ranges: Vec<SlotRange> = SlotRange(60).all().collect();
        assert_eq!((ranges.len(), ranges[0], ranges[4]), (64, SlotRange(60), SlotRange(0)));
        let top = MACHINE_UID_BASE + 64 * SlotRange::ADDRESSES;
        assert!(i32::try_from(top).is_ok(), "some tools take user ids as signed");
    }

    #[test]
    fn tags_are_short_stable_and_differ() {
        let (a, b) = (host_tag(Path::new("/a")), host_tag(Path::new("/b")));
        assert_eq!(a.len(), 4);
        assert_eq!(a, host_tag(Path::new("/a")));
        assert_ne!(a, b);
    }
}
