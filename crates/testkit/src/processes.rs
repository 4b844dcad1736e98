//! Which processes of ours run?

use std::collections::BTreeSet;
use std::fs;

use crate::leaks::Sight;

/// Programs that carry the product's name in their arguments because they build it.
const BUILD_TOOLS: [&str; 9] =
    ["cargo", "rustc", "clippy-driver", "rustfmt", "rustdoc", "cc", "collect2", "ld", "rust-lld"];
/// Machine monitors: ours even when nothing in the command line says so.
const MONITORS: [&str; 3] = ["qemu-system", "firecracker", "runsc"];
const SHOWN_CHARS: usize = 160;

pub(crate) fn look(sight: &Sight, found: &mut BTreeSet<String>) {
    let family = ancestors(std::process::id());
    for pid in pids() {
        if family.contains(&pid) {
            continue;
        }
        let Some(text) = described(pid) else { continue };
        if is_ours(sight, &text) {
            let shown: String = text.chars().take(SHOWN_CHARS).collect();
            found.insert(format!("process {pid}: {shown}"));
        }
    }
}

/// Every process id, as far as the list can be read at one moment.
pub(crate) fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("proc is mounted");
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// The command line of a process, or `[name]` of one that is dead but not yet waited for.
pub(crate) fn described(pid: u32) -> Option<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    if raw.is_empty() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        return Some(format!("[{}]", name.trim_end()));
    }
    let text = String::from_utf8_lossy(&raw);
    Some(text.trim_end_matches('\0').replace('\0', " "))
}

fn is_ours(sight: &Sight, text: &str) -> bool {
    let program = text.trim_start_matches('[').split(' ').next().unwrap_or("");
    let program = program.rsplit('/').next().unwrap_or(program);
    if BUILD_TOOLS.contains(&program) {
        return false;
    }
    let monitor = sight.tag.is_none() && MONITORS.iter().any(|m| program.starts_with(m));
    monitor || sight.owns(text)
}

/// The process and everything that started it, up to init.
fn ancestors(pid: u32) -> BTreeSet<u32> {
    let mut family = BTreeSet::new();
    let mut next = Some(pid);
    while let Some(pid) = next {
        if pid == 0 || !family.insert(pid) {
            break;
        }
        next = parent(pid);
    }
    family
}

/// Source: proc_pid_stat(5); the name in parentheses may itself hold spaces and parentheses.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leaks::HostSnapshot;
    use std::process::{Command, Stdio};

    #[test]
    fn a_planted_process_is_seen_until_it_is_waited_for() {
        let sight = Sight { tag: Some("zqproc".to_owned()), roots: Vec::new() };
        let before = HostSnapshot::take_with(sight.clone());
        // `read` waits for input that never comes; the tag is its $0.
        let mut child = Command::new("/bin/sh")
            .args(["-c", "echo ready; read line", "zqproc-sleeper"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a shell");
        // A process has no command line in the first instant after it is started.
        let mut word = [0_u8; 6];
        let output = child.stdout.as_mut().expect("stdout is a pipe");
        std::io::Read::read_exact(output, &mut word).expect("the shell says it is ready");
        let leaks = HostSnapshot::take_with(sight.clone()).leaks_since(&before);
        assert_eq!(leaks.len(), 1, "{leaks:?}");
        assert!(leaks[0].contains("zqproc-sleeper"), "{leaks:?}");
        child.kill().expect("kill the shell");
        child.wait().expect("wait for the shell");
        assert!(HostSnapshot::take_with(sight).leaks_since(&before).is_empty());
    }

    #[test]
    fn monitors_and_our_programs_are_ours_but_builds_are_not() {
        let all = Sight::default();
        for text in ["/usr/bin/qemu-system-x86_64 -M q35", "[qemu-system-x86]", "belljar up"] {
            assert!(is_ours(&all, text), "{text}");
        }
        for text in ["/usr/bin/rustc --crate-name belljar_node", "cargo test -p belljar-node", "sh"]
        {
            assert!(!is_ours(&all, text), "{text}");
        }
        let tagged = Sight { tag: Some("zqtag".to_owned()), roots: Vec::new() };
        assert!(!is_ours(&tagged, "/usr/bin/qemu-system-x86_64 -M q35"));
        assert!(is_ours(&tagged, "/usr/bin/qemu-system-x86_64 -name zqtag1"));
    }

    #[test]
    fn this_test_and_its_parents_are_not_a_leak() {
        let family = ancestors(std::process::id());
        assert!(family.contains(&std::process::id()));
        assert!(family.contains(&parent(std::process::id()).expect("a parent")));
    }
}
