//! Removing a tree, however deep, and also while programs inside change it.
//!
//! Names are removed in directories that are held open, so a directory that turns into a link
//! meanwhile is not followed. A few directories are held at a time; further down, the way back up
//! is `..`, checked to be the directory that was left.

use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::reach::Place;

/// How often one directory is emptied anew because something was put in meanwhile.
const REFILLS_MAX: u32 = 1000;

/// Removes the name and everything below it; `NOENT` when nothing is there.
///
/// # Errors
/// `BUSY` when the name, or a directory below, is where a file system is mounted: what is mounted
/// there is left alone. Otherwise as `unlinkat(2)`.
pub(super) fn erase(place: &Place) -> rustix::io::Result<()> {
    place.act(|| {
        if place.stat()?.is_none() {
            return Err(Errno::NOENT);
        }
        erase_name(&place.dir, &place.name)
    })
}

/// Removes the name in a directory, with everything below it. As [`erase`].
pub(super) fn erase_name(dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
    let name = CString::new(name.as_encoded_bytes()).map_err(|_| Errno::INVAL)?;
    match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        outcome => return outcome,
    }
    erase_tree(dir, name)
}

/// A directory on the way down.
struct Level {
    name: CString,
    dir: OwnedFd,
    refills: u32,
}

/// Directories held at once; those above are found again by `..`.
const HELD_MAX: usize = 64;

fn erase_tree(above: &OwnedFd, name: CString) -> rustix::io::Result<()> {
    let mut names = vec![name];
    let mut held = vec![enter(above, &names[0])?];
    let mut ids: Vec<(u64, u64)> = vec![identity(&held[0].dir)?];
    loop {
        let level = held.last_mut().expect("the loop ends with the first level");
        match empty_until_directory(&level.dir)? {
            Some(below) => {
                let next = match enter(&level.dir, &below) {
                    // It went, or became something else, meanwhile: look again.
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
                        if level.refills < REFILLS_MAX =>
                    {
                        level.refills += 1;
                        continue;
                    }
                    next => next?,
                };
                ids.push(identity(&next.dir)?);
                names.push(below);
                held.push(next);
                if held.len() > HELD_MAX {
                    held.remove(0);
                }
            }
            None => {
                let done = held.pop().expect("looked at above");
                ids.pop();
                names.pop();
                if held.is_empty() && !ids.is_empty() {
                    held.push(leave(&done.dir, &names, *ids.last().expect("not empty"))?);
                }
                let parent = held.last().map_or(above, |level| &level.dir);
                match rustix::fs::unlinkat(parent, &done.name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT) if ids.is_empty() => return Ok(()),
                    Ok(()) | Err(Errno::NOENT) => {}
                    // Something was put in meanwhile.
                    Err(Errno::NOTEMPTY | Errno::EXIST) if done.refills < REFILLS_MAX => {
                        ids.push(identity(&done.dir)?);
                        names.push(done.name.clone());
                        held.push(Level { refills: done.refills + 1, ..done });
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// Removes what is no directory, and every empty directory; yields a directory that is not empty.
fn empty_until_directory(dir: &OwnedFd) -> rustix::io::Result<Option<CString>> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let unlinked = match entry.file_type() {
            FileType::Directory => Err(Errno::ISDIR),
            _ => rustix::fs::unlinkat(dir, name, AtFlags::empty()),
        };
        match unlinked {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(error),
        }
        match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Some(name.to_owned())),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn enter(above: &OwnedFd, name: &CString) -> rustix::io::Result<Level> {
    let attributes =
        rustix::fs::statx(above, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?
            .stx_attributes;
    if attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(Errno::BUSY);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(above, name, flags, Mode::empty())?;
    Ok(Level { name: name.clone(), dir, refills: 0 })
}

/// Opens the directory above one that was emptied, if it still is the one it was entered from.
fn leave(dir: &OwnedFd, names: &[CString], id: (u64, u64)) -> rustix::io::Result<Level> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let above = rustix::fs::openat(dir, "..", flags, Mode::empty())?;
    if identity(&above)? != id {
        return Err(Errno::AGAIN);
    }
    let name = names.last().cloned().expect("as many as ids, of which there is one");
    Ok(Level { name, dir: above, refills: 0 })
}

fn identity(dir: &OwnedFd) -> rustix::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}
