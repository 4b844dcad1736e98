//! What a saved machine looks like on disk: three files, `machine.json` written last.
//!
//! `memory` is the guest's memory, mapped privately by every restored machine; `state` is the
//! rest of the machine; `machine.json` says what they fit. All three are read-only once saved.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use belljar_domain::{MiB, Vcpus};
use serde::{Deserialize, Serialize};

use crate::machine::StartError;

/// Generation of this layout. A change of meaning gets a new number.
const FORMAT: u32 = 1;
/// A description is some hundred bytes; more is not one.
const DESCRIPTION_MAX_BYTES: u64 = 64 * 1024;

/// The files of a saved machine.
#[derive(Debug, Clone)]
pub(crate) struct SavedFiles {
    pub(crate) folder: PathBuf,
    pub(crate) memory: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) description: PathBuf,
}

impl SavedFiles {
    pub(crate) fn within(folder: &Path) -> SavedFiles {
        SavedFiles {
            folder: folder.to_owned(),
            memory: folder.join("memory"),
            state: folder.join("state"),
            description: folder.join("machine.json"),
        }
    }

    /// Where the state is written before it is whole.
    pub(crate) fn unfinished_state(&self) -> PathBuf {
        self.folder.join("state.tmp")
    }
}

/// The content of `machine.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    format: u32,
    fingerprint: String,
    vcpus: u32,
    memory_mib: u32,
    /// Length of `state`: a cut file must not reach the machine monitor.
    state_bytes: u64,
}

/// What a saved machine must fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) fingerprint: String,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}, {}", self.fingerprint, self.vcpus, self.memory)
    }
}

/// Finishes a save: puts memory and state on stable storage, names the state, and writes the
/// description. Blocks on the disk.
///
/// # Errors
/// The file and why; without a description the folder holds no saved machine.
pub(crate) fn seal(files: &SavedFiles, shape: &Shape) -> Result<(), (PathBuf, io::Error)> {
    let unfinished = files.unfinished_state();
    let describe = |state_bytes| Description {
        format: FORMAT,
        fingerprint: shape.fingerprint.clone(),
        vcpus: shape.vcpus.0,
        memory_mib: shape.memory.0,
        state_bytes,
    };
    settle(&files.memory).map_err(|e| (files.memory.clone(), e))?;
    let state_bytes = settle(&unfinished).map_err(|e| (unfinished.clone(), e))?;
    fs::rename(&unfinished, &files.state).map_err(|e| (files.state.clone(), e))?;
    write_description(files, &describe(state_bytes)).map_err(|e| (files.description.clone(), e))?;
    File::open(&files.folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| (files.folder.clone(), e))
}

/// Makes a written file durable, ours and read-only; says its length in bytes.
fn settle(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    file.sync_all()?;
    // The machine's own user made it and must not keep the right to change it.
    let me = rustix::process::geteuid();
    if me.is_root() {
        std::os::unix::fs::fchown(&file, Some(me.as_raw()), None)?;
    }
    file.set_permissions(Permissions::from_mode(0o444))?;
    Ok(file.metadata()?.len())
}

fn write_description(files: &SavedFiles, description: &Description) -> io::Result<()> {
    let unfinished = files.folder.join("machine.json.tmp");
    let text = serde_json::to_vec_pretty(description)?;
    fs::write(&unfinished, text)?;
    settle(&unfinished)?;
    fs::rename(&unfinished, &files.description)
}

/// Checks that `folder` holds a saved machine that `current` can run. Blocks on the disk.
///
/// # Errors
/// [`StartError::Missing`], [`StartError::Corrupt`] or [`StartError::Incompatible`].
pub(crate) fn check(folder: &Path, current: &Shape) -> Result<SavedFiles, StartError> {
    let files = SavedFiles::within(folder);
    let description = read_description(&files.description)?;
    let saved = Shape {
        fingerprint: description.fingerprint,
        vcpus: Vcpus(description.vcpus),
        memory: MiB(description.memory_mib),
    };
    if saved != *current {
        return Err(StartError::Incompatible {
            saved: saved.to_string(),
            current: current.to_string(),
        });
    }
    expect_length("saved memory", &files.memory, current.memory.bytes())?;
    expect_length("saved machine state", &files.state, description.state_bytes)?;
    Ok(files)
}

fn read_description(path: &Path) -> Result<Description, StartError> {
    let what = "saved machine description";
    let length = length_of(what, path)?;
    let corrupt = |reason: String| StartError::Corrupt { path: path.to_owned(), reason };
    if length > DESCRIPTION_MAX_BYTES {
        return Err(corrupt(format!("it is {length} bytes long")));
    }
    let text = fs::read(path)
        .map_err(|source| StartError::Io { step: "read the saved machine description", source })?;
    let description: Description =
        serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
    if description.format != FORMAT {
        return Err(corrupt(format!("format {} is not {FORMAT}", description.format)));
    }
    Ok(description)
}

fn expect_length(what: &'static str, path: &Path, expected: u64) -> Result<(), StartError> {
    let found = length_of(what, path)?;
    if found == expected {
        return Ok(());
    }
    let reason = format!("it is {found} bytes long, not {expected}");
    Err(StartError::Corrupt { path: path.to_owned(), reason })
}

fn length_of(what: &'static str, path: &Path) -> Result<u64, StartError> {
    match fs::metadata(path) {
        Ok(found) => Ok(found.len()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(StartError::Missing { what, path: path.to_owned() })
        }
        Err(source) => Err(StartError::Io { step: "look at the saved machine", source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape { fingerprint: "driver 1".into(), vcpus: Vcpus(1), memory: MiB(1) }
    }

    #[test]
    fn what_was_sealed_is_accepted_and_anything_else_is_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = SavedFiles::within(folder.path());
        assert!(matches!(check(folder.path(), &shape()), Err(StartError::Missing { .. })));
        fs::write(&files.memory, vec![0; 1 << 20]).expect("write memory");
        fs::write(files.unfinished_state(), b"state").expect("write state");
        seal(&files, &shape()).expect("seal a whole machine");
        check(folder.path(), &shape()).expect("the same driver and shape");
        let mode = fs::metadata(&files.memory).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o444);

        let other = Shape { vcpus: Vcpus(2), ..shape() };
        let error = check(folder.path(), &other).expect_err("another shape");
        assert!(matches!(error, StartError::Incompatible { .. }));
        fs::remove_file(&files.state).expect("remove the state");
        fs::write(&files.state, b"stat").expect("write a cut state");
        let error = check(folder.path(), &shape()).expect_err("a cut state");
        assert!(matches!(error, StartError::Corrupt { ref path, .. } if *path == files.state));
    }
}
