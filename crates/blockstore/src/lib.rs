//! Root disks: a shared read-only base, a private copy-on-write overlay, and the NBD server that
//! hands the pair to a virtual machine.
//!
//! Everything here blocks on file or socket I/O and owns its threads: call it from a blocking
//! thread, never from an async task.
#![forbid(unsafe_code)]

pub mod block_map;
pub mod clone;
pub mod device;
pub mod image;
pub mod nbd;
pub mod overlay;

pub use block_map::BlockState;
pub use clone::{CloneError, CloneMethod, clone_file};
pub use device::{BLOCK_BYTES, BlockDevice};
pub use image::{BaseImage, OpenError, RawImage};
pub use nbd::{BindError, CloseError, NbdServer, SocketOwner};
pub use overlay::{CreateError, DirtyBlock, Overlay, OverlayStats, RemoveError};
