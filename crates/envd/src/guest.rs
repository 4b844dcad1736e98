//! The duties of PID 1: what the machine needs before anything else can run in it.

pub mod certificates;
mod cmdline;
pub mod control;
pub mod disks;
mod identity;
mod knock;
mod lines;
mod mounts;
mod network;
mod outbox;

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit};
use rustix::time::{ClockId, Timespec};

use crate::accounts::Accounts;
use crate::children;
use crate::state::{DEFAULT_PATH, Settings, UPLOAD_STALL_LIMIT};
use crate::workload::{Workload, WorkloadError};

/// Where the sandbox's names lie for programs inside.
///
/// Source: `contract/e2b-wire.md` section 2.6.
const IDENTITY_DIR: &str = "/run/e2b";

/// Host name of every sandbox.
const HOST_NAME: &str = "sandbox";

/// The user of requests that name none, in a template that has one.
///
/// Source: `contract/e2b-wire.md` section 2.6.
const USUAL_USER: &str = "user";

/// Open files a process may have without asking, and at most.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Where `mounts` puts the control groups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// When memory ends, the kernel ends any other process first: without the daemon the machine is
/// lost. Source: `proc_pid_oom_score_adj(5)`, where this means never.
const DAEMON_OOM_SCORE_ADJ: &str = "-1000";

/// Kernel settings every distribution's init makes, and the kernel by itself does not. Without the
/// first, an unprivileged program can put a hard link to a root's file or link where the daemon will
/// write (see `files::reach`); the watches are shared by the daemon and everything users run.
const KERNEL_SETTINGS: [(&str, &str); 5] = [
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_regular", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/inotify/max_user_instances", "1024"),
];

/// Sets the machine up as far as it goes. What fails is logged: a sandbox without, say, its
/// network is of more use than none.
pub fn set_up_machine() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    mounts::mount_all();
    let limit = Rlimit { current: Some(OPEN_FILES.0), maximum: Some(OPEN_FILES.1) };
    log_failure("raise the open files limit", rustix::process::setrlimit(Resource::Nofile, limit));
    log_failure("set the host name", rustix::system::sethostname(HOST_NAME.as_bytes()));
    for (name, value) in KERNEL_SETTINGS {
        let outcome = std::fs::write(Path::new("/proc/sys").join(name), value);
        log_failure(&format!("set {name}"), outcome);
    }
    let outcome = std::fs::write("/proc/self/oom_score_adj", DAEMON_OOM_SCORE_ADJ);
    log_failure("be spared when memory ends", outcome);
    log_failure("reap children", children::start_reaping());
    let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    network::bring_up(&cmdline::parse(&cmdline));
    log_failure("mark the machine as a sandbox", identity::mark(Path::new(IDENTITY_DIR)));
}

/// Puts user processes and this one into groups apart. Without it the daemon works, and a process
/// that takes everything takes the daemon's share too.
fn workload() -> Option<Arc<Workload>> {
    let outcome = Workload::create(Path::new(CGROUPS)).and_then(|workload| {
        workload.set_daemon_apart()?;
        Ok::<_, WorkloadError>(Arc::new(workload))
    });
    outcome.inspect_err(|error| tracing::warn!("failed to {error}; nothing is limited")).ok()
}

/// What the daemon starts with in a guest; the host's init message says the rest. The machine
/// must have been set up.
pub fn settings() -> Settings {
    let user = if Accounts::load().user(USUAL_USER).is_some() { USUAL_USER } else { "root" };
    Settings {
        in_guest: true,
        search_path: DEFAULT_PATH.to_owned(),
        default_user: user.to_owned(),
        default_workdir: None,
        access_token: None,
        upload_stall_limit: UPLOAD_STALL_LIMIT,
        workload: workload(),
    }
}

/// Sets the wall clock, forwards or backwards.
///
/// # Errors
/// As `clock_settime(2)`.
pub fn set_clock(unix_ns: u64) -> io::Result<()> {
    const NANOS: u64 = 1_000_000_000;
    let seconds = i64::try_from(unix_ns / NANOS).expect("2^64 ns are fewer than 2^63 s");
    let nanos = i64::try_from(unix_ns % NANOS).expect("below 10^9");
    Ok(rustix::time::clock_settime(
        ClockId::Realtime,
        Timespec { tv_sec: seconds, tv_nsec: nanos },
    )?)
}

/// Ends the machine. The host's VMM is told not to boot again, so this ends it too.
pub fn reboot() {
    mounts::unmount_all();
    log_failure("reboot", rustix::system::reboot(rustix::system::RebootCommand::Restart));
}

fn log_failure<T, E: std::fmt::Display>(what: &str, outcome: Result<T, E>) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "failed to {what}");
    }
}
