//! The parts of the outer machine, which has a working `/dev/kvm` on any host: Debian's own kernel,
//! and a first file system of a shell and some modules. Both are kept by content.
//!
//! The rest of that machine is this host's own files: see `nested`.

mod initrd;
mod modules;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::template::Stamp;
use super::{apt, content_key};
use crate::command::tied;
use crate::places::Places;
use crate::steps::{OrFix, Outcome, StepContext, StepError};
use initrd::Archive;
use modules::{Load, Modules, WANTED};

/// Names the newest kernel of the release. The one for cloud machines cannot mount a host's files.
const KERNEL: &str = "linux-image-amd64";
/// Shell and tools in one static program.
const SHELL: &str = "busybox-static";
const INIT: &str = include_str!("outer/init.sh");
/// Where apt keeps what the mirrors offer.
const LISTS: &str = "/var/lib/apt/lists";
/// Goes into the key: raise it when the code below changes what it makes.
const RECIPE_VERSION: &str = "1";

/// The finished parts.
pub(crate) struct OuterParts {
    folder: PathBuf,
}

impl OuterParts {
    /// Those that set-up made last.
    ///
    /// # Errors
    /// Set-up did not run.
    pub(crate) fn current(places: &Places) -> Result<OuterParts> {
        let link = link(places);
        let folder = std::fs::canonicalize(&link)
            .with_context(|| format!("{} is missing: set-up did not run", link.display()))?;
        Ok(OuterParts { folder })
    }

    /// Where they are, and what is made from them.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    pub(crate) fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }
}

fn link(places: &Places) -> PathBuf {
    places.cache.join("nested-current")
}

/// A Debian package in one version.
struct Exact {
    name: String,
    version: String,
}

impl Exact {
    fn argument(&self) -> String {
        format!("{}={}", self.name, self.version)
    }
}

/// Downloads and unpacks what is not there in the release's present versions.
///
/// Asking apt takes a second or two, so it is asked when its lists have changed.
pub(super) fn build(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let cache = &context.places.cache;
    let asked = || -> Result<Stamp> {
        let path = cache.join("nested.stamp");
        Ok(Stamp { path, key: content_key([recipe().as_bytes(), &changed(Path::new(LISTS))?]) })
    };
    if asked()?.is_current()
        && let Ok(parts) = OuterParts::current(context.places)
    {
        return Ok(Outcome::Cached(parts.folder.display().to_string()));
    }
    let mut packages = resolve();
    if packages.is_err() {
        apt::update(context)?;
        packages = resolve();
    }
    let packages = packages?;
    let mut folder = folder_for(cache, &packages);
    let is_cached = folder.is_dir();
    if !is_cached {
        let work = context.places.work_folder("outer")?;
        let packages = match download(context, &packages, work.path()) {
            Ok(()) => packages,
            // A mirror keeps no version that it has replaced: the lists here are old.
            Err(_) => {
                apt::update(context)?;
                let newer = resolve()?;
                download(context, &newer, work.path())?;
                newer
            }
        };
        folder = folder_for(cache, &packages);
        let parts = assemble(context, work.path())?;
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::rename(parts, &folder)?;
        // With a saved machine they are 300 MB, and nobody else runs one while we hold the lock.
        remove_others(cache, &folder)?;
    }
    super::publish(&folder, &link(context.places))?;
    asked()?.set()?;
    let text = folder.display().to_string();
    Ok(if is_cached { Outcome::Cached(text) } else { Outcome::Done(text) })
}

/// Removes the parts of earlier versions, and what was made from them.
fn remove_others(cache: &Path, kept: &Path) -> Result<()> {
    for entry in std::fs::read_dir(cache)? {
        let path = entry?.path();
        let key = path.file_name().and_then(|name| name.to_str()?.strip_prefix("nested-"));
        let is_keyed = key.is_some_and(|key| key.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if is_keyed && path != kept {
            std::fs::remove_dir_all(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// What the release has now: the kernel behind its general name, and the shell.
fn resolve() -> Result<[Exact; 2]> {
    let depends = apt::field(KERNEL, "Depends")?;
    let (name, version) = first_dependency(&depends)
        .with_context(|| format!("{KERNEL} names no kernel: `{depends}`"))?;
    let shell = Exact { name: SHELL.to_owned(), version: apt::field(SHELL, "Version")? };
    Ok([Exact { name, version }, shell])
}

/// `linux-image-6.1.0-1-amd64 (= 6.1.1-1), other` gives name and version of the first.
fn first_dependency(depends: &str) -> Option<(String, String)> {
    let first = depends.split(',').next()?.trim();
    let (name, version) = first.split_once(" (= ")?;
    Some((name.to_owned(), version.strip_suffix(')')?.to_owned()))
}

fn folder_for(cache: &Path, packages: &[Exact; 2]) -> PathBuf {
    let [kernel, shell] = packages.each_ref().map(Exact::argument);
    let parts = [kernel, shell, recipe()];
    cache.join(format!("nested-{}", content_key(parts.each_ref().map(String::as_bytes))))
}

/// Everything of ours that decides what is made.
fn recipe() -> String {
    let modules: Vec<String> =
        WANTED.iter().map(|(name, parameters)| format!("{name} {parameters}\n")).collect();
    format!("{RECIPE_VERSION}\n{}{INIT}", modules.concat())
}

/// When something in a folder was added, removed or replaced last.
fn changed(folder: &Path) -> Result<[u8; 16]> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(folder)
        .with_context(|| format!("cannot look at {}", folder.display()))?;
    let time = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    Ok(time.to_le_bytes())
}

fn download(context: &StepContext<'_>, packages: &[Exact; 2], work: &Path) -> Result<()> {
    let names = packages.each_ref().map(Exact::argument);
    context.say(&format!("downloads {}", names.join(" and ")));
    let mut get = tied("apt-get");
    get.current_dir(work).env("LC_ALL", "C").args(["-q", "download"]).args(names);
    context.run(get, |_| {})
}

/// Unpacks what was downloaded to `work` and makes the two files of it, in a folder there.
fn assemble(context: &StepContext<'_>, work: &Path) -> Result<PathBuf, StepError> {
    let tree = work.join("tree");
    context.say("unpacks the kernel and the shell");
    for entry in std::fs::read_dir(work)? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == "deb") {
            let mut unpack = tied("dpkg-deb");
            unpack.arg("-x").arg(&path).arg(&tree);
            context.run(unpack, |_| {})?;
        }
    }
    let parts = work.join("parts");
    std::fs::create_dir(&parts)?;
    let kernel = only_entry(&tree.join("boot"), "vmlinuz-")
        .or_fix("the kernel package is not as expected: report this with the log")?;
    std::fs::copy(kernel, parts.join("vmlinuz"))?;
    let modules = Modules::within(&only_entry(&tree.join("lib/modules"), "")?)?;
    let order = modules.order(WANTED, content)?;
    let shell = std::fs::read(tree.join("bin/busybox"))
        .or_else(|_| std::fs::read(tree.join("usr/bin/busybox")))
        .context("the package of the shell has no busybox")?;
    std::fs::write(parts.join("initrd"), first_files(&modules, &order, &shell)?)?;
    Ok(parts)
}

/// A module's content; later releases compress theirs.
fn content(module: &Path) -> Result<Vec<u8>> {
    if module.extension().is_none_or(|kind| kind != "xz") {
        return std::fs::read(module).with_context(|| format!("cannot read {}", module.display()));
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(module)
        .output()
        .context("cannot start xz")?;
    if !output.status.success() {
        bail!("xz cannot unpack {}", module.display());
    }
    Ok(output.stdout)
}

fn first_files(modules: &Modules, order: &[Load], shell: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.folder("bin");
    archive.program("bin/busybox", shell);
    archive.program("init", INIT.as_bytes());
    archive.folder("modules");
    let mut list = String::new();
    for Load { name, parameters } in order {
        archive.file(&format!("modules/{name}.ko"), &content(modules.file(name))?);
        list.push_str(&format!("{name}.ko {parameters}\n"));
    }
    archive.file("modules/order", list.as_bytes());
    Ok(archive.finish())
}

/// The one entry of a folder whose name begins with `prefix`.
fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("the kernel package has no {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => bail!("{} files {prefix}* in {}", found.len(), folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_general_name_leads_to_one_kernel() {
        let depends = "linux-image-6.1.0-56-amd64 (= 6.1.192-2), initramfs-tools";
        let (name, version) = first_dependency(depends).unwrap();
        assert_eq!((&*name, &*version), ("linux-image-6.1.0-56-amd64", "6.1.192-2"));
        assert_eq!(first_dependency("linux-image-6.1.0-56-amd64"), None);
        assert_eq!(first_dependency(""), None);
    }

    #[test]
    fn only_parts_of_other_versions_are_removed() {
        let cache = std::env::temp_dir().join(format!("xtask-outer-{}", std::process::id()));
        for name in ["nested-0a", "nested-1b", "kernel-0a", "nested-current"] {
            std::fs::create_dir_all(cache.join(name)).unwrap();
        }
        remove_others(&cache, &cache.join("nested-1b")).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["kernel-0a", "nested-1b", "nested-current"]);
        std::fs::remove_dir_all(&cache).unwrap();
    }

    #[test]
    fn another_version_is_another_folder() {
        let exact = |version: &str| Exact { name: "k".to_owned(), version: version.to_owned() };
        let cache = Path::new("/c");
        let one = folder_for(cache, &[exact("1"), exact("1")]);
        assert_eq!(one, folder_for(cache, &[exact("1"), exact("1")]));
        assert_ne!(one, folder_for(cache, &[exact("2"), exact("1")]));
    }
}
