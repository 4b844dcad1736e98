//! Which network namespaces, interfaces, unix sockets and nft tables are there?

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::leaks::{OURS, Sight};
use crate::processes;

pub(crate) fn look(sight: &Sight, found: &mut BTreeSet<String>) {
    named_namespaces(sight, found);
    held_namespaces(sight, found);
    interfaces(sight, found);
    unix_sockets(sight, found);
    nft_tables(sight, found);
}

fn named_namespaces(sight: &Sight, found: &mut BTreeSet<String>) {
    // The folder is made by the first `ip netns add`.
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if sight.wants(&name) {
            found.insert(format!("network namespace /run/netns/{name}"));
        }
    }
}

/// Namespaces without a name live as long as a process is inside. The test's own is no news.
fn held_namespaces(sight: &Sight, found: &mut BTreeSet<String>) {
    let home = fs::read_link("/proc/self/ns/net").expect("proc is mounted");
    for pid in processes::pids() {
        let Ok(link) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
        if link == home {
            continue;
        }
        // Without a tag the namespace alone is the name, so that a new process in an old
        // namespace is nothing new. With one, what counts is who is inside.
        let seen = match &sight.tag {
            None => true,
            Some(tag) => processes::described(pid).is_some_and(|text| text.contains(tag.as_str())),
        };
        if seen {
            found.insert(format!("network namespace {} of a process", link.display()));
        }
    }
}

fn interfaces(sight: &Sight, found: &mut BTreeSet<String>) {
    let entries = fs::read_dir("/sys/class/net").expect("sysfs is mounted");
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if sight.wants(&name) {
            found.insert(format!("interface {name}"));
        }
    }
}

/// Source: proc_net(5): the seventh column is the inode, what follows is the path.
fn unix_sockets(sight: &Sight, found: &mut BTreeSet<String>) {
    let table = fs::read("/proc/net/unix").expect("proc is mounted");
    for line in String::from_utf8_lossy(&table).lines().skip(1) {
        let mut fields = line.split_whitespace();
        let (Some(inode), Some(path)) = (fields.nth(6), fields.next()) else { continue };
        if sight.owns(path) {
            found.insert(format!("unix socket {path} (inode {inode})"));
        }
    }
}

/// Tables of this network namespace. Without nft, or without the right to ask it, nobody of us
/// can have made a table.
fn nft_tables(sight: &Sight, found: &mut BTreeSet<String>) {
    let Ok(listed) = Command::new("nft").args(["list", "tables"]).output() else { return };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let Some(name) = line.rsplit(' ').next() else { continue };
        let ours = match &sight.tag {
            None => name.starts_with(OURS),
            Some(tag) => name.contains(tag.as_str()),
        };
        if ours {
            found.insert(format!("nft {line}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leaks::HostSnapshot;
    use crate::{is_root, skip};

    fn sight(tag: &str) -> Sight {
        Sight { tag: Some(tag.to_owned()), roots: Vec::new() }
    }

    fn run(program: &str, arguments: &[&str]) -> bool {
        Command::new(program).args(arguments).output().is_ok_and(|o| o.status.success())
    }

    /// Plants something by command, checks that it is seen, takes it away, checks again.
    fn plant(tag: &str, make: &[&str], undo: &[&str], expected: &str) {
        if !is_root() {
            return skip("needs root to plant a leak");
        }
        let before = HostSnapshot::take_with(sight(tag));
        if !run(make[0], &make[1..]) {
            return skip(&format!("`{}` does not work here", make.join(" ")));
        }
        let leaks = HostSnapshot::take_with(sight(tag)).leaks_since(&before);
        let undone = run(undo[0], &undo[1..]);
        assert!(leaks.iter().any(|leak| leak.starts_with(expected)), "{leaks:?}");
        assert!(undone, "`{}` failed", undo.join(" "));
        let left = HostSnapshot::take_with(sight(tag)).leaks_since(&before);
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn a_planted_unix_socket_is_seen() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let before = HostSnapshot::take_with(sight("zqsock"));
        let socket = std::os::unix::net::UnixListener::bind(folder.path().join("zqsock.sock"))
            .expect("bind a socket");
        let leaks = HostSnapshot::take_with(sight("zqsock")).leaks_since(&before);
        assert_eq!(leaks.len(), 1, "{leaks:?}");
        assert!(leaks[0].starts_with("unix socket "), "{leaks:?}");
        drop(socket);
        assert!(HostSnapshot::take_with(sight("zqsock")).leaks_since(&before).is_empty());
    }

    #[test]
    fn a_planted_network_namespace_is_seen() {
        let (make, undo) = (["ip", "netns", "add", "zqnetns"], ["ip", "netns", "del", "zqnetns"]);
        plant("zqnetns", &make, &undo, "network namespace /run/netns/zqnetns");
    }

    #[test]
    fn a_planted_interface_is_seen() {
        let make = ["ip", "tuntap", "add", "dev", "zqif0", "mode", "tap"];
        plant("zqif0", &make, &["ip", "link", "del", "zqif0"], "interface zqif0");
    }

    #[test]
    fn a_planted_nft_table_is_seen() {
        let (make, undo) = (
            ["nft", "add", "table", "inet", "zqtable"],
            ["nft", "delete", "table", "inet", "zqtable"],
        );
        plant("zqtable", &make, &undo, "nft table inet zqtable");
    }

    #[test]
    fn a_planted_mount_is_seen() {
        let folder = tempfile::Builder::new().prefix("zqmount").tempdir().expect("a folder");
        let point = folder.path().to_str().expect("a plain path");
        let make = ["mount", "-t", "tmpfs", "zqmount", point];
        plant("zqmount", &make, &["umount", point], "mount ");
    }

    #[test]
    fn a_namespace_held_by_a_process_is_seen() {
        if !is_root() {
            return skip("needs root to make a network namespace");
        }
        let before = HostSnapshot::take_with(sight("zqheld"));
        let mut child = Command::new("unshare")
            .args(["--net", "/bin/sh", "-c", "echo inside; read line", "zqheld"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("start unshare");
        let mut word = [0_u8; 6];
        let output = child.stdout.as_mut().expect("stdout is a pipe");
        std::io::Read::read_exact(output, &mut word).expect("the shell says it is inside");
        let leaks = HostSnapshot::take_with(sight("zqheld")).leaks_since(&before);
        child.kill().expect("kill the shell");
        child.wait().expect("wait for the shell");
        assert!(leaks.iter().any(|l| l.starts_with("network namespace net:[")), "{leaks:?}");
        assert!(leaks.iter().any(|l| l.starts_with("process ")), "{leaks:?}");
        assert!(HostSnapshot::take_with(sight("zqheld")).leaks_since(&before).is_empty());
    }
}
