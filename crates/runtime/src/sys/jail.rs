//! What a child's file system becomes between fork and exec: a folder of the host as its root, with
//! files of the host bound into it and devices of its own, in namespaces that end with it.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::check;
use crate::machine::Identity;

/// A file or folder of the host that is shown inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    /// On the host.
    pub(crate) from: PathBuf,
    /// Below the jail's folder: an existing file or folder, as `from` is.
    pub(crate) to: &'static str,
    pub(crate) writable: bool,
}

/// A device that is made inside, for its user alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    /// Below the jail's folder `dev`, which becomes a file system in memory.
    pub(crate) name: &'static str,
    pub(crate) number: libc::dev_t,
}

/// All that the child needs, made before the fork: it may not allocate.
#[derive(Debug, Clone)]
pub(crate) struct Root {
    folder: CString,
    dev: CString,
    dev_net: CString,
    binds: Vec<(CString, CString, bool)>,
    devices: Vec<(CString, libc::dev_t)>,
    owner: Option<Identity>,
}

const TMPFS: &std::ffi::CStr = c"tmpfs";
const DEV_OPTIONS: &std::ffi::CStr = c"size=64k,mode=755";
const HERE: &std::ffi::CStr = c".";
const TOP: &std::ffi::CStr = c"/";

impl Root {
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a path with a zero byte.
    pub(crate) fn new(
        folder: &Path,
        binds: &[Bind],
        devices: &[Device],
        owner: Option<Identity>,
    ) -> io::Result<Root> {
        let text = |path: &Path| Ok::<_, io::Error>(CString::new(path.as_os_str().as_bytes())?);
        let binds = binds
            .iter()
            .map(|bind| Ok((text(&bind.from)?, text(&folder.join(bind.to))?, bind.writable)));
        let dev = folder.join("dev");
        let devices =
            devices.iter().map(|device| Ok((text(&dev.join(device.name))?, device.number)));
        Ok(Root {
            folder: text(folder)?,
            dev: text(&dev)?,
            dev_net: text(&dev.join("net"))?,
            binds: binds.collect::<io::Result<_>>()?,
            devices: devices.collect::<io::Result<_>>()?,
            owner,
        })
    }

    /// Makes it the calling process's root. For a child between fork and exec: system calls only.
    pub(super) fn enter(&self) -> io::Result<()> {
        let none = std::ptr::null();
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        // SAFETY: flags only; then strings that outlive the calls, and null where none is wanted.
        unsafe {
            check(libc::unshare(namespaces))?;
            // Nothing that is mounted from here on is seen outside.
            let private = libc::MS_REC | libc::MS_PRIVATE;
            check(libc::mount(none, TOP.as_ptr(), none, private, none.cast()))?;
        }
        mount_bind(&self.folder, &self.folder, true)?;
        for (from, to, writable) in &self.binds {
            mount_bind(from, to, *writable)?;
        }
        self.make_devices()?;
        self.change_root()
    }

    fn make_devices(&self) -> io::Result<()> {
        let flags = libc::MS_NOSUID | libc::MS_NOEXEC;
        // SAFETY: strings that outlive the calls.
        unsafe {
            let options = DEV_OPTIONS.as_ptr().cast();
            check(libc::mount(TMPFS.as_ptr(), self.dev.as_ptr(), TMPFS.as_ptr(), flags, options))?;
            check(libc::mkdir(self.dev_net.as_ptr(), 0o755))?;
        }
        for (path, number) in &self.devices {
            // SAFETY: a string that outlives the calls, and plain numbers.
            unsafe {
                check(libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, *number))?;
                if let Some(Identity { uid, gid }) = self.owner {
                    check(libc::chown(path.as_ptr(), uid, gid))?;
                }
            }
        }
        Ok(())
    }

    fn change_root(&self) -> io::Result<()> {
        let none = std::ptr::null();
        // SAFETY: strings that outlive the calls.
        unsafe {
            check(libc::chdir(self.folder.as_ptr()))?;
            let here = HERE.as_ptr();
            if check(libc::syscall(libc::SYS_pivot_root, here, here) as libc::c_int).is_ok() {
                // The old root lies over the new one at the same place.
                check(libc::umount2(here, libc::MNT_DETACH))?;
            } else {
                // Where this process's root is no mount, or the first one of all.
                check(libc::mount(here, TOP.as_ptr(), none, libc::MS_MOVE, none.cast()))?;
                check(libc::chroot(here))?;
            }
            check(libc::chdir(TOP.as_ptr()))
        }
    }
}

fn mount_bind(from: &CString, to: &CString, writable: bool) -> io::Result<()> {
    let none = std::ptr::null();
    // SAFETY: strings that outlive the calls, and null where none is wanted.
    unsafe {
        check(libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()))?;
    }
    if writable { Ok(()) } else { set_read_only(to) }
}

fn set_read_only(at: &CString) -> io::Result<()> {
    let none = std::ptr::null();
    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOSUID;
    // SAFETY: a string that outlives the call, and null where none is wanted.
    check(unsafe { libc::mount(none, at.as_ptr(), none, flags, none.cast()) })
}
