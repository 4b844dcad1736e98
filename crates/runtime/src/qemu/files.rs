//! The files a machine's process is handed: opened here, named by their descriptors there.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::machine::{Identity, StartError};
use crate::memory::MemoryFile;

/// A file the machine's process inherits and names by its descriptor, so that its user needs the
/// right to the file alone and not to the folders above it.
pub(super) struct Handed {
    file: File,
}

impl Handed {
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Handed, StartError> {
        match File::open(path) {
            Ok(file) => Ok(Handed { file }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StartError::Missing { what, path: path.to_owned() })
            }
            Err(source) => Err(StartError::Io { step: "open the machine's files", source }),
        }
    }

    /// Memory full of zeros: a file without a name, in `folder`, that nobody ever writes. It has no
    /// blocks. Where the folder is in memory, pages the guest reads and never wrote cost some.
    pub(super) fn zeros(
        folder: &Path,
        size_bytes: u64,
        identity: Option<Identity>,
    ) -> Result<Handed, StartError> {
        nameless(folder)
            .and_then(|file| {
                file.set_len(size_bytes)?;
                give(&file, identity)?;
                Ok(Handed { file })
            })
            .map_err(|source| StartError::Io { step: "make the machine's empty memory", source })
    }

    /// A file in memory for the state of a snapshot, and our own handle of it. The process fills it
    /// on its own account.
    pub(super) fn state(identity: Option<Identity>) -> Result<(Handed, File), StartError> {
        let make = || -> io::Result<(Handed, File)> {
            let file = File::from(memfd_create("machine-state", MemfdFlags::CLOEXEC)?);
            file.set_permissions(Permissions::from_mode(0o600))?;
            give(&file, identity)?;
            let ours = file.try_clone()?;
            Ok((Handed { file }, ours))
        };
        let step = "make the file for the machine's state";
        make().map_err(|source| StartError::Io { step, source })
    }

    /// What the process calls it. Descriptors keep their numbers over fork and exec.
    pub(super) fn name(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    pub(super) fn memory_file(&self) -> Result<MemoryFile, StartError> {
        MemoryFile::of(&self.file)
            .map_err(|source| StartError::Io { step: "look at the machine's memory file", source })
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

/// A new file without a name in `folder`, for its owner alone.
pub(super) fn nameless(folder: &Path) -> io::Result<File> {
    let open = |flags: i32, path: &Path, new: bool| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(new)
            .custom_flags(flags)
            .mode(0o600)
            .open(path)
    };
    match open(libc::O_TMPFILE, folder, false) {
        // Not every file system has them; overlayfs before Linux 6.3 does not.
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {
            let path = folder.join("nameless");
            let file = open(0, &path, true)?;
            fs::remove_file(path)?;
            Ok(file)
        }
        other => other,
    }
}

/// Opens a file to append to, readable by its owner alone.
pub(super) fn open_for(path: &Path, identity: Option<Identity>) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    give(&file, identity)?;
    Ok(file)
}

fn give(file: &File, identity: Option<Identity>) -> io::Result<()> {
    match identity {
        Some(Identity { uid, gid }) => std::os::unix::fs::fchown(file, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// New files that are removed again unless the machine starts.
#[derive(Default)]
pub(super) struct NewFiles {
    paths: Vec<PathBuf>,
}

impl NewFiles {
    pub(super) fn create(
        &mut self,
        path: &Path,
        size_bytes: u64,
        identity: Option<Identity>,
    ) -> Result<Handed, StartError> {
        let io =
            |source| StartError::Io { step: "make the machine's memory and state files", source };
        // Never one that exists: other machines may map it.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        self.paths.push(path.to_owned());
        file.set_len(size_bytes).and_then(|()| give(&file, identity)).map_err(io)?;
        Ok(Handed { file })
    }

    pub(super) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(e) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), error = %e, "a new machine's file stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abandoned_files_are_removed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("memory");
        let create = |keep: bool| -> Result<(), StartError> {
            let mut files = NewFiles::default();
            files.create(&path, 1 << 20, None)?;
            if keep {
                files.keep();
            }
            Ok(())
        };
        create(false).expect("a new file");
        assert!(!path.exists());
        create(true).expect("a new file");
        assert_eq!(fs::metadata(&path).expect("kept").len(), 1 << 20);
        assert!(create(true).is_err(), "an existing file is in use");
    }

    #[test]
    fn empty_memory_has_a_size_and_no_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let zeros = Handed::zeros(folder.path(), 1 << 30, None).expect("a file without blocks");
        assert_eq!(zeros.file.metadata().expect("open").len(), 1 << 30);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        let error = Handed::zeros(Path::new("/nonexistent"), 1, None).err();
        assert!(matches!(error, Some(StartError::Io { .. })), "{error:?}");
    }
}
