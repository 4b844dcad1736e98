//! The kernel's file systems, and the few entries programs expect in them.

use std::ffi::CStr;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::StatVfsMountFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::{disks, log_failure};

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: Option<&'static CStr>,
}

const NONE: MountFlags = MountFlags::empty();
const NO_SUID: MountFlags = MountFlags::NOSUID;
const INERT: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// In the order in which they need each other.
const MOUNTS: [Mount; 8] = [
    Mount { kind: "proc", target: "/proc", flags: INERT, options: None },
    Mount { kind: "sysfs", target: "/sys", flags: INERT, options: None },
    Mount { kind: "devtmpfs", target: "/dev", flags: NO_SUID, options: Some(c"mode=755") },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: NO_SUID.union(MountFlags::NOEXEC),
        options: Some(c"ptmxmode=666,mode=620,gid=5"),
    },
    Mount {
        kind: "tmpfs",
        target: "/dev/shm",
        flags: NO_SUID.union(MountFlags::NODEV),
        options: Some(c"mode=1777"),
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: NO_SUID.union(MountFlags::NODEV),
        options: Some(c"mode=755"),
    },
    Mount {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: INERT,
        // Every child moves itself into its group. Without this a move waits until all
        // processors have passed through the scheduler, for a timer tick or more.
        options: Some(c"favordynmods"),
    },
    Mount { kind: "mqueue", target: "/dev/mqueue", flags: INERT, options: None },
];

/// What scripts expect in `/dev` and the kernel does not put there.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts what is not mounted yet.
pub(super) fn mount_all() {
    make_root_writable();
    for mount in MOUNTS {
        let Mount { kind, target, flags, options } = mount;
        if !Path::new(target).is_dir() {
            log_failure("make a mount point", std::fs::create_dir_all(target));
        }
        let outcome = match rustix::mount::mount(kind, target, kind, flags, options) {
            // An older kernel lacks an option: the plain file system is better than none.
            Err(Errno::INVAL) if options.is_some() => {
                rustix::mount::mount(kind, target, kind, flags, None)
            }
            outcome => outcome,
        };
        match outcome {
            // The kernel mounts the device file system itself when so built.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => tracing::warn!(%error, target, "failed to mount"),
        }
    }
    for (to, at) in LINKS {
        if !Path::new(at).exists() {
            log_failure("link a device", symlink(to, at));
        }
    }
    // Temporary files stay on disk: memory is what a sandbox has least of. Locks are in memory:
    // none survives a boot.
    for folder in ["/tmp", "/run/lock"] {
        if !Path::new(folder).is_dir() {
            log_failure("make a folder for everyone", std::fs::create_dir_all(folder));
        }
        let outcome = std::fs::set_permissions(folder, Permissions::from_mode(0o1777));
        log_failure("open a folder to everyone", outcome);
    }
}

/// Ends writing to every disk: the others are unmounted, the root becomes read-only. What a
/// program that could not be killed still holds is flushed at least.
pub(super) fn unmount_all() {
    rustix::fs::sync();
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for disk in disks::disks(&table).iter().rev().filter(|disk| disk.at != Path::new("/")) {
        let outcome = rustix::mount::unmount(&disk.at, UnmountFlags::empty());
        log_failure("unmount a disk", outcome);
    }
    log_failure("make / read-only", rustix::mount::mount_remount("/", MountFlags::RDONLY, c""));
}

fn make_root_writable() {
    let read_only =
        rustix::fs::statvfs("/").is_ok_and(|root| root.f_flag.contains(StatVfsMountFlags::RDONLY));
    if read_only {
        log_failure("make / writable", rustix::mount::mount_remount("/", NONE, c""));
    }
}
