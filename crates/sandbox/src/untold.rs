//! Ends that nobody could be told of, on disk until somebody says they are recorded.
//!
//! One JSON file a run of a sandbox, `<folder>/<execution id>.json`, written under a temporary name
//! and renamed. The first word on a run stands: a sandbox that ended with an orderly stop stays
//! that, even when the stop itself was cut short.
//!
//! Format 1 knew `lost` and `shutdown`; format 2 has every reason for which a sandbox ends, and is
//! otherwise the same. Both are read.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use belljar_domain::lifecycle::EndReason;
use belljar_domain::{ExecutionId, MiB, UnixMillis, Vcpus};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::info::{SandboxInfo, Untold, UntoldHow};
use crate::ledger::{Entry, Run, write_private};

const FORMAT: u32 = 2;
/// Most ends kept; beyond it the oldest go. Many times what a host holds at once.
const KEPT_MAX: usize = 100_000;
/// Longest answer of [`UntoldEnds::list`]: texts of this many bytes, or the first end alone.
const LIST_MAX_BYTES: usize = 1024 * 1024;
/// What an end takes in an answer besides its terms.
const END_COST_BYTES: usize = 256;

/// One end, field for field.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: u32,
    how: String,
    noticed_at_unix_ms: i64,
    sandbox_id: String,
    execution_id: String,
    started_at_unix_ms: i64,
    run: Run,
}

/// The folder of ends.
#[derive(Debug, Clone)]
pub(crate) struct UntoldEnds {
    dir: PathBuf,
}

impl UntoldEnds {
    /// Makes the folder, and lets go of the oldest ends where there are too many.
    pub(crate) fn open(dir: PathBuf) -> io::Result<UntoldEnds> {
        std::fs::create_dir_all(&dir)?;
        let ends = UntoldEnds { dir };
        ends.trim(KEPT_MAX)?;
        Ok(ends)
    }

    /// Notes what a run that was killed has left. Entries of an old format say too little to tell.
    pub(crate) fn note_lost(&self, entry: &Entry, now: UnixMillis) -> io::Result<()> {
        let Some(run) = entry.run.clone() else { return Ok(()) };
        self.note(Record {
            format: FORMAT,
            how: UntoldHow::Lost.as_str().to_owned(),
            noticed_at_unix_ms: now.0,
            sandbox_id: entry.sandbox_id.clone(),
            execution_id: entry.execution_id.clone(),
            started_at_unix_ms: entry.started_at_unix_ms,
            run,
        })
    }

    /// Notes a sandbox that the program ends, for `reason`.
    pub(crate) fn note_ended(
        &self,
        info: &SandboxInfo,
        reason: EndReason,
        now: UnixMillis,
    ) -> io::Result<()> {
        self.note(Record {
            format: FORMAT,
            how: UntoldHow::Ended(reason).as_str().to_owned(),
            noticed_at_unix_ms: now.0,
            sandbox_id: info.sandbox_id.to_string(),
            execution_id: info.execution_id.to_string(),
            started_at_unix_ms: info.started_at.0,
            run: Run {
                template_id: info.template_id.to_string(),
                build_id: info.build_id.to_string(),
                end_at_unix_ms: info.end_at.0,
                vcpus: info.vcpus.0,
                memory_mib: info.memory.0,
                disk_mib: info.disk.0,
                terms: info.terms.to_string(),
            },
        })
    }

    fn note(&self, record: Record) -> io::Result<()> {
        // Before it is a path, it is an id: the ledger is ours, but files can be damaged.
        let execution_id: ExecutionId = record.execution_id.parse().map_err(io::Error::other)?;
        let path = self.path(&execution_id);
        if path.exists() {
            return Ok(());
        }
        let temporary = path.with_extension("tmp");
        write_private(&temporary, &serde_json::to_vec(&record).map_err(io::Error::other)?)?;
        std::fs::rename(&temporary, &path)
    }

    /// Ends that are not forgotten, in no order, as many as fit one answer.
    ///
    /// Reads a file for each: run it on a thread that may block.
    pub(crate) fn list(&self) -> io::Result<Vec<Untold>> {
        let mut ends = Vec::new();
        let mut bytes = 0;
        for file in std::fs::read_dir(&self.dir)? {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(Some(end)) => {
                    bytes += end.terms.len() + END_COST_BYTES;
                    if bytes > LIST_MAX_BYTES && !ends.is_empty() {
                        break;
                    }
                    ends.push(end);
                }
                // It was forgotten meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Ok(None) => {
                    warn!(path = %path.display(), "the record of an end is unreadable: removed");
                    remove(&path)?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(ends)
    }

    /// Lets go of one end. Idempotent.
    pub(crate) fn forget(&self, execution_id: &ExecutionId) -> io::Result<()> {
        remove(&self.path(execution_id))
    }

    fn path(&self, execution_id: &ExecutionId) -> PathBuf {
        self.dir.join(format!("{execution_id}.json"))
    }

    fn trim(&self, kept_max: usize) -> io::Result<()> {
        let mut files = Vec::new();
        for file in std::fs::read_dir(&self.dir)? {
            let file = file?;
            let path = file.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                // Cut short by a crash; the ledger entry it was made from is still there.
                remove(&path)?;
                continue;
            }
            files.push((file.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH), path));
        }
        let surplus = files.len().saturating_sub(kept_max);
        if surplus > 0 {
            warn!(surplus, "too many ends were never asked for: the oldest are let go of");
            files.sort();
        }
        files.iter().take(surplus).try_for_each(|(_, path)| remove(path))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// `None` when it is no record of a known format.
fn read(path: &Path) -> io::Result<Option<Untold>> {
    let bytes = std::fs::read(path)?;
    Ok(serde_json::from_slice::<Record>(&bytes).ok().and_then(parse))
}

fn parse(record: Record) -> Option<Untold> {
    let how = UntoldHow::parse(&record.how)?;
    let known = match record.format {
        1 => matches!(how, UntoldHow::Lost | UntoldHow::Ended(EndReason::Shutdown)),
        format => format == FORMAT,
    };
    if !known {
        return None;
    }
    Some(Untold {
        sandbox_id: record.sandbox_id.parse().ok()?,
        execution_id: record.execution_id.parse().ok()?,
        template_id: record.run.template_id.parse().ok()?,
        build_id: record.run.build_id.parse().ok()?,
        terms: record.run.terms,
        started_at: UnixMillis(record.started_at_unix_ms),
        end_at: UnixMillis(record.run.end_at_unix_ms),
        vcpus: Vcpus(record.run.vcpus),
        memory: MiB(record.run.memory_mib),
        disk: MiB(record.run.disk_mib),
        noticed_at: UnixMillis(record.noticed_at_unix_ms),
        how,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_domain::{BuildId, SandboxId, TemplateId};

    fn entry(terms: &str) -> Entry {
        let run = Run {
            template_id: TemplateId::random().to_string(),
            build_id: BuildId::random().to_string(),
            end_at_unix_ms: 9,
            vcpus: 2,
            memory_mib: 512,
            disk_mib: 1024,
            terms: terms.to_owned(),
        };
        let (id, execution) = (SandboxId::random().to_string(), ExecutionId::random().to_string());
        Entry::new((&id, &execution), "m", ("/run/x".into(), "/data/x".into()), 5, run)
    }

    fn open() -> (tempfile::TempDir, UntoldEnds) {
        let dir = tempfile::tempdir().expect("temporary folder");
        let ends = UntoldEnds::open(dir.path().join("untold")).expect("open");
        (dir, ends)
    }

    #[test]
    fn an_end_is_kept_until_it_is_forgotten() {
        let (dir, ends) = open();
        let entry = entry("for whom");
        ends.note_lost(&entry, UnixMillis(70)).expect("note");
        ends.note_lost(&entry, UnixMillis(80)).expect("note again");
        let ends = UntoldEnds::open(dir.path().join("untold")).expect("open again");
        let listed = ends.list().expect("list");
        let [end] = &listed[..] else { panic!("one end: {listed:?}") };
        assert_eq!((end.sandbox_id.as_str(), &*end.terms), (&*entry.sandbox_id, "for whom"));
        assert_eq!((end.noticed_at, end.how), (UnixMillis(70), UntoldHow::Lost));
        assert_eq!((end.started_at, end.end_at), (UnixMillis(5), UnixMillis(9)));
        ends.forget(&end.execution_id).expect("forget");
        ends.forget(&end.execution_id).expect("forget again");
        assert!(ends.list().expect("list").is_empty());
    }

    #[test]
    fn one_answer_is_bounded_and_all_come_in_the_end() {
        let (_dir, ends) = open();
        for _ in 0..5 {
            ends.note_lost(&entry(&"x".repeat(LIST_MAX_BYTES / 2)), UnixMillis(1)).expect("note");
        }
        let mut seen = 0;
        loop {
            let page = ends.list().expect("list");
            if page.is_empty() {
                break;
            }
            assert!(page.len() <= 2, "{}", page.len());
            seen += page.len();
            page.iter().for_each(|end| ends.forget(&end.execution_id).expect("forget"));
        }
        assert_eq!(seen, 5);
    }

    #[test]
    fn a_damaged_record_and_too_many_of_them_go() {
        let (dir, ends) = open();
        let folder = dir.path().join("untold");
        std::fs::write(folder.join("x.json"), "{").expect("write");
        std::fs::write(folder.join("y.tmp"), "{").expect("write");
        assert!(ends.list().expect("list").is_empty());
        assert!(!folder.join("x.json").exists());
        for _ in 0..4 {
            ends.note_lost(&entry(""), UnixMillis(1)).expect("note");
        }
        ends.trim(3).expect("trim");
        assert_eq!(ends.list().expect("list").len(), 3);
        assert!(!folder.join("y.tmp").exists());
    }

    #[test]
    fn both_formats_are_read_and_others_are_not() {
        let (dir, ends) = open();
        let folder = dir.path().join("untold");
        let record = |format: u32, how: &str| {
            let execution = ExecutionId::random();
            let text = format!(
                r#"{{"format":{format},"how":"{how}","noticed_at_unix_ms":7,
                "sandbox_id":"{}","execution_id":"{execution}","started_at_unix_ms":5,
                "run":{{"template_id":"{}","build_id":"{}","end_at_unix_ms":9,"vcpus":2,
                "memory_mib":512,"disk_mib":1024,"terms":"whose"}}}}"#,
                SandboxId::random(),
                TemplateId::random(),
                BuildId::random(),
            );
            std::fs::write(folder.join(format!("{execution}.json")), text).expect("write");
        };
        for (format, how) in [(1, "lost"), (1, "shutdown"), (2, "crashed"), (2, "killed")] {
            record(format, how);
        }
        for (format, how) in [(1, "crashed"), (2, "unheard of"), (3, "lost")] {
            record(format, how);
        }
        let mut how: Vec<_> = ends.list().expect("list").iter().map(|e| e.how.as_str()).collect();
        how.sort_unstable();
        assert_eq!(how, ["crashed", "killed", "lost", "shutdown"]);
    }
}
