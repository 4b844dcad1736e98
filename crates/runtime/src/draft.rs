//! The files of a snapshot while they are written: all of them, or none.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::machine::SaveError;
use crate::saved::{Description, SavedFiles, Shape, StateKind};

/// Longest state that is taken, in bytes. One of a machine with every device has some 60 KB; more
/// than this is a process that fills the disk.
const STATE_MAX_BYTES: u64 = 64 << 20;

/// Files that are removed again unless they are kept. Blocks on the disk.
#[derive(Debug)]
pub(crate) struct Draft {
    files: SavedFiles,
    state: File,
    /// What to remove.
    written: Vec<PathBuf>,
}

impl Draft {
    /// Takes the places of the files, before anything that costs time.
    ///
    /// # Errors
    /// [`SaveError::Io`], also when one of the files is there already.
    pub(crate) fn begin(folder: &Path) -> Result<Draft, SaveError> {
        let files = SavedFiles::within(folder);
        if files.description.exists() {
            let source = io::ErrorKind::AlreadyExists.into();
            return Err(SaveError::Io { path: files.description, source });
        }
        let state = create(&files.state)?;
        let written = vec![files.state.clone()];
        Ok(Draft { files, state, written })
    }

    /// Writes the state, and the description last.
    ///
    /// # Errors
    /// [`SaveError::Io`] naming the file.
    pub(crate) fn finish(&mut self, state: impl Read, shape: &Shape) -> Result<(), SaveError> {
        let state_bytes = copy_bounded(state, &mut self.state)
            .and_then(|bytes| settle(&self.state).map(|()| bytes))
            .map_err(|source| SaveError::Io { path: self.files.state.clone(), source })?;
        let mut file = create(&self.files.description)?;
        self.written.push(self.files.description.clone());
        let description = Description::new(shape, StateKind::Devices, state_bytes);
        serde_json::to_vec_pretty(&description)
            .map_err(io::Error::from)
            .and_then(|text| file.write_all(&text))
            .and_then(|()| settle(&file))
            .map_err(|source| SaveError::Io { path: self.files.description.clone(), source })?;
        Ok(())
    }

    /// Leaves the files where they are.
    pub(crate) fn keep(mut self) {
        self.written.clear();
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        for path in &self.written {
            if let Err(e) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), error = %e, "a file of a snapshot stays");
            }
        }
    }
}

fn create(path: &Path) -> Result<File, SaveError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| SaveError::Io { path: path.to_owned(), source })
}

fn copy_bounded(from: impl Read, to: &mut File) -> io::Result<u64> {
    let copied = io::copy(&mut from.take(STATE_MAX_BYTES + 1), to)?;
    if copied > STATE_MAX_BYTES {
        let what = format!("the state is longer than {STATE_MAX_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
    }
    Ok(copied)
}

fn settle(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o444))
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_domain::{MiB, Vcpus};

    use crate::pages::{SavedMachine, SavedMemory};
    use crate::saved;

    fn shape() -> Shape {
        Shape { fingerprint: "driver 1".into(), vcpus: Vcpus(1), memory: MiB(1) }
    }

    fn left(folder: &Path) -> usize {
        fs::read_dir(folder).expect("a folder").count()
    }

    #[test]
    fn a_draft_is_all_or_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let draft = Draft::begin(folder.path()).expect("an empty folder");
        assert_eq!(left(folder.path()), 1);
        drop(draft);
        assert_eq!(left(folder.path()), 0);

        let mut endless = Draft::begin(folder.path()).expect("an empty folder");
        let error = endless.finish(io::repeat(7), &shape()).expect_err("too much");
        drop(endless);
        assert!(matches!(error, SaveError::Io { ref path, .. } if path.ends_with("state")));
        assert_eq!(left(folder.path()), 0);

        for keep in [false, true] {
            let mut draft = Draft::begin(folder.path()).expect("an empty folder");
            draft.finish(&b"state"[..], &shape()).expect("room on the disk");
            if keep {
                draft.keep();
            }
        }
        saved::sync_saved(folder.path()).expect("whole");
        let memory = SavedMemory { base: None, pages: None };
        let machine = SavedMachine { folder: folder.path().to_owned(), memory };
        let checked = saved::check(&machine, &shape()).expect("the same driver and shape");
        assert_eq!(checked.kind, StateKind::Devices);
    }

    #[test]
    fn nothing_that_is_there_is_overwritten_or_removed() {
        for taken in ["state", "machine.json"] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let path = folder.path().join(taken);
            fs::write(&path, b"of another").expect("write a file");
            let error = Draft::begin(folder.path()).expect_err("a snapshot is there");
            assert!(matches!(error, SaveError::Io { path: ref of, .. } if *of == path), "{error}");
            assert_eq!(fs::read(&path).expect("kept"), b"of another");
            assert_eq!(left(folder.path()), 1);
        }
        let error = Draft::begin(Path::new("/nonexistent")).expect_err("no folder");
        assert!(matches!(error, SaveError::Io { .. }), "{error}");
    }
}
