//! Changes to the directory tree. Everything here blocks.

use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use belljar_wire::rpc::filesystem::EntryInfo;

use super::entry;
use crate::accounts::{Accounts, User};

/// Most entries one listing may have: the answer is one message in memory.
const LISTING_MAX_ENTRIES: usize = 500_000;

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
    /// A directory cannot be handled that large.
    #[error("list {}: more than {LISTING_MAX_ENTRIES} entries", .0.display())]
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
            _ => TreeError::Io { operation, path, source },
        }
    }
}

/// Describes one entry.
pub(super) fn stat(path: &Path) -> Result<EntryInfo, TreeError> {
    entry::describe(path, &Accounts::load()).map_err(TreeError::io("look at", path))
}

/// Makes a directory and those above it, owned by `user`.
pub(super) fn make_dir(path: &Path, user: &User) -> Result<EntryInfo, TreeError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Err(TreeError::Exists(path.to_owned())),
        Ok(_) => return Err(TreeError::NotADirectory(path.to_owned())),
        Err(_) => {}
    }
    make_dirs(path, user).map_err(|(at, source)| match source.kind() {
        io::ErrorKind::AlreadyExists => TreeError::NotADirectory(at),
        _ => TreeError::io("make the directory", &at)(source),
    })?;
    stat(path)
}

/// Makes the directories of `path` that are missing, owned by `user`. Names the one that failed.
pub(super) fn make_dirs(path: &Path, user: &User) -> Result<(), (PathBuf, io::Error)> {
    let missing: Vec<&Path> = path.ancestors().take_while(|above| !above.is_dir()).collect();
    for dir in missing.into_iter().rev() {
        let outcome = match std::fs::create_dir(dir) {
            // Someone else made it meanwhile, which serves as well.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            Err(error) => Err(error),
            Ok(()) => give(dir, user),
        };
        outcome.map_err(|error| (dir.to_owned(), error))?;
    }
    Ok(())
}

/// Makes `user` the owner, unless it is already.
pub(super) fn give(path: &Path, user: &User) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::metadata(path)?;
    if (metadata.uid(), metadata.gid()) == (user.uid, user.gid) {
        return Ok(());
    }
    chown(path, Some(user.uid), Some(user.gid))
}

/// Renames; what is at the destination and can be replaced by a rename is.
pub(super) fn rename(from: &Path, to: &Path, user: &User) -> Result<EntryInfo, TreeError> {
    std::fs::symlink_metadata(from).map_err(TreeError::io("look at", from))?;
    if let Some(parent) = to.parent() {
        make_dirs(parent, user)
            .map_err(|(at, source)| TreeError::io("make the directory", &at)(source))?;
    }
    std::fs::rename(from, to).map_err(TreeError::io("move to", to))?;
    stat(to)
}

/// Removes whatever is there, with everything below; nothing there is fine.
pub(super) fn remove(path: &Path) -> Result<(), TreeError> {
    let outcome = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match outcome.map_err(TreeError::io("remove", path)) {
        Err(TreeError::NotFound(_)) => Ok(()),
        outcome => outcome,
    }
}

/// Lists a directory, `depth` levels deep, a directory before what it holds, names in byte order.
/// Links are listed, not followed, except the directory itself.
pub(super) fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, TreeError> {
    let metadata = std::fs::metadata(path).map_err(TreeError::io("look at", path))?;
    if !metadata.is_dir() {
        return Err(TreeError::NotADirectory(path.to_owned()));
    }
    let accounts = Accounts::load();
    let mut entries = Vec::new();
    list_into(path, depth.max(1), &accounts, &mut entries)?;
    Ok(entries)
}

fn list_into(
    path: &Path,
    depth: u32,
    accounts: &Accounts,
    entries: &mut Vec<EntryInfo>,
) -> Result<(), TreeError> {
    let read = std::fs::read_dir(path).map_err(TreeError::io("list", path))?;
    let mut children = Vec::new();
    for child in read {
        let child = child.map_err(TreeError::io("list", path))?;
        let is_dir = child.file_type().is_ok_and(|kind| kind.is_dir());
        children.push((child.file_name(), is_dir));
    }
    children.sort();
    for (name, is_dir) in children {
        let child = path.join(name);
        // What disappears while it is being listed is left out.
        let Ok(entry) = entry::describe(&child, accounts) else { continue };
        if entries.len() >= LISTING_MAX_ENTRIES {
            return Err(TreeError::TooMany(path.to_owned()));
        }
        entries.push(entry);
        if is_dir && depth > 1 {
            match list_into(&child, depth - 1, accounts, entries) {
                Err(TreeError::NotFound(_)) => {}
                outcome => outcome?,
            }
        }
    }
    Ok(())
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

        remove(&root.join("x")).expect("removed");
        remove(&root.join("x")).expect("removing nothing is fine");
        assert!(!root.join("x").exists());
    }
}
