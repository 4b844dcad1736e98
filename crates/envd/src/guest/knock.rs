//! The control channel of machines without a virtio-serial port: a socket device.
//!
//! The daemon knocks at the host and waits to be called back, so that it pushes its readiness while
//! nobody but root can be called in its place. Restoring a machine ends its connections, and the
//! daemon knocks again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use belljar_wire::guest::{CONTROL_PORT, KNOCK_PORT};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys;

/// Until the host is knocked for again.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Where the kernel shows the devices of drivers of the paravirtual bus.
pub(super) const DRIVERS: &str = "/sys/bus/virtio/drivers";

/// Whether the machine has a socket device and no serial one.
pub(super) fn is_only_way(drivers: &Path) -> bool {
    let has_device = |driver: &str| {
        let entries = std::fs::read_dir(drivers.join(driver)).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).any(|name| {
            let number = name.to_str().and_then(|name| name.strip_prefix("virtio"));
            number.is_some_and(|number| number.parse::<u32>().is_ok())
        })
    };
    has_device("vmw_vsock_virtio_transport") && !has_device("virtio_console")
}

/// Where the host calls back.
pub(super) struct Door {
    listener: OwnedFd,
}

impl Door {
    /// # Errors
    /// I/O errors of making the socket.
    pub(super) fn open() -> io::Result<Door> {
        Ok(Door { listener: sys::listen_for_host(CONTROL_PORT)? })
    }

    /// Knocks until the host has called back.
    ///
    /// # Errors
    /// I/O errors of the socket, for good.
    pub(super) fn call_in(&self) -> io::Result<OwnedFd> {
        loop {
            // A host that is not there yet is knocked for again.
            let _refused = sys::knock_at_host(KNOCK_PORT);
            let mut watched = [PollFd::new(&self.listener, PollFlags::IN)];
            match poll(&mut watched, Some(&PATIENCE)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
            match sys::accept_host(&self.listener) {
                Ok(connection) => return Ok(connection),
                Err(e) if is_of_one_caller(&e) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Whether the error is one caller's and the next may do.
fn is_of_one_caller(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_device_is_used_where_it_is_the_only_one() {
        let drivers = tempfile::tempdir().expect("a directory");
        let device = |driver: &str, name: &str| {
            std::fs::create_dir_all(drivers.path().join(driver).join(name)).expect("made");
        };
        assert!(!is_only_way(drivers.path()));
        device("vmw_vsock_virtio_transport", "bind");
        assert!(!is_only_way(drivers.path()));
        device("vmw_vsock_virtio_transport", "virtio3");
        device("virtio_console", "uevent");
        assert!(is_only_way(drivers.path()));
        device("virtio_console", "virtio0");
        assert!(!is_only_way(drivers.path()));
    }
}
