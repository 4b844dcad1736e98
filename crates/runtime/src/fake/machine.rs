//! One fake machine: its life, and the tasks that are its guest.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use belljar_daemon::{OnError, Scope};
use belljar_wire::guest::Init;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::faults::{Fault, Faults, Step};
use super::{Machines, STATE, guest};
use crate::machine::{
    ControlStream, ExitCause, KillError, Machine, MachineSpec, PauseError, SaveError, StartError,
};
use crate::saved::{self, SavedFiles, Shape};

/// Bytes each way between a fake guest and its host. Both ends read as they come; more would only
/// be memory that thousands of machines hold.
const CONTROL_BYTES: usize = 512;
/// The tasks only wait on channels and sockets, so they end at once.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What a machine and its tasks share.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) name: String,
    pub(super) scope: Scope,
    pub(super) identity: Mutex<Init>,
    life: watch::Sender<Life>,
}

#[derive(Debug, Default)]
struct Life {
    frozen: bool,
    gone: Option<ExitCause>,
}

impl Body {
    pub(super) fn new(name: &str) -> Body {
        Body {
            name: name.to_owned(),
            scope: Scope::root("fake machine"),
            identity: Mutex::new(Init::default()),
            life: watch::Sender::default(),
        }
    }

    /// Ends the machine; the first cause counts.
    pub(super) fn end(&self, cause: ExitCause) {
        self.life.send_if_modified(|life| {
            let first = life.gone.is_none();
            life.gone.get_or_insert(cause);
            first
        });
        self.scope.cancel();
    }

    /// Waits until its tasks have ended.
    pub(super) async fn settled(&self) {
        self.scope.close(END_LIMIT).await;
    }

    /// Waits while the machine is frozen. Cancel-safe.
    pub(super) async fn running(&self) {
        // The sender lives in `self`, so this cannot fail.
        drop(self.life.subscribe().wait_for(|life| !life.frozen).await);
    }

    pub(super) fn crash(&self) {
        self.end(ExitCause::Crashed { detail: "injected".to_owned() });
    }

    fn freeze(&self, frozen: bool) {
        self.life.send_modify(|life| life.frozen = frozen);
    }

    fn is_gone(&self) -> bool {
        self.life.borrow().gone.is_some()
    }
}

/// The handle. Dropping it ends the machine.
pub(super) struct FakeMachine {
    body: Arc<Body>,
    faults: Arc<Faults>,
    machines: Machines,
    control: Option<ControlStream>,
    /// `None` for a restored machine.
    saving_to: Option<(SavedFiles, Shape)>,
}

impl FakeMachine {
    pub(super) fn new(
        body: Arc<Body>,
        faults: Arc<Faults>,
        machines: Machines,
        saving_to: Option<(SavedFiles, Shape)>,
    ) -> FakeMachine {
        FakeMachine { body, faults, machines, control: None, saving_to }
    }

    /// Starts the guest's tasks.
    pub(super) async fn bring_up(
        mut self,
        spec: &MachineSpec,
        cold: bool,
    ) -> Result<FakeMachine, StartError> {
        if let Some(network) = &spec.network {
            let address = (network.host_ip, guest::HTTP_PORT);
            let listener = TcpListener::bind(address)
                .await
                .map_err(|source| StartError::Io { step: "listen as the guest", source })?;
            let serving = guest::serve(listener, Arc::clone(&self.body), Arc::clone(&self.faults));
            self.body.scope.spawn("fake guest http", OnError::Log, serving);
        }
        let (ours, theirs) = tokio::io::duplex(CONTROL_BYTES);
        let speaking = guest::speak(theirs, cold, Arc::clone(&self.body), Arc::clone(&self.faults));
        self.body.scope.spawn("fake guest control", OnError::Log, speaking);
        self.control = Some(Box::new(ours));
        Ok(self)
    }

    async fn run_state(&self, step: Step, frozen: bool) -> Result<(), PauseError> {
        match self.faults.reach(step).await {
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
        let Some((files, shape)) = &self.saving_to else { return Err(SaveError::NotBooted) };
        match self.faults.reach(Step::Save).await {
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
        saved::seal(files, shape).map_err(|(path, source)| SaveError::Io { path, source })
    }

    async fn exited(&mut self) -> ExitCause {
        let mut life = self.body.life.subscribe();
        let cause = life.wait_for(|life| life.gone.is_some()).await.map(|life| life.gone.clone());
        cause.ok().flatten().expect("the sender lives in the body, and waited until there is one")
    }

    async fn kill(&mut self) -> Result<(), KillError> {
        let fault = self.faults.reach(Step::Kill).await;
        if fault == Some(Fault::Hang) {
            std::future::pending().await
        }
        self.body.end(ExitCause::Killed);
        self.control = None;
        self.body.settled().await;
        self.forget();
        if fault.is_some() {
            return Err(KillError {
                name: self.body.name.clone(),
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
