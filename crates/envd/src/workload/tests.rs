//! On a real cgroup2 file system, in a group of the test's own; hosts without one skip.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use belljar_testkit::skip;
use rustix::process::Signal;

use super::*;
use crate::children::{self, Reach};
use crate::sys::{self, ChildSetup};

const SOON: Duration = Duration::from_secs(10);

/// A group of this test's own; it goes with everything in it.
struct Playground(PathBuf);

impl Playground {
    /// `None`, said aloud, where there is no cgroup2 or it cannot be written.
    fn find() -> Option<Playground> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let table = fs::read_to_string("/proc/self/mounts").expect("Linux");
        let mount = table.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(fields[1]))
        });
        let Some(mount) = mount else {
            skip("this machine has no cgroup2 file system");
            return None;
        };
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let group = mount.join(format!("belljar-envd-test-{}-{number}", std::process::id()));
        if let Err(error) = fs::create_dir(&group) {
            skip(&format!("control groups cannot be made here ({error}); run as root"));
            return None;
        }
        Some(Playground(group))
    }
}

impl Drop for Playground {
    fn drop(&mut self) {
        // Deepest first; a test that left a process running fails here.
        for name in ["sandbox/user", "sandbox/pty", "sandbox", "other", "daemon", ""] {
            let outcome = fs::remove_dir(self.0.join(name));
            let gone = outcome.as_ref().err().map(io::Error::kind) == Some(io::ErrorKind::NotFound);
            if !std::thread::panicking() {
                assert!(outcome.is_ok() || gone, "{name}: {outcome:?}");
            }
        }
    }
}

/// `sleep` in a group.
fn sleeper(
    workload: &Workload,
    terminal: bool,
) -> (u32, tokio::sync::oneshot::Receiver<children::Ended>) {
    let mut command = Command::new("sleep");
    command.arg("600");
    let setup = ChildSetup {
        group: Some(workload.group(terminal)),
        terminal: false,
        oom_score_adj: "100",
        credentials: None,
        cwd: c"/".to_owned(),
    };
    sys::install_child_setup(&mut command, setup);
    children::spawn(&mut command).expect("spawns")
}

fn end(sleeper: (u32, tokio::sync::oneshot::Receiver<children::Ended>)) {
    assert!(children::signal(sleeper.0, Signal::KILL, Reach::Group));
    sleeper.1.blocking_recv().expect("reaped");
}

fn group_of(pid: u32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("alive");
    let line = text.lines().find_map(|line| line.strip_prefix("0::")).expect("in the v2 tree");
    line.to_owned()
}

fn freeze(workload: &Workload, groups: usize, limit: Duration) -> Result<Frozen, FreezeError> {
    workload.freeze(workload.announce(), groups, limit)
}

fn is_frozen(group: &Path) -> bool {
    let text = fs::read_to_string(group.join("cgroup.events")).expect("there");
    text.lines().any(|line| line == "frozen 1")
}

#[test]
fn children_are_in_their_group_when_they_run() {
    let Some(playground) = Playground::find() else { return };
    let workload = Workload::create(&playground.0).expect("made");
    Workload::create(&playground.0).expect("what is there already is used");
    for (terminal, name) in [(false, "sandbox/user"), (true, "sandbox/pty")] {
        let sleeper = sleeper(&workload, terminal);
        assert!(group_of(sleeper.0).ends_with(name), "{}", group_of(sleeper.0));
        end(sleeper);
    }
}

#[test]
fn a_freeze_stops_everything_but_the_daemon_until_the_thaw() {
    let Some(playground) = Playground::find() else { return };
    let workload = Workload::create(&playground.0).expect("made");
    fs::create_dir(playground.0.join(DAEMON)).expect("made");
    fs::create_dir(playground.0.join("other")).expect("made");
    let sleeper = sleeper(&workload, false);
    let first = workload.announce();
    let frozen = workload.freeze(first, 4, SOON).expect("frozen");
    assert_eq!(frozen.groups, 4, "sandbox with two inside, and other");
    assert!(is_frozen(&playground.0.join(USER)) && is_frozen(&playground.0.join("other")));
    assert!(!is_frozen(&playground.0.join(DAEMON)));
    let second = workload.announce();
    workload.freeze(second, 4, SOON).expect("still frozen");
    assert!(!workload.thaw_if(first), "a newer freeze is in force");
    assert!(is_frozen(&playground.0.join(USER)));
    assert!(workload.thaw_if(second));
    assert!(!is_frozen(&playground.0.join(USER)) && !is_frozen(&playground.0.join("other")));
    workload.thaw();
    assert!(workload.start().is_ok());
    end(sleeper);
}

#[test]
fn what_its_owner_froze_stays_frozen() {
    let Some(playground) = Playground::find() else { return };
    let workload = Workload::create(&playground.0).expect("made");
    let other = playground.0.join("other");
    fs::create_dir(&other).expect("made");
    fs::write(other.join("cgroup.freeze"), "1").expect("frozen");
    freeze(&workload, 4, SOON).expect("frozen");
    workload.thaw();
    assert!(is_frozen(&other) && !is_frozen(&playground.0.join(SANDBOX)));
}

#[test]
fn a_freeze_waits_for_starts_and_starts_wait_for_the_thaw() {
    let Some(playground) = Playground::find() else { return };
    let workload = Workload::create(&playground.0).expect("made");
    let starting = workload.start().unwrap_or_else(|_| panic!("nothing is frozen"));
    let outcome = freeze(&workload, 4, Duration::from_millis(20));
    assert_eq!(outcome, Err(FreezeError::TooSlow(20)));
    assert!(!is_frozen(&playground.0.join(SANDBOX)), "a freeze that failed leaves nothing frozen");
    drop(starting);
    freeze(&workload, 4, SOON).expect("frozen");
    std::thread::scope(|scope| {
        let start = scope.spawn(|| workload.start().is_ok());
        workload.thaw();
        assert!(start.join().expect("no panic"));
    });
}

#[test]
fn a_thaw_undoes_a_freeze_that_is_on_its_way() {
    let Some(playground) = Playground::find() else { return };
    let workload = Workload::create(&playground.0).expect("made");
    let late = workload.announce();
    workload.thaw();
    assert_eq!(workload.freeze(late, 4, SOON), Err(FreezeError::TooSlow(SOON.as_millis())));
    assert!(!is_frozen(&playground.0.join(USER)));
    let starting = workload.start().unwrap_or_else(|_| panic!("nothing is frozen"));
    let waiting = workload.announce();
    std::thread::scope(|scope| {
        let freezing = scope.spawn(|| workload.freeze(waiting, 4, SOON));
        while !workload.lock().closed {
            std::thread::yield_now();
        }
        workload.thaw();
        drop(starting);
        let outcome = freezing.join().expect("no panic");
        assert_eq!(outcome, Err(FreezeError::TooSlow(SOON.as_millis())));
    });
    assert!(workload.start().is_ok(), "the gate is open");
}

#[test]
fn too_many_groups_and_no_cgroups_are_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let error = Workload::create(dir.path()).expect_err("an ordinary directory");
    assert!(matches!(error, WorkloadError::NoCgroups(_)), "{error}");
    let Some(playground) = Playground::find() else { return };
    let workload = Workload::create(&playground.0).expect("made");
    let outcome = freeze(&workload, 2, SOON);
    assert_eq!(outcome, Err(FreezeError::TooMany { found: 3, limit: 2 }));
    assert!(workload.start().is_ok());
    freeze(&workload, 3, SOON).expect("frozen");
    assert!(freeze(&workload, 2, SOON).is_err());
    assert!(!is_frozen(&playground.0.join(USER)), "an error leaves nothing frozen");
    assert!(workload.start().is_ok());
}
