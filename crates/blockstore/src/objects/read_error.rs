//! Why nothing could be read of an image or an object.

use std::io;
use std::sync::Arc;

use belljar_domain::Kind;

use crate::blobs::{BlobError, BlobFault};

use super::Corrupt;

/// Why a read failed. No byte of what was asked for has been served. Cheap to clone: several
/// readers may wait for one read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The store has something under that name, and it is not what the name stands for.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The store does not have it.
    #[error("read {thing}: {store} does not have it")]
    Missing {
        /// Which object or image.
        thing: String,
        /// Which store.
        store: String,
    },
    /// The store could not be asked.
    #[error("read {thing}")]
    Store {
        /// Which object or image.
        thing: String,
        /// Why.
        #[source]
        source: BlobError,
    },
    /// The range does not lie inside the image.
    #[error("read {bytes} bytes at {offset} of an image of {size_bytes} bytes")]
    OutOfRange {
        /// Where.
        offset: u64,
        /// How much.
        bytes: u64,
        /// What there is.
        size_bytes: u64,
    },
    /// The file an image was to be written to.
    #[error("write image {image} to a file")]
    File {
        /// Which image.
        image: String,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
}

impl ReadError {
    /// The store's error about `thing`.
    pub(crate) fn of(thing: String, source: BlobError) -> ReadError {
        match source.fault {
            BlobFault::NotFound => ReadError::Missing { thing, store: source.store },
            BlobFault::Corrupt { what } => ReadError::Corrupt(Corrupt { thing, what }),
            _ => ReadError::Store { thing, source },
        }
    }

    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            ReadError::Corrupt(_) | ReadError::Missing { .. } | ReadError::File { .. } => {
                Kind::Internal
            }
            ReadError::Store { source, .. } => source.kind(),
            ReadError::OutOfRange { .. } => Kind::Invalid,
        }
    }
}

impl From<ReadError> for io::Error {
    /// For disks that read from images: what is damaged is `InvalidData`, a store that is away
    /// is `HostUnreachable`.
    fn from(e: ReadError) -> io::Error {
        let kind = match e.kind() {
            Kind::Unavailable | Kind::Timeout => io::ErrorKind::HostUnreachable,
            Kind::Invalid => io::ErrorKind::InvalidInput,
            Kind::Forbidden => io::ErrorKind::PermissionDenied,
            _ => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, e)
    }
}
