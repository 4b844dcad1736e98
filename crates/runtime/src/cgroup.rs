//! What bounds a machine's process: one cgroup a machine, below a folder of ours.
//!
//! Version 2 is used where its controllers are there; else version 1, one folder a controller.
//! A host may have version 2 mounted with every controller still in version 1 (hybrid mode), so
//! the choice reads `cgroup.controllers` and not the mount table alone.
//! Source of file names and ranges: cgroups(7) and the kernel's cgroup-v1 and cgroup-v2 documents.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The controllers a machine needs, in the order their folders are made.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// Default weight of a version 1 group, and of one virtual processor here.
const V1_SHARES_EACH: u32 = 1024;
/// Default weight of a version 2 group, and of one virtual processor here.
const V2_WEIGHT_EACH: u32 = 100;
const V2_WEIGHT_MAX: u32 = 10_000;
/// Tries to make a group whose parent another process removes as empty at the same time.
const CREATE_TRIES: u32 = 5;

/// Bounds of one machine's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    /// Threads count as processes.
    pub(crate) processes: u32,
    /// Share of the host's processors, in virtual processors.
    pub(crate) vcpus: u32,
}

/// Where this host's groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroups {
    /// One tree with every controller.
    V2 {
        /// Where it is mounted.
        root: PathBuf,
        /// Name of our folder in it.
        parent: String,
    },
    /// One tree a controller, in the order of [`CONTROLLERS`].
    V1 {
        /// Where they are mounted.
        roots: [PathBuf; 3],
        /// Name of our folder in each.
        parent: String,
    },
    /// Nothing bounds the processes.
    Unbounded {
        /// Why, as a sentence without a full stop.
        reason: String,
    },
}

/// One machine's group: its folders.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    folders: Vec<PathBuf>,
}

impl std::fmt::Display for Cgroups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cgroups::V2 { root, parent } => {
                write!(f, "cgroup v2 at {}", root.join(parent).display())
            }
            Cgroups::V1 { roots: [memory, ..], parent } => {
                write!(f, "cgroup v1 at {} and beside it", memory.join(parent).display())
            }
            Cgroups::Unbounded { reason } => write!(f, "nothing: {reason}"),
        }
    }
}

impl Cgroups {
    /// Finds out what this host has and whether this process may use it.
    pub(crate) fn discover(parent: &str) -> Cgroups {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let found = choose(&mounts, parent, |root| {
            fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default()
        });
        match found.try_out() {
            Ok(()) => found,
            Err(e) => {
                Cgroups::Unbounded { reason: format!("the cgroups are not ours to use: {e}") }
            }
        }
    }

    /// Makes and removes our folder, to learn whether a machine's group can be made.
    fn try_out(&self) -> io::Result<()> {
        let Some(parents) = self.parents() else { return Ok(()) };
        let result = self.make_parents(&parents);
        remove_empty(&parents);
        result
    }

    fn parents(&self) -> Option<Vec<PathBuf>> {
        match self {
            Cgroups::V2 { root, parent } => Some(vec![root.join(parent)]),
            Cgroups::V1 { roots, parent } => {
                Some(roots.iter().map(|root| root.join(parent)).collect())
            }
            Cgroups::Unbounded { .. } => None,
        }
    }

    fn make_parents(&self, parents: &[PathBuf]) -> io::Result<()> {
        if let Cgroups::V2 { root, .. } = self {
            enable_controllers(root)?;
        }
        for parent in parents {
            make_folder(parent)?;
            if let Cgroups::V2 { .. } = self {
                enable_controllers(parent)?;
            }
        }
        Ok(())
    }

    /// The group of the machine `name`, whether or not it exists.
    pub(crate) fn group(&self, name: &str) -> Group {
        let parents = self.parents().unwrap_or_default();
        Group { folders: parents.iter().map(|parent| parent.join(name)).collect() }
    }

    /// Makes the group of the machine `name` with its limits; an empty one where nothing bounds.
    ///
    /// # Errors
    /// I/O errors; nothing of the group is left then.
    pub(crate) fn create(&self, name: &str, limits: &Limits) -> io::Result<Group> {
        let group = self.group(name);
        let Some(parents) = self.parents() else { return Ok(group) };
        let mut tries_left = CREATE_TRIES;
        loop {
            tries_left -= 1;
            let made = self
                .make_parents(&parents)
                .and_then(|()| group.folders.iter().try_for_each(|folder| make_folder(folder)));
            match made {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::NotFound && tries_left > 0 => {}
                Err(e) => {
                    drop(group.remove());
                    return Err(e);
                }
            }
        }
        if let Err(e) = self.set(&group, limits) {
            drop(group.remove());
            return Err(e);
        }
        Ok(group)
    }

    fn set(&self, group: &Group, limits: &Limits) -> io::Result<()> {
        let memory = limits.memory_bytes.to_string();
        let processes = limits.processes.to_string();
        match (self, group.folders.as_slice()) {
            (Cgroups::V2 { .. }, [folder]) => {
                let weight = limits.vcpus.saturating_mul(V2_WEIGHT_EACH).clamp(1, V2_WEIGHT_MAX);
                write(folder, "memory.max", &memory)?;
                write(folder, "memory.oom.group", "1")?;
                write(folder, "pids.max", &processes)?;
                write(folder, "cpu.weight", &weight.to_string())
            }
            (Cgroups::V1 { .. }, [memory_folder, pids_folder, cpu_folder]) => {
                let shares = limits.vcpus.max(1).saturating_mul(V1_SHARES_EACH);
                write(memory_folder, "memory.limit_in_bytes", &memory)?;
                write(pids_folder, "pids.max", &processes)?;
                write(cpu_folder, "cpu.shares", &shares.to_string())
            }
            _ => Ok(()),
        }
    }
}

impl Group {
    /// Moves a process into the group.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn attach(&self, process_id: u32) -> io::Result<()> {
        let id = process_id.to_string();
        self.folders.iter().try_for_each(|folder| write(folder, "cgroup.procs", &id))
    }

    /// Whether any of it exists.
    pub(crate) fn exists(&self) -> bool {
        self.folders.iter().any(|folder| folder.exists())
    }

    /// The processes in the group.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut found: Vec<u32> = self
            .folders
            .iter()
            .filter_map(|folder| fs::read_to_string(folder.join("cgroup.procs")).ok())
            .flat_map(|text| text.lines().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Removes the group, and our folder when it was the last one in it. Idempotent.
    ///
    /// # Errors
    /// The first I/O error; a busy group means that a process is still in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        for folder in &self.folders {
            match fs::remove_dir(folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    result = result.and(Err(e));
                }
                _ => {}
            }
        }
        let parents: Vec<PathBuf> =
            self.folders.iter().filter_map(|f| f.parent().map(Path::to_owned)).collect();
        remove_empty(&parents);
        result
    }
}

/// Removes our folders where nothing is in them; one that is in use stays, and that is right.
fn remove_empty(parents: &[PathBuf]) {
    for parent in parents {
        drop(fs::remove_dir(parent));
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Lets the groups below `folder` use our controllers.
fn enable_controllers(folder: &Path) -> io::Result<()> {
    write(folder, "cgroup.subtree_control", "+memory +pids +cpu")
}

fn write(folder: &Path, file: &str, value: &str) -> io::Result<()> {
    fs::write(folder.join(file), value)
}

/// Reads a mount table and decides; `controllers` reads a version 2 root's `cgroup.controllers`.
fn choose(mounts: &str, parent: &str, controllers: impl Fn(&Path) -> String) -> Cgroups {
    let mut v1: [Option<PathBuf>; 3] = [None, None, None];
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(point), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let point = PathBuf::from(point);
        if kind == "cgroup2" {
            let offered = controllers(&point);
            if CONTROLLERS.iter().all(|wanted| offered.split_whitespace().any(|c| c == *wanted)) {
                return Cgroups::V2 { root: point, parent: parent.to_owned() };
            }
        } else if kind == "cgroup" {
            for (slot, wanted) in v1.iter_mut().zip(CONTROLLERS) {
                if options.split(',').any(|option| option == wanted) {
                    *slot = Some(point.clone());
                }
            }
        }
    }
    match v1 {
        [Some(memory), Some(pids), Some(cpu)] => {
            Cgroups::V1 { roots: [memory, pids, cpu], parent: parent.to_owned() }
        }
        _ => Cgroups::Unbounded {
            reason: "this host has no memory, pids and cpu controllers mounted".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
";

    #[test]
    fn a_hybrid_host_uses_version_1_and_a_pure_one_version_2() {
        let Cgroups::V1 { roots, .. } = choose(HYBRID, "ours", |_| "hugetlb".into()) else {
            panic!("version 2 has none of the controllers");
        };
        assert_eq!(roots[2], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        let pure = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let found = choose(pure, "ours", |_| "cpuset cpu io memory pids\n".into());
        assert_eq!(found, Cgroups::V2 { root: "/sys/fs/cgroup".into(), parent: "ours".into() });
        assert!(matches!(choose("", "ours", |_| String::new()), Cgroups::Unbounded { .. }));
    }

    #[test]
    fn version_2_limits_are_written_to_their_files() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let cgroups = Cgroups::V2 { root: root.path().to_owned(), parent: "ours".into() };
        let limits = Limits { memory_bytes: 4096, processes: 9, vcpus: 2 };
        cgroups.create("one", &limits).expect("plain files take every value");
        let read = |file: &str| fs::read_to_string(root.path().join("ours/one").join(file));
        assert_eq!(read("memory.max").expect("written"), "4096");
        assert_eq!(read("pids.max").expect("written"), "9");
        assert_eq!(read("cpu.weight").expect("written"), "200");
    }

    #[test]
    fn a_real_group_holds_its_limits_and_goes_with_its_parent() {
        let cgroups = Cgroups::discover("belljar-rtgroup");
        if let Cgroups::Unbounded { reason } = &cgroups {
            return belljar_testkit::skip(&format!("needs cgroups it may use: {reason}"));
        }
        let limits = Limits { memory_bytes: 64 << 20, processes: 9, vcpus: 1 };
        let group = cgroups.create("one", &limits).expect("the try-out succeeded");
        assert!(group.exists());
        assert_eq!(group.processes(), Vec::<u32>::new());
        group.remove().expect("nothing is in it");
        group.remove().expect("removing twice is fine");
        assert!(!group.exists());
        assert!(cgroups.parents().expect("bounded").iter().all(|parent| !parent.exists()));
    }
}
