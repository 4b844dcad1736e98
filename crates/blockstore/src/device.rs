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
    /// Says that `len` bytes at `offset` are not needed; they may read as anything after it, and
    /// here read as zeros.
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
