//! An NBD server on a unix socket: how a virtual machine reaches its root disk.
//!
//! Fixed newstyle negotiation, simple replies, one default export. Numbers, names and rules are
//! those of the NBD protocol document (`doc/proto.md` of the NBD project).
//!
//! What is offered, and what is not:
//!
//! - FLUSH and FUA call [`BlockDevice::flush`](crate::BlockDevice::flush), and what that promises is
//!   the disk's matter: a raw file is synced, an overlay has nothing to promise until it is sealed.
//! - WRITE_ZEROES may leave a hole unless the client says NO_HOLE, and TRIM gives whole blocks back.
//! - No FAST_ZERO: its only use is to ask whether clearing a whole disk ahead of a copy is cheaper than
//!   writing it, and a guest never asks.
//! - No structured replies, so no BLOCK_STATUS: QEMU asks for it when it copies images, never for
//!   a guest's I/O, and a copy of an image is made from its layers, not through the socket.
//!
//! - `protocol`: the bytes, parsed and made.
//! - `handshake`: options until transmission starts.
//! - `transmission`: requests until the client leaves.
//! - `server`: the socket, its threads and their end.
//!
//! Each connection is one thread that reads a request, does the I/O and writes the reply, all
//! blocking. Nearly every request is a memory copy to or from the page cache, so handing it to a
//! pool costs more than doing it, and there is no reordering to reason about. Against `qemu-nbd`,
//! which is asynchronous, on the same raw file this is at least as fast (`benches/against_qemu_nbd.rs`
//! prints the ratio).

mod handshake;
mod protocol;
mod server;
mod transmission;

pub use server::{BindError, CloseError, NbdServer, SocketOwner};
