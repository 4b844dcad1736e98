//! What a saved machine looks like on disk, `machine.json` written last.
//!
//! `state` is the machine without its memory; `machine.json` says what it fits. A machine that was
//! saved for a template has its `memory` beside them, mapped privately by every machine restored
//! from it; the memory of a snapshot is somewhere else, in whatever form its owner keeps it. All of
//! them are read-only once written.
//!
//! Format 1 is a template's: its state is a whole stream of the driver's. Format 2 says what the state
//! is, in `state`; so far that is `devices`, a snapshot's. A driver of before format 2 refuses it.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use belljar_domain::{MiB, Vcpus};
use serde::{Deserialize, Serialize};

use crate::machine::StartError;
use crate::pages::SavedMachine;

/// Generations of this layout. A change of meaning gets a new number.
const FORMAT_STREAM: u32 = 1;
const FORMAT_NAMED: u32 = 2;
/// A description is some hundred bytes; more is not one.
const DESCRIPTION_MAX_BYTES: u64 = 64 * 1024;

/// The memory of a template.
const MEMORY: &str = "memory";

/// What is in a `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StateKind {
    /// Everything the driver sends of a machine, with a word about its configuration.
    Stream,
    /// The devices alone, of a machine that goes on.
    Devices,
}

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
            memory: folder.join(MEMORY),
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
pub(crate) struct Description {
    format: u32,
    fingerprint: String,
    vcpus: u32,
    memory_mib: u32,
    /// Length of `state`: a cut file must not reach the machine monitor.
    state_bytes: u64,
    /// Only from format 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<StateKind>,
}

/// What every format has.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

impl Description {
    pub(crate) fn new(shape: &Shape, kind: StateKind, state_bytes: u64) -> Description {
        let (format, state) = match kind {
            StateKind::Stream => (FORMAT_STREAM, None),
            StateKind::Devices => (FORMAT_NAMED, Some(kind)),
        };
        Description {
            format,
            fingerprint: shape.fingerprint.clone(),
            vcpus: shape.vcpus.0,
            memory_mib: shape.memory.0,
            state_bytes,
            state,
        }
    }
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
    settle(&files.memory).map_err(|e| (files.memory.clone(), e))?;
    let state_bytes = settle(&unfinished).map_err(|e| (unfinished.clone(), e))?;
    fs::rename(&unfinished, &files.state).map_err(|e| (files.state.clone(), e))?;
    let description = Description::new(shape, StateKind::Stream, state_bytes);
    write_description(files, &description).map_err(|e| (files.description.clone(), e))?;
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

/// Puts what a snapshot left in `folder` on stable storage: its state, its description, and the
/// folder's entries. Blocks on the disk.
///
/// # Errors
/// I/O errors.
pub fn sync_saved(folder: &Path) -> io::Result<()> {
    let files = SavedFiles::within(folder);
    for path in [&files.state, &files.description, &files.folder] {
        File::open(path)?.sync_all()?;
    }
    Ok(())
}

/// A saved machine that fits.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) state: PathBuf,
    pub(crate) kind: StateKind,
}

/// Checks that `saved` is a machine that `current` can run. Blocks on the disk.
///
/// # Errors
/// [`StartError::Missing`], [`StartError::Corrupt`] or [`StartError::Incompatible`].
pub(crate) fn check(saved: &SavedMachine, current: &Shape) -> Result<Checked, StartError> {
    let SavedMachine { folder, memory } = saved;
    let files = SavedFiles::within(folder);
    let (description, kind) = read_description(&files.description)?;
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
    if let Some(base) = &memory.base {
        expect_length("saved memory", base, current.memory.bytes())?;
    }
    expect_length("saved machine state", &files.state, description.state_bytes)?;
    Ok(Checked { state: files.state, kind })
}

/// What the saved machine in `folder` says of the driver that saved it. Blocks on the disk.
///
/// # Errors
/// [`StartError::Missing`] or [`StartError::Corrupt`].
pub(crate) fn fingerprint_in(folder: &Path) -> Result<String, StartError> {
    let (description, _) = read_description(&SavedFiles::within(folder).description)?;
    Ok(description.fingerprint)
}

fn read_description(path: &Path) -> Result<(Description, StateKind), StartError> {
    let what = "saved machine description";
    let length = length_of(what, path)?;
    let corrupt = |reason: String| StartError::Corrupt { path: path.to_owned(), reason };
    if length > DESCRIPTION_MAX_BYTES {
        return Err(corrupt(format!("it is {length} bytes long")));
    }
    let text = fs::read(path)
        .map_err(|source| StartError::Io { step: "read the saved machine description", source })?;
    // The number first: a newer one may say things that have no meaning here.
    let AnyFormat { format } = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
    if format != FORMAT_STREAM && format != FORMAT_NAMED {
        return Err(corrupt(format!("format {format} is not {FORMAT_STREAM} or {FORMAT_NAMED}")));
    }
    let description: Description =
        serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
    let kind = match (format, description.state) {
        (FORMAT_STREAM, None) => StateKind::Stream,
        (FORMAT_NAMED, Some(kind)) => kind,
        (_, state) => return Err(corrupt(format!("format {format} has no state {state:?}"))),
    };
    Ok((description, kind))
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
        let saved = SavedMachine::template(folder.path());
        assert!(matches!(check(&saved, &shape()), Err(StartError::Missing { .. })));
        fs::write(&files.memory, vec![0; 1 << 20]).expect("write memory");
        fs::write(files.unfinished_state(), b"state").expect("write state");
        seal(&files, &shape()).expect("seal a whole machine");
        let checked = check(&saved, &shape()).expect("the same driver and shape");
        assert_eq!(checked.kind, StateKind::Stream);
        let mode = fs::metadata(&files.memory).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o444);

        let other = Shape { vcpus: Vcpus(2), ..shape() };
        let error = check(&saved, &other).expect_err("another shape");
        assert!(matches!(error, StartError::Incompatible { .. }));
        fs::remove_file(&files.state).expect("remove the state");
        fs::write(&files.state, b"stat").expect("write a cut state");
        let error = check(&saved, &shape()).expect_err("a cut state");
        assert!(matches!(error, StartError::Corrupt { ref path, .. } if *path == files.state));
    }

    #[test]
    fn descriptions_of_every_format_are_read_or_refused_by_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("machine.json");
        let read = |text: &str| {
            fs::write(&path, text).expect("write a description");
            read_description(&path)
        };
        let fields = r#""fingerprint": "driver 1", "vcpus": 1, "memory_mib": 1, "state_bytes": 5"#;
        let (_, kind) = read(&format!(r#"{{"format": 1, {fields}}}"#)).expect("a template's");
        assert_eq!(kind, StateKind::Stream);
        let devices = format!(r#"{{"format": 2, {fields}, "state": "devices"}}"#);
        let (description, kind) = read(&devices).expect("a snapshot's");
        assert_eq!(kind, StateKind::Devices);
        assert_eq!(description, Description::new(&shape(), StateKind::Devices, 5));
        for (text, said) in [
            (format!(r#"{{"format": 1, {fields}, "state": "devices"}}"#), "format 1"),
            (format!(r#"{{"format": 2, {fields}}}"#), "format 2"),
            (format!(r#"{{"format": 2, {fields}, "state": "pages"}}"#), "pages"),
            (r#"{"format": 3, "state": {"new": true}}"#.to_owned(), "format 3"),
            ("{}".to_owned(), "format"),
        ] {
            let error = read(&text).expect_err("no description");
            assert!(error.to_string().contains(said), "{text}: {error}");
        }
    }
}
