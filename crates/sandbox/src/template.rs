//! Templates on disk: one folder a build, named by its build id.
//!
//! ```text
//! <templates>/<build id>/rootfs.ext4     the root disk, read-only, shared by all sandboxes
//! <templates>/<build id>/memory          guest memory, read-only, mapped privately by all
//! <templates>/<build id>/state           device state, of the driver that saved it
//! <templates>/<build id>/machine.json    what that driver needs to restore it
//! <templates>/<build id>/template.json   the record below, written last
//! ```
//!
//! A build grows in a draft folder beside the finished ones and is renamed into place when it is
//! whole, so a folder named by a build id is always complete. The record's format is frozen: a
//! change gets a new number and keeps reading this one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use belljar_domain::{BuildId, MiB, TemplateId, Tier, UnixMillis, Vcpus};
use serde::{Deserialize, Serialize};

/// The only format of `template.json` so far.
const FORMAT: u32 = 1;
const RECORD: &str = "template.json";
const ROOTFS: &str = "rootfs.ext4";
const DRAFT_PREFIX: &str = ".draft-";
/// Longest record read, in bytes; real ones have under one thousand.
const RECORD_MAX_BYTES: u64 = 64 * 1024;
/// Longest alias, in bytes: fits a folder name and a table.
const ALIAS_MAX_BYTES: usize = 128;

/// Why a template could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file or folder could not be read or written.
    #[error("{step} {}", path.display())]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record is no record.
    #[error("parse {}", path.display())]
    Malformed {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The record was written by a newer program.
    #[error("read {}: its format is {found}, this program reads {FORMAT}", path.display())]
    Format {
        /// The record.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The record says something that cannot be.
    #[error("accept {}: {reason}", path.display())]
    Invalid {
        /// The record, or the file that does not fit it.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

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
    /// [`TemplateError`] when a file is missing, the record is not exactly of the known format, or
    /// the folder's name or the disk's size is not what the record says.
    pub fn load(dir: &Path) -> Result<Template, TemplateError> {
        let path = dir.join(RECORD);
        let meta = parse(&path, &read_record(&path)?)?;
        if dir.file_name().and_then(|name| name.to_str()) != Some(meta.build_id.as_str()) {
            let reason = format!("it is the record of build {}", meta.build_id);
            return Err(TemplateError::Invalid { path, reason });
        }
        check_files(dir, &meta)?;
        Ok(Template { dir: dir.to_owned(), meta })
    }

    /// The root disk's image.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join(ROOTFS)
    }
}

/// Reads every template in `templates`, newest first. Drafts and other hidden entries are skipped.
///
/// # Errors
/// [`TemplateError`] of the first one that cannot be read, or of the folder itself.
pub fn load_all(templates: &Path) -> Result<Vec<Template>, TemplateError> {
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
/// [`TemplateError`] of the folder itself.
pub fn load_each(templates: &Path) -> Result<Vec<Result<Template, TemplateError>>, TemplateError> {
    let shown = |dir: &PathBuf| !name_of(dir).starts_with('.');
    Ok(entries(templates)?.into_iter().filter(shown).map(|dir| Template::load(&dir)).collect())
}

/// Removes the drafts a killed build left in `templates`; answers how many. No build may run.
///
/// # Errors
/// [`TemplateError`] of the first draft that cannot be removed.
pub fn reclaim_drafts(templates: &Path) -> Result<usize, TemplateError> {
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
    /// [`TemplateError`], also when the build is there already.
    pub fn create(templates: &Path, build_id: &BuildId) -> Result<TemplateDraft, TemplateError> {
        let target = templates.join(build_id.as_str());
        if target.exists() {
            let reason = "this build is there already".to_owned();
            return Err(TemplateError::Invalid { path: target, reason });
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

    /// Writes the record, checks that the template is whole, and makes it visible. All of it is on
    /// stable storage afterwards. On an error the draft stays a draft.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn publish(&self, meta: &TemplateMeta) -> Result<Template, TemplateError> {
        if meta.build_id != self.build_id {
            let reason = format!("the record is of build {}", meta.build_id);
            return Err(TemplateError::Invalid { path: self.dir.clone(), reason });
        }
        check_files(&self.dir, meta)?;
        let record = self.dir.join(RECORD);
        let text = render(meta);
        parse(&record, text.as_bytes())?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&record)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(io_error("write", &record))?;
        for file in entries(&self.dir)? {
            sync(&file)?;
        }
        sync(&self.dir)?;
        std::fs::rename(&self.dir, &self.target).map_err(io_error("make", &self.target))?;
        if let Some(templates) = self.target.parent() {
            sync(templates)?;
        }
        Ok(Template { dir: self.target.clone(), meta: meta.clone() })
    }

    /// Removes the draft; nothing happens after [`TemplateDraft::publish`]. Idempotent.
    ///
    /// # Errors
    /// [`TemplateError`] naming what is left.
    pub fn discard(&self) -> Result<(), TemplateError> {
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

/// What every format has, so that a newer one is named and not called malformed.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
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

fn parse(path: &Path, bytes: &[u8]) -> Result<TemplateMeta, TemplateError> {
    let malformed = |source| TemplateError::Malformed { path: path.to_owned(), source };
    let any: AnyFormat = serde_json::from_slice(bytes).map_err(malformed)?;
    if any.format != FORMAT {
        return Err(TemplateError::Format { path: path.to_owned(), found: any.format });
    }
    let record: Record = serde_json::from_slice(bytes).map_err(malformed)?;
    let invalid = |reason: String| TemplateError::Invalid { path: path.to_owned(), reason };
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

fn tier(word: &str) -> Option<Tier> {
    [Tier::Microvm, Tier::Emulated, Tier::Gvisor, Tier::Fake]
        .into_iter()
        .find(|tier| tier.as_str() == word)
}

fn is_alias(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    (1..=ALIAS_MAX_BYTES).contains(&text.len()) && text.bytes().all(allowed)
}

fn read_record(path: &Path) -> Result<Vec<u8>, TemplateError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(RECORD_MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(io_error("read", path))?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len <= RECORD_MAX_BYTES) {
        return Ok(bytes);
    }
    let reason = format!("it is longer than {RECORD_MAX_BYTES} bytes");
    Err(TemplateError::Invalid { path: path.to_owned(), reason })
}

/// Whether everything but the record is in `dir`.
fn check_files(dir: &Path, meta: &TemplateMeta) -> Result<(), TemplateError> {
    for name in [ROOTFS, "memory", "state", "machine.json"] {
        let path = dir.join(name);
        let size_bytes = regular_file_bytes(&path)?;
        if name == ROOTFS && size_bytes != meta.disk.bytes() {
            let reason = format!("it has {size_bytes} bytes, its record says {}", meta.disk);
            return Err(TemplateError::Invalid { path, reason });
        }
    }
    Ok(())
}

fn regular_file_bytes(path: &Path) -> Result<u64, TemplateError> {
    let metadata = std::fs::symlink_metadata(path).map_err(io_error("find", path))?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    let reason = "it is not a regular file".to_owned();
    Err(TemplateError::Invalid { path: path.to_owned(), reason })
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, TemplateError> {
    std::fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
        .map_err(io_error("list", dir))
}

fn name_of(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().map(std::ffi::OsStr::to_string_lossy).unwrap_or_default()
}

fn sync(path: &Path) -> Result<(), TemplateError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io_error("sync", path))
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError + use<> {
    let path = path.to_owned();
    move |source| TemplateError::Io { step, path, source }
}

#[cfg(test)]
mod tests;
