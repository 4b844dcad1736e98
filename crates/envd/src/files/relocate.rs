//! Moving to another file system: a copy that keeps mode, owner, times, attributes and links,
//! which takes the destination's place in one step; only then the source is removed.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, StatxAttributes, StatxFlags, Timespec,
    Timestamps, Uid,
};
use rustix::io::Errno;
use xattr::FileExt as _;

use super::erase;
use super::reach::Place;

/// Deepest tree that is copied; two descriptors are held for each level.
const DEPTH_MAX: usize = 128;

/// Moves what `from` names to `to`, on another file system.
///
/// # Errors
/// When anything of it cannot be copied: then nothing has changed. When the source cannot be
/// removed: then both are there.
pub(super) fn relocate(from: &Place, to: &Place) -> io::Result<()> {
    if from.is_same(to) {
        // Two mounts of one file system.
        return Ok(());
    }
    let before = from.stat()?;
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = OsString::from(format!(".move-{}", hex::encode(random)));
    let name = CString::new(name.into_encoded_bytes()).expect("hexadecimal digits");
    let source = CString::new(from.name.as_encoded_bytes())?;
    let mut copied = Ok(());
    from.stricter(to).act(|| {
        copied = copy(&from.dir, &source, &to.dir, &name, DEPTH_MAX)
            .and_then(|()| Ok(rustix::fs::renameat(&to.dir, &name, &to.dir, &to.name)?));
        if copied.is_err() {
            // Nobody was told of it; why it failed is what the caller learns.
            let _ = erase::erase_name(&to.dir, OsStr::new(name.to_str().expect("ASCII")));
        }
        Ok(())
    })?;
    copied?;
    let id = |stat: Stat| (stat.st_dev, stat.st_ino);
    if from.stat()?.map(id) != before.map(id) {
        return Err(io::Error::other(
            "another file took the source's name meanwhile; both are kept",
        ));
    }
    Ok(erase::erase(from)?)
}

fn copy(
    from: &OwnedFd,
    name: &CString,
    to: &OwnedFd,
    new_name: &CString,
    depth: usize,
) -> io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let private = Mode::RWXU;
    match kind {
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let mut source = File::from(rustix::fs::openat(from, name, flags, Mode::empty())?);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            let mut target = File::from(rustix::fs::openat(to, new_name, flags, mode)?);
            // Another file may have taken the name: what was opened says what it is.
            let stat = rustix::fs::fstat(&source)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(Errno::AGAIN.into());
            }
            io::copy(&mut source, &mut target)?;
            finish(&source, &target, &stat)
        }
        FileType::Directory => {
            if depth == 0 {
                let message = format!(
                    "it is more than {DEPTH_MAX} directories deep, which is as deep as a move to \
                     another file system goes"
                );
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            rustix::fs::mkdirat(to, new_name, private)?;
            copy_directory(from, name, to, new_name, depth)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&target, to, new_name)?;
            own(to, new_name, &stat)?;
            Ok(rustix::fs::utimensat(to, new_name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?)
        }
        _ => {
            rustix::fs::mknodat(to, new_name, kind, private, stat.st_rdev)?;
            // Held from here on: whoever may write to the directory could put a link in its place.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let node = rustix::fs::openat(to, new_name, flags, Mode::empty())?;
            if FileType::from_raw_mode(rustix::fs::fstat(&node)?.st_mode) != kind {
                return Err(Errno::AGAIN.into());
            }
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            let flags = AtFlags::EMPTY_PATH;
            let owned = keep_owner(rustix::fs::chownat(&node, "", Some(uid), Some(gid), flags))?;
            let mode = Mode::from_raw_mode(mode_bits(&stat, owned));
            let held = format!("/proc/self/fd/{}", node.as_raw_fd());
            rustix::fs::chmodat(rustix::fs::CWD, held, mode, AtFlags::empty())?;
            Ok(rustix::fs::utimensat(to, new_name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?)
        }
    }
}

fn copy_directory(
    from: &OwnedFd,
    name: &CString,
    to: &OwnedFd,
    new_name: &CString,
    depth: usize,
) -> io::Result<()> {
    let statx = rustix::fs::statx(from, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?;
    if statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(Errno::BUSY.into());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, flags, Mode::empty())?;
    let target = rustix::fs::openat(to, new_name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&source)?;
    let mut below = Vec::new();
    for entry in Dir::read_from(&source)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            below.push(entry.file_name().to_owned());
        }
    }
    for name in below {
        copy(&source, &name, &target, &name, depth - 1)?;
    }
    finish(&File::from(source), &File::from(target), &stat)
}

/// Gives a copied file or directory what else the original has.
fn finish(source: &File, target: &File, stat: &Stat) -> io::Result<()> {
    // Attributes that the other file system or the caller's rights do not allow stay behind, as
    // with every tool that moves files.
    for name in source.list_xattr().into_iter().flatten() {
        if let Ok(Some(value)) = source.get_xattr(&name) {
            let _ = target.set_xattr(&name, &value);
        }
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let owned = keep_owner(rustix::fs::fchown(target, Some(uid), Some(gid)))?;
    rustix::fs::fchmod(target, Mode::from_raw_mode(mode_bits(stat, owned)))?;
    Ok(rustix::fs::futimens(target, &times(stat))?)
}

fn own(dir: &OwnedFd, name: &CString, stat: &Stat) -> io::Result<bool> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    keep_owner(rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
}

/// Whether the owner could be kept; it cannot by who is not root, or where there are no owners.
fn keep_owner(outcome: rustix::io::Result<()>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(Errno::PERM | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The bits that make a program run as its owner are only for the owner that set them.
fn mode_bits(stat: &Stat, owned: bool) -> u32 {
    stat.st_mode & if owned { 0o7777 } else { 0o1777 }
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}
