//! Blobs as files of one directory.
//!
//! A blob is written to a temporary file beside the others, synced, and renamed to its name, and the folder is
//! synced: after a crash there is the old blob or the new one. Temporary files a crash has left are removed
//! when the store is opened, once they are a day old; another process may still be writing younger ones.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::UnixMillis;
use bytes::Bytes;

use super::error::{BlobAction, BlobError, BlobFault};
use super::{BLOB_BYTES_MAX, BlobKey, BlobStat, BlobStore, CREATE_BYTES_MAX, Created};

/// Where unfinished blobs are. No key begins with a dot.
const UNFINISHED: &str = ".unfinished";
/// How long an unfinished blob may be somebody's: longer than any write takes.
const UNFINISHED_AGE: Duration = Duration::from_secs(24 * 3600);

/// A directory of blobs.
#[derive(Debug)]
pub struct DirStore {
    root: PathBuf,
    name: String,
}

impl DirStore {
    /// Opens the store in `root`, which is made (mode 0700) if it is not there.
    ///
    /// # Errors
    /// When the folder cannot be made or written.
    pub fn open(root: &Path) -> Result<DirStore, BlobError> {
        let store = DirStore { root: root.to_owned(), name: root.display().to_string() };
        let failed = |e: io::Error| store.error(BlobAction::Write, UNFINISHED, e.into());
        let unfinished = root.join(UNFINISHED);
        make_folders(&unfinished).map_err(failed)?;
        let now = clock::now();
        for entry in fs::read_dir(&unfinished).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Gone meanwhile: its writer has finished it.
            let Ok(metadata) = entry.metadata() else { continue };
            if now.since(modified(&metadata)) > UNFINISHED_AGE {
                let removed = fs::remove_file(entry.path());
                tracing::debug!(file = %entry.path().display(), ?removed, "an old unfinished blob");
            }
        }
        Ok(store)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, key: &BlobKey) -> PathBuf {
        self.root.join(key.as_str())
    }

    fn error(&self, action: BlobAction, key: &str, fault: BlobFault) -> BlobError {
        BlobError { action, key: key.to_owned(), store: self.name.clone(), fault }
    }

    fn check_length(&self, key: &BlobKey, body: &Bytes, max_bytes: u64) -> Result<(), BlobError> {
        let bytes = body.len() as u64;
        if bytes > max_bytes {
            let fault = BlobFault::TooLong { bytes, max_bytes };
            return Err(self.error(BlobAction::Write, key.as_str(), fault));
        }
        Ok(())
    }

    /// Writes the whole body to a file nobody else knows, durably.
    fn unfinished(&self, body: &[u8]) -> io::Result<Unfinished> {
        let name = format!("{:032x}", rand::random::<u128>());
        let path = self.root.join(UNFINISHED).join(name);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        let unfinished = Unfinished { path };
        file.write_all(body)?;
        file.sync_all()?;
        Ok(unfinished)
    }

    fn write(&self, key: &BlobKey, body: &[u8], replace: bool) -> io::Result<Created> {
        let target = self.path(key);
        let folder = target.parent().unwrap_or(&self.root);
        make_folders(folder)?;
        let unfinished = self.unfinished(body)?;
        if replace {
            fs::rename(&unfinished.path, &target)?;
        } else {
            // A second name for the file: unlike a rename this fails where there is one already.
            match fs::hard_link(&unfinished.path, &target) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(Created::WasThere),
                other => other?,
            }
        }
        File::open(folder)?.sync_all()?;
        Ok(Created::Yes)
    }

    fn walk(
        &self,
        folder: &Path,
        key: &str,
        found: &mut Vec<(BlobKey, BlobStat)>,
    ) -> io::Result<()> {
        let entries = match fs::read_dir(folder) {
            // A folder nobody has written to yet is empty.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = format!("{key}/{}", name.to_string_lossy());
            let metadata = match entry.metadata() {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            if metadata.is_dir() {
                self.walk(&entry.path(), &name, found)?;
            } else if let Ok(key) = BlobKey::new(name) {
                // Files that nobody could have put here are not blobs.
                found.push((key, stat_of(&metadata)));
            }
        }
        Ok(())
    }
}

impl BlobStore for DirStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn put(&self, key: &BlobKey, body: Bytes) -> Result<(), BlobError> {
        self.check_length(key, &body, BLOB_BYTES_MAX)?;
        let failed = |e: io::Error| self.error(BlobAction::Write, key.as_str(), e.into());
        self.write(key, &body, true).map(|_made| ()).map_err(failed)
    }

    fn create(&self, key: &BlobKey, body: Bytes) -> Result<Created, BlobError> {
        self.check_length(key, &body, CREATE_BYTES_MAX)?;
        let failed = |e: io::Error| self.error(BlobAction::Write, key.as_str(), e.into());
        self.write(key, &body, false).map_err(failed)
    }

    fn get(&self, key: &BlobKey, max_bytes: u64) -> Result<Bytes, BlobError> {
        let failed = |e: io::Error| self.error(BlobAction::Read, key.as_str(), e.into());
        let file = File::open(self.path(key)).map_err(failed)?;
        let mut body = Vec::new();
        file.take(max_bytes.saturating_add(1)).read_to_end(&mut body).map_err(failed)?;
        if body.len() as u64 > max_bytes {
            let what = format!("it is longer than the {max_bytes} bytes it may have");
            let fault = BlobFault::Corrupt { what };
            return Err(self.error(BlobAction::Read, key.as_str(), fault));
        }
        Ok(body.into())
    }

    fn get_range(&self, key: &BlobKey, range: Range<u64>) -> Result<Bytes, BlobError> {
        let failed = |fault| self.error(BlobAction::Read, key.as_str(), fault);
        let bytes = range.end.saturating_sub(range.start);
        if bytes > BLOB_BYTES_MAX {
            return Err(failed(BlobFault::TooLong { bytes, max_bytes: BLOB_BYTES_MAX }));
        }
        let file = File::open(self.path(key)).map_err(|e| failed(e.into()))?;
        let length = file.metadata().map_err(|e| failed(e.into()))?.len();
        if range.end > length {
            let what = format!("it has {length} bytes, and should have {} or more", range.end);
            return Err(failed(BlobFault::Corrupt { what }));
        }
        let mut body = vec![0; crate::device::index(bytes)];
        file.read_exact_at(&mut body, range.start).map_err(|e| failed(e.into()))?;
        Ok(body.into())
    }

    fn stat(&self, key: &BlobKey) -> Result<BlobStat, BlobError> {
        let failed = |e: io::Error| self.error(BlobAction::Stat, key.as_str(), e.into());
        let metadata = fs::metadata(self.path(key)).map_err(failed)?;
        if metadata.is_dir() {
            return Err(self.error(BlobAction::Stat, key.as_str(), BlobFault::NotFound));
        }
        Ok(stat_of(&metadata))
    }

    fn list(&self, folder: &BlobKey) -> Result<Vec<(BlobKey, BlobStat)>, BlobError> {
        let mut found = Vec::new();
        self.walk(&self.path(folder), folder.as_str(), &mut found)
            .map_err(|e| self.error(BlobAction::List, folder.as_str(), e.into()))?;
        Ok(found)
    }

    fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        match fs::remove_file(self.path(key)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(self.error(BlobAction::Delete, key.as_str(), e.into()))
            }
            _ => Ok(()),
        }
    }
}

/// Removes its file when it was not renamed.
struct Unfinished {
    path: PathBuf,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Not there after a rename; what stays for another reason is removed by a later opening.
        let _removed = fs::remove_file(&self.path);
    }
}

/// Makes a folder and those above it, so that their names outlive a crash as what is put into them does.
fn make_folders(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_folders(parent)?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        // Another writer was first; it syncs too, but perhaps not yet.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    File::open(parent)?.sync_all()
}

fn modified(metadata: &fs::Metadata) -> UnixMillis {
    // Linux file systems all keep it. A blob without one counts as new, which keeps it.
    metadata.modified().map_or_else(|_| clock::now(), UnixMillis::from)
}

fn stat_of(metadata: &fs::Metadata) -> BlobStat {
    BlobStat { bytes: metadata.len(), modified: modified(metadata) }
}
