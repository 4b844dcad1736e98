//! A driver without machines: for tests of everything above it, on any host, without root.
//!
//! A fake machine is a task, and one more for each connection to its guest. Its guest speaks the control channel as the real daemon does
//! and, given a network slot, answers HTTP on the daemon's port; a frozen one is silent. Files are
//! written and asked for as the real driver does. [`Faults`] break any step on purpose.

mod faults;
mod guest;
mod machine;

pub use faults::{Fault, Faults, Step};
pub use guest::HTTP_PORT;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use belljar_domain::Tier;

use crate::machine::{BootSource, ExitCause, KillError, Machine, MachineSpec, Runtime, StartError};
use crate::saved::{self, SavedFiles, Shape};
use machine::{Body, FakeMachine};

/// What every state file of the fake says.
const STATE: &[u8] = b"fake machine state 1\n";

/// The driver.
#[derive(Debug, Default)]
pub struct FakeRuntime {
    faults: Arc<Faults>,
    machines: Machines,
}

/// The machines that live, by name.
type Machines = Arc<Mutex<HashMap<Arc<str>, Arc<Body>>>>;

impl FakeRuntime {
    /// A driver that does what it is told.
    pub fn new() -> FakeRuntime {
        FakeRuntime::default()
    }

    /// A driver that fails where `faults` say.
    pub fn with_faults(faults: Arc<Faults>) -> FakeRuntime {
        FakeRuntime { faults, machines: Machines::default() }
    }

    /// How many of its machines live: a test's leak oracle.
    pub fn live_machines(&self) -> usize {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn shape(&self, spec: &MachineSpec) -> Shape {
        Shape { fingerprint: self.fingerprint(), vcpus: spec.vcpus, memory: spec.memory }
    }

    async fn start(
        &self,
        spec: &MachineSpec,
        saving_to: Option<(SavedFiles, Shape)>,
    ) -> Result<Box<dyn Machine>, StartError> {
        let cold = saving_to.is_some();
        let body = Arc::new(Body::new(&spec.name, Arc::clone(&self.faults)));
        {
            let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
            if machines.contains_key(&body.name) {
                let source = io::ErrorKind::AlreadyExists.into();
                return Err(StartError::Io { step: "start a machine under a used name", source });
            }
            machines.insert(Arc::clone(&body.name), Arc::clone(&body));
        }
        let machine = FakeMachine::new(body, Arc::clone(&self.machines), saving_to);
        // From here on an early return drops the machine, which ends it.
        let machine = machine.bring_up(spec, cold).await?;
        Ok(Box::new(machine))
    }

    async fn start_fault(&self, step: Step, name: &'static str) -> Result<(), StartError> {
        match self.faults.reach(step).await {
            None => Ok(()),
            Some(Fault::Fail) => {
                Err(StartError::Refused { step: name, answer: "injected".to_owned() })
            }
            Some(Fault::Crash) => Err(StartError::Died { detail: "injected".to_owned() }),
            Some(Fault::Hang) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    fn tier(&self) -> Tier {
        Tier::Fake
    }

    fn fingerprint(&self) -> String {
        "fake 1".to_owned()
    }

    /// A host holds thousands of fake machines, and none of them looks at a disk.
    fn reads_disks(&self) -> bool {
        false
    }

    async fn boot(
        &self,
        spec: MachineSpec,
        source: BootSource,
    ) -> Result<Box<dyn Machine>, StartError> {
        spec.check_name()?;
        if !source.kernel.exists() {
            return Err(StartError::Missing { what: "guest kernel", path: source.kernel });
        }
        self.start_fault(Step::Boot, "boot the machine").await?;
        let files = SavedFiles::within(&source.artifacts);
        let memory = files.memory.clone();
        let shape = self.shape(&spec);
        fs::File::create_new(&memory)
            .and_then(|file| file.set_len(spec.memory.bytes()))
            .map_err(|source| StartError::Io { step: "make the machine's memory file", source })?;
        let started = self.start(&spec, Some((files, shape))).await;
        if started.is_err() {
            drop(fs::remove_file(memory));
        }
        started
    }

    async fn restore(
        &self,
        spec: MachineSpec,
        artifacts: &Path,
    ) -> Result<Box<dyn Machine>, StartError> {
        spec.check_name()?;
        let files = saved::check(artifacts, &self.shape(&spec))?;
        let state = fs::read(&files.state)
            .map_err(|source| StartError::Io { step: "read the saved state", source })?;
        if state != STATE {
            let reason = "it is no state of a fake machine".to_owned();
            return Err(StartError::Corrupt { path: files.state, reason });
        }
        self.start_fault(Step::Restore, "load the saved machine").await?;
        self.start(&spec, None).await
    }

    async fn reclaim(&self, name: &str) -> Result<bool, KillError> {
        match self.faults.reach(Step::Reclaim).await {
            None => {}
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Fail | Fault::Crash) => {
                return Err(KillError {
                    name: name.to_owned(),
                    what: "the machine",
                    reason: "injected".to_owned(),
                });
            }
        }
        let leaked = self.machines.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(body) = leaked else { return Ok(false) };
        body.end(ExitCause::Killed);
        body.settled().await;
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
