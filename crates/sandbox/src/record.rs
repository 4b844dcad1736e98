//! Folders with a record: what templates and snapshots have in common on disk.
//!
//! Such a folder grows as a draft under a hidden name beside the finished ones, gets its record
//! last, and is renamed into place when it is whole. A record names its format first of all.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use belljar_domain::Tier;
use serde::Deserialize;

/// Why a template or a snapshot could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A file or folder could not be read or written.
    #[error("{step} {}", path.display())]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record is no record.
    #[error("parse {}", path.display())]
    Malformed {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The record was written by a newer program.
    #[error("read {}: its format is {found}, this program reads {reads}", path.display())]
    Format {
        /// The record.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format this program reads.
        reads: u32,
    },
    /// The record says something that cannot be.
    #[error("accept {}: {reason}", path.display())]
    Invalid {
        /// The record, or the file that does not fit it.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// What every format has, so that a newer one is named and not called malformed.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// Refuses a record of another format by its number, before anything else of it is looked at.
pub(crate) fn check_format(path: &Path, bytes: &[u8], reads: u32) -> Result<(), RecordError> {
    let any: AnyFormat = serde_json::from_slice(bytes)
        .map_err(|source| RecordError::Malformed { path: path.to_owned(), source })?;
    if any.format == reads {
        return Ok(());
    }
    Err(RecordError::Format { path: path.to_owned(), found: any.format, reads })
}

/// Reads a record of at most `max_bytes`.
pub(crate) fn read_record(path: &Path, max_bytes: u64) -> Result<Vec<u8>, RecordError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(max_bytes + 1).read_to_end(&mut bytes))
        .map_err(io_error("read", path))?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len <= max_bytes) {
        return Ok(bytes);
    }
    let reason = format!("it is longer than {max_bytes} bytes");
    Err(RecordError::Invalid { path: path.to_owned(), reason })
}

/// Writes a record that must not be there yet. Only this user may read it: a snapshot's has what
/// callers gave with their sandbox.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let mut options = OpenOptions::new();
    options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(io_error("write", path))
}

/// The tier of this word.
pub(crate) fn tier(word: &str) -> Option<Tier> {
    [Tier::Microvm, Tier::Emulated, Tier::Gvisor, Tier::Fake]
        .into_iter()
        .find(|tier| tier.as_str() == word)
}

pub(crate) fn regular_file_bytes(path: &Path) -> Result<u64, RecordError> {
    let metadata = std::fs::symlink_metadata(path).map_err(io_error("find", path))?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    let reason = "it is not a regular file".to_owned();
    Err(RecordError::Invalid { path: path.to_owned(), reason })
}

pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>, RecordError> {
    std::fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
        .map_err(io_error("list", dir))
}

pub(crate) fn name_of(path: &Path) -> Cow<'_, str> {
    path.file_name().map(std::ffi::OsStr::to_string_lossy).unwrap_or_default()
}

fn sync(path: &Path) -> Result<(), RecordError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io_error("sync", path))
}

pub(crate) fn io_error(
    step: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> RecordError + use<> {
    let path = path.to_owned();
    move |source| RecordError::Io { step, path, source }
}

/// Makes the draft folder `dir` visible as `target`. All that is in it is on stable storage before, and
/// its name after.
pub(crate) fn put_in_place(dir: &Path, target: &Path) -> Result<(), RecordError> {
    for file in entries(dir)? {
        sync(&file)?;
    }
    sync(dir)?;
    std::fs::rename(dir, target).map_err(io_error("make", target))?;
    target.parent().map_or(Ok(()), sync)
}
