//! Finds and removes what an earlier process left of a machine, by its exact command line.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::cgroup::Group;
use crate::machine::KillError;

/// A killed process is gone by then unless the kernel holds it.
const KILL_LIMIT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(10);

/// Kills every process that has `marker` (two neighbouring arguments) and every process of
/// `group`, and removes the group. Says whether there was anything. Blocks up to some seconds.
///
/// # Errors
/// [`KillError`] for the first thing that stays.
pub(crate) fn remove(name: &str, marker: [&str; 2], group: &Group) -> Result<bool, KillError> {
    let fail =
        |what, e: io::Error| KillError { name: name.to_owned(), what, reason: e.to_string() };
    let marked = find(marker).map_err(|e| fail("the process", e))?;
    let mut found = !marked.is_empty() || group.exists();
    for pidfd in &marked {
        kill(pidfd).map_err(|e| fail("the process", e))?;
    }
    let give_up = Instant::now() + KILL_LIMIT;
    loop {
        for pid in group.processes() {
            if let Some(pidfd) = open(pid) {
                found = true;
                kill(&pidfd).map_err(|e| fail("a process in the cgroup", e))?;
            }
        }
        match group.remove() {
            Ok(()) => return Ok(found),
            Err(e) if Instant::now() >= give_up => return Err(fail("the cgroup", e)),
            // Busy for a moment after its last process.
            Err(_) => drop(poll(&mut [], Some(&timespec(RETRY)))),
        }
    }
}

/// Handles of the processes that have `marker` among their arguments.
fn find(marker: [&str; 2]) -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if !has_marker(pid, marker) {
            continue;
        }
        // Looked at again under a handle: the id may have gone to another process between.
        if let Some(pidfd) = open(pid)
            && has_marker(pid, marker)
        {
            found.push(pidfd);
        }
    }
    Ok(found)
}

fn has_marker(pid: u32, marker: [&str; 2]) -> bool {
    // A process that is gone, or a zombie, has no command line.
    let Ok(text) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let arguments: Vec<&[u8]> = text.split(|byte| *byte == 0).collect();
    arguments
        .windows(2)
        .any(|pair| pair[0] == marker[0].as_bytes() && pair[1] == marker[1].as_bytes())
}

fn open(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Kills a process and waits for its end.
fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    let give_up = Instant::now() + KILL_LIMIT;
    loop {
        let left = give_up.saturating_duration_since(Instant::now());
        let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
        match poll(&mut watched, Some(&timespec(left))) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn timespec(span: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(span.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    #[test]
    fn only_the_exact_marker_is_killed() {
        let sleeper = |value: &str| {
            // Reads for ever: the other end of its input is ours and says nothing.
            let mut child = Command::new("/bin/sh")
                .args(["-c", "echo up; read line", "-name", value])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("every Linux has a shell");
            // A process has no command line yet for a moment after it was started.
            let mut up = [0; 3];
            let output = child.stdout.as_mut().expect("piped");
            output.read_exact(&mut up).expect("it says that it is up");
            child
        };
        let (mut wanted, mut other) = (sleeper("leftover-aa"), sleeper("leftover-aab"));
        let marker = ["-name", "leftover-aa"];
        assert!(remove("aa", marker, &Group::default()).expect("it is ours to kill"));
        wanted.wait().expect("it was killed");
        assert!(!remove("aa", marker, &Group::default()).expect("nothing is left"));
        assert!(other.try_wait().expect("our child").is_none(), "the wrong process was killed");
        other.kill().expect("our child");
        other.wait().expect("our child");
    }
}
