//! How much of a machine user processes may take, so that daemon and kernel keep going.

use std::fs;

/// Most that is kept from user processes, bytes. A kernel's own needs grow slower than memory.
const RESERVE_MAX_BYTES: u64 = 128 * 1024 * 1024;

/// The part of memory, and of process ids, that is kept from user processes.
const RESERVED_PART: u64 = 8;

/// Limits of all user processes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Memory they may hold. There is no `memory.high` below it: a hog that is killed says so, one
    /// that is throttled looks hung.
    pub(super) memory_max_bytes: u64,
    /// Memory that is left.
    pub(super) reserve_bytes: u64,
    /// Processes and threads.
    pub(super) pids_max: u64,
}

impl Limits {
    /// As the kernel describes this machine.
    pub(super) fn of_this_machine() -> Limits {
        let number = |path: &str| {
            fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok())
        };
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let ids = number("/proc/sys/kernel/pid_max").unwrap_or(u64::MAX);
        let threads = number("/proc/sys/kernel/threads-max").unwrap_or(u64::MAX);
        Limits::new(total_bytes(&meminfo), ids.min(threads))
    }

    /// Of a machine with this memory, which runs at most this many threads. 0 bytes: unknown.
    fn new(memory_bytes: u64, threads: u64) -> Limits {
        let reserve_bytes = (memory_bytes / RESERVED_PART).min(RESERVE_MAX_BYTES);
        let memory_max_bytes = match memory_bytes {
            0 => u64::MAX,
            _ => memory_bytes - reserve_bytes,
        };
        Limits { memory_max_bytes, reserve_bytes, pids_max: threads - threads / RESERVED_PART }
    }
}

fn total_bytes(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn an_eighth_is_kept_and_of_memory_at_most_128_mib() {
        let small = Limits::new(512 * MIB, 4000);
        assert_eq!((small.memory_max_bytes, small.reserve_bytes), (448 * MIB, 64 * MIB));
        assert_eq!(small.pids_max, 3500);
        let large = Limits::new(16 * 1024 * MIB, 32768);
        assert_eq!((large.memory_max_bytes, large.reserve_bytes), (16_256 * MIB, 128 * MIB));
        assert_eq!(large.pids_max, 28_672);
    }

    #[test]
    fn a_machine_that_says_nothing_has_no_limit() {
        let unknown = Limits::new(total_bytes("junk"), u64::MAX);
        assert_eq!((unknown.memory_max_bytes, unknown.reserve_bytes), (u64::MAX, 0));
        assert_eq!(total_bytes("MemTotal:        1024 kB\nMemFree: 1 kB\n"), MIB);
    }
}
