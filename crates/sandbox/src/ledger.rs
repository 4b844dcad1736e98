//! What this host holds for each sandbox, on disk, written before it exists.
//!
//! One JSON file a sandbox, `<ledger>/<sandbox id>.json`, written to a temporary name and renamed.
//! It is not synced to the device: what it names (processes, namespaces, sockets) does not survive
//! the machine going down either, and files it names are found by the scan of their folders. Only
//! the server's user may read it: what callers give with a sandbox is in it.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// Format of a sandbox's entry. Format 1 is without `run`: what sandboxes once had, and what a machine
/// has that is nobody's yet.
const FORMAT: u32 = 2;
const FORMAT_WITHOUT_RUN: u32 = 1;
/// The run of a machine that is nobody's.
const SPARE: &str = "spare";

/// One sandbox's holdings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) format: u32,
    pub(crate) sandbox_id: String,
    pub(crate) execution_id: String,
    /// Name given to the runtime.
    pub(crate) machine: String,
    /// Folder of sockets and logs.
    pub(crate) run_dir: PathBuf,
    /// The private disk file.
    pub(crate) overlay: PathBuf,
    pub(crate) started_at_unix_ms: i64,
    /// What it was; absent in format 1, so that nobody is told of its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) run: Option<Run>,
}

/// What a sandbox was, for whoever asks after it is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Run {
    pub(crate) template_id: String,
    pub(crate) build_id: String,
    pub(crate) end_at_unix_ms: i64,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk_mib: u32,
    /// The caller's, word for word.
    pub(crate) terms: String,
}

impl Entry {
    pub(crate) fn new(
        (sandbox_id, execution_id): (&str, &str),
        machine: &str,
        (run_dir, overlay): (PathBuf, PathBuf),
        started_at_unix_ms: i64,
        run: Run,
    ) -> Entry {
        Entry {
            format: FORMAT,
            sandbox_id: sandbox_id.to_owned(),
            execution_id: execution_id.to_owned(),
            machine: machine.to_owned(),
            run_dir,
            overlay,
            started_at_unix_ms,
            run: Some(run),
        }
    }

    /// Of a machine that stands ready for whoever comes. Servers that know of no such thing reclaim it
    /// all the same.
    pub(crate) fn spare(
        id: &str,
        machine: &str,
        (run_dir, overlay): (PathBuf, PathBuf),
        started_at_unix_ms: i64,
    ) -> Entry {
        Entry {
            format: FORMAT_WITHOUT_RUN,
            sandbox_id: id.to_owned(),
            execution_id: SPARE.to_owned(),
            machine: machine.to_owned(),
            run_dir,
            overlay,
            started_at_unix_ms,
            run: None,
        }
    }

    /// Whether it was never anybody's sandbox.
    pub(crate) fn is_spare(&self) -> bool {
        self.execution_id == SPARE
    }
}

/// The entry that names what a machine holds. It changes hands with the machine.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    ledger: Ledger,
    // Held to look or to change, never across a wait.
    sandbox_id: Arc<Mutex<String>>,
}

impl Line {
    /// Writes the entry.
    pub(crate) fn write(ledger: &Ledger, entry: &Entry) -> io::Result<Line> {
        ledger.write(entry)?;
        let sandbox_id = Arc::new(Mutex::new(entry.sandbox_id.clone()));
        Ok(Line { ledger: ledger.clone(), sandbox_id })
    }

    /// Names the same things by another entry. The new one is there before the old one goes: what a
    /// kill in between leaves is named twice, and removed once.
    pub(crate) fn pass_to(&self, entry: &Entry) -> io::Result<()> {
        self.ledger.write(entry)?;
        let old = std::mem::replace(&mut *self.id(), entry.sandbox_id.clone());
        self.ledger.remove(&old)
    }

    /// Removes the entry.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let id = self.id().clone();
        self.ledger.remove(&id)
    }

    fn id(&self) -> MutexGuard<'_, String> {
        // Every change is one assignment.
        self.sandbox_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The folder of entries.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    dir: PathBuf,
}

impl Ledger {
    pub(crate) fn open(dir: PathBuf) -> io::Result<Ledger> {
        std::fs::create_dir_all(&dir)?;
        Ok(Ledger { dir })
    }

    fn path(&self, sandbox_id: &str) -> PathBuf {
        self.dir.join(format!("{sandbox_id}.json"))
    }

    pub(crate) fn write(&self, entry: &Entry) -> io::Result<()> {
        let path = self.path(&entry.sandbox_id);
        let temporary = path.with_extension("tmp");
        let text = serde_json::to_vec(entry).map_err(io::Error::other)?;
        write_private(&temporary, &text)?;
        std::fs::rename(&temporary, &path)
    }

    pub(crate) fn remove(&self, sandbox_id: &str) -> io::Result<()> {
        match std::fs::remove_file(self.path(sandbox_id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Every entry, and the paths of files that are none (cut short by a crash: a `.tmp` was
    /// never acted on, because the rename comes before the first resource).
    pub(crate) fn entries(&self) -> io::Result<(Vec<Entry>, Vec<PathBuf>)> {
        let mut entries = Vec::new();
        let mut unreadable = Vec::new();
        for file in std::fs::read_dir(&self.dir)? {
            let path = file?.path();
            match read(&path) {
                Some(entry) => entries.push(entry),
                None => unreadable.push(path),
            }
        }
        Ok((entries, unreadable))
    }
}

fn read(path: &Path) -> Option<Entry> {
    if path.extension()? != "json" {
        return None;
    }
    let entry: Entry = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let whole = match entry.format {
        FORMAT_WITHOUT_RUN => entry.run.is_none(),
        FORMAT => entry.run.is_some(),
        _ => false,
    };
    whole.then_some(entry)
}

/// Makes or replaces a file only this user may read.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let run = Run {
            template_id: "t".to_owned(),
            build_id: "b".to_owned(),
            end_at_unix_ms: 9,
            vcpus: 2,
            memory_mib: 512,
            disk_mib: 1024,
            terms: "for \"you\"".to_owned(),
        };
        Entry::new(("iabc", "e"), "m-iabc", ("/run/x".into(), "/data/x".into()), 5, run)
    }

    #[test]
    fn what_was_written_is_read_back_and_removed() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let ledger = Ledger::open(dir.path().join("ledger")).expect("open");
        ledger.write(&entry()).expect("write");
        assert_eq!(ledger.entries().expect("read").0, [entry()]);
        ledger.remove("iabc").expect("remove");
        ledger.remove("iabc").expect("remove twice");
        assert!(ledger.entries().expect("read").0.is_empty());
    }

    #[test]
    fn a_torn_entry_is_reported_not_trusted() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let ledger = Ledger::open(dir.path().to_owned()).expect("open");
        std::fs::write(dir.path().join("x.tmp"), b"{").expect("write");
        std::fs::write(dir.path().join("y.json"), b"{\"format\":9}").expect("write");
        let (entries, unreadable) = ledger.entries().expect("read");
        assert!(entries.is_empty());
        assert_eq!(unreadable.len(), 2);
    }

    #[test]
    fn an_entry_of_the_first_format_is_read() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let ledger = Ledger::open(dir.path().to_owned()).expect("open");
        let first = r#"{"format":1,"sandbox_id":"iabc","execution_id":"e","machine":"m-iabc",
            "run_dir":"/run/x","overlay":"/data/x","started_at_unix_ms":5}"#;
        std::fs::write(dir.path().join("iabc.json"), first).expect("write");
        let (entries, unreadable) = ledger.entries().expect("read");
        assert_eq!(entries, [Entry { format: 1, run: None, ..entry() }]);
        assert!(unreadable.is_empty());
    }

    #[test]
    fn an_entry_changes_hands() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let ledger = Ledger::open(dir.path().to_owned()).expect("open");
        let spare = Entry::spare("is", "m-is", ("/run/s".into(), "/data/s".into()), 4);
        let line = Line::write(&ledger, &spare).expect("write");
        assert_eq!(ledger.entries().expect("read").0, std::slice::from_ref(&spare));
        assert!(spare.is_spare() && !entry().is_spare());
        line.pass_to(&entry()).expect("pass on");
        assert_eq!(ledger.entries().expect("read").0, [entry()]);
        line.clone().remove().expect("remove");
        assert!(ledger.entries().expect("read").0.is_empty());
    }

    #[test]
    fn nobody_else_may_read_what_callers_give() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().expect("temporary folder");
        let ledger = Ledger::open(dir.path().to_owned()).expect("open");
        ledger.write(&entry()).expect("write");
        let mode = dir.path().join("iabc.json").metadata().expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
