//! What can go wrong with a blob, in words that every store shares.

use std::error::Error;
use std::io;
use std::sync::Arc;

use belljar_domain::Kind;

/// What was to be done with a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobAction {
    /// Read it, or a part of it.
    Read,
    /// Write it.
    Write,
    /// Ask for its size and time.
    Stat,
    /// List blobs under it.
    List,
    /// Remove it.
    Delete,
}

impl std::fmt::Display for BlobAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BlobAction::Read => "read",
            BlobAction::Write => "write",
            BlobAction::Stat => "look at",
            BlobAction::List => "list",
            BlobAction::Delete => "delete",
        })
    }
}

/// Why it could not be done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BlobFault {
    /// There is no such blob.
    #[error("it is not there")]
    NotFound,
    /// The store did not answer, or said that it cannot now: try again later.
    #[error("the store cannot be used now")]
    Unavailable(#[source] Arc<dyn Error + Send + Sync>),
    /// The blob is not what it must be.
    #[error("it is damaged: {what}")]
    Corrupt {
        /// What is wrong with it.
        what: String,
    },
    /// There is no room: free some, or enlarge the store.
    #[error("the store is full")]
    Full(#[source] Arc<dyn Error + Send + Sync>),
    /// The store does not let this process: look at its permissions or credentials.
    #[error("the store does not allow it")]
    Denied(#[source] Arc<dyn Error + Send + Sync>),
    /// The caller's mistake: a body longer than the store takes.
    #[error("{bytes} bytes are more than the {max_bytes} it may have")]
    TooLong {
        /// What it has.
        bytes: u64,
        /// What it may have.
        max_bytes: u64,
    },
}

/// Why something could not be done with a blob. Cheap to clone: several readers may wait for one read.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{action} {key} in {store}")]
pub struct BlobError {
    /// What was to be done.
    pub action: BlobAction,
    /// The blob, or the folder that was listed.
    pub key: String,
    /// [`BlobStore::name`](super::BlobStore::name).
    pub store: String,
    /// Why not.
    #[source]
    pub fault: BlobFault,
}

impl BlobError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match &self.fault {
            BlobFault::NotFound => Kind::NotFound,
            BlobFault::Unavailable(_) => Kind::Unavailable,
            BlobFault::Corrupt { .. } | BlobFault::TooLong { .. } => Kind::Internal,
            BlobFault::Full(_) => Kind::Quota,
            BlobFault::Denied(_) => Kind::Forbidden,
        }
    }

    /// Whether the blob is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self.fault, BlobFault::NotFound)
    }
}

impl From<io::Error> for BlobFault {
    fn from(e: io::Error) -> BlobFault {
        match e.kind() {
            io::ErrorKind::NotFound => BlobFault::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                BlobFault::Full(Arc::new(e))
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                BlobFault::Denied(Arc::new(e))
            }
            _ => BlobFault::Unavailable(Arc::new(e)),
        }
    }
}
