//! Named network namespaces: make, enter, remove. Every function here is for a thread of its own.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::step::{Step, StepFailed};

/// The calling thread's namespace. (`/proc/self` would be the main thread's.)
const OWN: &str = "/proc/thread-self/ns/net";

/// Puts the calling thread into a new namespace and names it `path`.
pub(crate) fn make(path: &Path) -> Result<File, StepFailed> {
    unshare(CloneFlags::CLONE_NEWNET).step("make a network namespace")?;
    File::create_new(path).step("create the name of a network namespace")?;
    mount(Some(OWN), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .step("name a network namespace")?;
    File::open(OWN).step("open a network namespace")
}

/// Puts the calling thread into the namespace `path`.
pub(crate) fn enter(path: &Path) -> Result<(), StepFailed> {
    let namespace = File::open(path).step("open a network namespace")?;
    setns(namespace, CloneFlags::CLONE_NEWNET).step("enter a network namespace")
}

/// Removes the name; the namespace ends with the last process and descriptor in it. Idempotent.
pub(crate) fn remove(path: &Path) -> Result<(), StepFailed> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not a mount, or not there: the process that made it died half way.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(e) => return Err(e).step("unmount a network namespace"),
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).step("remove a namespace's name"),
        _ => Ok(()),
    }
}
