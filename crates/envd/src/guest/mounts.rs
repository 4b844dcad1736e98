//! The kernel's file systems, and the few entries programs expect in them.

use std::ffi::CStr;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::StatVfsMountFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::log_failure;

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
    Mount { kind: "cgroup2", target: "/sys/fs/cgroup", flags: INERT, options: None },
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
        match rustix::mount::mount(kind, target, kind, flags, options) {
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
    // Temporary files stay on disk: memory is what a sandbox has least of.
    if !Path::new("/tmp").is_dir() {
        log_failure("make /tmp", std::fs::create_dir_all("/tmp"));
    }
    log_failure(
        "open /tmp to everyone",
        std::fs::set_permissions("/tmp", Permissions::from_mode(0o1777)),
    );
}

fn make_root_writable() {
    let read_only =
        rustix::fs::statvfs("/").is_ok_and(|root| root.f_flag.contains(StatVfsMountFlags::RDONLY));
    if read_only {
        log_failure("make / writable", rustix::mount::mount_remount("/", NONE, c""));
    }
}
