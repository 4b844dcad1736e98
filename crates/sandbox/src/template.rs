//! Templates on disk: one folder a build, named by its build id.
//!
//! ```text
//! <templates>/<build id>/rootfs.ext4     the root disk, read-only, shared by all sandboxes
//! <templates>/<build id>/memory          guest memory, read-only, mapped privately by all
//! <templates>/<build id>/state           device state, of the driver that saved it
//! <templates>/<build id>/machine.json    what that driver needs to restore it
//! <templates>/<build id>/kernel          what machines boot that start without their memory, and
//! <templates>/<build id>/kernel.words    what is added to its command line, a word a line; builds
//!                                        from before that have neither
//! <templates>/<build id>/template.json   the record below, written last
//! ```
//!
//! A build grows in a draft folder beside the finished ones and is renamed into place when it is
//! whole, so a folder named by a build id is always complete. The record's format is frozen: a
//! change gets a new number and keeps reading this one.

use std::io;
use std::path::{Path, PathBuf};

use belljar_domain::{BuildId, MiB, TemplateId, Tier, UnixMillis, Vcpus};
use serde::{Deserialize, Serialize};

use crate::record::{
    RecordError, check_format, entries, io_error, name_of, put_in_place, read_record,
    regular_file_bytes, tier, write_new,
};

/// The only format of `template.json` so far.
const FORMAT: u32 = 1;
const RECORD: &str = "template.json";
const ROOTFS: &str = "rootfs.ext4";
const KERNEL: &str = "kernel";
const KERNEL_WORDS: &str = "kernel.words";
/// Longest list of words read, in bytes: what a kernel takes as its command line.
const KERNEL_WORDS_MAX_BYTES: u64 = 2048;
const DRAFT_PREFIX: &str = ".draft-";
/// Longest record read, in bytes; real ones have under one thousand.
const RECORD_MAX_BYTES: u64 = 64 * 1024;
/// Longest alias, in bytes: fits a folder name and a table.
const ALIAS_MAX_BYTES: usize = 128;

/// What a template is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateMeta {
    /// The template this is a build of.
    pub template_id: TemplateId,
    /// The build; also its folder's name.
    pub build_id: BuildId,
    /// Names users may say instead of the id: `[a-z0-9._-]`.
    pub aliases: Vec<String>,
    /// Virtual processors of its machines.
    pub vcpus: Vcpus,
    /// Memory of its machines.
    pub memory: MiB,
    /// Size of its root disk.
    pub disk: MiB,
    /// Version of the guest daemon in it.
    pub envd_version: String,
    /// What isolates its machines.
    pub tier: Tier,
    /// The driver's own word for what it can restore (`Runtime::fingerprint`).
    pub fingerprint: String,
    /// When it was built.
    pub created_at: UnixMillis,
    /// Digest of everything it was built from; equal keys make equal templates.
    pub source_key: String,
}

/// A complete template on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Its folder, which is what `Runtime::restore` takes.
    pub dir: PathBuf,
    /// What it is.
    pub meta: TemplateMeta,
}

impl Template {
    /// Reads the template in the folder `dir`.
    ///
    /// Blocks on file I/O for a few system calls.
    ///
    /// # Errors
    /// [`RecordError`] when a file is missing, the record is not exactly of the known format, or
    /// the folder's name or the disk's size is not what the record says.
    pub fn load(dir: &Path) -> Result<Template, RecordError> {
        let path = dir.join(RECORD);
        let meta = parse(&path, &read_record(&path, RECORD_MAX_BYTES)?)?;
        if dir.file_name().and_then(|name| name.to_str()) != Some(meta.build_id.as_str()) {
            let reason = format!("it is the record of build {}", meta.build_id);
            return Err(RecordError::Invalid { path, reason });
        }
        check_files(dir, &meta)?;
        Ok(Template { dir: dir.to_owned(), meta })
    }

    /// The root disk's image.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join(ROOTFS)
    }
}

/// The kernel of a template build, for machines that start without their memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) path: PathBuf,
    /// What is added to its command line.
    pub(crate) words: Vec<String>,
}

impl Kernel {
    /// Reads what lies in the folder of `build` in `templates`.
    ///
    /// # Errors
    /// [`RecordError`], also for builds from before they had one.
    pub(crate) fn load(templates: &Path, build: &BuildId) -> Result<Kernel, RecordError> {
        let dir = templates.join(build.as_str());
        let (path, words) = (dir.join(KERNEL), dir.join(KERNEL_WORDS));
        regular_file_bytes(&path)?;
        let text = read_record(&words, KERNEL_WORDS_MAX_BYTES)?;
        let text = String::from_utf8(text).map_err(|_| RecordError::Invalid {
            path: words,
            reason: "it is not UTF-8".to_owned(),
        })?;
        Ok(Kernel { path, words: text.lines().map(str::to_owned).collect() })
    }
}

/// Reads every template in `templates`, newest first. Drafts and other hidden entries are skipped.
///
/// # Errors
/// [`RecordError`] of the first one that cannot be read, or of the folder itself.
pub fn load_all(templates: &Path) -> Result<Vec<Template>, RecordError> {
    let mut found = load_each(templates)?.into_iter().collect::<Result<Vec<_>, _>>()?;
    found.sort_by(|a, b| {
        let (a, b) = (&a.meta, &b.meta);
        b.created_at.cmp(&a.created_at).then_with(|| a.build_id.cmp(&b.build_id))
    });
    Ok(found)
}

/// Reads every template in `templates`, each for itself, in no order. Drafts and other hidden entries
/// are skipped.
///
/// # Errors
/// [`RecordError`] of the folder itself.
pub fn load_each(templates: &Path) -> Result<Vec<Result<Template, RecordError>>, RecordError> {
    let shown = |dir: &PathBuf| !name_of(dir).starts_with('.');
    Ok(entries(templates)?.into_iter().filter(shown).map(|dir| Template::load(&dir)).collect())
}

/// Removes the drafts a killed build left in `templates`; answers how many. No build may run.
///
/// # Errors
/// [`RecordError`] of the first draft that cannot be removed.
pub fn reclaim_drafts(templates: &Path) -> Result<usize, RecordError> {
    let mut removed = 0;
    for dir in entries(templates)? {
        if name_of(&dir).starts_with(DRAFT_PREFIX) {
            std::fs::remove_dir_all(&dir).map_err(io_error("remove", &dir))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// A template that is being built, invisible to [`load_all`].
#[derive(Debug)]
pub struct TemplateDraft {
    dir: PathBuf,
    target: PathBuf,
    build_id: BuildId,
}

impl TemplateDraft {
    /// Makes an empty draft folder in `templates`.
    ///
    /// # Errors
    /// [`RecordError`], also when the build is there already.
    pub fn create(templates: &Path, build_id: &BuildId) -> Result<TemplateDraft, RecordError> {
        let target = templates.join(build_id.as_str());
        if target.exists() {
            let reason = "this build is there already".to_owned();
            return Err(RecordError::Invalid { path: target, reason });
        }
        let dir = templates.join(format!("{DRAFT_PREFIX}{build_id}"));
        std::fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        Ok(TemplateDraft { dir, target, build_id: build_id.clone() })
    }

    /// The draft's folder: where the disk goes and the machine is saved to.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the root disk's image goes.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join(ROOTFS)
    }

    /// Puts the kernel beside the disk, for machines that start without their memory. Blocks.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn put_kernel(&self, kernel: &Path, words: &[String]) -> Result<(), RecordError> {
        let copy = self.dir.join(KERNEL);
        std::fs::copy(kernel, copy).map_err(io_error("copy", kernel))?;
        write_new(&self.dir.join(KERNEL_WORDS), words.join("\n").as_bytes())
    }

    /// Writes the record, checks that the template is whole, and makes it visible. All of it is on
    /// stable storage afterwards. On an error the draft stays a draft.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn publish(&self, meta: &TemplateMeta) -> Result<Template, RecordError> {
        if meta.build_id != self.build_id {
            let reason = format!("the record is of build {}", meta.build_id);
            return Err(RecordError::Invalid { path: self.dir.clone(), reason });
        }
        check_files(&self.dir, meta)?;
        let record = self.dir.join(RECORD);
        let text = render(meta);
        parse(&record, text.as_bytes())?;
        write_new(&record, text.as_bytes())?;
        put_in_place(&self.dir, &self.target)?;
        Ok(Template { dir: self.target.clone(), meta: meta.clone() })
    }

    /// Removes the draft; nothing happens after [`TemplateDraft::publish`]. Idempotent.
    ///
    /// # Errors
    /// [`RecordError`] naming what is left.
    pub fn discard(&self) -> Result<(), RecordError> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &self.dir)(e)),
            _ => Ok(()),
        }
    }
}

/// `template.json`, field for field.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: u32,
    template_id: String,
    build_id: String,
    aliases: Vec<String>,
    vcpus: u32,
    memory_mib: u32,
    disk_mib: u32,
    envd_version: String,
    tier: String,
    fingerprint: String,
    created_at_unix_ms: i64,
    source_key: String,
}

fn render(meta: &TemplateMeta) -> String {
    let record = Record {
        format: FORMAT,
        template_id: meta.template_id.to_string(),
        build_id: meta.build_id.to_string(),
        aliases: meta.aliases.clone(),
        vcpus: meta.vcpus.0,
        memory_mib: meta.memory.0,
        disk_mib: meta.disk.0,
        envd_version: meta.envd_version.clone(),
        tier: meta.tier.to_string(),
        fingerprint: meta.fingerprint.clone(),
        created_at_unix_ms: meta.created_at.0,
        source_key: meta.source_key.clone(),
    };
    let mut text =
        serde_json::to_string_pretty(&record).expect("a record has string keys and plain values");
    text.push('\n');
    text
}

fn parse(path: &Path, bytes: &[u8]) -> Result<TemplateMeta, RecordError> {
    let malformed = |source| RecordError::Malformed { path: path.to_owned(), source };
    check_format(path, bytes, FORMAT)?;
    let record: Record = serde_json::from_slice(bytes).map_err(malformed)?;
    let invalid = |reason: String| RecordError::Invalid { path: path.to_owned(), reason };
    for (what, number) in
        [("vcpus", record.vcpus), ("memory_mib", record.memory_mib), ("disk_mib", record.disk_mib)]
    {
        if number == 0 {
            return Err(invalid(format!("`{what}` is 0")));
        }
    }
    if let Some(alias) = record.aliases.iter().find(|alias| !is_alias(alias)) {
        return Err(invalid(format!("the alias {alias:?} is not made of a-z, 0-9, `.`, `_`, `-`")));
    }
    Ok(TemplateMeta {
        template_id: record.template_id.parse().map_err(|e| invalid(format!("{e}")))?,
        build_id: record.build_id.parse().map_err(|e| invalid(format!("{e}")))?,
        aliases: record.aliases,
        vcpus: Vcpus(record.vcpus),
        memory: MiB(record.memory_mib),
        disk: MiB(record.disk_mib),
        envd_version: record.envd_version,
        tier: tier(&record.tier)
            .ok_or_else(|| invalid(format!("the tier {:?} is unknown", record.tier)))?,
        fingerprint: record.fingerprint,
        created_at: UnixMillis(record.created_at_unix_ms),
        source_key: record.source_key,
    })
}

fn is_alias(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    (1..=ALIAS_MAX_BYTES).contains(&text.len()) && text.bytes().all(allowed)
}

/// Whether everything but the record is in `dir`.
fn check_files(dir: &Path, meta: &TemplateMeta) -> Result<(), RecordError> {
    for name in [ROOTFS, "memory", "state", "machine.json"] {
        let path = dir.join(name);
        let size_bytes = regular_file_bytes(&path)?;
        if name == ROOTFS && size_bytes != meta.disk.bytes() {
            let reason = format!("it has {size_bytes} bytes, its record says {}", meta.disk);
            return Err(RecordError::Invalid { path, reason });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
