//! What a stopped server left on this machine: nothing, or a list.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Things on this machine that belong to Belljar, each in words.
pub(crate) struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks for what names `data` (processes, mounts, sockets) or carries our name and `tag`
    /// (network namespaces, control groups, run folders). The tag sets one server's resources
    /// apart from another's; empty, it stands for all of them.
    pub(crate) fn find(data: &Path, tag: &str) -> Traces {
        let mut found = BTreeSet::new();
        processes(data, &mut found);
        mounts(data, &mut found);
        sockets(data, &mut found);
        for name in names_in(Path::new("/run/netns")) {
            if name.starts_with("belljar") && name.contains(tag) {
                found.insert(format!("network namespace {name}"));
            }
        }
        for name in names_in(Path::new("/run/belljar")) {
            if name.contains(tag) {
                sockets(&Path::new("/run/belljar").join(name), &mut found);
            }
        }
        control_groups(tag, &mut found);
        Traces(found)
    }

    /// What is there now and was not there `before`.
    pub(crate) fn since(&self, before: &Traces) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn processes(data: &Path, found: &mut BTreeSet<String>) {
    let own = std::process::id().to_string();
    let wanted = data.as_os_str().as_bytes();
    for pid in names_in(Path::new("/proc")) {
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == own {
            continue;
        }
        // Gone between the two calls: then it is not left over.
        let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if line.windows(wanted.len()).any(|window| window == wanted) {
            let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
            found.insert(format!("process {pid} {}", String::from_utf8_lossy(program)));
        }
    }
}

fn mounts(data: &Path, found: &mut BTreeSet<String>) {
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    for line in table.lines() {
        // Fifth field of proc(5)'s mountinfo: the mount point.
        if let Some(point) = line.split(' ').nth(4).filter(|at| Path::new(at).starts_with(data)) {
            found.insert(format!("mount {point}"));
        }
    }
}

fn sockets(folder: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            sockets(&entry.path(), found);
        } else if kind.is_socket() {
            found.insert(format!("socket {}", entry.path().display()));
        }
    }
}

/// Version 2 has one tree, version 1 one for each controller.
fn control_groups(tag: &str, found: &mut BTreeSet<String>) {
    let root = Path::new("/sys/fs/cgroup");
    let mut trees = vec![root.to_owned()];
    trees.extend(names_in(root).into_iter().map(|name| root.join(name)));
    for tree in trees {
        let ours = tree.join("belljar");
        let Ok(entries) = std::fs::read_dir(&ours) else { continue };
        for entry in entries.flatten() {
            let is_ours = entry.file_name().to_string_lossy().contains(tag);
            if is_ours && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.insert(format!("control group {}", entry.path().display()));
            }
        }
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_and_a_socket_are_found_and_gone_again() {
        let folder = std::env::temp_dir().join(format!("xtask-traces-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("deep")).unwrap();
        let before = Traces::find(&folder, "no server");
        let socket = UnixListener::bind(folder.join("deep/socket")).unwrap();
        // `tail -f` of a file in the folder: a process whose arguments name it.
        std::fs::write(folder.join("file"), "").unwrap();
        let mut child = Command::new("tail").arg("-f").arg(folder.join("file")).spawn().unwrap();
        // A process has no arguments yet in the first instant after exec.
        let deadline = Instant::now() + Duration::from_secs(10);
        let left = loop {
            let left = Traces::find(&folder, "no server").since(&before);
            if left.len() == 2 || Instant::now() > deadline {
                break left;
            }
            std::thread::yield_now();
        };
        child.kill().unwrap();
        child.wait().unwrap();
        drop(socket);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(left[0].starts_with("process ") && left[0].ends_with(" tail"), "{left:?}");
        assert!(left[1].starts_with("socket "), "{left:?}");
        assert!(Traces::find(&folder, "no server").since(&before).is_empty());
    }
}
