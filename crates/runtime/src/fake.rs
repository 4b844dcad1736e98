//! A driver without machines: for tests of everything above it, on any host, without root.
//!
//! A fake machine is a task, and one more for each connection to its guest. Its guest speaks the control channel as the real daemon does
//! and, given a network slot, answers HTTP on the daemon's port; a frozen one is silent. Files are
//! written and asked for as the real driver does; its memory is what was written to it, by tests too
//! ([`FakeRuntime::write_memory`]). [`Faults`] break any step on purpose.

mod faults;
mod guest;
mod machine;
mod memory;

pub use faults::{Fault, Faults, Step};
pub use guest::HTTP_PORT;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use belljar_domain::Tier;

use crate::machine::{
    BootMemory, BootSource, ExitCause, KillError, Machine, MachineSpec, Runtime, StartError,
};
use crate::pages::{SavedMachine, SavedMemory};
use crate::saved::{self, SavedFiles, Shape};
use machine::{Body, FakeMachine};
use memory::FakeMemory;

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

    /// Does what a guest's program would: writes `bytes` at `offset` of the memory of the machine
    /// `name`.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is no such machine; I/O errors of its base;
    /// [`io::ErrorKind::InvalidInput`] beyond the end of its memory.
    pub fn write_memory(&self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.body(name)?.memory().write(offset, bytes)
    }

    /// What the machine `name` has in its memory at `offset`.
    ///
    /// # Errors
    /// As [`FakeRuntime::write_memory`].
    pub fn read_memory(&self, name: &str, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        self.body(name)?.memory().read(offset, length)
    }

    fn body(&self, name: &str) -> io::Result<Arc<Body>> {
        let machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        machines.get(name).map(Arc::clone).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    async fn start(
        &self,
        spec: &MachineSpec,
        cold: bool,
        saving_to: Option<SavedFiles>,
        saved: SavedMemory,
    ) -> Result<Box<dyn Machine>, StartError> {
        let bytes = spec.memory.bytes();
        let memory = if saved.pages.is_none() {
            FakeMemory::restored(bytes, saved)
        } else {
            let reading = tokio::task::spawn_blocking(move || FakeMemory::restored(bytes, saved));
            reading.await.map_err(io::Error::from).flatten()
        };
        let memory = memory.map_err(|source| StartError::Pages { source })?;
        let body = Arc::new(Body::new(&spec.name, Arc::clone(&self.faults), memory));
        {
            let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
            if machines.contains_key(&body.name) {
                let source = io::ErrorKind::AlreadyExists.into();
                return Err(StartError::Io { step: "start a machine under a used name", source });
            }
            machines.insert(Arc::clone(&body.name), Arc::clone(&body));
        }
        let machines = Arc::clone(&self.machines);
        let machine = FakeMachine::new(body, machines, self.shape(spec), saving_to);
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
        let zeros = SavedMemory { base: None, pages: None };
        let BootMemory::Saveable { artifacts } = source.memory else {
            return self.start(&spec, true, None, zeros).await;
        };
        let files = SavedFiles::within(&artifacts);
        let memory = files.memory.clone();
        fs::File::create_new(&memory)
            .and_then(|file| file.set_len(spec.memory.bytes()))
            .map_err(|source| StartError::Io { step: "make the machine's memory file", source })?;
        let started = self.start(&spec, true, Some(files), zeros).await;
        if started.is_err() {
            drop(fs::remove_file(memory));
        }
        started
    }

    async fn restore(
        &self,
        spec: MachineSpec,
        saved: SavedMachine,
    ) -> Result<Box<dyn Machine>, StartError> {
        spec.check_name()?;
        let found = saved::check(&saved, &self.shape(&spec))?;
        let state = fs::read(&found.state)
            .map_err(|source| StartError::Io { step: "read the saved state", source })?;
        if state != STATE {
            let reason = "it is no state of a fake machine".to_owned();
            return Err(StartError::Corrupt { path: found.state, reason });
        }
        self.start_fault(Step::Restore, "load the saved machine").await?;
        self.start(&spec, false, None, saved.memory).await
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
