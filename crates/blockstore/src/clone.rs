//! Copies of big sparse files: shared blocks where the file system can, holes kept where not.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::device::index;

/// How a file was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMethod {
    /// The copy shares its source's blocks.
    Reflink,
    /// The data was copied, the holes were not.
    Sparse,
}

/// Why a file could not be copied.
#[derive(Debug, thiserror::Error)]
#[error("copy {} to {}", from.display(), to.display())]
pub struct CloneError {
    /// The source.
    pub from: PathBuf,
    /// The copy.
    pub to: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Copies the file `from` to `to`, which must not exist, with mode 0600. The copy is not synced.
///
/// # Errors
/// [`CloneError`]; no copy is left then.
pub fn clone_file(from: &Path, to: &Path) -> Result<CloneMethod, CloneError> {
    let failed = |source| CloneError { from: from.to_owned(), to: to.to_owned(), source };
    let source = File::open(from).map_err(failed)?;
    let copy =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(failed)?;
    clone_into(&source, &copy).map_err(|e| {
        // The error that matters is `e`; a copy that cannot be removed either shows up by its name.
        let _removed = std::fs::remove_file(to);
        failed(e)
    })
}

fn clone_into(source: &File, copy: &File) -> io::Result<CloneMethod> {
    if ioctl_ficlone(copy, source).is_ok() {
        return Ok(CloneMethod::Reflink);
    }
    let size_bytes = source.metadata()?.len();
    copy.set_len(size_bytes)?;
    for extent in data_extents(source, size_bytes)? {
        copy_extent(source, copy, extent)?;
    }
    Ok(CloneMethod::Sparse)
}

/// Copies a part of `source` to the same place of `copy`.
pub(crate) fn copy_extent(source: &File, copy: &File, extent: Extent) -> io::Result<()> {
    let (mut from, mut to) = (extent.start, extent.start);
    while from < extent.end {
        let left = index((extent.end - from).min(1 << 30));
        match copy_file_range(source, Some(&mut from), copy, Some(&mut to), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                return copy_by_hand(source, copy, Extent { start: from, end: extent.end });
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &File, copy: &File, extent: Extent) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut buf = vec![0; 1 << 20];
    let mut at = extent.start;
    while at < extent.end {
        let part = &mut buf[..index((extent.end - at).min(1 << 20))];
        source.read_exact_at(part, at)?;
        copy.write_all_at(part, at)?;
        at += crate::device::len_u64(part);
    }
    Ok(())
}

/// A range of a file that holds data, in bytes, without its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// The parts of the first `size_bytes` of a file that are not holes, in order. A file system
/// without holes has one part.
pub(crate) fn data_extents(file: &File, size_bytes: u64) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size_bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Past the last data: the rest is one hole.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                return Ok(vec![Extent { start: 0, end: size_bytes }]);
            }
            Err(e) => return Err(e.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(size_bytes);
        if end <= start {
            break;
        }
        extents.push(Extent { start, end });
        at = end;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let dir = tempfile::tempdir().expect("temp folder");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let source = File::create(&from).expect("create");
        source.set_len(16 << 20).expect("grow");
        source.write_all_at(&[3; 9000], 5 << 20).expect("write");
        clone_file(&from, &to).expect("copy");
        assert_eq!(std::fs::read(&from).expect("read"), std::fs::read(&to).expect("read"));
        let blocks = std::fs::metadata(&to).expect("stat").blocks();
        assert!(blocks * 512 < 1 << 20, "{blocks} sectors were copied");
    }

    #[test]
    fn an_existing_target_is_left_alone() {
        let dir = tempfile::tempdir().expect("temp folder");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, "new").expect("write");
        std::fs::write(&to, "old").expect("write");
        let e = clone_file(&from, &to).expect_err("the target exists");
        assert_eq!(e.source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).expect("read"), "old");
    }
}
