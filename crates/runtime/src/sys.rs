//! The calls no safe wrapper covers: preparing a forked child, opening a tap, running a tiny
//! guest on `/dev/kvm`, installing pages through a userfaultfd, and reading the time stamp counter.
#![expect(
    unsafe_code,
    reason = "JUSTIFICATION: code between fork and exec, device ioctls and one processor \
              instruction have no safe interface; each block below says why it is sound"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::machine::Identity;

pub(crate) mod jail;
pub(crate) mod kvm;
pub(crate) mod userfault;

/// What a child becomes between fork and exec.
#[derive(Debug, Clone)]
pub(crate) struct ChildSetup {
    /// The network namespace it enters.
    pub(crate) netns: Option<RawFd>,
    /// What its file system becomes; `None` is ours.
    pub(crate) root: Option<jail::Root>,
    /// Who it becomes.
    pub(crate) identity: Option<Identity>,
    /// The descriptors it keeps beside the standard three, under the same numbers.
    pub(crate) inherit: Vec<RawFd>,
}

/// Has `command` prepare its child so. The child dies with the *thread* that spawns it.
pub(crate) fn confine(command: &mut Command, setup: ChildSetup) {
    let parent = std::process::id();
    // SAFETY: the closure makes system calls only: it allocates nothing, takes no lock, and the
    // vector it reads was built before the fork.
    unsafe {
        command.pre_exec(move || setup.apply(parent));
    }
}

impl ChildSetup {
    fn apply(&self, parent: u32) -> io::Result<()> {
        if let Some(netns) = self.netns {
            // SAFETY: a descriptor number and a flag; no memory is passed.
            check(unsafe { libc::setns(netns, libc::CLONE_NEWNET) })?;
        }
        if let Some(root) = &self.root {
            root.enter()?;
        }
        if let Some(Identity { uid, gid }) = self.identity {
            // SAFETY: an empty list needs no pointer; the rest are plain numbers.
            unsafe {
                check(libc::setgroups(0, std::ptr::null()))?;
                check(libc::setresgid(gid, gid, gid))?;
                check(libc::setresuid(uid, uid, uid))?;
            }
        }
        // After the change of user, which would clear the death signal.
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: plain numbers, and a pointer to a value that outlives the call.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            // A core file of a machine monitor is the guest's memory on the host's disk.
            check(libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core))?;
        }
        // SAFETY: takes no argument.
        let still_ours = u32::try_from(unsafe { libc::getppid() }) == Ok(parent);
        if !still_ours {
            // The parent died before the death signal was set: nobody would ever send it.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // Only marks: the standard library's own pipe must stay open until exec.
        let mark = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
        // SAFETY: a range of descriptor numbers and a flag.
        check(unsafe { libc::close_range(3, libc::c_uint::MAX, mark) })?;
        for fd in &self.inherit {
            // SAFETY: a descriptor number this process holds, and a flag.
            check(unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) })?;
        }
        Ok(())
    }
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches to the tap `name` of the calling thread's network namespace.
///
/// # Errors
/// I/O errors; `InvalidInput` when the name does not fit an interface.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of an interface"));
    }
    let device: File = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the structure is plain data for which all zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // VNET_HDR lets the guest leave checksums and segmentation to the host.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the ioctl reads and writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(device.into())
}

/// Waits for a descriptor to be readable, in the runtime of the caller.
///
/// # Errors
/// I/O errors.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped, and nobody here replaces
    // the one in there.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Lets a user attach to the tap `name` of the calling thread's network namespace, which is there.
///
/// # Errors
/// As [`open_tap`].
pub(crate) fn give_tap(name: &str, uid: u32) -> io::Result<()> {
    let tap = open_tap(name)?;
    // SAFETY: a descriptor and a plain number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(uid)) })
}

/// The processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux leaves it to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}
