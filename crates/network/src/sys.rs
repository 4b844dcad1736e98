//! Attaching to a tap device: the one thing here that only an `ioctl` can do.

// JUSTIFICATION: the kernel makes taps through `TUNSETIFF` on `/dev/net/tun` and refuses them on
// netlink; neither rustix nor nix wraps the two calls. Numbers from `linux/if_tun.h`.
#![expect(unsafe_code, reason = "TUNSETIFF and TUNSETPERSIST have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// The calls as the kernel's header declares them.
mod call {
    use libc::{c_int, ifreq};

    nix::ioctl_write_ptr_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<c_int>()),
        ifreq
    );
    nix::ioctl_write_int_bad!(
        tunsetpersist,
        nix::request_code_write!(b'T', 203, size_of::<c_int>())
    );
}

/// Attaches to the single-queue tap `name` in the calling thread's network namespace, making it
/// if it is not there. Frames carry no extra header.
///
/// The descriptor stays valid when the thread, or a process that inherits it, is in another
/// namespace. A tap that is not persistent goes away with its descriptor.
///
/// # Errors
/// The system's: no `/dev/net/tun`, no privilege (`CAP_NET_ADMIN`), or the tap is attached already
/// (`EBUSY`). `InvalidInput` when `name` is empty or longer than 15 bytes.
pub fn attach_tap(name: &str) -> io::Result<OwnedFd> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if name.is_empty() || name.len() >= ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a tap's name has 1 to 15 bytes"));
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI)
        .expect("both flags are below 0x8000");
    let request =
        libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the descriptor is open; the kernel reads one `ifreq` from a pointer that is valid
    // for the whole call, and looks at its name and flags only, which are initialised.
    unsafe { call::tunsetiff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}

/// Keeps the tap behind `tap` when its descriptor is closed; it ends with its namespace.
pub(crate) fn persist_tap(tap: &OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the argument is a plain number, not a pointer.
    unsafe { call::tunsetpersist(tap.as_raw_fd(), 1) }?;
    Ok(())
}
