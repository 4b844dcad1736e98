//! What [`crate::Runtime`] and [`crate::Machine`] promise of snapshots.

use std::io;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{
    Harness, KeptPages, Running, Saved, content, kill_process, nothing_is_left, process_exists,
};
use crate::machine::{BootMemory, BootSource, MachineSpec, SaveError, StartError};
use crate::pages::{PageSink, PageSource, SavedMachine, SavedMemory, SnapshotTarget};
use crate::saved::sync_saved;
use std::fs;
use std::path::{Path, PathBuf};

/// A snapshot: its folder, what it lies over, and its pages.
struct Snapshot {
    folder: PathBuf,
    base: Option<PathBuf>,
    pages: KeptPages,
}

impl Snapshot {
    fn saved(&self) -> SavedMachine {
        let memory =
            SavedMemory { base: self.base.clone(), pages: Some(Arc::new(self.pages.clone())) };
        SavedMachine { folder: self.folder.clone(), memory }
    }
}

/// A sink or a source that does not work.
struct Broken;

impl PageSink for Broken {
    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
}

impl PageSource for Broken {
    fn read_runs(&self, _: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// A source of one page where no memory is.
struct Outside;

impl PageSource for Outside {
    fn read_runs(&self, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        each(1 << 50, &[0; 4096])
    }
}

/// A sink that kills the process whose pages it gets, and waits until it is dead.
struct Killer(u32);

impl PageSink for Killer {
    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        let id = i32::try_from(self.0).ok().and_then(Pid::from_raw).expect("a process");
        let process = pidfd_open(id, PidfdFlags::empty())?;
        if process_exists(self.0) {
            kill_process(self.0);
        }
        poll(&mut [PollFd::new(&process, PollFlags::IN)], None)?;
        Ok(())
    }
}

pub(super) async fn run(harness: &dyn Harness, saved: &Saved) {
    a_running_machine_is_not_snapshotted(harness, saved).await;
    a_failed_snapshot_leaves_nothing_and_the_machine_goes_on(harness, saved).await;
    snapshots_are_forked_and_snapshotted_again(harness, saved).await;
    what_does_not_fit_is_refused_by_name(harness, saved).await;
    a_machine_killed_in_its_snapshot_is_gone(harness, saved).await;
    a_machine_booted_for_itself_is_snapshotted(harness).await;
}

impl Running {
    async fn freeze_for_snapshot(&mut self) {
        self.control.prepare_snapshot(self.patience).await.expect("the guest prepares");
        self.machine.freeze().await.expect("freeze a machine");
    }

    async fn go_on(&mut self) {
        self.machine.thaw().await.expect("thaw a machine after its snapshot");
        self.control.continue_after_snapshot(self.patience).await.expect("the guest goes on");
    }

    /// Of a frozen machine.
    async fn snapshot(&mut self, folder: PathBuf, base: Option<PathBuf>) -> Snapshot {
        let pages = KeptPages::default();
        let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(pages.clone()) };
        drop(self.machine.snapshot(target).await.expect("snapshot a frozen machine"));
        assert_eq!(names(&folder), ["machine.json", "state"], "the files of a snapshot");
        sync_saved(&folder).expect("put a snapshot on stable storage");
        assert!(pages.size_bytes() > 0, "a machine that ran has pages of its own");
        Snapshot { folder, base, pages }
    }

    async fn restore_snapshot(
        harness: &dyn Harness,
        spec: MachineSpec,
        snapshot: &Snapshot,
    ) -> Running {
        let machine = harness.runtime().restore(spec.clone(), snapshot.saved()).await;
        let machine = machine.expect("restore a snapshot");
        let mut running = Running::new(machine, spec, harness.patience());
        running.init().await.expect("a restored guest takes its identity");
        running
    }

    async fn scribble(&mut self, harness: &dyn Harness, seed: u64) -> Option<u64> {
        harness.scribble(&self.spec, &mut self.control, seed).await
    }

    async fn recall(&mut self, harness: &dyn Harness) -> Option<u64> {
        harness.recall(&self.spec, &mut self.control).await
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("the folder is there").flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

async fn a_running_machine_is_not_snapshotted(harness: &dyn Harness, saved: &Saved) {
    let mut running = Running::restore(harness, "unfrozen", saved).await;
    let folder = harness.folder("unfrozen-snapshot").await;
    let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(KeptPages::default()) };
    let error = running.machine.snapshot(target).await.err();
    assert!(matches!(error, Some(SaveError::NotFrozen)), "a machine that runs says {error:?}");
    assert!(names(&folder).is_empty(), "a refused snapshot leaves nothing");
    running.init().await.expect("a refused snapshot does no harm");
    running.kill().await;
    let target = SnapshotTarget { folder, pages: Box::new(KeptPages::default()) };
    let error = running.machine.snapshot(target).await.err();
    assert!(matches!(error, Some(SaveError::Gone)), "a killed machine says {error:?}");
}

async fn a_failed_snapshot_leaves_nothing_and_the_machine_goes_on(
    harness: &dyn Harness,
    saved: &Saved,
) {
    let mut running = Running::restore(harness, "unlucky", saved).await;
    let written = running.scribble(harness, 11).await;
    running.freeze_for_snapshot().await;

    let folder = harness.folder("unlucky-snapshot").await;
    let missing = folder.join("missing");
    let target = SnapshotTarget { folder: missing.clone(), pages: Box::new(KeptPages::default()) };
    let error = running.machine.snapshot(target).await.err();
    let named = matches!(&error, Some(SaveError::Io { path, .. }) if path.starts_with(&missing));
    assert!(named, "a snapshot into no folder says {error:?}");

    let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(Broken) };
    let error = running.machine.snapshot(target).await.err();
    let full = matches!(&error, Some(SaveError::Sink { source })
        if source.kind() == io::ErrorKind::StorageFull);
    assert!(full, "a sink that is full says {error:?}");
    assert!(names(&folder).is_empty(), "a failed snapshot left {:?}", names(&folder));

    fs::write(folder.join("state"), b"of another").expect("write a file");
    let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(KeptPages::default()) };
    let error = running.machine.snapshot(target).await.err();
    assert!(matches!(error, Some(SaveError::Io { .. })), "a folder in use says {error:?}");
    assert_eq!(fs::read(folder.join("state")).expect("it was kept"), b"of another");
    fs::remove_file(folder.join("state")).expect("remove it");

    // None of that has thawed it.
    drop(running.snapshot(folder, None).await);
    running.go_on().await;
    assert_eq!(running.recall(harness).await, written, "memory after failed snapshots");
    running.init().await.expect("a guest goes on after its snapshots");
    running.kill().await;
    nothing_is_left(harness, &running.spec.name).await;
}

async fn snapshots_are_forked_and_snapshotted_again(harness: &dyn Harness, saved: &Saved) {
    let base = saved.artifacts.join("memory");
    let before = content(&base);
    let mut parent = Running::restore(harness, "parent", saved).await;
    let first = parent.scribble(harness, 1).await;
    parent.freeze_for_snapshot().await;
    let folder = harness.folder("parent-snapshot").await;
    let snapshot = parent.snapshot(folder, Some(base.clone())).await;
    let one = harness.fork("child-one", &parent.spec).await;
    let two = harness.fork("child-two", &parent.spec).await;
    parent.go_on().await;
    assert_eq!(parent.recall(harness).await, first, "a machine's memory after its snapshot");
    let second = parent.scribble(harness, 2).await;
    assert!(first.is_none() || second != first, "two seeds grow into the same");

    let (mut one, mut two) = tokio::join!(
        Running::restore_snapshot(harness, one, &snapshot),
        Running::restore_snapshot(harness, two, &snapshot)
    );
    assert_eq!(one.recall(harness).await, first, "the memory of a child");
    assert_eq!(two.recall(harness).await, first, "the memory of another child");
    let third = one.scribble(harness, 3).await;
    assert_eq!(two.recall(harness).await, first, "one child's writes reach the other");
    assert_eq!(parent.recall(harness).await, second, "a child's writes reach its parent");
    parent.kill().await;

    one.freeze_for_snapshot().await;
    let folder = harness.folder("child-snapshot").await;
    let again = one.snapshot(folder, Some(base.clone())).await;
    let grandchild = harness.fork("grandchild", &one.spec).await;
    // As a pause does: the machine does not go on.
    one.kill().await;
    two.init().await.expect("the end of one child does not reach the other");
    two.kill().await;
    let mut grandchild = Running::restore_snapshot(harness, grandchild, &again).await;
    assert_eq!(grandchild.recall(harness).await, third, "the memory of a snapshot's snapshot");
    grandchild.scribble(harness, 4).await;
    grandchild.init().await.expect("a snapshot of a snapshot runs");
    grandchild.kill().await;
    assert_eq!(before, content(&base), "snapshots changed what they lie over");
    nothing_is_left(harness, &grandchild.spec.name).await;
}

async fn what_does_not_fit_is_refused_by_name(harness: &dyn Harness, saved: &Saved) {
    let runtime = harness.runtime();
    let mut running = Running::restore(harness, "fitting", saved).await;
    running.freeze_for_snapshot().await;
    let folder = harness.folder("fitting-snapshot").await;
    let base = Some(saved.artifacts.join("memory"));
    let snapshot = running.snapshot(folder.clone(), base.clone()).await;
    running.kill().await;

    let broken: Arc<dyn PageSource> = Arc::new(Broken);
    for (name, pages) in [("unreadable", broken), ("outside", Arc::new(Outside))] {
        // A disk of its own for each try: servers may end with their first client.
        let spec = harness.spec(name, Some(&running.spec)).await;
        let memory = SavedMemory { base: base.clone(), pages: Some(pages) };
        let saved = SavedMachine { folder: folder.clone(), memory };
        let error = runtime.restore(spec.clone(), saved).await.err();
        let invalid = matches!(&error, Some(StartError::Pages { source })
            if source.kind() == io::ErrorKind::InvalidData);
        assert!(invalid, "pages that are none say {error:?}");
        nothing_is_left(harness, &spec.name).await;
    }

    let state = fs::read(folder.join("state")).expect("a snapshot has a state");
    let description = fs::read_to_string(folder.join("machine.json")).expect("it is text");
    let damaged = async |name: &str, state: &[u8], description: &str| {
        let folder = harness.folder(&format!("{name}-snapshot")).await;
        let spec = harness.spec(name, Some(&running.spec)).await;
        fs::write(folder.join("state"), state).expect("write a state");
        fs::write(folder.join("machine.json"), description).expect("write a description");
        let saved = SavedMachine { folder, ..snapshot.saved() };
        let error = runtime.restore(spec.clone(), saved).await.err();
        nothing_is_left(harness, &spec.name).await;
        error
    };
    let error = damaged("cut", &state[..state.len() / 2], &description).await;
    assert!(matches!(error, Some(StartError::Corrupt { .. })), "a cut state says {error:?}");
    let error = damaged("odd", &vec![0x5A; state.len()], &description).await;
    let named = matches!(
        error,
        Some(StartError::Corrupt { .. } | StartError::Died { .. } | StartError::Refused { .. })
    );
    assert!(named, "a nonsense state says {error:?}");
    let newer = description.replace("\"format\": 2", "\"format\": 99");
    let error = damaged("newer", &state, &newer).await;
    assert!(matches!(error, Some(StartError::Corrupt { .. })), "a newer format says {error:?}");
    let foreign = description.replace(&runtime.fingerprint(), "another driver");
    let error = damaged("foreign", &state, &foreign).await;
    let named = matches!(error, Some(StartError::Incompatible { .. }));
    assert!(named, "a machine of another driver says {error:?}");
}

async fn a_machine_killed_in_its_snapshot_is_gone(harness: &dyn Harness, saved: &Saved) {
    let mut running = Running::restore(harness, "shot", saved).await;
    let Some(id) = running.machine.process_id() else { return running.kill().await };
    running.freeze_for_snapshot().await;
    let folder = harness.folder("shot-snapshot").await;
    let target = SnapshotTarget { folder: folder.clone(), pages: Box::new(Killer(id)) };
    let error = running.machine.snapshot(target).await.err();
    assert!(matches!(error, Some(SaveError::Gone)), "a machine killed meanwhile says {error:?}");
    assert!(names(&folder).is_empty(), "its snapshot left {:?}", names(&folder));
    running.kill().await;
    nothing_is_left(harness, &running.spec.name).await;
}

async fn a_machine_booted_for_itself_is_snapshotted(harness: &dyn Harness) {
    let spec = harness.spec("private", None).await;
    let (kernel, memory) = (harness.kernel(), BootMemory::Private);
    let source = BootSource { kernel, cmdline: Vec::new(), memory };
    let machine = harness.runtime().boot(spec.clone(), source).await.expect("boot a machine");
    let mut running = Running::new(machine, spec, harness.patience());
    running.control.booted(harness.patience()).await.expect("the guest says that it booted");
    running.init().await.expect("a booted guest takes its identity");
    let error = running.machine.save().await.err();
    assert!(matches!(error, Some(SaveError::NotSaveable)), "saving it says {error:?}");
    let written = running.scribble(harness, 21).await;
    running.freeze_for_snapshot().await;
    let folder = harness.folder("private-snapshot").await;
    let snapshot = running.snapshot(folder, None).await;
    let child = harness.fork("private-child", &running.spec).await;
    running.go_on().await;
    assert_eq!(running.recall(harness).await, written, "a machine's memory after its snapshot");
    running.kill().await;

    let mut child = Running::restore_snapshot(harness, child, &snapshot).await;
    assert_eq!(child.recall(harness).await, written, "the memory of its child");
    child.freeze_for_snapshot().await;
    let folder = harness.folder("private-again").await;
    let again = child.snapshot(folder, None).await;
    let last = harness.fork("private-last", &child.spec).await;
    child.kill().await;
    let mut last = Running::restore_snapshot(harness, last, &again).await;
    assert_eq!(last.recall(harness).await, written, "the memory of its child's child");
    last.kill().await;
    nothing_is_left(harness, &last.spec.name).await;
}
