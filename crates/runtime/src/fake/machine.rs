//! One fake machine: its life, and the tasks that are its guest.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use belljar_daemon::{OnError, Scope};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};

use super::faults::{Fault, Faults, Step};
use super::memory::FakeMemory;
use super::{Machines, STATE, guest};
use crate::draft::Draft;
use crate::machine::{
    ControlStream, ExitCause, KillError, Machine, MachineSpec, PauseError, SaveError, StartError,
};
use crate::pages::{PageSink, SnapshotTarget};
use crate::saved::{self, SavedFiles, Shape};

/// Bytes each way between a fake guest and its host. Both ends read as they come; more would only
/// be memory that thousands of machines hold.
const CONTROL_BYTES: usize = 64;
/// The tasks only wait on channels and sockets, so they end at once.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What a machine and its tasks share.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) name: Arc<str>,
    pub(super) scope: Scope,
    pub(super) faults: Arc<Faults>,
    /// Places for connections to its guest.
    pub(super) places: Semaphore,
    memory: Mutex<FakeMemory>,
    // Held to look or to change, never across a wait.
    life: Mutex<Life>,
    /// Told when the machine is thawed.
    thawed: Notify,
}

#[derive(Debug, Default)]
struct Life {
    frozen: bool,
    /// Set before the scope is cancelled.
    gone: Option<ExitCause>,
    identity: Identity,
}

/// What a fake guest keeps of what it is told.
#[derive(Debug, Default, Clone)]
pub(super) struct Identity {
    pub(super) sandbox_id: String,
    pub(super) template_id: String,
    pub(super) access_token: Option<String>,
}

impl Body {
    pub(super) fn new(name: &str, faults: Arc<Faults>, memory: FakeMemory) -> Body {
        Body {
            name: name.into(),
            scope: Scope::root("fake machine"),
            faults,
            places: Semaphore::new(guest::CONNECTIONS),
            memory: Mutex::new(memory),
            life: Mutex::default(),
            thawed: Notify::new(),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        // Every change is one assignment.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, FakeMemory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a guest has in memory when it is saved: who it is. Its first page says so.
    pub(super) fn remember(&self) {
        let id = self.identity().sandbox_id;
        let page = id.bytes().chain(std::iter::repeat(0)).take(64).collect::<Vec<_>>();
        // A base that somebody took away is found out by whoever reads the memory.
        drop(self.memory().write(0, &page));
    }

    /// Ends the machine; the first cause counts.
    pub(super) fn end(&self, cause: ExitCause) {
        self.life().gone.get_or_insert(cause);
        self.scope.cancel();
    }

    /// Waits until its tasks have ended.
    pub(super) async fn settled(&self) {
        self.scope.close(END_LIMIT).await;
    }

    /// Waits while the machine is frozen. Cancel-safe.
    pub(super) async fn running(&self) {
        loop {
            // Made before the look: it hears of a thaw in between.
            let thawed = self.thawed.notified();
            if !self.life().frozen {
                return;
            }
            thawed.await;
        }
    }

    pub(super) fn crash(&self) {
        self.end(ExitCause::Crashed { detail: "injected".to_owned() });
    }

    pub(super) fn become_guest(&self, identity: Identity) {
        self.life().identity = identity;
    }

    pub(super) fn identity(&self) -> Identity {
        self.life().identity.clone()
    }

    fn freeze(&self, frozen: bool) {
        self.life().frozen = frozen;
        if !frozen {
            self.thawed.notify_waiters();
        }
    }

    fn is_gone(&self) -> bool {
        self.life().gone.is_some()
    }
}

/// The handle. Dropping it ends the machine.
pub(super) struct FakeMachine {
    body: Arc<Body>,
    machines: Machines,
    control: Option<ControlStream>,
    shape: Shape,
    /// `None` for a machine with memory of its own; on the heap, because all but a few have that.
    saving_to: Option<Box<SavedFiles>>,
}

impl FakeMachine {
    pub(super) fn new(
        body: Arc<Body>,
        machines: Machines,
        shape: Shape,
        saving_to: Option<SavedFiles>,
    ) -> FakeMachine {
        FakeMachine { body, machines, control: None, shape, saving_to: saving_to.map(Box::new) }
    }

    /// Starts the guest.
    pub(super) async fn bring_up(
        mut self,
        spec: &MachineSpec,
        cold: bool,
    ) -> Result<FakeMachine, StartError> {
        let listener = match &spec.network {
            None => None,
            Some(network) => {
                let listener = TcpListener::bind((network.host_ip, guest::HTTP_PORT)).await;
                let failed = |source| StartError::Io { step: "listen as the guest", source };
                Some(listener.map_err(failed)?)
            }
        };
        let (ours, theirs) = tokio::io::duplex(CONTROL_BYTES);
        let living = guest::live(theirs, cold, listener, Arc::clone(&self.body));
        self.body.scope.spawn("fake guest", OnError::Log, living);
        self.control = Some(Box::new(ours));
        Ok(self)
    }

    async fn run_state(&self, step: Step, frozen: bool) -> Result<(), PauseError> {
        match self.body.faults.reach(step).await {
            None => {}
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Crash) => self.body.crash(),
            Some(Fault::Fail) => {
                return Err(PauseError::Refused { answer: "injected".to_owned() });
            }
        }
        if self.body.is_gone() {
            return Err(PauseError::Gone);
        }
        self.body.freeze(frozen);
        Ok(())
    }

    /// Takes this machine, and no later one of its name, off the list.
    fn forget(&self) {
        let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        if machines.get(&self.body.name).is_some_and(|body| Arc::ptr_eq(body, &self.body)) {
            machines.remove(&self.body.name);
        }
    }
}

#[async_trait]
impl Machine for FakeMachine {
    fn take_control(&mut self) -> Option<ControlStream> {
        self.control.take()
    }

    async fn freeze(&mut self) -> Result<(), PauseError> {
        self.run_state(Step::Freeze, true).await
    }

    async fn thaw(&mut self) -> Result<(), PauseError> {
        self.run_state(Step::Thaw, false).await
    }

    async fn save(&mut self) -> Result<(), SaveError> {
        let Some(files) = self.saving_to.as_deref() else { return Err(SaveError::NotSaveable) };
        match self.body.faults.reach(Step::Save).await {
            None => {}
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Crash) => self.body.crash(),
            Some(Fault::Fail) => {
                return Err(SaveError::Refused { answer: "injected".to_owned() });
            }
        }
        if self.body.is_gone() {
            return Err(SaveError::Gone);
        }
        self.body.freeze(true);
        let state = files.unfinished_state();
        fs::write(&state, STATE).map_err(|source| SaveError::Io { path: state, source })?;
        let written = self.body.memory().private();
        File::options()
            .write(true)
            .open(&files.memory)
            .and_then(|file| {
                written.iter().try_for_each(|(at, page)| file.write_all_at(&page[..], *at))
            })
            .map_err(|source| SaveError::Io { path: files.memory.clone(), source })?;
        saved::seal(files, &self.shape).map_err(|(path, source)| SaveError::Io { path, source })
    }

    async fn snapshot(&mut self, into: SnapshotTarget) -> Result<Box<dyn PageSink>, SaveError> {
        if self.saving_to.is_some() {
            return Err(SaveError::NotPrivate);
        }
        if self.body.is_gone() {
            return Err(SaveError::Gone);
        }
        if !self.body.life().frozen {
            return Err(SaveError::NotFrozen);
        }
        let SnapshotTarget { folder, pages: mut sink } = into;
        let mut draft = Draft::begin(&folder)?;
        match self.body.faults.reach(Step::Snapshot).await {
            None => {}
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Crash) => self.body.crash(),
            Some(Fault::Fail) => {
                return Err(SaveError::Refused { answer: "injected".to_owned() });
            }
        }
        let (pages, shape) = (self.body.memory().private(), self.shape.clone());
        let copied = tokio::task::spawn_blocking(move || {
            for (offset, page) in pages {
                sink.write(offset, &page[..]).map_err(|source| SaveError::Sink { source })?;
            }
            draft.finish(STATE, &shape)?;
            Ok((draft, sink))
        });
        let (draft, sink) = copied.await.map_err(|e| SaveError::Memory { source: e.into() })??;
        if self.body.is_gone() {
            return Err(SaveError::Gone);
        }
        draft.keep();
        Ok(sink)
    }

    async fn exited(&mut self) -> ExitCause {
        self.body.scope.cancelled().await;
        let cause = self.body.life().gone.clone();
        cause.expect("the cause is set before the scope is cancelled")
    }

    async fn kill(&mut self) -> Result<(), KillError> {
        let fault = self.body.faults.reach(Step::Kill).await;
        if fault == Some(Fault::Hang) {
            std::future::pending().await
        }
        self.body.end(ExitCause::Killed);
        self.control = None;
        self.body.settled().await;
        self.forget();
        if fault.is_some() {
            return Err(KillError {
                name: self.body.name.to_string(),
                what: "the machine",
                reason: "injected".to_owned(),
            });
        }
        Ok(())
    }

    fn process_id(&self) -> Option<u32> {
        None
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.body.end(ExitCause::Killed);
        self.forget();
    }
}
