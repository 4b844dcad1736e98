//! Stores of named, immutable blobs: a directory on this host, or a bucket that speaks S3.
//!
//! Both pass one contract suite (`tests/blob_stores.rs`). Calls block; a [`BlobStore`] may be used from
//! many threads at once, but not from inside an async task.

mod directory;
mod error;
mod key;
mod s3;

use std::ops::Range;

use belljar_domain::UnixMillis;
use bytes::Bytes;

pub use directory::DirStore;
pub use error::{BlobAction, BlobError, BlobFault};
pub use key::{BlobKey, KeyError};
pub use s3::{S3Credentials, S3Options, S3Patience, S3Store, S3StoreError};

/// Largest blob any store takes, in bytes: more than the largest object or manifest.
pub const BLOB_BYTES_MAX: u64 = 256 << 20;
/// Largest blob that [`BlobStore::create`] takes, in bytes: what S3 takes in one request that can
/// carry a condition, with room to spare.
pub const CREATE_BYTES_MAX: u64 = 1 << 20;

/// What is known of a blob without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobStat {
    /// Its size.
    pub bytes: u64,
    /// When it was last written, by the store's own clock; S3 tells it to the second in some answers.
    pub modified: UnixMillis,
}

/// Whether a blob was made by this call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// It was.
    Yes,
    /// It was there already and is unchanged.
    WasThere,
}

/// Named blobs that appear whole or not at all.
///
/// What a call that returned has written is seen by every call that starts later, from any process.
/// Every call is bounded in time, tries again what may be tried again a bounded number of times,
/// and names the blob in its error.
pub trait BlobStore: Send + Sync + 'static {
    /// What to call the store in messages; never holds a secret.
    fn name(&self) -> &str;

    /// Writes a blob of at most [`BLOB_BYTES_MAX`], in place of what was there. Durable when it
    /// returns; readers see the old bytes or the new ones, never a mixture.
    ///
    /// # Errors
    /// [`BlobFault::Full`], [`BlobFault::Denied`], [`BlobFault::Unavailable`]; the blob may be
    /// written all the same after `Unavailable`.
    fn put(&self, key: &BlobKey, body: Bytes) -> Result<(), BlobError>;

    /// Writes a blob of at most [`CREATE_BYTES_MAX`] unless there is one: of several callers, one makes
    /// it. Its time of writing is not touched when it was there.
    ///
    /// # Errors
    /// As [`BlobStore::put`].
    fn create(&self, key: &BlobKey, body: Bytes) -> Result<Created, BlobError>;

    /// A whole blob of at most `max_bytes`.
    ///
    /// # Errors
    /// [`BlobFault::NotFound`]; [`BlobFault::Corrupt`] when it is longer; else as for any call.
    fn get(&self, key: &BlobKey, max_bytes: u64) -> Result<Bytes, BlobError>;

    /// Bytes `range` of a blob.
    ///
    /// # Errors
    /// [`BlobFault::NotFound`]; [`BlobFault::Corrupt`] when the blob ends before the range does;
    /// else as for any call.
    fn get_range(&self, key: &BlobKey, range: Range<u64>) -> Result<Bytes, BlobError>;

    /// Size and time of a blob.
    ///
    /// # Errors
    /// [`BlobFault::NotFound`]; else as for any call.
    fn stat(&self, key: &BlobKey) -> Result<BlobStat, BlobError>;

    /// Every blob whose key begins with the folder `folder` and a slash, in no order.
    ///
    /// # Errors
    /// As for any call.
    fn list(&self, folder: &BlobKey) -> Result<Vec<(BlobKey, BlobStat)>, BlobError>;

    /// Removes a blob. One that is not there is no error.
    ///
    /// # Errors
    /// As for any call.
    fn delete(&self, key: &BlobKey) -> Result<(), BlobError>;
}
