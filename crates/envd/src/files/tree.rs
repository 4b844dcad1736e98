//! Changes to the directory tree. Everything here blocks.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use belljar_wire::rpc::filesystem::EntryInfo;
use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::reach::{self, Last, Place};
use super::{entry, erase, relocate};
use crate::accounts::{Accounts, User};

/// Most entries one listing may have. The answer is one message, in memory with its JSON: about
/// 1 KiB an entry.
const LISTING_MAX_ENTRIES: usize = 100_000;

/// Why an operation on the tree failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    /// Nothing is there.
    #[error("path not found: {}", .0.display())]
    NotFound(PathBuf),
    /// It is there, and is a directory.
    #[error("directory already exists: {}", .0.display())]
    Exists(PathBuf),
    /// A file is where a directory is needed.
    #[error("path is not a directory: {}", .0.display())]
    NotADirectory(PathBuf),
    /// A directory is where the moved file should be.
    #[error("path is a directory: {}", .0.display())]
    IsADirectory(PathBuf),
    /// The destination of a move holds something.
    #[error("directory is not empty: {}", .0.display())]
    NotEmpty(PathBuf),
    /// A directory cannot be moved below itself.
    #[error("cannot move {} into itself", .0.display())]
    IntoItself(PathBuf),
    /// A file system is mounted there, or below.
    #[error("cannot {operation} {}: a file system is mounted there or below", path.display())]
    Mounted {
        /// Verb.
        operation: &'static str,
        /// What.
        path: PathBuf,
    },
    /// A directory cannot be handled that large.
    #[error("more than {LISTING_MAX_ENTRIES} entries in {}: list less depth, or directories below it", .0.display())]
    TooMany(PathBuf),
    /// The kernel refused.
    #[error("{operation} {}", path.display())]
    Io {
        /// Verb.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl TreeError {
    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TreeError {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => TreeError::NotFound(path),
            io::ErrorKind::NotADirectory => TreeError::NotADirectory(path),
            io::ErrorKind::ResourceBusy => TreeError::Mounted { operation, path },
            _ => TreeError::Io { operation, path, source },
        }
    }

    /// As `io`, for looking: what would be below a file is not there.
    fn looking(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TreeError {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotADirectory => TreeError::NotFound(path),
            _ => TreeError::io(operation, &path)(source),
        }
    }
}

/// Describes one entry.
pub(super) fn stat(path: &Path) -> Result<EntryInfo, TreeError> {
    entry::describe(path, &Accounts::load()).map_err(TreeError::looking("look at", path))
}

/// Makes a directory and those above it, owned by `user`.
pub(super) fn make_dir(path: &Path, user: &User) -> Result<EntryInfo, TreeError> {
    let failed = || TreeError::io("make the directory", path);
    let existing = |path: &Path| match std::fs::metadata(path) {
        Ok(there) if there.is_dir() => TreeError::Exists(path.to_owned()),
        // Also a link that leads nowhere.
        _ => TreeError::NotADirectory(path.to_owned()),
    };
    let mut place = reach::reach(path, user, Last::Keep).map_err(failed())?;
    if place.stat().map_err(|error| failed()(error.into()))?.is_some() {
        return Err(existing(path));
    }
    place.make_missing(user).map_err(failed())?;
    if !place.make_dir(user).map_err(failed())? {
        return Err(existing(path));
    }
    stat(path)
}

/// Renames, to another file system too; what is at the destination and can be replaced by a
/// rename is. Directories missing above the destination are made, owned by `user`.
pub(super) fn rename(from: &Path, to: &Path, user: &User) -> Result<EntryInfo, TreeError> {
    let source =
        reach::reach(from, user, Last::Keep).map_err(TreeError::looking("look at", from))?;
    let there = source.stat().map_err(|error| TreeError::looking("look at", from)(error.into()))?;
    if there.is_none() {
        return Err(TreeError::NotFound(from.to_owned()));
    }
    if to != from && to.starts_with(from) {
        return Err(TreeError::IntoItself(from.to_owned()));
    }
    let mut target = reach::reach(to, user, Last::Keep).map_err(TreeError::io("move to", to))?;
    target.make_missing(user).map_err(TreeError::io("make a directory for", to))?;
    let renamed = source
        .stricter(&target)
        .act(|| rustix::fs::renameat(&source.dir, &source.name, &target.dir, &target.name));
    let outcome = match renamed {
        Err(Errno::XDEV) => relocate::relocate(&source, &target),
        outcome => outcome.map_err(|error| source.stricter(&target).explain(error)),
    };
    outcome.map_err(|error| match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ISDIR) => TreeError::IsADirectory(to.to_owned()),
        Some(Errno::NOTEMPTY | Errno::EXIST) => TreeError::NotEmpty(to.to_owned()),
        Some(Errno::INVAL) => TreeError::IntoItself(from.to_owned()),
        Some(Errno::BUSY) => TreeError::Mounted { operation: "move", path: from.to_owned() },
        _ => TreeError::io("move to", to)(error),
    })?;
    stat(to)
}

/// Removes whatever is there, with everything below; nothing there is fine.
pub(super) fn remove(path: &Path, user: &User) -> Result<(), TreeError> {
    let outcome = reach::reach(path, user, Last::Keep).and_then(|place| {
        if is_mount(&place) {
            return Err(Errno::BUSY.into());
        }
        erase::erase(&place).map_err(|error| place.explain(error))
    });
    match outcome.map_err(TreeError::io("remove", path)) {
        Err(TreeError::NotFound(_)) => Ok(()),
        outcome => outcome,
    }
}

/// Whether a file system is mounted on the name itself. The root always is one.
fn is_mount(place: &Place) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    place.name == "."
        || rustix::fs::statx(&place.dir, &place.name, flags, StatxFlags::empty())
            .is_ok_and(|statx| statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Lists a directory, `depth` levels deep, a directory before what it holds, names in byte order.
/// Links are listed, not followed, except the directory itself. What disappears meanwhile, what
/// may not be read, and what is nested deeper than a path can say is left out, but not the
/// directory itself. Names that are not UTF-8 are shown with replacement characters.
pub(super) fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, TreeError> {
    let looked = TreeError::looking("look at", path);
    if !std::fs::metadata(path).map_err(looked)?.is_dir() {
        return Err(TreeError::NotADirectory(path.to_owned()));
    }
    let accounts = Accounts::load();
    let mut entries = Vec::new();
    let mut levels = vec![Level::read(path).map_err(TreeError::io("list", path))?];
    while let Some(level) = levels.last_mut() {
        let Some((name, is_dir)) = level.children.next() else {
            levels.pop();
            continue;
        };
        let child = level.path.join(name);
        let Ok(entry) = entry::describe(&child, &accounts) else { continue };
        if entries.len() >= LISTING_MAX_ENTRIES {
            return Err(TreeError::TooMany(path.to_owned()));
        }
        entries.push(entry);
        if is_dir
            && u32::try_from(levels.len()).is_ok_and(|level| level < depth)
            && let Ok(below) = Level::read(&child)
        {
            levels.push(below);
        }
    }
    Ok(entries)
}

/// A directory being listed.
struct Level {
    path: PathBuf,
    /// Names, and whether each is a directory.
    children: std::vec::IntoIter<(OsString, bool)>,
}

impl Level {
    fn read(path: &Path) -> io::Result<Level> {
        let mut children = Vec::new();
        for child in std::fs::read_dir(path)? {
            // One more than is listed anyway: the listing will say so.
            if children.len() > LISTING_MAX_ENTRIES {
                break;
            }
            let child = child?;
            let is_dir = child.file_type().is_ok_and(|kind| kind.is_dir());
            children.push((child.file_name(), is_dir));
        }
        children.sort();
        Ok(Level { path: path.to_owned(), children: children.into_iter() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> User {
        let uid = rustix::process::geteuid().as_raw();
        Accounts::load().user_by_id(uid).expect("the tests run as someone")
    }

    #[test]
    fn listing_goes_as_deep_as_asked_and_follows_no_links() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        make_dir(&root.join("b/c/d"), &me()).expect("made");
        std::fs::write(root.join("a"), b"").expect("written");
        std::os::unix::fs::symlink(root, root.join("b/loop")).expect("linked");
        let names = |depth| -> Vec<String> {
            let entries = list(root, depth).expect("listed");
            entries
                .into_iter()
                .map(|entry| {
                    let path = Path::new(&entry.path).strip_prefix(root).expect("below");
                    path.to_string_lossy().into_owned()
                })
                .collect()
        };
        assert_eq!(names(0), ["a", "b"]);
        assert_eq!(names(1), ["a", "b"]);
        assert_eq!(names(2), ["a", "b", "b/c", "b/loop"]);
        assert_eq!(names(9), ["a", "b", "b/c", "b/c/d", "b/loop"]);
        assert!(matches!(list(&root.join("a"), 1), Err(TreeError::NotADirectory(_))));
        assert!(matches!(list(&root.join("z"), 1), Err(TreeError::NotFound(_))));
    }

    #[test]
    fn making_moving_and_removing() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        make_dir(&root.join("x/y"), &me()).expect("made");
        assert!(matches!(make_dir(&root.join("x"), &me()), Err(TreeError::Exists(_))));
        std::fs::write(root.join("f"), b"1").expect("written");
        assert!(matches!(make_dir(&root.join("f"), &me()), Err(TreeError::NotADirectory(_))));
        assert!(matches!(make_dir(&root.join("f/g"), &me()), Err(TreeError::NotADirectory(_))));

        let moved = rename(&root.join("f"), &root.join("new/place"), &me()).expect("moved");
        assert_eq!(moved.name, "place");
        let missing = rename(&root.join("f"), &root.join("g"), &me());
        assert!(matches!(missing, Err(TreeError::NotFound(_))));

        remove(&root.join("x"), &me()).expect("removed");
        remove(&root.join("x"), &me()).expect("removing nothing is fine");
        assert!(!root.join("x").exists());
    }

    /// The root is refused by this alone, so it is tested where nothing would be removed.
    #[test]
    fn the_root_and_what_is_mounted_are_known_as_mounts() {
        let at = |path: &str| {
            is_mount(&reach::reach(Path::new(path), &me(), Last::Keep).expect("there"))
        };
        assert!(at("/") && at("/proc"));
        assert!(!at("/proc/self") && !at("/nowhere"));
    }
}
