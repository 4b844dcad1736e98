//! What the kernel says about this host: its processor, and how busy it and its disks are.
//!
//! Read from `/proc` (proc(5)), which is memory. What is missing there stays zero or empty: a host
//! that cannot say how busy it is still runs sandboxes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use belljar_wire::rpc::belljar::node::v1 as pb;
use tokio::time::Instant;

/// Least time a processor reading covers; one asked for sooner is answered from the one before.
const CPU_SPAN_MIN: Duration = Duration::from_secs(1);

/// This host.
#[derive(Debug)]
pub(crate) struct Host {
    /// Folders whose file systems matter.
    folders: Vec<PathBuf>,
    // Held to compute one reading, never across a wait.
    cpu: Mutex<Cpu>,
}

#[derive(Debug)]
struct Cpu {
    at: Instant,
    ticks: Ticks,
    percent: f32,
}

/// Time all processors have spent since the host started, in the kernel's unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    all: u64,
}

impl Host {
    pub(crate) fn new(folders: Vec<PathBuf>) -> Host {
        let cpu = Cpu { at: Instant::now(), ticks: cpu_ticks(&read("/proc/stat")), percent: 0.0 };
        Host { folders, cpu: Mutex::new(cpu) }
    }

    pub(crate) fn machine(&self) -> pb::Machine {
        machine(&read("/proc/cpuinfo"))
    }

    /// The host's part of a node's load.
    pub(crate) fn load(&self) -> pb::Load {
        let memory = read("/proc/meminfo");
        let total = meminfo_bytes(&memory, "MemTotal");
        let cpu_count = std::thread::available_parallelism().map_or(0, usize::from);
        pb::Load {
            cpu_percent: self.cpu_percent(),
            cpu_count: u32::try_from(cpu_count).unwrap_or(u32::MAX),
            memory_total_bytes: total,
            memory_used_bytes: total.saturating_sub(meminfo_bytes(&memory, "MemAvailable")),
            disks: disks(&self.folders, &read("/proc/self/mounts")),
            huge_pages: huge_pages(&memory).into(),
            ..pb::Load::default()
        }
    }

    fn cpu_percent(&self) -> f32 {
        // A panic while it was held left a reading or the one before.
        let mut cpu = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        if cpu.at.elapsed() >= CPU_SPAN_MIN {
            let now = cpu_ticks(&read("/proc/stat"));
            cpu.percent = percent(cpu.ticks, now);
            cpu.ticks = now;
            cpu.at = Instant::now();
        }
        cpu.percent
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The first line is `cpu user nice system idle iowait irq softirq steal guest guest_nice`; guest
/// time is in user time already.
fn cpu_ticks(stat: &str) -> Ticks {
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
    let fields: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
    let all = fields.iter().sum();
    let idle: u64 = fields.iter().skip(3).take(2).sum();
    Ticks { busy: all - idle, all }
}

#[expect(clippy::cast_precision_loss, reason = "a percentage of some seconds' ticks")]
fn percent(before: Ticks, now: Ticks) -> f32 {
    let all = now.all.saturating_sub(before.all);
    if all == 0 {
        return 0.0;
    }
    now.busy.saturating_sub(before.busy) as f32 * 100.0 / all as f32
}

/// The value of a `Name:  1234 kB` line, or of one without a unit.
fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn meminfo_bytes(text: &str, name: &str) -> u64 {
    meminfo(text, name).saturating_mul(1024)
}

fn huge_pages(memory: &str) -> pb::HugePages {
    let total = meminfo(memory, "HugePages_Total");
    pb::HugePages {
        total,
        used: total.saturating_sub(meminfo(memory, "HugePages_Free")),
        reserved: meminfo(memory, "HugePages_Rsvd"),
        page_size_bytes: meminfo_bytes(memory, "Hugepagesize"),
        ..pb::HugePages::default()
    }
}

/// Of the first processor; ARM kernels have other words for family and model.
fn machine(cpuinfo: &str) -> pb::Machine {
    let value = |names: &[&str]| {
        names.iter().find_map(|wanted| {
            cpuinfo.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                (name.trim() == *wanted).then(|| value.trim().to_owned())
            })
        })
    };
    pb::Machine {
        cpu_family: value(&["cpu family", "CPU architecture"]).unwrap_or_default(),
        cpu_model: value(&["model", "CPU part"]).unwrap_or_default(),
        cpu_model_name: value(&["model name", "CPU implementer"]).unwrap_or_default(),
        cpu_architecture: std::env::consts::ARCH.to_owned(),
        ..pb::Machine::default()
    }
}

/// The file systems that hold `folders`, each once.
fn disks(folders: &[PathBuf], mounts: &str) -> Vec<pb::Disk> {
    let mut disks: Vec<pb::Disk> = Vec::new();
    for folder in folders {
        let Some(mount) = mount_of(folder, mounts) else { continue };
        let Ok(stat) = rustix::fs::statvfs(folder) else { continue };
        if disks.iter().any(|disk| disk.mount == mount.point) {
            continue;
        }
        disks.push(pb::Disk {
            mount: mount.point,
            device: mount.device,
            fs_type: mount.fs_type,
            used_bytes: stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize),
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            ..pb::Disk::default()
        });
    }
    disks
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    device: String,
    point: String,
    fs_type: String,
}

/// The mount a folder is on: of the longest mount points above it, the last one made.
fn mount_of(folder: &Path, mounts: &str) -> Option<Mount> {
    let all = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').map(plain);
        let (device, point, fs_type) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Mount { device, point, fs_type })
    });
    all.filter(|mount| folder.starts_with(&mount.point)).max_by_key(|mount| mount.point.len())
}

/// The kernel writes blanks and backslashes as `\040` and the like.
fn plain(field: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(field.to_owned(), |text, (escape, char)| text.replace(escape, char))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_becomes_a_percentage() {
        let before = cpu_ticks("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3 4\n");
        assert_eq!(before, Ticks { busy: 150, all: 1000 });
        let now = cpu_ticks("cpu  150 0 75 870 55 0 0 0 30 0\n");
        assert!((percent(before, now) - 50.0).abs() < 0.01);
        assert!(percent(now, now).abs() < f32::EPSILON);
        assert_eq!(cpu_ticks(""), Ticks::default());
    }

    #[test]
    fn memory_and_huge_pages_are_read() {
        let text = "MemTotal:       24681972 kB\nMemAvailable:   23000000 kB\n\
            HugePages_Total:       8\nHugePages_Free:        5\nHugePages_Rsvd:        1\n\
            Hugepagesize:       2048 kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), 24_681_972 * 1024);
        assert_eq!(meminfo_bytes(text, "Mem"), 0);
        let pages = huge_pages(text);
        assert_eq!((pages.total, pages.used, pages.reserved), (8, 3, 1));
        assert_eq!(pages.page_size_bytes, 2 << 20);
    }

    #[test]
    fn the_processor_is_named_as_the_kernel_names_it() {
        let text = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 106\nmodel name\t: A CPU @ 2 GHz\n";
        let machine = machine(text);
        assert_eq!((&*machine.cpu_family, &*machine.cpu_model), ("6", "106"));
        assert_eq!(machine.cpu_model_name, "A CPU @ 2 GHz");
        assert!(!machine.cpu_architecture.is_empty());
    }

    #[test]
    fn a_folder_is_on_the_deepest_mount_above_it() {
        let mounts = "/dev/vda / ext4 rw 0 0\n/dev/vdb /var/lib xfs rw 0 0\n\
            tmpfs /with\\040blank tmpfs rw 0 0\n";
        let point = |folder: &str| mount_of(Path::new(folder), mounts).expect("a mount").point;
        assert_eq!(point("/var/lib/belljar"), "/var/lib");
        assert_eq!(point("/var/library"), "/");
        assert_eq!(point("/with blank/x"), "/with blank");
        assert_eq!(mount_of(Path::new("relative"), mounts), None);
    }

    #[test]
    fn this_host_says_something() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let host = Host::new(vec![dir.path().to_owned(), dir.path().to_owned()]);
        let load = host.load();
        assert!(load.memory_total_bytes >= load.memory_used_bytes && load.memory_used_bytes > 0);
        assert_eq!(load.disks.len(), 1);
        assert!(load.disks[0].total_bytes > 0 && load.cpu_count > 0);
    }
}
