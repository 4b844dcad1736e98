//! The all-in-one preset: where a single-machine server keeps things, and its defaults.
//!
//! This is the only place that knows "local". A fleet's roles are given the same settings from
//! their configuration instead.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use belljar_network::Ipv4Cidr;
use belljar_sandbox::Settings;
use sha2::{Digest as _, Sha256};

use crate::args::Place;

/// First user id of machine processes: above what Debian, systemd and container id maps hand out.
const MACHINE_UID_BASE: u32 = 2_140_000_000;

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

    pub(crate) fn database(&self) -> PathBuf {
        self.data_dir.join("belljar.db")
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.data_dir.join("api-key")
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

    pub(crate) fn sandbox_settings(&self, sandboxes_max: u16, range: SlotRange) -> Settings {
        Settings {
            host_tag: self.host_tag.clone(),
            ledger_dir: self.data_dir.join("ledger"),
            run_dir: self.run_dir.clone(),
            overlay_dir: self.data_dir.join("overlays"),
            templates_dir: self.templates_dir(),
            machine_uid_base: self.machine_uid_base(range),
            sandboxes_max: usize::from(sandboxes_max),
            // Restores are bound by processor time: more at once only makes each one slower.
            starting_max: std::thread::available_parallelism().map_or(2, usize::from) * 4,
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
