//! One server a data folder: an advisory lock that dies with its holder.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// Held for as long as this process uses the data folder.
#[derive(Debug)]
pub(crate) struct DataLock {
    _file: File,
}

/// Takes the lock, or says who holds it.
pub(crate) fn take(path: &Path) -> Result<DataLock> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("failed to open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        file.read_to_string(&mut holder).context("failed to read who holds the data folder")?;
        bail!(
            "the data folder is in use by process {}; stop it, or name another with --data-dir",
            holder.trim()
        );
    }
    file.set_len(0).and_then(|()| file.rewind()).context("failed to clear the lock file")?;
    write!(file, "{}", std::process::id()).context("failed to write the lock file")?;
    Ok(DataLock { _file: file })
}
