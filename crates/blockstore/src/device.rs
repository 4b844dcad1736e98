//! What a disk is to the rest of this crate: a fixed size and random access.
//!
//! Calls block on file I/O: run them on a blocking thread.

use std::io;

/// The unit of change tracking and copy-on-write, in bytes.
///
/// 4 KiB is the guest's page and its file system's block, so a guest write is never split.
pub const BLOCK_BYTES: u64 = 4096;

/// A disk of fixed size. Offsets and lengths are in bytes and may be unaligned.
///
/// Every call checks its range against [`BlockDevice::size_bytes`] and answers
/// [`io::ErrorKind::InvalidInput`] outside it: the caller is a hostile guest.
///
/// Calls may come from several threads at once. A call that starts after another has returned sees
/// its effect, whichever thread made it; calls that overlap in time and in range may be seen in
/// any order, byte by byte, but none of them is lost.
pub trait BlockDevice: Send + Sync + 'static {
    /// Size in bytes; a multiple of [`BLOCK_BYTES`].
    fn size_bytes(&self) -> u64;
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// I/O errors of the backing files, and out-of-range.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// I/O errors of the backing files (`StorageFull` kept as such), and out-of-range.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes `len` bytes at `offset` read as zeros.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes `len` bytes at `offset` read as zeros and takes space for them, so that a later write
    /// there does not fail for want of it.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn zero_allocated(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Says that `len` bytes at `offset` are not needed. Whole blocks of them read as zeros after it,
    /// the edges as zeros or as before. Takes no space.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn trim(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Puts all finished writes on stable storage, as far as this disk promises it.
    ///
    /// # Errors
    /// I/O errors of the backing files.
    fn flush(&self) -> io::Result<()>;
}

/// Refuses a range that does not lie inside a disk of `size_bytes`.
pub(crate) fn check_range(size_bytes: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the range does not lie inside the disk",
        )),
    }
}

/// The length of a buffer as a disk length.
pub(crate) fn len_u64(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).expect("a slice is shorter than 2^63 bytes")
}

/// A disk length as an index into a buffer that is known to be that long.
pub(crate) fn index(len: u64) -> usize {
    usize::try_from(len).expect("the length was taken from a slice")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_wrap_or_pass_the_end_are_refused() {
        assert!(check_range(8192, 0, 8192).is_ok());
        assert!(check_range(8192, 8192, 0).is_ok());
        for (offset, len) in [(0, 8193), (8192, 1), (u64::MAX, 1), (1, u64::MAX), (8193, 0)] {
            let e = check_range(8192, offset, len).expect_err("outside");
            assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
