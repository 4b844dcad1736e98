//! The changes of one watched directory, as the kernel's inotify tells them: one event a change,
//! named below the directory. Everything here blocks, on a disk or on whatever else is mounted.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use belljar_wire::rpc::filesystem::{EventType, FilesystemEvent};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::entry;
use super::watch::{Lost, Wanted, WatchError};
use crate::accounts::Accounts;

/// Directories one recursive watch covers, and entries it finds in a tree that is moved in. The
/// kernel has limits of its own.
pub(super) const TREE_MAX: usize = 100_000;

/// Changes read before they are handed on.
const BATCH: usize = 256;

/// File systems whose other users' changes inotify does not see: NFS, SMB (three), FUSE, 9p, Ceph.
/// Source: `statfs(2)`.
const NETWORK_MAGIC: [i64; 7] =
    [0x6969, 0x517B, 0xFF53_4D42, 0xFE53_4D42, 0x6573_5546, 0x0102_1997, 0x00C3_6400];

/// A watched directory, or tree, and the names its watches have.
#[derive(Debug)]
pub(super) struct Watched {
    wanted: Wanted,
    directories: HashMap<i32, PathBuf>,
}

/// What reading left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing: wait for more.
    Nothing,
    /// There may be more to read at once.
    More,
    /// There never will be more: the directory is gone.
    Ended,
}

/// Starts watching.
///
/// # Errors
/// [`WatchError`] when the directory cannot be watched.
pub(super) fn open(wanted: Wanted) -> Result<(OwnedFd, Watched), WatchError> {
    let path = wanted.path.clone();
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(WatchError::NotADirectory(path)),
        Err(error) => return Err(refuse(path, error)),
    }
    let file_system = match rustix::fs::statfs(&path) {
        Ok(file_system) => file_system,
        Err(error) => return Err(refuse(path, error.into())),
    };
    if !wanted.allow_network_mounts && NETWORK_MAGIC.contains(&file_system.f_type) {
        return Err(WatchError::NetworkMount(path));
    }
    let inotify = match inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) {
        Ok(inotify) => inotify,
        // The kernel's limit for a user, or this process's own.
        Err(Errno::MFILE | Errno::NFILE) => return Err(WatchError::TooMany),
        Err(error) => return Err(refuse(path, error.into())),
    };
    let mut watched = Watched { wanted, directories: HashMap::new() };
    match watched.add(&inotify, &path, &mut |_| {}) {
        Ok(()) => Ok((inotify, watched)),
        Err(Lost::TooLarge) => Err(WatchError::TooLarge(path)),
        Err(Lost::Read(error)) => Err(refuse(path, error)),
        Err(Lost::Overflow) => unreachable!("nothing was read yet"),
    }
}

fn refuse(path: PathBuf, source: io::Error) -> WatchError {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => WatchError::NotFound(path),
        _ => WatchError::Io { path, source },
    }
}

/// Reads what there is, at most about a batch.
///
/// # Errors
/// [`Lost`] when changes were missed, or will be.
pub(super) fn read(
    inotify: impl AsFd,
    watched: &mut Watched,
    pending: &mut Vec<FilesystemEvent>,
) -> Result<Left, Lost> {
    // Room for a few dozen events with names of ordinary length.
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let inotify = inotify.as_fd();
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let accounts = watched.wanted.include_entry.then(Accounts::load);
    let mut tell = Teller { root: watched.wanted.path.clone(), accounts, pending };
    loop {
        // Events in the reader's buffer have left the kernel: they are never left behind.
        if tell.pending.len() >= BATCH && reader.is_buffer_empty() {
            return Ok(Left::More);
        }
        match reader.next() {
            Ok(event) => {
                let name = event
                    .file_name()
                    .map(|name| Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())));
                watched.take(&inotify, event.wd(), event.events(), name, &mut tell)?;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if watched.directories.is_empty() => return Ok(Left::Ended),
            Err(Errno::AGAIN) => return Ok(Left::Nothing),
            Err(error) => return Err(Lost::Read(error.into())),
        }
    }
}

/// Turns changes into events.
struct Teller<'a> {
    root: PathBuf,
    accounts: Option<Accounts>,
    pending: &'a mut Vec<FilesystemEvent>,
}

impl Teller<'_> {
    fn tell(&mut self, path: &Path, kind: EventType) {
        let name = path.strip_prefix(&self.root).unwrap_or(path).to_string_lossy();
        let name = if name.is_empty() { ".".to_owned() } else { name.into_owned() };
        let describe = |accounts| entry::describe(path, accounts).ok();
        self.pending.push(FilesystemEvent {
            name,
            r#type: kind.into(),
            entry: self.accounts.as_ref().and_then(describe).into(),
            ..FilesystemEvent::default()
        });
    }
}

fn kind(flags: ReadFlags) -> Option<EventType> {
    [
        (ReadFlags::CREATE | ReadFlags::MOVED_TO, EventType::EVENT_TYPE_CREATE),
        (ReadFlags::DELETE | ReadFlags::DELETE_SELF, EventType::EVENT_TYPE_REMOVE),
        (ReadFlags::MODIFY, EventType::EVENT_TYPE_WRITE),
        (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, EventType::EVENT_TYPE_RENAME),
        (ReadFlags::ATTRIB, EventType::EVENT_TYPE_CHMOD),
    ]
    .into_iter()
    .find_map(|(mask, kind)| flags.intersects(mask).then_some(kind))
}

impl Watched {
    /// Tells of one event of the kernel, and follows the tree it changes.
    fn take(
        &mut self,
        inotify: &impl AsFd,
        watch: i32,
        flags: ReadFlags,
        name: Option<&Path>,
        tell: &mut Teller<'_>,
    ) -> Result<(), Lost> {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Err(Lost::Overflow);
        }
        let Some(directory) = self.directories.get(&watch).cloned() else { return Ok(()) };
        if flags.contains(ReadFlags::IGNORED) {
            self.directories.remove(&watch);
            return Ok(());
        }
        let is_root = directory == self.wanted.path;
        let path = name.map_or_else(|| directory.clone(), |name| directory.join(name));
        // What happens to a directory below the watched one is told by the one above it.
        if let Some(kind) = kind(flags).filter(|_| name.is_some() || is_root) {
            tell.tell(&path, kind);
        }
        if self.wanted.recursive && flags.contains(ReadFlags::ISDIR) && name.is_some() {
            if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                // What was in it before it was watched.
                self.add(inotify, &path, &mut |below| {
                    tell.tell(below, EventType::EVENT_TYPE_CREATE);
                })?;
            } else if flags.contains(ReadFlags::MOVED_FROM) {
                self.drop_below(inotify, &path);
            }
        }
        Ok(())
    }

    /// Watches a directory and, when that is wanted, all below it. Tells what is below. What is
    /// gone again before it could be watched is left out, and so is what no path is long enough
    /// for; the watched directory itself must be there.
    fn add(
        &mut self,
        inotify: &impl AsFd,
        top: &Path,
        found: &mut dyn FnMut(&Path),
    ) -> Result<(), Lost> {
        let is_root = top == self.wanted.path;
        let mut ahead = vec![top.to_owned()];
        let mut entries = 0;
        while let Some(path) = ahead.pop() {
            match self.add_one(inotify, &path) {
                Ok(()) => {}
                Err(Lost::Read(_)) if !is_root || path != top => continue,
                Err(error) => return Err(error),
            }
            if !self.wanted.recursive {
                return Ok(());
            }
            // The watch stands before the directory is read, so nothing slips between.
            for child in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                entries += 1;
                if !is_root && entries > TREE_MAX {
                    return Err(Lost::TooLarge);
                }
                found(&child.path());
                if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                    ahead.push(child.path());
                }
            }
        }
        Ok(())
    }

    fn add_one(&mut self, inotify: &impl AsFd, path: &Path) -> Result<(), Lost> {
        if self.directories.len() >= TREE_MAX {
            return Err(Lost::TooLarge);
        }
        let mut flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVE_SELF
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR;
        if path != self.wanted.path {
            flags |= WatchFlags::DONT_FOLLOW;
        }
        match inotify::add_watch(inotify, path, flags) {
            Ok(watch) => {
                self.directories.insert(watch, path.to_owned());
                Ok(())
            }
            // The kernel's limit of watches for a user.
            Err(Errno::NOSPC | Errno::NOMEM) => Err(Lost::TooLarge),
            Err(error) => Err(Lost::Read(error.into())),
        }
    }

    /// Forgets a directory that was moved away, with all below it.
    fn drop_below(&mut self, inotify: &impl AsFd, path: &Path) {
        self.directories.retain(|watch, directory| {
            let gone = directory.starts_with(path);
            if gone {
                // It may have ended by itself.
                let _ = inotify::remove_watch(inotify, *watch);
            }
            !gone
        });
    }
}
