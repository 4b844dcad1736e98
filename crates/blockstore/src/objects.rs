//! Images in a blob store: packs of blocks, maps of images over them, and names for images.
//!
//! ```text
//!   refs/NAME ──► manifests/IMAGE ──► objects/ab/OBJECT   (many manifests share objects)
//!                 flat map:           frames of compressed blocks,
//!                 block → object,     an index that vouches for each frame;
//!                 block there         the object's name vouches for the index
//! ```
//!
//! The bytes are written down in `docs/formats.md`. Nothing read from a store is used before it was
//! checked against the name it was asked for by.

mod bytes_of;
mod dedup;
mod frame;
mod index;
mod layout;
mod manifest;
mod pack;
mod read_error;
mod reader;
mod refs;
mod runs;
mod writer;

pub(crate) use dedup::find_object;
pub use dedup::{BlockIndex, BlockIndexStats};
pub use frame::{Codec, FRAME_BLOCKS_MAX};
pub(crate) use frame::{decode as frame_decode, is_whole as is_frame_whole};
pub(crate) use index::OBJECT_MAGIC;
pub use index::{FrameEntry, OBJECT_BLOCKS_MAX, ObjectIndex};
pub use layout::{ImageId, InvalidName, ObjectId, RefName};
pub(crate) use layout::{
    condemned_folder, condemned_image, condemned_object, hash_of, image_of_key, manifests_folder,
    object_of_key, objects_folder, refs_folder,
};
pub use manifest::{IMAGE_BYTES_MAX, ImageManifest, MANIFEST_BYTES_MAX, ObjectUse};
pub use pack::{PackOptions, Packed, Packer};
pub use read_error::ReadError;
pub use reader::{ImageReader, Materialised};
pub use refs::{PublishError, RefError, delete_ref, publish, read_manifest, refs, resolve};
pub use runs::Run;
pub use writer::{ImageWriter, WriteError, WriteStats, Written};

/// What is wrong with bytes that came from a store: which thing, and what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("use {thing}: it is damaged: {what}")]
pub struct Corrupt {
    /// Which object or image, such as `object ab12…` or `image cd34…`.
    pub thing: String,
    /// What is wrong.
    pub what: String,
}
