//! Does `/dev/kvm` run guests, or does it only open?
//!
//! Some hosts offer a KVM that emulates every instruction (2,000,000 take 2 s instead of 10 ms).
//! So a guest of two instructions counts down in a child process, which can be killed when it
//! is slow and abandoned when even that does not help. Source of numbers and layouts: the
//! kernel's KVM API document and `linux/kvm.h` for x86.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How many instructions the guest runs.
pub(crate) const INSTRUCTIONS: u32 = 2_000_000;

const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
const KVM_CREATE_VM: libc::Ioctl = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: libc::Ioctl = 0xAE04;
const KVM_CREATE_VCPU: libc::Ioctl = 0xAE41;
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_AE46;
const KVM_RUN: libc::Ioctl = 0xAE80;
const KVM_SET_REGS: libc::Ioctl = 0x4090_AE82;
const KVM_GET_SREGS: libc::Ioctl = 0x8138_AE83;
const KVM_SET_SREGS: libc::Ioctl = 0x4138_AE84;
const API_VERSION: libc::c_int = 12;
const EXIT_REASON_OFFSET: usize = 8;
const EXIT_HLT: u32 = 5;
const PAGE: usize = 4096;

/// Real mode: `mov ecx, 1000000; again: dec ecx; jnz again; hlt`.
const CODE: [u8; 11] = [0x66, 0xB9, 0x40, 0x42, 0x0F, 0x00, 0x66, 0x49, 0x75, 0xFC, 0xF4];

/// What became of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It ran to its end, and this much processor time went by, the host's load left out.
    Ran(Duration),
    /// The step that failed, as a verb phrase.
    Failed(&'static str),
    /// It did not end in time.
    TooSlow,
}

/// The child's exit codes are places in this list, from 1; 0 is success.
const STEPS: [&str; 6] = [
    "agree on the version of KVM",
    "make a KVM machine",
    "give a KVM machine memory",
    "make a KVM processor",
    "set the registers of a KVM processor",
    "run a KVM processor to its halt",
];

/// Runs the guest for at most `limit`. Blocks that long, and up to as long again for the kill.
///
/// # Errors
/// When no child can be made or watched.
pub(crate) fn try_guest(device: &OwnedFd, limit: Duration) -> io::Result<Outcome> {
    let fd = device.as_raw_fd();
    // The alarm ends a child whose parent is gone; 1 s granularity, rounded up.
    let alarm = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).saturating_add(2);
    // SAFETY: the child makes system calls only and leaves by `_exit`: no lock that another
    // thread held at the fork is ever taken, and nothing of the parent's is dropped.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above; `run_guest` returns the code.
        unsafe {
            libc::alarm(alarm);
            libc::_exit(run_guest(fd));
        }
    }
    let Some(pid) = Pid::from_raw(child).filter(|_| child > 0) else {
        return Err(io::Error::last_os_error());
    };
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let in_time = ends_within(&pidfd, limit)?;
    if !in_time {
        pidfd_send_signal(&pidfd, Signal::KILL)?;
        if !ends_within(&pidfd, limit)? {
            // A processor that never leaves the guest cannot be waited for; the alarm is pending
            // too, and the child is reaped with this process.
            return Ok(Outcome::TooSlow);
        }
    }
    let (status, used) = reap(child)?;
    if !in_time || !libc::WIFEXITED(status) {
        return Ok(Outcome::TooSlow);
    }
    Ok(match libc::WEXITSTATUS(status) {
        0 => Outcome::Ran(used),
        code => {
            let place = usize::try_from(code).unwrap_or(0).wrapping_sub(1);
            Outcome::Failed(STEPS.get(place).copied().unwrap_or("run a KVM machine"))
        }
    })
}

fn ends_within(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
    match poll(&mut watched, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        // A signal cut the wait short: the child counts as slow, which is safe.
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn reap(child: libc::pid_t) -> io::Result<(libc::c_int, Duration)> {
    let mut status = 0;
    // SAFETY: plain data for which all zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to values that outlive the call.
    let reaped = unsafe { libc::wait4(child, &raw mut status, 0, &raw mut usage) };
    if reaped != child {
        return Err(io::Error::last_os_error());
    }
    let span = |time: libc::timeval| {
        Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    Ok((status, span(usage.ru_utime) + span(usage.ru_stime)))
}

/// The layout of `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    bytes: u64,
    host_address: u64,
}

/// Runs in the forked child: system calls only. Answers the exit code.
///
/// # Safety
/// The calling process must be a fresh fork with this thread alone; it leaks what it makes.
unsafe fn run_guest(device: RawFd) -> libc::c_int {
    // SAFETY: every pointer is to a mapping of the stated size or to a local that outlives its
    // call; sizes of the register blocks are those encoded in the ioctl numbers.
    unsafe {
        if libc::ioctl(device, KVM_GET_API_VERSION, 0) != API_VERSION {
            return 1;
        }
        let machine = libc::ioctl(device, KVM_CREATE_VM, 0);
        if machine < 0 {
            return 2;
        }
        let memory = map(PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        if memory.is_null() {
            return 3;
        }
        std::ptr::copy_nonoverlapping(CODE.as_ptr(), memory, CODE.len());
        let region = MemoryRegion {
            slot: 0,
            flags: 0,
            guest_address: PAGE as u64,
            bytes: PAGE as u64,
            host_address: memory as u64,
        };
        if libc::ioctl(machine, KVM_SET_USER_MEMORY_REGION, &raw const region) < 0 {
            return 3;
        }
        let processor = libc::ioctl(machine, KVM_CREATE_VCPU, 0);
        let shared_bytes = libc::ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0);
        if processor < 0 || shared_bytes < PAGE as libc::c_int {
            return 4;
        }
        let shared = map(shared_bytes as usize, libc::MAP_SHARED, processor);
        if shared.is_null() {
            return 4;
        }
        if !set_registers(processor) {
            return 5;
        }
        loop {
            if libc::ioctl(processor, KVM_RUN, 0) == 0 {
                break;
            }
            if *libc::__errno_location() != libc::EINTR {
                return 6;
            }
        }
        let reason = shared.add(EXIT_REASON_OFFSET).cast::<u32>().read_volatile();
        if reason == EXIT_HLT { 0 } else { 6 }
    }
}

/// # Safety
/// As [`run_guest`].
unsafe fn map(bytes: usize, flags: libc::c_int, fd: RawFd) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, 0) };
    if address == libc::MAP_FAILED { std::ptr::null_mut() } else { address.cast() }
}

/// Points the processor at the code: code segment 0, instruction pointer one page.
///
/// # Safety
/// As [`run_guest`].
unsafe fn set_registers(processor: RawFd) -> bool {
    // `struct kvm_sregs`, 312 bytes: the code segment comes first, base then limit and selector.
    let mut segments = [0_u64; 39];
    // `struct kvm_regs`, 18 words: the last two are instruction pointer and flags.
    let mut registers = [0_u64; 18];
    registers[16] = PAGE as u64;
    registers[17] = 2;
    // SAFETY: the blocks have the sizes encoded in the ioctl numbers.
    unsafe {
        if libc::ioctl(processor, KVM_GET_SREGS, segments.as_mut_ptr()) < 0 {
            return false;
        }
        segments[0] = 0;
        // Word 1 is limit (4 bytes), selector (2 bytes), type and present: clear the selector.
        segments[1] &= !(0xFFFF << 32);
        libc::ioctl(processor, KVM_SET_SREGS, segments.as_ptr()) >= 0
            && libc::ioctl(processor, KVM_SET_REGS, registers.as_ptr()) >= 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_ends_whatever_the_device_is() {
        let Ok(device) = std::fs::File::options().read(true).write(true).open("/dev/kvm") else {
            return belljar_testkit::skip("needs /dev/kvm that opens");
        };
        let outcome = try_guest(&device.into(), Duration::from_secs(1)).expect("a child is made");
        assert!(!matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    }

    #[test]
    fn something_that_is_no_kvm_is_named() {
        let null = std::fs::File::options().read(true).write(true).open("/dev/null");
        let device = null.expect("every Linux has it").into();
        let outcome = try_guest(&device, Duration::from_secs(5)).expect("a child is made");
        assert_eq!(outcome, Outcome::Failed(STEPS[0]));
    }
}
