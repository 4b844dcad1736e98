//! The host leak oracle: what is on this host now that was not there before?
//!
//! ```no_run
//! # async fn test() {
//! use belljar_testkit::{HostSnapshot, Sight, assert_clean};
//!
//! let sight = Sight { tag: Some("mytest".to_owned()), roots: Vec::new() };
//! let before = HostSnapshot::take_with(sight);
//! // ... create things whose names contain the tag, and give them all back ...
//! assert_clean(&before).await;
//! # }
//! ```
//!
//! Without a tag everything that looks like ours counts, so such a test must have the host to
//! itself. With a tag only names that contain it count, and tests may run side by side.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{cgroups, network, processes};

/// The word that marks a thing as ours when no tag is given.
pub(crate) const OURS: &str = "belljar";
/// How long the kernel may take to finish a teardown that the product has ordered.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
const SETTLE_STEP: Duration = Duration::from_millis(50);

/// Where a snapshot looks and which names count.
#[derive(Debug, Clone, Default)]
pub struct Sight {
    /// Only things whose name, path or command line contains this. Keep it under 10 characters:
    /// an interface name holds 15.
    pub tag: Option<String>,
    /// Folders of which every file counts, whatever its name: the test's own.
    pub roots: Vec<PathBuf>,
}

impl Sight {
    /// Whether a name is one of those looked for; without a tag every name is.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.tag.as_ref().is_none_or(|tag| name.contains(tag.as_str()))
    }

    /// Whether a name is ours: it contains the tag, or without one the name of the product.
    pub(crate) fn owns(&self, name: &str) -> bool {
        name.contains(self.tag.as_deref().unwrap_or(OURS))
    }
}

/// What was on the host at one moment.
#[derive(Debug, Clone)]
pub struct HostSnapshot {
    sight: Sight,
    found: BTreeSet<String>,
}

impl HostSnapshot {
    /// Looks at everything that may be ours.
    pub fn take() -> HostSnapshot {
        HostSnapshot::take_with(Sight::default())
    }

    /// Looks at what `sight` asks for: processes, network namespaces, interfaces, mounts,
    /// cgroups, unix sockets, nft tables and the files below its roots.
    ///
    /// # Panics
    /// When `/proc` or `/sys` cannot be read: an oracle that cannot see must not say "clean".
    pub fn take_with(sight: Sight) -> HostSnapshot {
        let mut found = BTreeSet::new();
        processes::look(&sight, &mut found);
        network::look(&sight, &mut found);
        cgroups::look(&sight, &mut found);
        look_at_mounts(&sight, &mut found);
        for root in &sight.roots {
            look_at_files(root, &mut found);
        }
        HostSnapshot { sight, found }
    }

    /// What is here that was not there `before`, one line a thing, sorted.
    pub fn leaks_since(&self, before: &HostSnapshot) -> Vec<String> {
        self.found.difference(&before.found).cloned().collect()
    }
}

/// Fails the test unless the host is as clean as it was `before`, within 5 seconds.
///
/// # Panics
/// With the list of what is left.
pub async fn assert_clean(before: &HostSnapshot) {
    let deadline = tokio::time::Instant::now() + SETTLE_LIMIT;
    loop {
        let leaks = HostSnapshot::take_with(before.sight.clone()).leaks_since(before);
        if leaks.is_empty() {
            return;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{} things are left on the host after {} s:\n  {}",
            leaks.len(),
            SETTLE_LIMIT.as_secs(),
            leaks.join("\n  ")
        );
        tokio::time::sleep(SETTLE_STEP).await;
    }
}

/// Mounts of this process' mount namespace. The mount id is part of the name, so that a second
/// mount over the same place is seen. Source: proc_pid_mountinfo(5).
fn look_at_mounts(sight: &Sight, found: &mut BTreeSet<String>) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("proc is mounted");
    for line in table.lines() {
        let mut fields = line.split(' ');
        let (Some(id), Some(point)) = (fields.next(), fields.nth(3)) else { continue };
        let source = line.split_once(" - ").map_or("", |(_, rest)| rest);
        let name = format!("mount {point} of {source} (id {id})");
        if sight.wants(&name) {
            found.insert(name);
        }
    }
}

fn look_at_files(folder: &Path, found: &mut BTreeSet<String>) {
    // A root that does not exist holds no files; one that vanishes while read holds none either.
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        found.insert(format!("file {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            look_at_files(&path, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight(tag: &str) -> Sight {
        Sight { tag: Some(tag.to_owned()), roots: Vec::new() }
    }

    #[test]
    fn files_below_a_root_are_seen() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sight =
            Sight { tag: Some("zqfiles".to_owned()), roots: vec![folder.path().to_owned()] };
        let before = HostSnapshot::take_with(sight.clone());
        std::fs::create_dir(folder.path().join("a")).expect("make a folder");
        std::fs::write(folder.path().join("a/b"), b"x").expect("write a file");
        let leaks = HostSnapshot::take_with(sight).leaks_since(&before);
        assert_eq!(leaks.len(), 2, "{leaks:?}");
        assert!(leaks[1].ends_with("/a/b"), "{leaks:?}");
    }

    #[test]
    fn a_leak_of_somebody_else_is_not_mine() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let before = HostSnapshot::take_with(sight("zqmine"));
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("zqother.sock"))
            .expect("bind a socket");
        assert!(HostSnapshot::take_with(sight("zqmine")).leaks_since(&before).is_empty());
    }

    #[tokio::test]
    async fn a_late_teardown_is_waited_for() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sight = Sight { tag: Some("zqlate".to_owned()), roots: vec![folder.path().to_owned()] };
        let before = HostSnapshot::take_with(sight.clone());
        let file = folder.path().join("slow");
        std::fs::write(&file, b"x").expect("write a file");
        let clean = assert_clean(&before);
        let removal = async {
            // The oracle has looked once by the time this task gets its turn.
            tokio::task::yield_now().await;
            std::fs::remove_file(&file).expect("remove the file");
        };
        tokio::join!(clean, removal);
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "1 things are left on the host after 5 s")]
    async fn a_leak_fails_the_test() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sight = Sight { tag: Some("zqleak".to_owned()), roots: vec![folder.path().to_owned()] };
        let before = HostSnapshot::take_with(sight);
        std::fs::write(folder.path().join("left"), b"x").expect("write a file");
        assert_clean(&before).await;
    }
}
