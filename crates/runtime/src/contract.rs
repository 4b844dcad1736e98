//! The suite every driver passes, the fake included. It says what [`Runtime`] and [`Machine`]
//! promise, by asking for it.
//!
//! A driver's test implements [`Harness`] and calls [`run`]. A broken promise panics; the guest
//! must be one that speaks `wire::guest`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use belljar_domain::Vcpus;
use belljar_wire::guest::{Init, ToGuest};

use crate::control::{ControlError, GuestControl};
use crate::machine::{
    BootMemory, BootSource, ExitCause, Machine, MachineSpec, Runtime, SaveError, StartError,
};
use crate::pages::{SavedMachine, SnapshotTarget};

mod memory_source;
mod pages;
mod snapshots;

pub use memory_source::memory_source_suite;
pub use pages::KeptPages;

/// How long a frozen guest must be silent to count as frozen.
const SILENCE: Duration = Duration::from_millis(300);

/// What a driver's test supplies.
#[async_trait]
pub trait Harness: Send + Sync {
    /// The driver. Always the same one.
    fn runtime(&self) -> Arc<dyn Runtime>;

    /// The guest kernel.
    fn kernel(&self) -> PathBuf;

    /// A new empty folder.
    async fn folder(&self, name: &str) -> PathBuf;

    /// A machine with a run folder of its own. Its root disk is pristine, or what the disk of
    /// the machine `saved` became. The harness may extend the name.
    async fn spec(&self, name: &str, saved: Option<&MachineSpec>) -> MachineSpec;

    /// As [`Harness::spec`], with what the disk of the machine `frozen` is, which is frozen now.
    async fn fork(&self, name: &str, frozen: &MachineSpec) -> MachineSpec;

    /// Has the guest of the machine write what `seed` grows into over some of its memory, and says
    /// the digest of it; `None` where guests do not know how.
    async fn scribble(
        &self,
        spec: &MachineSpec,
        control: &mut GuestControl,
        seed: u64,
    ) -> Option<u64>;

    /// The digest of what [`Harness::scribble`] wrote, by what is in the guest's memory now.
    async fn recall(&self, spec: &MachineSpec, control: &mut GuestControl) -> Option<u64>;

    /// How long any single step may take.
    fn patience(&self) -> Duration;
}

/// A machine of the suite.
struct Running {
    machine: Box<dyn Machine>,
    control: GuestControl,
    spec: MachineSpec,
    nonce: u64,
    patience: Duration,
}

/// A machine that was saved and killed.
struct Saved {
    spec: MachineSpec,
    artifacts: PathBuf,
}

/// Asks for every promise.
///
/// # Panics
/// At the first broken promise, naming it.
pub async fn run(harness: &dyn Harness) {
    starting_without_a_kernel_is_refused_by_name(harness).await;
    reclaiming_finds_nothing_where_nothing_is(harness).await;
    let saved = booting_and_saving(harness).await;
    restoring_what_does_not_fit_is_refused_by_name(harness, &saved).await;
    two_copies_run_at_once_and_share_no_writes(harness, &saved).await;
    a_frozen_machine_is_silent_until_thawed(harness, &saved).await;
    a_restored_machine_cannot_be_saved(harness, &saved).await;
    killing_twice_is_fine_and_the_cause_is_told(harness, &saved).await;
    a_guest_that_stops_is_told_from_a_crash(harness, &saved).await;
    a_leaked_machine_is_reclaimed(harness, &saved).await;
    a_dropped_machine_is_gone(harness, &saved).await;
    snapshots::run(harness, &saved).await;
}

impl Running {
    fn new(mut machine: Box<dyn Machine>, spec: MachineSpec, patience: Duration) -> Running {
        let stream = machine.take_control().expect("a new machine has its control stream");
        assert!(machine.take_control().is_none(), "the control stream was given out twice");
        Running { machine, control: GuestControl::new(stream), spec, nonce: 0, patience }
    }

    async fn boot(harness: &dyn Harness, name: &str) -> (Running, PathBuf) {
        let spec = harness.spec(name, None).await;
        let artifacts = harness.folder(&format!("{name}-artifacts")).await;
        let source = saveable(harness, &artifacts);
        let machine = harness.runtime().boot(spec.clone(), source).await.expect("boot a machine");
        let mut running = Running::new(machine, spec, harness.patience());
        running.control.booted(harness.patience()).await.expect("the guest says that it booted");
        running.init().await.expect("a booted guest takes its identity");
        (running, artifacts)
    }

    async fn restore(harness: &dyn Harness, name: &str, saved: &Saved) -> Running {
        let spec = harness.spec(name, Some(&saved.spec)).await;
        let machine = harness
            .runtime()
            .restore(spec.clone(), SavedMachine::template(&saved.artifacts))
            .await
            .expect("restore a saved machine");
        let mut running = Running::new(machine, spec, harness.patience());
        running.init().await.expect("a restored guest takes its identity");
        running
    }

    async fn init(&mut self) -> Result<String, ControlError> {
        self.nonce += 1;
        let sandbox_id = self.spec.name.clone();
        let init = Init { nonce: self.nonce, sandbox_id, ..Init::default() };
        self.control.init(init, self.patience).await
    }

    async fn exited(&mut self) -> ExitCause {
        tokio::time::timeout(self.patience, self.machine.exited())
            .await
            .expect("the end of a machine is told in time")
    }

    async fn kill(&mut self) {
        tokio::time::timeout(self.patience, self.machine.kill())
            .await
            .expect("a kill ends in time")
            .expect("a kill leaves nothing");
        if let Some(id) = self.machine.process_id() {
            assert!(!process_exists(id), "process {id} is there after its machine was killed");
        }
    }
}

/// A boot for a template.
fn saveable(harness: &dyn Harness, artifacts: &Path) -> BootSource {
    let memory = BootMemory::Saveable { artifacts: artifacts.to_owned() };
    BootSource { kernel: harness.kernel(), cmdline: Vec::new(), memory }
}

async fn starting_without_a_kernel_is_refused_by_name(harness: &dyn Harness) {
    let spec = harness.spec("no-kernel", None).await;
    let artifacts = harness.folder("no-kernel-artifacts").await;
    let kernel = artifacts.join("no-such-kernel");
    let source = BootSource { kernel: kernel.clone(), ..saveable(harness, &artifacts) };
    let error = harness.runtime().boot(spec.clone(), source).await.err();
    let named = matches!(&error, Some(StartError::Missing { path, .. }) if *path == kernel);
    assert!(named, "booting without a kernel says {error:?}");
    let left: Vec<_> = fs::read_dir(artifacts).expect("the folder is there").collect();
    assert!(left.is_empty(), "a failed boot left {left:?}");
    nothing_is_left(harness, &spec.name).await;
}

async fn reclaiming_finds_nothing_where_nothing_is(harness: &dyn Harness) {
    let spec = harness.spec("never-started", None).await;
    nothing_is_left(harness, &spec.name).await;
}

async fn booting_and_saving(harness: &dyn Harness) -> Saved {
    let (mut running, artifacts) = Running::boot(harness, "template").await;
    running.machine.freeze().await.expect("freeze a booted machine");
    running.machine.thaw().await.expect("thaw it");
    running.init().await.expect("a thawed guest answers");
    running
        .control
        .prepare_snapshot(harness.patience())
        .await
        .expect("the guest prepares for its snapshot");
    let folder = harness.folder("template-snapshot").await;
    running.machine.freeze().await.expect("freeze a booted machine");
    let pages = Box::new(KeptPages::default());
    let error = running.machine.snapshot(SnapshotTarget { folder, pages }).await.err();
    let named = matches!(error, Some(SaveError::NotPrivate));
    assert!(named, "a snapshot of a machine whose memory others will map says {error:?}");
    running.machine.thaw().await.expect("thaw it");
    running.machine.save().await.expect("save a booted machine");
    for name in ["memory", "state", "machine.json"] {
        assert!(artifacts.join(name).is_file(), "a saved machine has a file {name}");
    }
    let files = fs::read_dir(&artifacts).expect("the folder is there").count();
    assert_eq!(files, 3, "a saved machine has no other files");
    running.kill().await;
    Saved { spec: running.spec, artifacts }
}

async fn restoring_what_does_not_fit_is_refused_by_name(harness: &dyn Harness, saved: &Saved) {
    let runtime = harness.runtime();
    let spec = harness.spec("misfit", Some(&saved.spec)).await;
    for missing in ["memory", "state", "machine.json"] {
        let folder = harness.folder(&format!("without-{}", &missing[..5])).await;
        linked_copy(&saved.artifacts, &folder, missing);
        let error = runtime.restore(spec.clone(), SavedMachine::template(&folder)).await.err();
        let wanted = folder.join(missing);
        let named = matches!(&error, Some(StartError::Missing { path, .. }) if *path == wanted);
        assert!(named, "restoring without {missing} says {error:?}");
    }

    let folder = harness.folder("cut").await;
    linked_copy(&saved.artifacts, &folder, "state");
    let state = fs::read(saved.artifacts.join("state")).expect("a saved machine has a state");
    fs::write(folder.join("state"), &state[..state.len() / 2]).expect("write a cut state");
    let error = runtime.restore(spec.clone(), SavedMachine::template(&folder)).await.err();
    assert!(matches!(error, Some(StartError::Corrupt { .. })), "a cut state says {error:?}");
    fs::write(folder.join("state"), vec![0x5A; state.len()]).expect("write a nonsense state");
    let error = runtime.restore(spec.clone(), SavedMachine::template(&folder)).await.err();
    let named = matches!(
        error,
        Some(StartError::Corrupt { .. } | StartError::Died { .. } | StartError::Refused { .. })
    );
    assert!(named, "a nonsense state says {error:?}");

    let folder = harness.folder("other-driver").await;
    linked_copy(&saved.artifacts, &folder, "machine.json");
    let text = fs::read_to_string(saved.artifacts.join("machine.json")).expect("it is text");
    let foreign = text.replace(&runtime.fingerprint(), "another driver");
    fs::write(folder.join("machine.json"), foreign).expect("write a foreign description");
    let error = runtime.restore(spec.clone(), SavedMachine::template(&folder)).await.err();
    let named = matches!(&error, Some(StartError::Incompatible { saved, .. })
        if saved.contains("another driver"));
    assert!(named, "a machine of another driver says {error:?}");

    let bigger = MachineSpec { vcpus: Vcpus(spec.vcpus.0 + 1), ..spec.clone() };
    let error = runtime.restore(bigger, SavedMachine::template(&saved.artifacts)).await.err();
    let named = matches!(error, Some(StartError::Incompatible { .. }));
    assert!(named, "a machine of another shape says {error:?}");
    nothing_is_left(harness, &spec.name).await;
}

async fn two_copies_run_at_once_and_share_no_writes(harness: &dyn Harness, saved: &Saved) {
    let before = content(&saved.artifacts.join("memory"));
    let (mut one, mut two) = tokio::join!(
        Running::restore(harness, "copy-one", saved),
        Running::restore(harness, "copy-two", saved)
    );
    one.kill().await;
    for _ in 0..3 {
        two.init().await.expect("the end of one copy does not reach the other");
    }
    two.kill().await;
    let after = content(&saved.artifacts.join("memory"));
    assert_eq!(before, after, "a restored machine changed the saved memory");
}

async fn a_frozen_machine_is_silent_until_thawed(harness: &dyn Harness, saved: &Saved) {
    let mut running = Running::restore(harness, "frozen", saved).await;
    running.machine.freeze().await.expect("freeze a machine");
    running.machine.freeze().await.expect("freezing twice is fine");
    let init = Init { nonce: 99, ..Init::default() };
    let early = running.control.init(init, SILENCE).await;
    assert!(matches!(early, Err(ControlError::TimedOut { .. })), "a frozen guest says {early:?}");
    running.machine.thaw().await.expect("thaw a machine");
    running.init().await.expect("a thawed guest answers");
    running.kill().await;
}

async fn a_restored_machine_cannot_be_saved(harness: &dyn Harness, saved: &Saved) {
    let mut running = Running::restore(harness, "unsaveable", saved).await;
    let error = running.machine.save().await.err();
    assert!(matches!(error, Some(SaveError::NotSaveable)), "saving a restored machine: {error:?}");
    running.init().await.expect("a refused save does no harm");
    running.kill().await;
}

async fn killing_twice_is_fine_and_the_cause_is_told(harness: &dyn Harness, saved: &Saved) {
    let mut running = Running::restore(harness, "killed", saved).await;
    running.kill().await;
    running.kill().await;
    assert_eq!(running.exited().await, ExitCause::Killed);
    let frozen = running.machine.freeze().await;
    assert!(frozen.is_err(), "a killed machine can be frozen");
    let closed = running.init().await.expect_err("a killed guest cannot answer");
    assert!(!matches!(closed, ControlError::TimedOut { .. }), "{closed}");
    nothing_is_left(harness, &running.spec.name).await;
}

async fn a_guest_that_stops_is_told_from_a_crash(harness: &dyn Harness, saved: &Saved) {
    let mut running = Running::restore(harness, "stopped", saved).await;
    running.control.send(&ToGuest::Shutdown, running.patience).await.expect("the guest listens");
    assert_eq!(running.exited().await, ExitCause::GuestStopped);
    running.kill().await;
    assert_eq!(running.exited().await, ExitCause::GuestStopped);

    let mut running = Running::restore(harness, "crashed", saved).await;
    if let Some(id) = running.machine.process_id() {
        kill_process(id);
        let cause = running.exited().await;
        assert!(matches!(cause, ExitCause::Crashed { .. }), "a crash is told as {cause:?}");
    }
    running.kill().await;
    nothing_is_left(harness, &running.spec.name).await;
}

async fn a_leaked_machine_is_reclaimed(harness: &dyn Harness, saved: &Saved) {
    let running = Running::restore(harness, "leaked", saved).await;
    let (name, id) = (running.spec.name.clone(), running.machine.process_id());
    // As a daemon would that dies before it can kill: nothing of the machine's handle runs.
    std::mem::forget(running.machine);
    let found = harness.runtime().reclaim(&name).await.expect("reclaim a leaked machine");
    assert!(found, "a leaked machine was not found");
    if let Some(id) = id {
        assert!(!process_exists(id), "process {id} is there after it was reclaimed");
    }
    nothing_is_left(harness, &name).await;
}

async fn a_dropped_machine_is_gone(harness: &dyn Harness, saved: &Saved) {
    let running = Running::restore(harness, "dropped", saved).await;
    let name = running.spec.name.clone();
    drop(running);
    // Whether it is found depends on who is faster; afterwards it is gone either way.
    harness.runtime().reclaim(&name).await.expect("what is left of a dropped machine goes");
    nothing_is_left(harness, &name).await;
}

async fn nothing_is_left(harness: &dyn Harness, name: &str) {
    let found = harness.runtime().reclaim(name).await.expect("reclaim what is not there");
    assert!(!found, "something was left of machine {name}");
}

/// Links every file of a saved machine into `folder`, but `except`.
fn linked_copy(from: &Path, folder: &Path, except: &str) {
    for name in ["memory", "state", "machine.json"].into_iter().filter(|name| *name != except) {
        symlink(from.join(name), folder.join(name)).expect("link a file of a saved machine");
    }
}

/// A checksum of a file.
fn content(path: &Path) -> u64 {
    use std::hash::Hasher as _;
    use std::io::Read as _;
    let mut file = fs::File::open(path).expect("a saved machine has its files");
    let mut hash = std::hash::DefaultHasher::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block).expect("a saved machine can be read") {
            0 => return hash.finish(),
            read => hash.write(&block[..read]),
        }
    }
}

/// Whether a process is there and no zombie of somebody else's.
fn process_exists(id: u32) -> bool {
    fs::read_to_string(format!("/proc/{id}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

fn kill_process(id: u32) {
    let id = i32::try_from(id).ok().and_then(rustix::process::Pid::from_raw);
    let id = id.expect("the id of a living process");
    rustix::process::kill_process(id, rustix::process::Signal::KILL).expect("it is ours");
}
