//! Memory without a guard, to compare with.

// JUSTIFICATION: mapping memory and touching it page by page, which is what is measured, have no safe
// interface.
#![expect(unsafe_code, reason = "mapped memory")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Memory that nobody has touched: a copy of a file's pages, or empty.
pub(crate) struct PlainMemory {
    address: usize,
    bytes: usize,
}

impl PlainMemory {
    pub(crate) fn empty(bytes: usize) -> io::Result<PlainMemory> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: at an address of the kernel's choice, so nothing that exists is touched.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, rights(), flags) }?;
        Ok(PlainMemory { address: start.expose_provenance(), bytes })
    }

    pub(crate) fn of(file: &File, bytes: usize) -> io::Result<PlainMemory> {
        let flags = MapFlags::PRIVATE;
        // SAFETY: as `empty`; the file is the caller's and as long as that, and nobody cuts it off.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, rights(), flags, file.as_fd(), 0) }?;
        Ok(PlainMemory { address: start.expose_provenance(), bytes })
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: the mapping is this value's alone, readable and writable, and lives as long.
        unsafe { std::slice::from_raw_parts_mut(start, self.bytes) }
    }
}

impl Drop for PlainMemory {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: mapped by this value, and nothing refers to it any more.
        unsafe { munmap(start, self.bytes) }.expect("unmap what was mapped");
    }
}

fn rights() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}
