//! Root disks: a shared read-only base, a private copy-on-write overlay, and the NBD server that
//! hands the pair to a virtual machine.

pub mod device;

pub use device::{BlockDevice, BLOCK_BYTES};
