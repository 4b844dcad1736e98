//! Every child process of this daemon: one thread reaps, and no signal ever meets a reused id.
//!
//! As PID 1 the daemon also inherits every orphan of the machine, so one place must own
//! `wait`: a thread looks at whatever child ended, and takes the registry's lock before it
//! removes the child from the process table. Whoever holds that lock may therefore trust that a
//! registered process id still means the process it meant. Spawning holds it too, so a child
//! that ends at once is not mistaken for an orphan.
//!
//! Waiting for any child is a property of the whole process, hence one registry for all servers
//! in it.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tokio::sync::oneshot;

use crate::sys;
pub(crate) use crate::sys::Ended;

/// Whom a signal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The process alone.
    Process,
    /// Its whole process group, which it leads.
    Group,
}

#[derive(Default)]
struct Children {
    registry: Mutex<Registry>,
    changed: Condvar,
}

#[derive(Default)]
struct Registry {
    running: HashMap<u32, oneshot::Sender<Ended>>,
    /// The reaper found no child at all, registered or not.
    childless: bool,
    reaping: bool,
}

/// Starts a child and registers it in one step. The receiver yields how it ended.
pub(crate) fn spawn(command: &mut Command) -> io::Result<(u32, oneshot::Receiver<Ended>)> {
    let children = children();
    let mut registry = lock(children);
    ensure_reaper(&mut registry)?;
    // The handle is dropped: waiting is the reaper's, and dropping it does not end the child.
    let pid = command.spawn()?.id();
    let (ended, receiver) = oneshot::channel();
    registry.running.insert(pid, ended);
    registry.childless = false;
    children.changed.notify_all();
    Ok((pid, receiver))
}

/// Signals a registered child. Says whether it was still there to be signalled.
pub(crate) fn signal(pid: u32, signal: Signal, reach: Reach) -> bool {
    let registry = lock(children());
    if !registry.running.contains_key(&pid) {
        return false;
    }
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    match reach {
        Reach::Process => rustix::process::kill_process(pid, signal).is_ok(),
        Reach::Group => rustix::process::kill_process_group(pid, signal).is_ok(),
    }
}

/// Starts reaping before the first spawn: PID 1 inherits orphans of whoever came before.
pub(crate) fn start_reaping() -> io::Result<()> {
    ensure_reaper(&mut lock(children()))
}

fn ensure_reaper(registry: &mut Registry) -> io::Result<()> {
    if !registry.reaping {
        std::thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(128 * 1024)
            .spawn(|| reap_forever(children()))?;
        registry.reaping = true;
    }
    Ok(())
}

/// Waits until this process has no children left, at most `limit`. Says whether that is so.
pub(crate) fn wait_until_childless(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let children = children();
    let mut registry = lock(children);
    while !registry.childless {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
        registry =
            children.changed.wait_timeout(registry, left).unwrap_or_else(PoisonError::into_inner).0;
    }
    true
}

fn children() -> &'static Children {
    static CHILDREN: OnceLock<Children> = OnceLock::new();
    CHILDREN.get_or_init(Children::default)
}

/// The registry stays consistent across a panic of a holder: each change to it is one insert or
/// one remove.
fn lock(children: &Children) -> MutexGuard<'_, Registry> {
    children.registry.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reap_forever(children: &Children) {
    loop {
        match sys::wait_for_ended_child() {
            Ok(Some(pid)) => {
                let mut registry = lock(children);
                // `None` when spawning itself reaped it, after a program that could not be run.
                if let Some(ended) = sys::reap(pid)
                    && let Some(waiting) = registry.running.remove(&pid)
                {
                    // Nobody waits for it any more: then nobody needs to know.
                    let _ = waiting.send(ended);
                }
            }
            Ok(None) => wait_for_a_spawn(children),
            Err(error) => {
                tracing::error!(%error, "failed to wait for children; none are reaped from now on");
                return;
            }
        }
    }
}

fn wait_for_a_spawn(children: &Children) {
    let mut registry = lock(children);
    // Spawning holds the lock, so a registered child that is not there now was reaped by someone
    // else; whoever waits for it learns that its end is unknown.
    if !registry.running.is_empty() && !sys::has_children() {
        registry.running.clear();
    }
    if registry.running.is_empty() {
        registry.childless = true;
        children.changed.notify_all();
    }
    while registry.childless {
        registry = children.changed.wait(registry).unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_that_ends_at_once_is_reported() {
        for _ in 0..20 {
            let (_, ended) = spawn(&mut Command::new("true")).expect("spawns");
            assert_eq!(ended.await, Ok(Ended::Exited(0)));
        }
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_leaves_nothing_behind() {
        for _ in 0..20 {
            let error = spawn(&mut Command::new("/nowhere/nothing")).expect_err("no such file");
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }

    #[tokio::test]
    async fn signals_reach_living_children_only() {
        let (pid, ended) = spawn(Command::new("sleep").arg("600")).expect("spawns");
        assert!(signal(pid, Signal::KILL, Reach::Process));
        assert_eq!(ended.await, Ok(Ended::Killed { signal: 9, core_dumped: false }));
        assert!(!signal(pid, Signal::KILL, Reach::Process));
    }
}
