//! An NBD server on a unix socket: how a virtual machine reaches its root disk.
//!
//! Fixed newstyle negotiation, simple replies, one default export. Numbers, names and rules are
//! those of the NBD protocol document (`doc/proto.md` of the NBD project).
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
