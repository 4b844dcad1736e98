//! Disks and memories of sandboxes: images in layers, a private copy-on-write overlay over one, and
//! the NBD server that hands a disk to a virtual machine. And images that are not here: kept in a blob
//! store as packs of unique compressed blocks, read through a cache that checks everything, collected
//! when nothing names them.
//!
//! Everything here blocks on file or socket I/O and owns its threads: call it from a blocking
//! thread, never from an async task.
#![forbid(unsafe_code)]

pub mod blobs;
pub mod block_map;
pub mod cache;
pub mod clone;
pub mod device;
pub mod gc;
pub mod image;
pub mod layered;
pub mod layers;
pub mod memory;
pub mod nbd;
pub mod objects;
pub mod overlay;
pub mod verify;

pub use blobs::{BlobError, BlobStore, DirStore, S3Store};
pub use block_map::BlockState;
pub use cache::{CacheLimits, ChunkCache};
pub use clone::{CloneError, CloneMethod, clone_file};
pub use device::{BLOCK_BYTES, BlockDevice};
pub use image::{OpenError, RawImage};
pub use layered::{
    FetchImageError, LayeredImage, LoadError, MapProblem, MaterialiseError, PageContent, PageRun,
    SaveError,
};
pub use layers::{BadLayerName, Layer, LayerName, LayerStore, OpenStoreError, SweepError, Swept};
pub use memory::{MemoryLayerWriter, MemoryWriteError};
pub use nbd::{BindError, CloseError, NbdServer, SocketOwner};
pub use objects::{BlockIndex, ImageId, ImageManifest, ImageReader, ImageWriter, RefName};
pub use overlay::{CreateError, Overlay, OverlayStats, RemoveError, SealError};
