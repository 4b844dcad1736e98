//! Walking to a file, and with whose rights: the permission model of every file call.
//!
//! The access token is what permits a call; the user it names is a wish, not a proof, and whoever
//! holds the token may name `root`. So, as clients of the original expect, the daemon uses **its
//! own rights**: it reads and writes any file, and the user named decides three things: the home
//! directory paths start at, the owner of what is made or written, and the following of links.
//!
//! **Links.** A program inside that is not root can put a symbolic link where a client will read
//! or write, and must not win root's rights by it. A link that root made is followed like any other
//! part of a path. From a path with a link somebody else made, the whole call is done with the file
//! rights **of the user it names**: the kernel then decides as if that user's own program had asked.
//!
//! **Races.** A path is walked name by name, each directory held open, no link followed by the
//! kernel. What was checked is what is used, whatever is renamed or re-linked meanwhile. What is
//! made is made in the directory that is held; owners are changed on open descriptors.
//!
//! Looking (`Stat`, `ListDir`, watches) changes nothing and tells no content, so it follows every
//! link with the daemon's rights.
//!
//! A daemon that is not root has one set of rights for everything.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use crate::accounts::User;

/// Links one path may lead through, as in the kernel.
const LINKS_MAX: usize = 40;

/// How often a walk is begun again because its last name turned into a link meanwhile.
const RETRIES: usize = 16;

/// What a link at the end of a path means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    /// What it points at.
    Follow,
    /// The link itself.
    Keep,
}

/// Whose rights count.
#[derive(Debug, Clone)]
enum Rights {
    Daemon,
    User(User),
}

/// Where a path leads: a directory that is held, and a name in it.
#[derive(Debug)]
pub(super) struct Place {
    /// The path as it was asked for; for messages and answers.
    pub(super) path: PathBuf,
    /// The deepest directory on the way that exists.
    pub(super) dir: OwnedFd,
    /// Directories below it that do not exist yet, outermost first.
    missing: Vec<OsString>,
    /// The last name; `.` for the root.
    pub(super) name: OsString,
    rights: Rights,
}

/// A file opened to be written, and what has to be known when that fails half-way.
#[derive(Debug)]
pub(super) struct Opened {
    /// The file, empty, and owned by the user.
    pub(super) file: File,
    /// Where it is.
    pub(super) place: Place,
    /// Whether it was not there before.
    pub(super) is_new: bool,
}

/// Walks to `path`, which must be absolute and clean, for `user`.
///
/// # Errors
/// As `openat(2)` of each directory on the way; a missing one is no error.
pub(super) fn reach(path: &Path, user: &User, last: Last) -> io::Result<Place> {
    let alone = user.uid == 0 || !rustix::process::geteuid().is_root();
    let trust = if alone { Trust::Everyone } else { Trust::Root };
    match walk(path, last, trust) {
        Ok(walked) => Ok(walked.into_place(path, Rights::Daemon)),
        Err(Stop::Failed(error)) => Err(error.into()),
        Err(Stop::ForeignLink) => {
            let rights = Rights::User(user.clone());
            let walked = rights.act(|| match walk(path, last, Trust::Everyone) {
                Ok(walked) => Ok(walked),
                Err(Stop::Failed(error)) => Err(error),
                Err(Stop::ForeignLink) => Err(Errno::LOOP),
            })?;
            Ok(walked.into_place(path, rights))
        }
    }
}

/// Opens a file to be read. Pipes and devices are opened without waiting.
///
/// # Errors
/// As `openat(2)`.
pub(super) fn open_to_read(path: &Path, user: &User) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    for _ in 0..RETRIES {
        let place = reach(path, user, Last::Follow)?;
        if !place.missing.is_empty() {
            return Err(Errno::NOENT.into());
        }
        match place.open(flags) {
            Err(Errno::LOOP) => {}
            opened => return opened.map(File::from).map_err(|error| place.explain(error)),
        }
    }
    Err(Errno::LOOP.into())
}

/// Opens a file to be written from its start, makes it and the directories above it when they are
/// missing, and makes `user` the owner. Devices and pipes keep theirs, and so does a file with
/// several names, which may be somebody's way to have another one's file given to them.
///
/// # Errors
/// As `openat(2)`, `mkdirat(2)` and `fchown(2)`.
pub(super) fn open_to_write(path: &Path, user: &User) -> io::Result<Opened> {
    let old = OFlags::WRONLY | OFlags::TRUNC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    for _ in 0..RETRIES {
        let mut place = reach(path, user, Last::Follow)?;
        place.make_missing(user)?;
        let (opened, is_new) = match place.open(old) {
            Err(Errno::NOENT) => (place.open(new), true),
            opened => (opened, false),
        };
        match opened {
            Err(Errno::LOOP | Errno::EXIST) => {}
            Err(error) => return Err(place.explain(error)),
            Ok(file) => {
                place.give(&file, user)?;
                return Ok(Opened { file: File::from(file), place, is_new });
            }
        }
    }
    Err(Errno::LOOP.into())
}

impl Place {
    /// Opens the name itself; a link is `ELOOP`.
    pub(super) fn open(&self, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o666);
        self.act(|| rustix::fs::openat(&self.dir, &self.name, flags, mode))
    }

    /// Describes the name itself; `None` when nothing is there.
    pub(super) fn stat(&self) -> rustix::io::Result<Option<Stat>> {
        if !self.missing.is_empty() {
            return Ok(None);
        }
        match rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the directories that are missing on the way, owned by `user`.
    ///
    /// # Errors
    /// As `mkdirat(2)`; `ENOTDIR` when something else took the name.
    pub(super) fn make_missing(&mut self, user: &User) -> io::Result<()> {
        for name in std::mem::take(&mut self.missing) {
            let dir = self.make(&name, user).map(|(dir, _)| dir);
            self.dir = dir.map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    /// Makes the name a directory, owned by `user`. Says whether it was not there.
    ///
    /// # Errors
    /// As `mkdirat(2)`; `ENOTDIR` when something else is there.
    pub(super) fn make_dir(&self, user: &User) -> io::Result<bool> {
        let made = self.make(&self.name, user).map(|(_, is_new)| is_new);
        made.map_err(|error| self.explain(error))
    }

    fn make(&self, name: &OsStr, user: &User) -> rustix::io::Result<(OwnedFd, bool)> {
        let mode = Mode::from_raw_mode(0o777);
        let is_new = match self.act(|| rustix::fs::mkdirat(&self.dir, name, mode)) {
            Ok(()) => true,
            // Someone else made it meanwhile, which serves as well.
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error),
        };
        let dir = match open_dir(&self.dir, name) {
            Err(Errno::LOOP) => return Err(Errno::NOTDIR),
            dir => dir?,
        };
        if is_new {
            self.give(&dir, user)?;
        }
        Ok((dir, is_new))
    }

    /// Makes `user` the owner of what is open, unless it is already, or is none that may change.
    pub(super) fn give(&self, file: &OwnedFd, user: &User) -> rustix::io::Result<()> {
        let stat = rustix::fs::fstat(file)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let changes = match kind {
            FileType::RegularFile => stat.st_nlink <= 1,
            FileType::Directory => true,
            _ => false,
        };
        // What is made with the user's rights is theirs; what was there before stays whose it is.
        let own = matches!(self.rights, Rights::Daemon);
        if !changes || !own || (stat.st_uid, stat.st_gid) == (user.uid, user.gid) {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        rustix::fs::chownat(file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
    }

    /// Removes the name if it still is this file.
    pub(super) fn unlink_if(&self, file: &File) {
        let Ok(mine) = rustix::fs::fstat(file) else { return };
        if let Ok(Some(there)) = self.stat()
            && (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
        {
            // It is half a file nobody was told about; the caller reports why.
            let _ = self.act(|| rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty()));
        }
    }

    /// Of two places of one operation the one with fewer rights, which then count for both.
    pub(super) fn stricter<'a>(&'a self, other: &'a Place) -> &'a Place {
        match self.rights {
            Rights::Daemon => other,
            Rights::User(_) => self,
        }
    }

    /// Whether both are the same name of the same directory.
    pub(super) fn is_same(&self, other: &Place) -> bool {
        let id = |place: &Place| {
            let stat = rustix::fs::fstat(&place.dir).ok()?;
            Some((stat.st_dev, stat.st_ino, place.missing.is_empty()))
        };
        self.name == other.name && id(self).is_some() && id(self) == id(other)
    }

    /// Does one thing with the rights this place was reached with.
    ///
    /// # Errors
    /// Those of the job; `EPERM` when the rights cannot be taken on.
    pub(super) fn act<T>(
        &self,
        job: impl FnOnce() -> rustix::io::Result<T>,
    ) -> rustix::io::Result<T> {
        self.rights.act(job)
    }

    /// Adds to a refusal whose rights it is about.
    pub(super) fn explain(&self, error: Errno) -> io::Error {
        match &self.rights {
            Rights::User(user) if matches!(error, Errno::ACCESS | Errno::PERM) => io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "permission denied: the path leads through a symbolic link that is not \
                     root's, which is followed with the rights of user '{}'",
                    user.name
                ),
            ),
            _ => error.into(),
        }
    }
}

impl Rights {
    fn act<T>(&self, job: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        match self {
            Rights::Daemon => job(),
            Rights::User(user) => {
                let _acting = Acting::begin(user)?;
                job()
            }
        }
    }
}

/// This thread has a user's rights over files until this is dropped. Its real and saved ids stay
/// root's: nobody but root may signal or trace it meanwhile.
struct Acting {
    groups: Vec<Gid>,
}

/// Ids that stay as they are.
const NO_UID: Option<Uid> = None;
const NO_GID: Option<Gid> = None;

impl Acting {
    fn begin(user: &User) -> rustix::io::Result<Acting> {
        let acting = Acting { groups: rustix::process::getgroups()? };
        let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(NO_GID, Gid::from_raw(user.gid), NO_GID)?;
        rustix::thread::set_thread_res_uid(NO_UID, Uid::from_raw(user.uid), NO_UID)?;
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        let back = rustix::thread::set_thread_res_uid(NO_UID, Uid::ROOT, NO_UID)
            .and_then(|()| {
                rustix::thread::set_thread_res_gid(NO_GID, rustix::process::getgid(), NO_GID)
            })
            .and_then(|()| rustix::thread::set_thread_groups(&self.groups));
        if back.is_err() {
            // The thread would serve others with this user's rights. The saved ids are root's, so
            // only a kernel without memory can refuse.
            tracing::error!("failed to take back the daemon's own rights");
            std::process::abort();
        }
    }
}

/// Whose links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    Root,
    Everyone,
}

enum Stop {
    ForeignLink,
    Failed(Errno),
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Stop {
        Stop::Failed(error)
    }
}

struct Walked {
    dir: OwnedFd,
    missing: Vec<OsString>,
    name: OsString,
}

impl Walked {
    fn into_place(self, path: &Path, rights: Rights) -> Place {
        let Walked { dir, missing, name } = self;
        Place { path: path.to_owned(), dir, missing, name, rights }
    }
}

fn walk(path: &Path, last: Last, trust: Trust) -> Result<Walked, Stop> {
    let mut dir = root()?;
    // The names ahead, the next one last.
    let mut ahead = names(path);
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        let is_last = ahead.is_empty();
        if name == ".." {
            dir = open_dir(&dir, &name)?;
            continue;
        }
        if is_last && last == Last::Keep {
            return Ok(Walked { dir, missing: Vec::new(), name });
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = match rustix::fs::openat(&dir, &name, flags, Mode::empty()) {
            Ok(found) => found,
            Err(Errno::NOENT) => return missing_from(dir, name, ahead),
            Err(error) => return Err(error.into()),
        };
        let stat = rustix::fs::fstat(&found)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                if trust == Trust::Root && stat.st_uid != 0 {
                    return Err(Stop::ForeignLink);
                }
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP.into());
                }
                let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    dir = root()?;
                }
                ahead.extend(names(&target));
            }
            _ if is_last => return Ok(Walked { dir, missing: Vec::new(), name }),
            FileType::Directory => dir = found,
            _ => return Err(Errno::NOTDIR.into()),
        }
    }
    Ok(Walked { dir, missing: Vec::new(), name: ".".into() })
}

/// The end of a walk at the first name that does not exist.
fn missing_from(dir: OwnedFd, name: OsString, ahead: Vec<OsString>) -> Result<Walked, Stop> {
    let mut missing = vec![name];
    missing.extend(ahead.into_iter().rev());
    if missing.iter().any(|name| name == "..") {
        return Err(Errno::NOENT.into());
    }
    let name = missing.pop().expect("it begins with one name");
    Ok(Walked { dir, missing, name })
}

/// The names of a path, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().rev().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.collect()
}

fn root() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/", flags, Mode::empty())
}

fn open_dir(dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}
