//! Raw files as disks: opening them, and a template's disk while it is built, written in place.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use crate::device::{BLOCK_BYTES, BlockDevice, check_range, index, len_u64};

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file could not be opened or looked at.
    #[error("open disk image {}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a folder, a device or a pipe.
    #[error("open disk image {}: it is not a regular file", path.display())]
    NotAFile {
        /// The image.
        path: PathBuf,
    },
    /// Its size is no whole number of blocks.
    #[error(
        "open disk image {}: its {size_bytes} bytes are not a positive multiple of {BLOCK_BYTES}",
        path.display()
    )]
    Unaligned {
        /// The image.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
}

pub(crate) fn open(path: &Path, writable: bool) -> Result<(File, u64), OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).write(writable).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(OpenError::NotAFile { path: path.to_owned() });
    }
    let size_bytes = metadata.len();
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(OpenError::Unaligned { path: path.to_owned(), size_bytes });
    }
    Ok((file, size_bytes))
}

/// A raw file that is read and written in place.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    size_bytes: u64,
}

impl RawImage {
    /// Opens the image at `path` for reading and writing.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<RawImage, OpenError> {
        let (file, size_bytes) = open(path, true)?;
        Ok(RawImage { file, size_bytes })
    }
}

impl BlockDevice for RawImage {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(self.size_bytes, offset, len_u64(buf))?;
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(self.size_bytes, offset, len_u64(buf))?;
        self.file.write_all_at(buf, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.size_bytes, offset, len)?;
        make_zero(&self.file, offset, len)
    }

    fn zero_allocated(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.size_bytes, offset, len)?;
        write_zeros(&self.file, offset, len)
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Gives the range back to the file system; it then reads as zeros. False where the file system
/// cannot: the range is unchanged then.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(file, how, offset, len) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Makes the range read as zeros: a hole where the file system can, else zeros as data.
pub(crate) fn make_zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 || punch_hole(file, offset, len)? {
        return Ok(());
    }
    write_zeros(file, offset, len)
}

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

fn write_zeros(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let part = (end - at).min(len_u64(&ZEROS));
        file.write_all_at(&ZEROS[..index(part)], at)?;
        at += part;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn sizes_that_are_no_blocks_are_refused() {
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("disk");
        for bytes in [0, 1, 4095, 4097] {
            fs::write(&path, vec![1; bytes]).expect("write");
            assert!(matches!(RawImage::open(&path), Err(OpenError::Unaligned { .. })));
        }
        assert!(matches!(open(dir.path(), false), Err(OpenError::NotAFile { .. })));
        let absent = dir.path().join("absent");
        assert!(matches!(RawImage::open(&absent), Err(OpenError::Io { .. })));
    }

    #[test]
    fn a_raw_image_keeps_what_is_written() {
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("disk");
        fs::write(&path, vec![5; 64 * 1024]).expect("write");
        let raw = RawImage::open(&path).expect("open");
        raw.write_at(b"hello", 4094).expect("write");
        raw.zero(10_000, 20_000).expect("zero");
        raw.trim(40_960, 4096).expect("trim");
        raw.flush().expect("flush");
        let mut expected = vec![5; 64 * 1024];
        expected[4094..4099].copy_from_slice(b"hello");
        expected[10_000..30_000].fill(0);
        expected[40_960..45_056].fill(0);
        assert_eq!(fs::read(&path).expect("read"), expected);
        assert!(raw.zero(65_536, 1).is_err());
        assert!(raw.write_at(&[1], 65_536).is_err());
    }
}
