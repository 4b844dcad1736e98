//! What the machine uses, for `GET /metrics`.

use std::sync::Mutex;

use serde::Serialize;

use crate::clock;

/// The answer. Sizes are bytes unless the name says `mib`.
///
/// Source: `contract/e2b-wire.md` section 2.1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// Seconds since the Unix epoch.
    pub ts: i64,
    /// Online processors.
    pub cpu_count: u32,
    /// Share of all processors used since the previous call, percent.
    pub cpu_used_pct: f32,
    /// Memory.
    pub mem_total: u64,
    /// Memory in use, without what the kernel could drop.
    pub mem_used: u64,
    /// Page cache.
    pub mem_cache: u64,
    /// The same as `mem_total`.
    pub mem_total_mib: u64,
    /// The same as `mem_used`.
    pub mem_used_mib: u64,
    /// Root file system in use.
    pub disk_used: u64,
    /// Root file system.
    pub disk_total: u64,
}

/// Processor time so far, in clock ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTicks {
    busy: u64,
    total: u64,
}

/// Takes the measurements; remembers the last one, because processor use is a difference.
#[derive(Debug, Default)]
pub struct Meter {
    last: Mutex<CpuTicks>,
}

impl Meter {
    /// Measures now. Reads a few files under `/proc`, which do not block.
    pub fn read(&self) -> Metrics {
        let memory = memory(&read_proc("/proc/meminfo"));
        let now = cpu_ticks(&read_proc("/proc/stat"));
        let before = std::mem::replace(
            &mut *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
            now,
        );
        let (disk_total, disk_used) = rustix::fs::statvfs("/").map_or((0, 0), |disk| {
            let used = disk.f_blocks.saturating_sub(disk.f_bfree);
            (disk.f_blocks * disk.f_frsize, used * disk.f_frsize)
        });
        const MIB: u64 = 1024 * 1024;
        Metrics {
            ts: clock::unix_seconds(),
            cpu_count: std::thread::available_parallelism()
                .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
            cpu_used_pct: percent(before, now),
            mem_total: memory.total,
            mem_used: memory.used,
            mem_cache: memory.cache,
            mem_total_mib: memory.total / MIB,
            mem_used_mib: memory.used / MIB,
            disk_used,
            disk_total,
        }
    }
}

fn read_proc(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

struct Memory {
    total: u64,
    used: u64,
    cache: u64,
}

fn memory(text: &str) -> Memory {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    let total = field("MemTotal");
    Memory { total, used: total.saturating_sub(field("MemAvailable")), cache: field("Cached") }
}

fn cpu_ticks(text: &str) -> CpuTicks {
    let Some(line) = text.lines().next() else { return CpuTicks::default() };
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is inside user.
    let ticks: Vec<u64> =
        line.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
    let total = ticks.iter().sum();
    let idle = ticks.iter().skip(3).take(2).sum::<u64>();
    CpuTicks { busy: total - idle, total }
}

fn percent(before: CpuTicks, now: CpuTicks) -> f32 {
    let total = now.total.saturating_sub(before.total);
    if total == 0 {
        return 0.0;
    }
    let busy = now.busy.saturating_sub(before.busy);
    // Hundredths are exact far beyond what the ticks resolve.
    let hundredths = u16::try_from(busy.min(total) * 10_000 / total).unwrap_or(10_000);
    f32::from(hundredths) / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_use_is_the_share_since_the_last_look() {
        let first = cpu_ticks("cpu  10 0 10 70 10 0 0 0 5 0\ncpu0 1 2 3 4\n");
        assert_eq!(first, CpuTicks { busy: 20, total: 100 });
        let second = cpu_ticks("cpu  60 0 10 120 10 0 0 0 5 0\n");
        assert!((percent(first, second) - 50.0).abs() < 0.01);
        assert!((percent(second, second)).abs() < f32::EPSILON);
    }

    #[test]
    fn memory_in_use_leaves_out_what_the_kernel_could_drop() {
        let memory = memory("MemTotal:  1000 kB\nMemAvailable:  400 kB\nCached:   100 kB\n");
        assert_eq!((memory.total, memory.used), (1_024_000, 614_400));
        assert_eq!(memory.cache, 102_400);
    }

    #[test]
    fn this_machine_can_be_measured() {
        let metrics = Meter::default().read();
        assert!(metrics.mem_total > 0 && metrics.disk_total > 0 && metrics.cpu_count > 0);
    }
}
