//! Disks and memories of sandboxes: images in layers, a private copy-on-write overlay over one, and
//! the NBD server that hands a disk to a virtual machine.
//!
//! Everything here blocks on file or socket I/O and owns its threads: call it from a blocking
//! thread, never from an async task.
#![forbid(unsafe_code)]

pub mod block_map;
pub mod clone;
pub mod device;
pub mod image;
pub mod layered;
pub mod layers;
pub mod memory;
pub mod nbd;
pub mod overlay;

pub use block_map::BlockState;
pub use clone::{CloneError, CloneMethod, clone_file};
pub use device::{BLOCK_BYTES, BlockDevice};
pub use image::{OpenError, RawImage};
pub use layered::{
    LayeredImage, LoadError, MapProblem, MaterialiseError, PageContent, PageRun, SaveError,
};
pub use layers::{BadLayerName, Layer, LayerName, LayerStore, OpenStoreError, SweepError, Swept};
pub use memory::{MemoryLayerWriter, MemoryWriteError};
pub use nbd::{BindError, CloseError, NbdServer, SocketOwner};
pub use overlay::{CreateError, Overlay, OverlayStats, RemoveError, SealError};
