//! The first and only message of a machine monitor: its regions as JSON, and with it the userfaultfd.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::error::HandshakeError;
use super::halt::Halt;
use super::layout::Layout;
use crate::sys::userfault::Userfault;

/// A monitor that has connected sends at once: it has nothing left to do before.
const DEADLINE: Duration = Duration::from_secs(10);
/// Regions need some 200 bytes each.
const MESSAGE_MAX_BYTES: usize = 64 << 10;
/// Room for more than the one that belongs there, so that a wrong number is seen. The kernel closes the rest.
const DESCRIPTORS_MAX: usize = 4;
/// What `/proc` says of the right descriptor.
const USERFAULT: &str = "anon_inode:[userfaultfd]";

/// How a handshake ended.
pub(super) enum Greeting {
    /// The memory is ours to fill.
    Ready(Userfault, Layout),
    /// It was called off.
    Halted,
}

/// Receives the message. A descriptor that came is put into `kept` first of all: as long as it is open
/// the machine cannot see memory that nobody has filled.
pub(super) fn receive(
    stream: &UnixStream,
    memory_bytes: u64,
    halt: &Halt,
    kept: &dyn Fn(Arc<OwnedFd>),
) -> Result<Greeting, HandshakeError> {
    let deadline = Instant::now() + DEADLINE;
    let mut message = Vec::new();
    let mut descriptors: Vec<Arc<OwnedFd>> = Vec::new();
    loop {
        if !wait(stream, halt, deadline, message.len())? {
            return Ok(Greeting::Halted);
        }
        let came = receive_part(stream, &mut message).map_err(HandshakeError::Io)?;
        let Some(came) = came else { continue };
        for fd in came.descriptors {
            let fd = Arc::new(fd);
            kept(Arc::clone(&fd));
            descriptors.push(fd);
        }
        if came.bytes == 0 {
            return Err(HandshakeError::HungUp { received: message.len() });
        }
        if message.len() > MESSAGE_MAX_BYTES {
            return Err(HandshakeError::TooLong { limit_bytes: MESSAGE_MAX_BYTES });
        }
        if is_whole(&message) {
            break;
        }
    }
    let [fd] = &descriptors[..] else {
        return Err(HandshakeError::Descriptors(descriptors.len()));
    };
    check_kind(fd)?;
    let layout = Layout::parse(&message, memory_bytes).map_err(HandshakeError::Layout)?;
    Ok(Greeting::Ready(Userfault::new(Arc::clone(fd)), layout))
}

/// Whether the message can be judged, or more must come. Nothing marks its end but its own form.
fn is_whole(message: &[u8]) -> bool {
    let text = message.trim_ascii();
    match (text.first(), text.last()) {
        (None, _) => false,
        // Looked into at the ends of lists only: one that comes byte by byte is not read each time.
        (Some(b'['), Some(b']')) => serde_json::from_slice::<serde::de::IgnoredAny>(text)
            .map_or_else(|e| !e.is_eof(), |_| true),
        (Some(b'['), _) => false,
        _ => true,
    }
}

/// `false` when it was called off.
fn wait(
    stream: &UnixStream,
    halt: &Halt,
    deadline: Instant,
    received: usize,
) -> Result<bool, HandshakeError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let waited_ms = u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX);
            return Err(HandshakeError::TooLate { received, waited_ms });
        }
        let limit =
            Timespec::try_from(left).map_err(|e| HandshakeError::Io(io::Error::other(e)))?;
        let mut watched = [PollFd::new(halt, PollFlags::IN), PollFd::new(stream, PollFlags::IN)];
        match poll(&mut watched, Some(&limit)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) if !watched[0].revents().is_empty() => return Ok(false),
            Ok(_) => return Ok(true),
            Err(e) => return Err(HandshakeError::Io(e.into())),
        }
    }
}

struct Came {
    bytes: usize,
    descriptors: Vec<OwnedFd>,
}

/// Adds what is there to `message`. `None` when nothing is.
fn receive_part(stream: &UnixStream, message: &mut Vec<u8>) -> io::Result<Option<Came>> {
    let mut part = vec![0_u8; MESSAGE_MAX_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = match recvmsg(stream, &mut [IoSliceMut::new(&mut part)], &mut control, flags) {
        Ok(received) => received,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let mut descriptors = Vec::new();
    for each in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = each {
            descriptors.extend(fds);
        }
    }
    message.extend(&part[..received.bytes]);
    Ok(Some(Came { bytes: received.bytes, descriptors }))
}

/// Refuses anything but a userfaultfd: calls on a file of the sender's choice could do anything. And makes
/// sure that it does not block.
fn check_kind(fd: &OwnedFd) -> Result<(), HandshakeError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let found = link.map_err(HandshakeError::Io)?;
    if found.as_os_str() != USERFAULT {
        return Err(HandshakeError::NotAUserfault { found: found.display().to_string() });
    }
    rustix::io::ioctl_fionbio(fd.as_fd(), true).map_err(|e| HandshakeError::Io(e.into()))
}
