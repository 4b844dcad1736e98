//! Which cgroups of ours exist, in the v2 tree and in every v1 hierarchy beside it?

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::leaks::{OURS, Sight};

const ROOT: &str = "/sys/fs/cgroup";
/// Deeper than any tree a service manager makes; a bound on the walk, not a rule.
const MAX_DEPTH: u32 = 16;

pub(crate) fn look(sight: &Sight, found: &mut BTreeSet<String>) {
    walk(sight, Path::new(ROOT), false, MAX_DEPTH, found);
}

fn walk(
    sight: &Sight,
    folder: &Path,
    inside_ours: bool,
    depth_left: u32,
    found: &mut BTreeSet<String>,
) {
    // A cgroup may vanish between its listing and its visit; the host may have none at all.
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = inside_ours
            || match &sight.tag {
                None => name.starts_with(OURS),
                Some(tag) => name.contains(tag.as_str()),
            };
        let path = entry.path();
        if ours {
            found.insert(format!("cgroup {}", path.display()));
        }
        if depth_left > 0 {
            walk(sight, &path, ours, depth_left - 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leaks::HostSnapshot;
    use crate::{is_root, skip};

    #[test]
    fn a_planted_cgroup_is_seen_in_every_hierarchy() {
        if !is_root() {
            return skip("needs root to make a cgroup");
        }
        let sight = Sight { tag: Some("zqcgroup".to_owned()), roots: Vec::new() };
        let mut planted = 0;
        for hierarchy in ["", "unified", "memory", "pids"] {
            let path = Path::new(ROOT).join(hierarchy).join("zqcgroup");
            if !path.with_file_name("cgroup.procs").exists() {
                continue;
            }
            let before = HostSnapshot::take_with(sight.clone());
            fs::create_dir(&path).expect("make a cgroup");
            let leaks = HostSnapshot::take_with(sight.clone()).leaks_since(&before);
            fs::remove_dir(&path).expect("remove the cgroup");
            assert_eq!(leaks, [format!("cgroup {}", path.display())]);
            planted += 1;
        }
        if planted == 0 {
            skip("no cgroup hierarchy is mounted");
        }
    }
}
