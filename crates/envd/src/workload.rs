//! User processes in control groups of their own, so that they can be limited and frozen and the
//! daemon cannot be starved by them.
//!
//! ```text
//! /                the cgroup2 mount: kernel threads
//! ├── daemon       this process: memory the kernel does not take away, first call on processors
//! └── sandbox      every user process: memory.max and pids.max
//!     ├── user     those with pipes
//!     └── pty      those with a terminal
//! ```
//!
//! Root inside may add groups of its own beside these, as container engines do: the controllers
//! are on for all children of the mount. Such groups have no limit unless their maker sets one,
//! and are frozen with the rest.
//!
//! Source of `user` and `pty`: `contract/e2b-wire.md` section 2.3.

mod limits;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};

use limits::Limits;

const DAEMON: &str = "daemon";
const SANDBOX: &str = "sandbox";
const USER: &str = "sandbox/user";
const PTY: &str = "sandbox/pty";

/// What limits and weights need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Shares of the processors under contention; the kernel's default is 100, its largest 10,000.
/// The daemon works little and must answer soon. Someone waits at a terminal.
const DAEMON_CPU_WEIGHT: u64 = 1000;
const PTY_CPU_WEIGHT: u64 = 200;

/// How long the start of a process waits for a freeze to end. A snapshot takes less.
const THAW_WAIT_LIMIT: Duration = Duration::from_secs(30);

/// Most groups beside our own that a freeze looks at.
const TOP_GROUPS_MAX: usize = 4096;

/// The groups of user processes.
#[derive(Debug)]
pub struct Workload {
    root: PathBuf,
    user: Arc<OwnedFd>,
    pty: Arc<OwnedFd>,
    gate: Mutex<Gate>,
    changed: Condvar,
}

/// Keeps starts and freezes apart: a child that joins a frozen group stops before its exec, and
/// its parent would wait for that exec.
#[derive(Debug, Default)]
struct Gate {
    /// The groups this daemon froze; empty when nothing is frozen.
    frozen: Vec<PathBuf>,
    /// A freeze is being made or in force.
    closed: bool,
    /// Children between fork and exec.
    starting: u32,
    /// Counts freezes and thaws, so that the watchdog of one freeze never ends another, and a
    /// thaw undoes also a freeze that is still on its way.
    generation: u64,
}

/// Why the groups could not be made.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// Not the top of a cgroup2 file system.
    #[error("find control groups: {} is no cgroup2 file system", .0.display())]
    NoCgroups(PathBuf),
    /// A group or one of its files could not be used.
    #[error("set up control group {}: {source}", .path.display())]
    Group {
        /// The group or file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Why user processes were not frozen; none of them is then.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FreezeError {
    /// There are more groups than the caller wants to wait for.
    #[error("freeze {found} control groups, more than maxCgroups={limit}")]
    TooMany {
        /// How many there are.
        found: usize,
        /// The caller's limit.
        limit: usize,
    },
    /// Something did not stop in time.
    #[error("freeze every process within {0} ms; all of them run on")]
    TooSlow(u128),
    /// The kernel refused.
    #[error("freeze control group {0}; all of them run on")]
    Refused(String),
}

/// A freeze that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen {
    /// Groups frozen, those inside others included.
    pub groups: usize,
    /// How long it took.
    pub waited: Duration,
}

/// User processes are frozen, and stayed so longer than a start waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StillFrozen;

/// A start in progress: no freeze begins before it is dropped.
pub(crate) struct Starting<'a>(&'a Workload);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.lock().starting -= 1;
        self.0.changed.notify_all();
    }
}

impl Workload {
    /// Makes the groups below `root`, which is a cgroup2 mount or an empty group in one, and
    /// limits them as far as the controllers there allow.
    ///
    /// # Errors
    /// [`WorkloadError`] when there are no groups to put processes into. Limits that cannot be
    /// set are logged only.
    pub fn create(root: &Path) -> Result<Workload, WorkloadError> {
        let controllers = fs::read_to_string(root.join("cgroup.controllers"))
            .map_err(|_| WorkloadError::NoCgroups(root.to_owned()))?;
        let available: Vec<&str> = controllers.split_whitespace().collect();
        enable(root, &available);
        make(root, SANDBOX)?;
        enable(&root.join(SANDBOX), &available);
        make(root, USER)?;
        make(root, PTY)?;
        let limits = Limits::of_this_machine();
        set(root, &available, SANDBOX, "memory.max", limits.memory_max_bytes);
        set(root, &available, SANDBOX, "pids.max", limits.pids_max);
        set(root, &available, PTY, "cpu.weight", PTY_CPU_WEIGHT);
        Ok(Workload {
            root: root.to_owned(),
            user: Arc::new(open_processes(&root.join(USER))?),
            pty: Arc::new(open_processes(&root.join(PTY))?),
            gate: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Moves this process into a group of its own whose memory the kernel keeps.
    ///
    /// # Errors
    /// [`WorkloadError`] when it stays where it is.
    pub fn set_daemon_apart(&self) -> Result<(), WorkloadError> {
        let controllers = fs::read_to_string(self.root.join("cgroup.controllers"));
        let controllers = controllers.unwrap_or_default();
        let available: Vec<&str> = controllers.split_whitespace().collect();
        make(&self.root, DAEMON)?;
        let reserve_bytes = Limits::of_this_machine().reserve_bytes;
        // Half is the daemon's for good, so that its own code is never dropped and read again
        // from a busy disk; the other half as long as the kernel can do without.
        set(&self.root, &available, DAEMON, "memory.min", reserve_bytes / 2);
        set(&self.root, &available, DAEMON, "memory.low", reserve_bytes);
        set(&self.root, &available, DAEMON, "cpu.weight", DAEMON_CPU_WEIGHT);
        let path = self.root.join(DAEMON).join("cgroup.procs");
        fs::write(&path, "0").map_err(|source| WorkloadError::Group { path, source })
    }

    /// The file through which a child joins its group by writing `0`.
    pub(crate) fn group(&self, terminal: bool) -> Arc<OwnedFd> {
        Arc::clone(if terminal { &self.pty } else { &self.user })
    }

    /// Announces a start, which a freeze waits for. Waits out a freeze, at most
    /// [`THAW_WAIT_LIMIT`]. Blocks.
    pub(crate) fn start(&self) -> Result<Starting<'_>, StillFrozen> {
        let deadline = Instant::now() + THAW_WAIT_LIMIT;
        let mut gate = self.lock();
        while gate.closed {
            gate = self.wait(gate, deadline).ok_or(StillFrozen)?;
        }
        gate.starting += 1;
        Ok(Starting(self))
    }

    /// Announces a freeze. What it returns names it to [`Workload::freeze`] and
    /// [`Workload::thaw_if`], so that a watchdog can be set before anything stops.
    pub fn announce(&self) -> u64 {
        let mut gate = self.lock();
        gate.generation += 1;
        gate.generation
    }

    /// Stops every process in a group other than the daemon's, and waits until all have stopped;
    /// only what root moved to the top of the tree runs on. Again when frozen already: then it
    /// counts as a newer freeze. Blocks.
    ///
    /// # Errors
    /// [`FreezeError`]; everything runs on then, but for what a newer freeze stops.
    pub fn freeze(
        &self,
        generation: u64,
        groups_max: usize,
        limit: Duration,
    ) -> Result<Frozen, FreezeError> {
        let outcome = self.stop(generation, groups_max, limit);
        if outcome.is_err() {
            // Also what an earlier freeze had stopped: this one has taken its watchdog's place.
            self.thaw_if(generation);
        }
        outcome
    }

    /// As [`Workload::freeze`], and leaves what it did when it fails.
    fn stop(
        &self,
        generation: u64,
        groups_max: usize,
        limit: Duration,
    ) -> Result<Frozen, FreezeError> {
        let started = Instant::now();
        let deadline = started + limit;
        let groups = top_groups(&self.root);
        let found = groups.iter().map(|group| 1 + descendants(group)).sum();
        if found > groups_max {
            return Err(FreezeError::TooMany { found, limit: groups_max });
        }
        let too_slow = FreezeError::TooSlow(limit.as_millis());
        let mut gate = self.lock();
        if gate.generation != generation {
            return Err(too_slow);
        }
        gate.closed = true;
        while gate.starting > 0 {
            let Some(woken) = self.wait(gate, deadline) else { return Err(too_slow) };
            gate = woken;
            if gate.generation != generation {
                // A thaw has opened the gate, or a newer freeze holds it.
                return Err(too_slow);
            }
        }
        let outcome = stop_all(&groups, &mut gate.frozen);
        let stopping = gate.frozen.clone();
        // Not held while waiting: a thaw must never wait for a freeze.
        drop(gate);
        outcome?;
        if !stopping.iter().all(|group| wait_until_frozen(group, deadline)) {
            return Err(too_slow);
        }
        Ok(Frozen { groups: found, waited: started.elapsed() })
    }

    /// Lets everything run again that [`Workload::freeze`] stopped or was about to. Nothing stopped
    /// is fine.
    pub fn thaw(&self) {
        let mut gate = self.lock();
        gate.generation += 1;
        self.open(&mut gate);
    }

    /// As [`Workload::thaw`], unless there has been a newer freeze. Says whether it thawed.
    pub fn thaw_if(&self, generation: u64) -> bool {
        let mut gate = self.lock();
        let due = gate.closed && gate.generation == generation;
        if due {
            self.open(&mut gate);
        }
        due
    }

    fn open(&self, gate: &mut Gate) {
        for group in gate.frozen.drain(..) {
            // One that is gone holds no process.
            if let Err(error) = fs::write(group.join("cgroup.freeze"), "0")
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::error!(%error, group = %group.display(), "failed to thaw a group");
            }
        }
        gate.closed = false;
        self.changed.notify_all();
    }

    /// Waits for a change; `None` once the deadline has passed.
    fn wait<'a>(
        &'a self,
        gate: MutexGuard<'a, Gate>,
        deadline: Instant,
    ) -> Option<MutexGuard<'a, Gate>> {
        let left = deadline.checked_duration_since(Instant::now())?;
        Some(self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    /// A holder that panics leaves at worst a group frozen that is listed as such.
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns controllers on for the children of a group. One the kernel lacks is no one's loss but
/// that of its limit.
fn enable(group: &Path, available: &[&str]) {
    for name in CONTROLLERS.iter().filter(|name| available.contains(name)) {
        if let Err(error) = fs::write(group.join("cgroup.subtree_control"), format!("+{name}")) {
            tracing::warn!(%error, name, group = %group.display(), "failed to turn a controller on");
        }
    }
}

fn make(root: &Path, name: &str) -> Result<(), WorkloadError> {
    let path = root.join(name);
    match fs::create_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        outcome => outcome.map_err(|source| WorkloadError::Group { path, source }),
    }
}

fn set(root: &Path, available: &[&str], group: &str, file: &str, value: u64) {
    let controller = file.split('.').next().unwrap_or_default();
    if !available.contains(&controller) {
        return;
    }
    if let Err(error) = fs::write(root.join(group).join(file), value.to_string()) {
        tracing::warn!(%error, group, file, value, "failed to limit a control group");
    }
}

fn open_processes(group: &Path) -> Result<OwnedFd, WorkloadError> {
    let path = group.join("cgroup.procs");
    rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| WorkloadError::Group { path, source: error.into() })
}

/// Every group right below the mount but the daemon's.
fn top_groups(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| entry.file_name() != DAEMON)
        .map(|entry| entry.path())
        .take(TOP_GROUPS_MAX)
        .collect()
}

fn descendants(group: &Path) -> usize {
    let text = fs::read_to_string(group.join("cgroup.stat")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("nr_descendants "));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Tells each group to stop, and lists those that were not stopped before: what its owner froze
/// stays its owner's to thaw.
fn stop_all(groups: &[PathBuf], frozen: &mut Vec<PathBuf>) -> Result<(), FreezeError> {
    for group in groups {
        let file = group.join("cgroup.freeze");
        if fs::read_to_string(&file).is_ok_and(|state| state.trim() == "1") {
            continue;
        }
        match fs::write(&file, "1") {
            Ok(()) => frozen.push(group.clone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(FreezeError::Refused(format!("{}: {error}", group.display())));
            }
        }
    }
    Ok(())
}

/// Whether every process of a group has stopped by the deadline. One that is gone counts.
fn wait_until_frozen(group: &Path, deadline: Instant) -> bool {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(events) = rustix::fs::open(group.join("cgroup.events"), flags, Mode::empty()) else {
        return true;
    };
    loop {
        let mut bytes = [0; 256];
        // From the start again: reading is also what arms the next notification.
        let Ok(length) = rustix::io::pread(&events, &mut bytes, 0) else { return true };
        let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
        if text.lines().any(|line| line == "frozen 1") {
            return true;
        }
        let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
        let Ok(left) = left.try_into() else { return false };
        // An interrupted wait and an elapsed one both lead to another look.
        let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left));
    }
}

#[cfg(test)]
mod tests;
