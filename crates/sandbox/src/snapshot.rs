//! Snapshots on disk: one folder each, named by its id, which is that of a build.
//!
//! ```text
//! <snapshots>/<id>/disk.map        what its disk is made of
//! <snapshots>/<id>/memory.map      what its memory is made of; not there when only the disk was kept
//! <snapshots>/<id>/state           device state, of the driver that saved it; likewise
//! <snapshots>/<id>/machine.json    what that driver needs to restore it; likewise
//! <snapshots>/<id>/snapshot.json   the record below, written last
//! <snapshots>/<id>/memory          its memory in one file, for many to start from; made when it is
//!                                  first wanted, and can be made again
//! ```
//!
//! The maps name layers by their paths under the data folder: those of the template it comes from,
//! and sealed ones that several snapshots may share. The record's format is frozen: a change gets a
//! new number and keeps reading this one.

use std::path::{Path, PathBuf};

use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, Tier, UnixMillis, Vcpus};
use serde::{Deserialize, Serialize};

use crate::record::{
    RecordError, check_format, entries, io_error, name_of, put_in_place, read_record,
    regular_file_bytes, tier, write_new,
};

/// The only format of `snapshot.json` so far.
const FORMAT: u32 = 1;
const RECORD: &str = "snapshot.json";
const DRAFT_PREFIX: &str = ".draft-";
const GONE_PREFIX: &str = ".gone-";
/// Longest record read, in bytes: terms of 1 MiB, spelled as JSON at its worst, and the rest.
pub(crate) const RECORD_MAX_BYTES: u64 = 7 * 1024 * 1024;

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// Its id; also its folder's name. It can be started from as if it were a build.
    pub snapshot_id: BuildId,
    /// Whom it is of.
    pub sandbox_id: SandboxId,
    /// The run it was taken of.
    pub execution_id: ExecutionId,
    /// The template of that run.
    pub template_id: TemplateId,
    /// What that run was started from.
    pub build_id: BuildId,
    /// The template build whose kernel it runs.
    pub kernel_build_id: BuildId,
    /// Whether the sandbox was given up for it, and not only copied.
    pub paused: bool,
    /// Whether it has no memory: it boots when it is started.
    pub filesystem_only: bool,
    /// Whether its guest did not answer when it was frozen.
    pub guest_unresponsive: bool,
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Memory.
    pub memory: MiB,
    /// Size of its root disk.
    pub disk: MiB,
    /// Version of its guest daemon.
    pub envd_version: String,
    /// What isolated it.
    pub tier: Tier,
    /// The driver's own word for what it can restore (`Runtime::fingerprint`).
    pub fingerprint: String,
    /// What the caller of the create gave with the sandbox.
    pub terms: String,
    /// When the run began.
    pub started_at: UnixMillis,
    /// When it was frozen.
    pub created_at: UnixMillis,
    /// What it added to the disk, bytes.
    pub own_bytes: u64,
}

/// A snapshot's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotFiles {
    /// The folder, which also holds what the driver saved.
    pub(crate) dir: PathBuf,
    pub(crate) disk_map: PathBuf,
    pub(crate) memory_map: PathBuf,
    /// The memory in one file, once it is made.
    pub(crate) memory: PathBuf,
}

impl SnapshotFiles {
    pub(crate) fn within(dir: &Path) -> SnapshotFiles {
        SnapshotFiles {
            dir: dir.to_owned(),
            disk_map: dir.join("disk.map"),
            memory_map: dir.join("memory.map"),
            memory: dir.join("memory"),
        }
    }
}

/// Reads the snapshot in the folder `dir`. Blocks on file I/O for a few system calls.
///
/// # Errors
/// [`RecordError`] when a file is missing or the record is not exactly of the known format.
pub(crate) fn load(dir: &Path) -> Result<SnapshotMeta, RecordError> {
    let path = dir.join(RECORD);
    let meta = parse(&path, &read_record(&path, RECORD_MAX_BYTES)?)?;
    if dir.file_name().and_then(|name| name.to_str()) != Some(meta.snapshot_id.as_str()) {
        let reason = format!("it is the record of snapshot {}", meta.snapshot_id);
        return Err(RecordError::Invalid { path, reason });
    }
    check_files(dir, meta.filesystem_only)?;
    Ok(meta)
}

/// The folders of all snapshots in `snapshots`, in no order.
///
/// # Errors
/// [`RecordError`] of the folder itself.
pub(crate) fn folders(snapshots: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let shown = |dir: &PathBuf| !name_of(dir).starts_with('.');
    Ok(entries(snapshots)?.into_iter().filter(shown).collect())
}

/// Removes what a server that was killed left half made or half removed.
///
/// # Errors
/// [`RecordError`] of the first folder that cannot be removed.
pub(crate) fn reclaim(snapshots: &Path) -> Result<(), RecordError> {
    for dir in entries(snapshots)? {
        if name_of(&dir).starts_with('.') {
            std::fs::remove_dir_all(&dir).map_err(io_error("remove", &dir))?;
        }
    }
    Ok(())
}

/// Removes the snapshot in the folder `dir`. It is no snapshot from the first step on.
///
/// # Errors
/// [`RecordError`]; what is left is removed at the next start.
pub(crate) fn remove(dir: &Path) -> Result<(), RecordError> {
    let gone = dir.with_file_name(format!("{GONE_PREFIX}{}", name_of(dir)));
    std::fs::rename(dir, &gone).map_err(io_error("remove", dir))?;
    std::fs::remove_dir_all(&gone).map_err(io_error("remove", &gone))
}

/// A snapshot that is being made. Removed when it is dropped unpublished.
#[derive(Debug)]
pub(crate) struct SnapshotDraft {
    files: SnapshotFiles,
    target: PathBuf,
    published: bool,
}

impl SnapshotDraft {
    /// Makes an empty draft folder in `snapshots`.
    ///
    /// # Errors
    /// [`RecordError`], also when there is one of this id.
    pub(crate) fn create(snapshots: &Path, id: &BuildId) -> Result<SnapshotDraft, RecordError> {
        let target = snapshots.join(id.as_str());
        if target.exists() {
            let reason = "this snapshot is there already".to_owned();
            return Err(RecordError::Invalid { path: target, reason });
        }
        let dir = snapshots.join(format!("{DRAFT_PREFIX}{id}"));
        std::fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        Ok(SnapshotDraft { files: SnapshotFiles::within(&dir), target, published: false })
    }

    pub(crate) fn files(&self) -> &SnapshotFiles {
        &self.files
    }

    /// Writes the record, checks that the snapshot is whole, and makes it visible. All of the folder
    /// is on stable storage afterwards; layers are the caller's to sync before.
    ///
    /// # Errors
    /// [`RecordError`]; the draft stays one.
    pub(crate) fn publish(mut self, meta: &SnapshotMeta) -> Result<SnapshotFiles, RecordError> {
        let dir = &self.files.dir;
        check_files(dir, meta.filesystem_only)?;
        let record = dir.join(RECORD);
        let text = render(meta);
        parse(&record, &text)?;
        write_new(&record, &text)?;
        put_in_place(dir, &self.target)?;
        self.published = true;
        Ok(SnapshotFiles::within(&self.target))
    }
}

impl Drop for SnapshotDraft {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        let dir = &self.files.dir;
        if let Err(e) = std::fs::remove_dir_all(dir) {
            tracing::warn!(dir = %dir.display(), error = %e, "a snapshot's draft stays until the next start");
        }
    }
}

/// `snapshot.json`, field for field.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: u32,
    snapshot_id: String,
    sandbox_id: String,
    execution_id: String,
    template_id: String,
    build_id: String,
    kernel_build_id: String,
    paused: bool,
    filesystem_only: bool,
    guest_unresponsive: bool,
    vcpus: u32,
    memory_mib: u32,
    disk_mib: u32,
    envd_version: String,
    tier: String,
    fingerprint: String,
    terms: String,
    started_at_unix_ms: i64,
    created_at_unix_ms: i64,
    own_bytes: u64,
}

fn render(meta: &SnapshotMeta) -> Vec<u8> {
    let record = Record {
        format: FORMAT,
        snapshot_id: meta.snapshot_id.to_string(),
        sandbox_id: meta.sandbox_id.to_string(),
        execution_id: meta.execution_id.to_string(),
        template_id: meta.template_id.to_string(),
        build_id: meta.build_id.to_string(),
        kernel_build_id: meta.kernel_build_id.to_string(),
        paused: meta.paused,
        filesystem_only: meta.filesystem_only,
        guest_unresponsive: meta.guest_unresponsive,
        vcpus: meta.vcpus.0,
        memory_mib: meta.memory.0,
        disk_mib: meta.disk.0,
        envd_version: meta.envd_version.clone(),
        tier: meta.tier.to_string(),
        fingerprint: meta.fingerprint.clone(),
        terms: meta.terms.clone(),
        started_at_unix_ms: meta.started_at.0,
        created_at_unix_ms: meta.created_at.0,
        own_bytes: meta.own_bytes,
    };
    serde_json::to_vec(&record).expect("a record has string keys and plain values")
}

pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<SnapshotMeta, RecordError> {
    check_format(path, bytes, FORMAT)?;
    let record: Record = serde_json::from_slice(bytes)
        .map_err(|source| RecordError::Malformed { path: path.to_owned(), source })?;
    let invalid = |reason: String| RecordError::Invalid { path: path.to_owned(), reason };
    if record.vcpus == 0 || record.memory_mib == 0 || record.disk_mib == 0 {
        return Err(invalid("its processors, memory or disk are 0".to_owned()));
    }
    Ok(SnapshotMeta {
        snapshot_id: record.snapshot_id.parse().map_err(|e| invalid(format!("{e}")))?,
        sandbox_id: record.sandbox_id.parse().map_err(|e| invalid(format!("{e}")))?,
        execution_id: record.execution_id.parse().map_err(|e| invalid(format!("{e}")))?,
        template_id: record.template_id.parse().map_err(|e| invalid(format!("{e}")))?,
        build_id: record.build_id.parse().map_err(|e| invalid(format!("{e}")))?,
        kernel_build_id: record.kernel_build_id.parse().map_err(|e| invalid(format!("{e}")))?,
        paused: record.paused,
        filesystem_only: record.filesystem_only,
        guest_unresponsive: record.guest_unresponsive,
        vcpus: Vcpus(record.vcpus),
        memory: MiB(record.memory_mib),
        disk: MiB(record.disk_mib),
        envd_version: record.envd_version,
        tier: tier(&record.tier)
            .ok_or_else(|| invalid(format!("the tier {:?} is unknown", record.tier)))?,
        fingerprint: record.fingerprint,
        terms: record.terms,
        started_at: UnixMillis(record.started_at_unix_ms),
        created_at: UnixMillis(record.created_at_unix_ms),
        own_bytes: record.own_bytes,
    })
}

/// Whether everything but the record is in `dir`.
fn check_files(dir: &Path, filesystem_only: bool) -> Result<(), RecordError> {
    let of_memory: &[&str] =
        if filesystem_only { &[] } else { &["memory.map", "state", "machine.json"] };
    for name in ["disk.map"].iter().chain(of_memory) {
        regular_file_bytes(&dir.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> SnapshotMeta {
        SnapshotMeta {
            snapshot_id: BuildId::random(),
            sandbox_id: SandboxId::random(),
            execution_id: ExecutionId::random(),
            template_id: TemplateId::random(),
            build_id: BuildId::random(),
            kernel_build_id: BuildId::random(),
            paused: true,
            filesystem_only: true,
            guest_unresponsive: false,
            vcpus: Vcpus(2),
            memory: MiB(512),
            disk: MiB(1024),
            envd_version: "1".to_owned(),
            tier: Tier::Fake,
            fingerprint: "fake".to_owned(),
            terms: "{\"a\":\"b\"}".to_owned(),
            started_at: UnixMillis(1),
            created_at: UnixMillis(2),
            own_bytes: 4096,
        }
    }

    #[test]
    fn a_snapshot_is_there_once_it_is_whole_and_gone_at_once() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let meta = meta();
        let draft = SnapshotDraft::create(dir.path(), &meta.snapshot_id).expect("draft");
        assert!(folders(dir.path()).expect("list").is_empty(), "a draft is no snapshot");
        std::fs::write(&draft.files().disk_map, "map").expect("write");
        let files = draft.publish(&meta).expect("publish");
        assert_eq!(load(&files.dir).expect("load"), meta);
        assert_eq!(folders(dir.path()).expect("list").len(), 1);
        SnapshotDraft::create(dir.path(), &meta.snapshot_id).expect_err("it is there");
        remove(&files.dir).expect("remove");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn half_of_one_is_never_published_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let meta = SnapshotMeta { filesystem_only: false, ..meta() };
        let draft = SnapshotDraft::create(dir.path(), &meta.snapshot_id).expect("draft");
        std::fs::write(&draft.files().disk_map, "map").expect("write");
        let e = draft.publish(&meta).expect_err("its memory is missing");
        assert!(e.to_string().contains("memory.map"), "{e}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
        // What a killed server leaves goes with the next start.
        std::mem::forget(SnapshotDraft::create(dir.path(), &meta.snapshot_id).expect("draft"));
        reclaim(dir.path()).expect("reclaim");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn records_that_are_none_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let meta = meta();
        let draft = SnapshotDraft::create(dir.path(), &meta.snapshot_id).expect("draft");
        std::fs::write(&draft.files().disk_map, "map").expect("write");
        let files = draft.publish(&meta).expect("publish");
        let record = files.dir.join(RECORD);
        let text = std::fs::read_to_string(&record).expect("read");
        for (from, to, says) in [
            ("\"format\":1", "\"format\":9", "its format is 9"),
            ("\"vcpus\":2", "\"vcpus\":0", "are 0"),
            ("\"tier\":\"fake\"", "\"tier\":\"moon\"", "\"moon\" is unknown"),
            ("\"paused\"", "\"poused\"", "parse"),
        ] {
            assert!(text.contains(from), "{from}");
            std::fs::write(&record, text.replace(from, to)).expect("write");
            let e = load(&files.dir).expect_err(to);
            assert!(e.to_string().contains(says), "{e}");
        }
        std::fs::write(&record, &text).expect("write");
        let other = dir.path().join(BuildId::random().as_str());
        std::fs::rename(&files.dir, &other).expect("rename");
        let e = load(&other).expect_err("its name is not its id");
        assert!(e.to_string().contains("it is the record of snapshot"), "{e}");
    }
}
