//! From Debian packages to the disk image of the `base` template.
//!
//! ```text
//! apt's mirrors ─mmdebstrap─► tree ─customise─► mke2fs ─► cached image ─copy, debugfs─► output
//!                                                        (by key)       (guest daemon)
//! ```
//!
//! The left part takes minutes and changes rarely: its result is kept in the cache folder under a
//! digest of everything it depends on. The right part runs each time and takes about a second.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_blockstore::{CloneError, clone_file};
use belljar_daemon::{Scope, Teardown};
use belljar_domain::MiB;
use rustix::fs::FlockOperation;

use crate::blocking::blocking;
use crate::image::{EPOCH_S, ImageError, Workshop};
use crate::program::{Program, ProgramError};
use crate::progress::{Event, OnProgress};
use crate::sources::{Sources, SourcesError, host_sources};
use crate::tree::{self, TreeError};

/// The guest's Debian release.
const SUITE: &str = "bookworm";

/// What the base template offers, beside Debian's minimum. Recommendations are left out.
const PACKAGES: [&str; 18] = [
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "git",
    "iproute2",
    "iputils-ping",
    "netbase",
    "nodejs",
    "passwd",
    "procps",
    "python-is-python3",
    "python3",
    "python3-pip",
    "python3-venv",
    "sudo",
    "util-linux",
    "xz-utils",
];

const PACKAGES_DEADLINE: Duration = Duration::from_secs(1800);
/// Free space every image has at least, whatever size was asked for.
const FREE_MIN: MiB = MiB(512);
const WORK_PREFIX: &str = "work-";
const IMAGE_PREFIX: &str = "packages-";
const ENVD_FOLDER: &str = "/usr/sbin";
const ENVD_NAME: &str = "belljar-envd";

/// What to make.
#[derive(Debug, Clone)]
pub struct RootfsConfig {
    /// The static guest daemon; becomes `/usr/sbin/belljar-envd`.
    pub envd: PathBuf,
    /// Where the image goes; replaced at once when it is whole.
    pub output: PathBuf,
    /// Keeps the package image between builds. Made if absent; one build at a time works in it.
    pub cache_dir: PathBuf,
    /// Size of the disk. A larger one is made if less than 512 MiB of it would be free.
    pub disk: MiB,
    /// The host's apt configuration, normally `/etc/apt`.
    pub etc_apt: PathBuf,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    /// The image.
    pub image: PathBuf,
    /// Its size.
    pub disk: MiB,
    /// Whether the package part came from the cache.
    pub packages_cached: bool,
}

/// Why no image was made. Nothing but the cache's log is left.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Not root.
    #[error("assemble a root file system: files of several owners are made, which needs root")]
    NotRoot,
    /// Another build works in the cache.
    #[error("use {}: another build works in it", cache_dir.display())]
    Busy {
        /// The cache folder.
        cache_dir: PathBuf,
    },
    /// The host's apt knows no Debian mirror.
    #[error("choose a Debian mirror")]
    Sources(#[from] SourcesError),
    /// A program failed.
    #[error("assemble the packages")]
    Program(#[from] ProgramError),
    /// The package tree could not be changed.
    #[error("prepare the package tree")]
    Tree(#[from] TreeError),
    /// The image could not be made.
    #[error("make the disk image")]
    Image(#[from] ImageError),
    /// The package image could not be copied.
    #[error("copy the package image")]
    Clone(#[from] CloneError),
    /// A file could not be read or written.
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
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError + use<> {
    let path = path.to_owned();
    move |source| RootfsError::Io { step, path, source }
}

/// Makes the image that `config` describes. Takes minutes the first time, then about a second.
///
/// Not cancel-safe; to stop it, cancel `scope`: it then ends soon, with an error. If the process
/// is killed, the next call removes what that left in the cache.
///
/// # Errors
/// [`RootfsError`].
pub async fn assemble(
    config: &RootfsConfig,
    scope: &Scope,
    on: OnProgress<'_>,
) -> Result<Rootfs, RootfsError> {
    if !rustix::process::geteuid().is_root() {
        return Err(RootfsError::NotRoot);
    }
    let config = &with_absolute_paths(config)?;
    let cache_dir = &config.cache_dir;
    std::fs::create_dir_all(cache_dir).map_err(io_error("make", cache_dir))?;
    let _turn = lock(cache_dir)?;
    remove_stale(cache_dir).await?;

    let mut undo = Teardown::new(scope, Duration::from_secs(120));
    let work_dir = cache_dir.join(format!("{WORK_PREFIX}{}", std::process::id()));
    std::fs::create_dir(&work_dir).map_err(io_error("make", &work_dir))?;
    let folder = work_dir.clone();
    undo.push("work folder", async move { remove_tree(&folder).await.map_err(|e| e.to_string()) });
    let outcome = assemble_in(&work_dir, config, scope, on).await;
    // A folder that cannot be removed is logged there, and removed by the next build.
    let _leaks = undo.run().await;
    outcome
}

/// Programs run in the work folder, where a relative path would mean something else.
fn with_absolute_paths(config: &RootfsConfig) -> Result<RootfsConfig, RootfsError> {
    let absolute = |path: &Path| std::path::absolute(path).map_err(io_error("locate", path));
    Ok(RootfsConfig {
        envd: absolute(&config.envd)?,
        output: absolute(&config.output)?,
        cache_dir: absolute(&config.cache_dir)?,
        disk: config.disk,
        etc_apt: config.etc_apt.clone(),
    })
}

async fn assemble_in(
    work_dir: &Path,
    config: &RootfsConfig,
    scope: &Scope,
    on: OnProgress<'_>,
) -> Result<Rootfs, RootfsError> {
    let sources = host_sources(&config.etc_apt, SUITE)?;
    let apt_options = host_apt_options(work_dir, scope).await?;
    let key = package_key(&sources, &apt_options, config.disk);
    let packages = config.cache_dir.join(format!("{IMAGE_PREFIX}{key}.ext4"));
    let log = config.cache_dir.join("rootfs.log");
    let shop = Workshop { scope, work_dir, log: &log };

    let packages_cached = packages.exists();
    if packages_cached {
        on(Event::Step("take the package image from the cache"));
    } else {
        std::fs::write(&log, "").map_err(io_error("write", &log))?;
        let image = package_image(shop, &sources, &apt_options, config.disk, on).await?;
        std::fs::rename(&image, &packages).map_err(io_error("make", &packages))?;
        remove_other_images(&config.cache_dir, &packages)?;
    }

    on(Event::Step("put in the guest daemon"));
    let unfinished = work_dir.join("rootfs.ext4");
    copy_image(&packages, &unfinished).await?;
    shop.add_program(&unfinished, &config.envd, ENVD_FOLDER, ENVD_NAME).await?;
    let size_bytes = std::fs::metadata(&unfinished).map_err(io_error("find", &unfinished))?.len();
    publish(&unfinished, &config.output).await?;
    Ok(Rootfs { image: config.output.clone(), disk: MiB::at_least(size_bytes), packages_cached })
}

/// The slow part: packages, the changes to them, and an image of that. Answers its path in the work
/// folder.
async fn package_image(
    shop: Workshop<'_>,
    sources: &Sources,
    apt_options: &[String],
    disk: MiB,
    on: OnProgress<'_>,
) -> Result<PathBuf, RootfsError> {
    on(Event::Step("download and unpack Debian packages"));
    let tree = shop.work_dir.join("tree");
    let sources_file = shop.work_dir.join("debian.sources");
    std::fs::write(&sources_file, &sources.text).map_err(io_error("write", &sources_file))?;
    let program = Program {
        name: "mmdebstrap",
        package: "mmdebstrap",
        args: mmdebstrap_args(&tree, &sources_file, apt_options),
        env: vec![("SOURCE_DATE_EPOCH", EPOCH_S)],
        current_dir: shop.work_dir,
        log: shop.log,
        deadline: PACKAGES_DEADLINE,
    };
    program
        .run(shop.scope, |line| {
            if let Some(detail) = line.strip_prefix("I: ") {
                on(Event::Detail(detail.to_owned()));
            }
        })
        .await?;

    on(Event::Step("prepare the package tree"));
    let (root, sources, options) = (tree.clone(), sources.clone(), apt_options.to_vec());
    let used_bytes = blocking(move || {
        tree::customise(&root, &sources, &options)?;
        tree::used_bytes(&root)
    })
    .await?;

    on(Event::Step("make the disk image"));
    let image = shop.work_dir.join("packages.ext4");
    let size = MiB(disk.0.max(MiB::at_least(used_bytes).0 + FREE_MIN.0));
    shop.make_ext4(&tree, &image, size).await?;
    Ok(image)
}

fn mmdebstrap_args(tree: &Path, sources: &Path, apt_options: &[String]) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![
        "--mode=root".into(),
        "--variant=minbase".into(),
        "--format=directory".into(),
        format!("--include={}", PACKAGES.join(",")).into(),
    ];
    args.extend(apt_options.iter().map(|option| format!("--aptopt={option}").into()));
    let dpkg_options = tree::DPKG_OPTIONS.lines();
    args.extend(dpkg_options.map(|option| format!("--dpkgopt={option}").into()));
    args.extend([SUITE.into(), tree.into(), sources.into()]);
    args
}

/// The host's apt options that decide whether its mirrors can be used at all: the proxy, and how
/// strict apt is about dates of archives.
async fn host_apt_options(work_dir: &Path, scope: &Scope) -> Result<Vec<String>, RootfsError> {
    let log = work_dir.join("apt-config");
    let program = Program {
        name: "apt-config",
        package: "apt",
        args: vec!["dump".into(), "Acquire".into()],
        env: vec![],
        current_dir: work_dir,
        log: &log,
        deadline: Duration::from_secs(30),
    };
    let mut options = Vec::new();
    program
        .run(scope, |line| {
            if is_wanted_option(line) {
                options.push(line.to_owned());
            }
        })
        .await?;
    Ok(options)
}

/// `Name "value";` of an option that is set and wanted.
fn is_wanted_option(line: &str) -> bool {
    let Some((name, value)) = line.split_once(' ') else { return false };
    let name = name.to_ascii_lowercase();
    let wanted = name.starts_with("acquire::check-")
        || name.starts_with("acquire::http::proxy")
        || name.starts_with("acquire::https::proxy");
    wanted && value.starts_with('"') && value.ends_with("\";") && value != "\"\";"
}

/// A digest of everything the package image depends on, as far as this host can tell.
fn package_key(sources: &Sources, apt_options: &[String], disk: MiB) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hasher.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(bytes);
    };
    part(SUITE.as_bytes());
    part(PACKAGES.join(",").as_bytes());
    part(tree::recipe().as_slice());
    part(sources.text.as_bytes());
    part(apt_options.join("\n").as_bytes());
    part(&disk.0.to_le_bytes());
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Holds the cache for this process until dropped; the kernel frees it if the process dies.
fn lock(cache_dir: &Path) -> Result<std::fs::File, RootfsError> {
    let path = cache_dir.join("lock");
    let file = std::fs::File::create(&path).map_err(io_error("make", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(RootfsError::Busy { cache_dir: cache_dir.to_owned() })
        }
        Err(e) => Err(io_error("lock", &path)(e.into())),
    }
}

/// Removes work folders of builds that were killed. The cache is locked, so none is in use.
async fn remove_stale(cache_dir: &Path) -> Result<(), RootfsError> {
    for path in entries_named(cache_dir, WORK_PREFIX)? {
        remove_tree(&path).await.map_err(io_error("remove", &path))?;
    }
    Ok(())
}

/// One package image is kept: the others were made from lists that are not used any more.
fn remove_other_images(cache_dir: &Path, current: &Path) -> Result<(), RootfsError> {
    for path in entries_named(cache_dir, IMAGE_PREFIX)? {
        if path != current {
            std::fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

fn entries_named(dir: &Path, prefix: &str) -> Result<Vec<PathBuf>, RootfsError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

async fn remove_tree(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    blocking(move || std::fs::remove_dir_all(path)).await
}

async fn copy_image(from: &Path, to: &Path) -> Result<(), RootfsError> {
    let (from, to) = (from.to_owned(), to.to_owned());
    blocking(move || clone_file(&from, &to)).await?;
    Ok(())
}

/// Puts the finished image in its place, whole and on stable storage.
async fn publish(unfinished: &Path, output: &Path) -> Result<(), RootfsError> {
    let (unfinished, output) = (unfinished.to_owned(), output.to_owned());
    blocking(move || {
        let folder = output.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(io_error("make", folder))?;
        // The output may lie on another file system than the cache.
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let beside = folder.join(format!(".{name}.{}", std::process::id()));
        if std::fs::rename(&unfinished, &beside).is_err() {
            clone_file(&unfinished, &beside)?;
        }
        let finished = std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o644))
            .and_then(|()| std::fs::File::open(&beside)?.sync_all())
            .and_then(|()| std::fs::rename(&beside, &output));
        finished.map_err(|e| {
            // The error that matters is `e`.
            let _removed = std::fs::remove_file(&beside);
            io_error("make", &output)(e)
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_options_that_reach_a_mirror_are_taken() {
        assert!(is_wanted_option("Acquire::Check-Valid-Until \"false\";"));
        assert!(is_wanted_option("Acquire::http::Proxy \"http://proxy.example:3128\";"));
        assert!(is_wanted_option("Acquire::http::Proxy::mirror.example \"DIRECT\";"));
        for line in
            ["Acquire \"\";", "Acquire::http::Proxy \"\";", "Acquire::Languages \"none\";", ""]
        {
            assert!(!is_wanted_option(line), "{line}");
        }
    }

    #[test]
    fn the_key_follows_what_the_image_is_made_of() {
        let sources = |text: &str| Sources { text: text.to_owned(), keyrings: Vec::new() };
        let keys = [
            package_key(&sources("a"), &[], MiB(2048)),
            package_key(&sources("b"), &[], MiB(2048)),
            package_key(&sources("a"), &["b".to_owned()], MiB(2048)),
            package_key(&sources("a"), &[], MiB(2049)),
        ];
        let different: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
        assert_eq!(keys[0], package_key(&sources("a"), &[], MiB(2048)));
    }

    #[tokio::test]
    async fn one_build_at_a_time_works_in_a_cache() {
        let dir = tempfile::tempdir().expect("temp folder");
        let turn = lock(dir.path()).expect("free");
        assert!(matches!(lock(dir.path()), Err(RootfsError::Busy { .. })));
        drop(turn);
        let stale = dir.path().join("work-1/tree");
        std::fs::create_dir_all(&stale).expect("mkdir");
        let _turn = lock(dir.path()).expect("free again");
        remove_stale(dir.path()).await.expect("remove");
        assert!(!stale.exists());
    }
}
