//! The machine monitor's side: it tells its regions, and hands its userfaultfd over.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::sys::GuardedMemory;

/// One region over all of `memory`, as Firecracker writes it.
pub(crate) fn regions(memory: &GuardedMemory, page_bytes: u64) -> String {
    let (address, bytes) = (memory.address(), memory.bytes());
    format!(
        r#"[{{"base_host_virt_addr":{address},"size":{bytes},"offset":0,"page_size":{page_bytes},"page_size_kib":{page_bytes}}}]"#
    )
}

/// Connects and sends `message` with `descriptors`. The connection stays, as a monitor's does.
pub(crate) fn send(
    socket: &Path,
    message: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "room for them");
    }
    sendmsg(&stream, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(stream)
}

/// Hands all of `memory` over.
pub(crate) fn hand_over(socket: &Path, memory: &GuardedMemory) -> io::Result<UnixStream> {
    send(socket, regions(memory, 4096).as_bytes(), &[memory.userfault()])
}
