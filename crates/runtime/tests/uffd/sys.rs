//! Memory that a userfaultfd guards: what a machine monitor makes of a guest's memory.

// JUSTIFICATION: mapping memory, guarding it, and looking at bytes that appear while they are looked at
// have no safe interface. Numbers and layouts: `linux/userfaultfd.h`.
#![expect(unsafe_code, reason = "memory that another thread fills")]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, munmap};

const UFFDIO_API: libc::Ioctl = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::Ioctl = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_AA01;
const API: u64 = 0xAA;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const REGISTER_MISSING: u64 = 1;

/// Anonymous memory, every page of it missing.
#[derive(Debug)]
pub(crate) struct GuardedMemory {
    address: usize,
    bytes: usize,
    userfault: OwnedFd,
}

impl GuardedMemory {
    /// With pages of 2 MiB if `huge`: `OutOfMemory` where the host has none.
    pub(crate) fn new(bytes: usize, huge: bool) -> io::Result<GuardedMemory> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the descriptor guards nothing before memory is registered with it, below.
        let userfault = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = [API, FEATURE_EVENT_REMOVE, 0];
        // SAFETY: the call reads and writes three words, which outlive it.
        let answer = unsafe { libc::ioctl(userfault.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        check(answer)?;
        let memory = GuardedMemory { address: map(bytes, huge)?, bytes, userfault };
        let mut range = [u64::try_from(memory.address).expect("64 bits"), 0, REGISTER_MISSING, 0];
        range[1] = u64::try_from(bytes).expect("64 bits");
        // SAFETY: the call reads and writes four words, which outlive it. The memory is this value's,
        // and is only touched through its methods.
        let answer = unsafe {
            libc::ioctl(memory.userfault.as_raw_fd(), UFFDIO_REGISTER, range.as_mut_ptr())
        };
        check(answer)?;
        Ok(memory)
    }

    pub(crate) fn address(&self) -> u64 {
        u64::try_from(self.address).expect("64 bits")
    }

    pub(crate) fn bytes(&self) -> u64 {
        u64::try_from(self.bytes).expect("64 bits")
    }

    pub(crate) fn userfault(&self) -> BorrowedFd<'_> {
        self.userfault.as_fd()
    }

    /// One byte. Waits until its page is there.
    pub(crate) fn byte(&self, offset: usize) -> u8 {
        assert!(offset < self.bytes, "inside the memory");
        // SAFETY: inside the mapping, which lives as long as `self`; other threads may write it, which
        // a volatile access of one byte allows for.
        unsafe { std::ptr::with_exposed_provenance::<u8>(self.address + offset).read_volatile() }
    }

    /// Writes one byte. Waits until its page is there.
    pub(crate) fn write(&self, offset: usize, value: u8) {
        assert!(offset < self.bytes, "inside the memory");
        let to = std::ptr::with_exposed_provenance_mut::<u8>(self.address + offset);
        // SAFETY: as `byte`.
        unsafe { to.write_volatile(value) }
    }

    /// Copies the page at `offset` out. Waits until it is there.
    pub(crate) fn page(&self, offset: usize) -> [u8; 4096] {
        assert!(offset + 4096 <= self.bytes, "inside the memory");
        // SAFETY: as `byte`.
        unsafe {
            std::ptr::with_exposed_provenance::<[u8; 4096]>(self.address + offset).read_volatile()
        }
    }

    /// Ends the guard: who waits goes on with zeros.
    pub(crate) fn let_go(&self) {
        let mut range = [self.address(), self.bytes()];
        // SAFETY: the call reads two words, which outlive it.
        let answer = unsafe {
            libc::ioctl(self.userfault.as_raw_fd(), UFFDIO_UNREGISTER, range.as_mut_ptr())
        };
        check(answer).expect("it was registered");
    }

    /// Gives pages back. Waits until their guard has read that.
    pub(crate) fn remove(&self, offset: usize, bytes: usize) {
        assert!(offset + bytes <= self.bytes, "inside the memory");
        let start = std::ptr::with_exposed_provenance_mut(self.address + offset);
        // SAFETY: inside the mapping; nobody holds a reference into it, only values are copied out.
        unsafe { madvise(start, bytes, Advice::LinuxDontNeed) }.expect("give pages back");
    }
}

impl Drop for GuardedMemory {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: mapped by `new`, and nothing refers to it any more.
        unsafe { munmap(start, self.bytes) }.expect("unmap what was mapped");
    }
}

fn map(bytes: usize, huge: bool) -> io::Result<usize> {
    let kind = if huge { MapFlags::HUGETLB } else { MapFlags::NORESERVE };
    let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | kind);
    // SAFETY: at an address of the kernel's choice, so nothing that exists is touched.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, rights, flags) }?;
    Ok(start.expose_provenance())
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
