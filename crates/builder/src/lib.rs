//! Makes templates, in two halves that know nothing of each other:
//!
//! - [`rootfs`]: Debian packages and the guest daemon become a disk image. Needs root, `mmdebstrap`
//!   and `e2fsprogs`; the slow part is kept in a cache.
//! - [`snapshot`]: a machine boots once from such an image, is warmed up, and its memory and state
//!   are saved beside the disk. What comes out is a `belljar_sandbox::template::Template`.
#![forbid(unsafe_code)]

pub mod progress;
pub mod rootfs;
pub mod snapshot;
pub mod sources;
pub mod warm;

mod blocking;
mod image;
mod program;
mod tree;

pub use image::ImageError;
pub use program::ProgramError;
pub use progress::{Event, OnProgress};
pub use rootfs::{Rootfs, RootfsConfig, RootfsError};
pub use snapshot::{BuildConfig, BuildError, Deps, build, source_key};
