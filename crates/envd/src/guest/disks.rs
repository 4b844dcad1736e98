//! Stops and resumes all writing to the machine's disks, so that the host can copy them.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::sys;

/// Most of the mount table that is read, bytes; programs inside may mount without end.
const TABLE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// Which disks are stopped.
#[derive(Debug, Default)]
pub struct Disks {
    stopped: Mutex<Stopped>,
}

#[derive(Debug, Default)]
struct Stopped {
    /// A directory of each, held open: thawing must not need to look anything up.
    roots: Vec<OwnedFd>,
    /// Counts freezes, so that the watchdog of one never ends another.
    generation: u64,
    /// Counts thaws, so that one undoes also a freeze that is still flushing.
    thaws: u64,
}

/// Names a freeze to its watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    generation: u64,
    thaws: u64,
}

/// Why the disks are not stopped; none of them is then.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// The kernel does not say what is mounted.
    #[error("read the mount table: {0}")]
    Table(io::Error),
    /// One of them would not stop.
    #[error("stop writing to the disk at {}: {source}", .at.display())]
    Freeze {
        /// Where it is mounted.
        at: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Flushing took so long that the watchdog has passed, and nothing would end the freeze; or a
    /// thaw came meanwhile.
    #[error("flush the disks in time; writing goes on")]
    TooLate,
}

impl Disks {
    /// Announces a freeze. What it returns names it to [`Disks::thaw_if`], so that a watchdog can
    /// be set before anything stops.
    pub fn announce(&self) -> Announced {
        let mut stopped = self.lock();
        stopped.generation += 1;
        Announced { generation: stopped.generation, thaws: stopped.thaws }
    }

    /// Flushes every disk and stops writing to it. Writers wait until the thaw. Blocks for as
    /// long as flushing takes. Those stopped already are left so. A watchdog must thaw at `until`
    /// or later.
    ///
    /// # Errors
    /// [`DisksError`]; what this call stopped goes on then.
    pub fn freeze(&self, announced: Announced, until: Instant) -> Result<(), DisksError> {
        let table = fs::read("/proc/self/mountinfo").map_err(DisksError::Table)?;
        let table = table.get(..table.len().min(TABLE_MAX_BYTES)).unwrap_or_default();
        let mut roots = Vec::new();
        // The last mounted first: it may lie in a file on an earlier one.
        for disk in disks(&String::from_utf8_lossy(table)).iter().rev() {
            match freeze_one(&disk.at) {
                Ok(Some(root)) => roots.push(root),
                Ok(None) => {}
                Err(error) => {
                    thaw(roots);
                    return Err(DisksError::Freeze { at: disk.at.clone(), source: error.into() });
                }
            }
        }
        let mut stopped = self.lock();
        stopped.roots.extend(roots);
        let undone = stopped.thaws != announced.thaws;
        drop(stopped);
        // Looked at only now: a watchdog that bites later finds the disks listed.
        if undone || Instant::now() >= until {
            self.thaw();
            return Err(DisksError::TooLate);
        }
        Ok(())
    }

    /// Lets writing go on wherever [`Disks::freeze`] stopped it. Nothing stopped is fine.
    ///
    /// It takes one short write of each disk's head, and no thread of the pool: those may all be
    /// waiting to write.
    pub fn thaw(&self) {
        let mut stopped = self.lock();
        stopped.thaws += 1;
        let roots = std::mem::take(&mut stopped.roots);
        drop(stopped);
        thaw(roots);
    }

    /// As [`Disks::thaw`], unless a newer freeze was announced. Says whether anything was stopped.
    pub fn thaw_if(&self, announced: Announced) -> bool {
        let mut stopped = self.lock();
        if stopped.generation != announced.generation || stopped.roots.is_empty() {
            return false;
        }
        let roots = std::mem::take(&mut stopped.roots);
        drop(stopped);
        thaw(roots);
        true
    }

    fn lock(&self) -> MutexGuard<'_, Stopped> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `None` when there is nothing to stop: it is stopped, cannot be, or is gone.
fn freeze_one(at: &Path) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::open(at, flags, Mode::empty()) else { return Ok(None) };
    match sys::freeze_file_system(&root) {
        Ok(()) => Ok(Some(root)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::BUSY | Errno::OPNOTSUPP) => Ok(None),
            Some(errno) => Err(errno),
            None => Err(Errno::IO),
        },
    }
}

/// In the order opposite to that in which they were stopped.
fn thaw(roots: Vec<OwnedFd>) {
    for root in roots.into_iter().rev() {
        if let Err(error) = sys::thaw_file_system(&root)
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            tracing::error!(%error, "failed to let writing to a disk go on");
        }
    }
}

/// One file system on a block device.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Disk {
    /// Where it is mounted first.
    pub(super) at: PathBuf,
    device: String,
}

/// The writable disks of a mount table, in the order of their first mounts.
///
/// Source of the format: `proc_pid_mountinfo(5)`.
pub(super) fn disks(table: &str) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for line in table.lines() {
        let Some((mount, source)) = line.split_once(" - ") else { continue };
        let mut fields = mount.split(' ').skip(2);
        let (Some(device), Some(_), Some(at)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let mut source = source.split(' ');
        let (kind, options) =
            (source.next().unwrap_or_default(), source.nth(1).unwrap_or_default());
        // File systems without a device have major number 0; FUSE would ask a program inside.
        let is_disk = !device.starts_with("0:") && !kind.starts_with("fuse");
        let writable = options.split(',').any(|option| option == "rw");
        if is_disk && writable && !disks.iter().any(|known| known.device == device) {
            disks.push(Disk { at: unescape(at), device: device.to_owned() });
        }
    }
    disks
}

/// Space, tab, line feed and backslash are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut plain = text.to_owned();
    for (escape, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(escape, character);
    }
    PathBuf::from(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_once_and_nothing_else_is() {
        let table = "\
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 21 0:20 / /proc rw,nosuid - proc proc rw
23 21 254:0 /home /srv/a rw,relatime shared:1 - ext4 /dev/vda rw
24 21 7:0 / /mnt/a\\040b rw - ext4 /dev/loop0 rw,noatime
25 21 7:1 / /mnt/cd ro - iso9660 /dev/loop1 ro
26 21 8:1 / /mnt/ntfs rw - fuseblk /dev/sda1 rw
junk
";
        let found: Vec<PathBuf> = disks(table).into_iter().map(|disk| disk.at).collect();
        assert_eq!(found, [PathBuf::from("/"), PathBuf::from("/mnt/a b")]);
    }

    #[test]
    fn a_watchdog_ends_only_its_own_freeze() {
        let disks = Disks::default();
        let first = disks.announce();
        let second = disks.announce();
        // No disk at all stands in for a stopped one: thawing it is refused and harmless.
        let own = OwnedFd::from(fs::File::open("/proc").expect("there"));
        disks.lock().roots.push(own);
        assert!(!disks.thaw_if(first));
        assert!(disks.thaw_if(second));
        assert!(!disks.thaw_if(second), "nothing is left to thaw");
    }
}
