//! One Firecracker machine: freezing, saving, watching and killing it.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::api::{
    Api, ApiError, Call, InstanceInfo, InstanceState, RunState, SnapshotCreate, SnapshotKind,
};
use super::channel::Cut;
use super::collect::Collected;
use super::jail::Jail;
use super::memory::Backing;
use super::snapshot;
use super::start::{MEMORY_OUT, STATE_OUT, millis};
use crate::keeper::{Exit, Process};
use crate::machine::{
    ControlStream, ExitCause, KillError, Machine, PauseError, SaveError, StartError,
};
use crate::pages::{PageSink, SnapshotTarget};
use crate::saved::{self, SavedFiles, Shape};

/// Freezing takes some 10 ms; a busy host may need a hundred times that.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
/// The memory goes to a disk, all of it: gibibytes on a slow one.
pub(super) const SAVE_LIMIT: Duration = Duration::from_secs(300);
/// The end of a killed process, and of its cgroup (2 s).
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What makes a machine one that can be saved: its files, which the process was given.
pub(super) struct Template {
    pub(super) files: SavedFiles,
    pub(super) shape: Shape,
}

/// What makes a machine one that can be snapshotted.
pub(super) struct Own {
    pub(super) backing: Backing,
    pub(super) shape: Shape,
    /// Where its process writes its state, and memory; empty but during a snapshot.
    pub(super) state: File,
    pub(super) memory: File,
}

impl Own {
    pub(super) fn new(jail: &Jail, shape: Shape, backing: Backing) -> Result<Own, StartError> {
        let (state, memory) = (jail.output(STATE_OUT)?, jail.output(MEMORY_OUT)?);
        Ok(Own { backing, shape, state, memory })
    }

    /// Whether the kernel tells its pages from those of its base.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.backing, Backing::Mapped { .. })
    }
}

/// What can be kept of a machine.
pub(super) enum Keeps {
    Template(Template),
    Own(Own),
}

/// A running machine. The fields are dropped in this order.
pub(super) struct FirecrackerMachine {
    name: String,
    process: Process,
    api: Api,
    collected: Collected,
    control: Option<ControlStream>,
    cut: Cut,
    keeps: Keeps,
    /// Its disk, where that is a block device: what the host holds back of it is written when it freezes.
    disk: Option<Arc<File>>,
    /// Serves its memory.
    _handler: Option<Box<dyn Send + Sync>>,
    _jail: Jail,
    /// How long a call may take that does nothing long.
    limit: Duration,
    /// Set once the process is gone.
    cause: Option<ExitCause>,
    /// Whether the end of the process is our doing.
    killing: bool,
}

impl FirecrackerMachine {
    pub(super) fn new(
        name: String,
        (process, api, collected, jail): (Process, Api, Collected, Jail),
        (control, cut): (ControlStream, Cut),
        (keeps, disk): (Keeps, Option<File>),
        handler: Option<Box<dyn Send + Sync>>,
        limit: Duration,
    ) -> FirecrackerMachine {
        FirecrackerMachine {
            name,
            process,
            api,
            collected,
            control: Some(control),
            cut,
            keeps,
            disk: disk.map(Arc::new),
            _handler: handler,
            _jail: jail,
            limit: limit.max(PAUSE_LIMIT),
            cause: None,
            killing: false,
        }
    }

    async fn state(&self) -> Result<InstanceState, ApiError> {
        let info: InstanceInfo = self.api.ask(&Call::Describe, self.limit).await?;
        Ok(info.state)
    }

    /// Asks first: Firecracker need not take a change to what is.
    async fn become_state(&mut self, wanted: RunState) -> Result<(), PauseError> {
        if self.process.ended().is_some() {
            return Err(PauseError::Gone);
        }
        let is = match self.state().await.map_err(unpaused)? {
            InstanceState::Running => RunState::Resumed,
            InstanceState::Paused => RunState::Paused,
            InstanceState::NotStarted => {
                return Err(PauseError::Refused { answer: "it has not started".to_owned() });
            }
        };
        if is == wanted {
            return Ok(());
        }
        self.api.tell(&Call::Run(wanted), self.limit).await.map_err(unpaused)
    }

    /// Says why the process is gone, which it is.
    fn settle(&mut self, exit: &Exit) -> ExitCause {
        if let Some(cause) = &self.cause {
            return cause.clone();
        }
        let cause = match exit_code(&exit.status) {
            Some(0) => ExitCause::GuestStopped,
            _ if self.killing => ExitCause::Killed,
            code => {
                let why = code.and_then(meaning).map_or(String::new(), |why| format!(" ({why})"));
                let detail = format!("{}{why}; {}", exit.status, self.collected.tail());
                ExitCause::Crashed { detail }
            }
        };
        self.cause.insert(cause).clone()
    }

    async fn save_all(&mut self) -> Result<(), SaveError> {
        let Keeps::Template(Template { files, shape }) = &self.keeps else {
            return Err(SaveError::NotSaveable);
        };
        let (files, shape) = (files.clone(), shape.clone());
        if self.state().await.map_err(unsaved)? != InstanceState::Paused {
            let pause = Call::Run(RunState::Paused);
            self.api.tell(&pause, self.limit).await.map_err(unsaved)?;
        }
        self.write(SnapshotKind::Full).await?;
        let folder = files.folder.clone();
        let sealing = tokio::task::spawn_blocking(move || saved::seal(&files, &shape));
        match tokio::time::timeout(SAVE_LIMIT, sealing).await {
            Ok(Ok(sealed)) => sealed.map_err(|(path, source)| SaveError::Io { path, source }),
            Ok(Err(e)) => Err(SaveError::Io { path: folder, source: e.into() }),
            Err(_) => Err(SaveError::TimedOut { waited_ms: millis(SAVE_LIMIT) }),
        }
    }

    /// Has Firecracker write state and memory to the files it was given.
    async fn write(&self, snapshot_type: SnapshotKind) -> Result<(), SaveError> {
        let call = Call::CreateSnapshot(SnapshotCreate {
            snapshot_path: STATE_OUT.to_owned(),
            mem_file_path: MEMORY_OUT.to_owned(),
            snapshot_type,
        });
        self.api.tell(&call, SAVE_LIMIT).await.map_err(unsaved)
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn take_control(&mut self) -> Option<ControlStream> {
        self.control.take()
    }

    async fn freeze(&mut self) -> Result<(), PauseError> {
        self.become_state(RunState::Paused).await?;
        let Some(disk) = self.disk.clone() else { return Ok(()) };
        let refused = |e: std::io::Error| PauseError::Refused { answer: format!("its disk: {e}") };
        let writing = tokio::task::spawn_blocking(move || disk.sync_data());
        let written = tokio::time::timeout(SAVE_LIMIT, writing).await;
        written.map_err(|e| refused(e.into()))?.map_err(|e| refused(e.into()))?.map_err(refused)
    }

    async fn thaw(&mut self) -> Result<(), PauseError> {
        self.become_state(RunState::Resumed).await
    }

    async fn save(&mut self) -> Result<(), SaveError> {
        let Keeps::Template(Template { files, .. }) = &self.keeps else {
            return Err(SaveError::NotSaveable);
        };
        if self.process.ended().is_some() {
            return Err(SaveError::Gone);
        }
        let unfinished = files.unfinished_state();
        let result = self.save_all().await;
        if result.is_err() {
            // A state without a description is nothing; what is left of it goes with the folder.
            drop(std::fs::remove_file(unfinished));
        }
        result
    }

    async fn snapshot(&mut self, into: SnapshotTarget) -> Result<Box<dyn PageSink>, SaveError> {
        let Keeps::Own(own) = &self.keeps else { return Err(SaveError::NotPrivate) };
        if self.process.ended().is_some() {
            return Err(SaveError::Gone);
        }
        if self.state().await.map_err(unsaved)? != InstanceState::Paused {
            return Err(SaveError::NotFrozen);
        }
        let draft = snapshot::begin(own, &into.folder)?;
        // Of a mapped memory the state is wanted, and a diff is the least that comes with it.
        let kind = if own.is_mapped() { SnapshotKind::Diff } else { SnapshotKind::Full };
        let written = self.write(kind).await;
        // Firecracker tells the guest that its connections are gone, whatever became of the rest.
        self.cut.cut();
        written?;
        snapshot::finish(own, self.process.handle(), draft, into.pages).await
    }

    async fn exited(&mut self) -> ExitCause {
        loop {
            // Its pipes are read meanwhile, so that what it says is its last.
            tokio::select! {
                biased;
                exit = self.process.wait() => return self.settle(&exit),
                () = self.collected.pump() => {}
            }
        }
    }

    async fn kill(&mut self) -> Result<(), KillError> {
        let fail = |what, reason| KillError { name: self.name.clone(), what, reason };
        if self.process.ended().is_none() {
            self.killing = true;
            self.process.kill();
        }
        let waited = tokio::time::timeout(KILL_LIMIT, self.process.wait()).await;
        let exit = waited.map_err(|_| {
            fail("the process", format!("it is still there after {} s", KILL_LIMIT.as_secs()))
        })?;
        if let Some(reason) = &exit.leftover {
            return Err(fail("the cgroup", reason.clone()));
        }
        self.control = None;
        self.settle(&exit);
        Ok(())
    }

    fn process_id(&self) -> Option<u32> {
        Some(self.process.pid())
    }
}

fn exit_code(status: &str) -> Option<u32> {
    status.strip_prefix("exit status ")?.parse().ok()
}

/// What Firecracker means by an exit code. Source: its list of exit codes.
fn meaning(code: u32) -> Option<&'static str> {
    Some(match code {
        1 => "an error it did not name",
        2 => "an error while it ended",
        148 => "a system call its filter forbids",
        149 => "SIGBUS: memory that its file or handler does not have",
        150 => "SIGSEGV",
        151 => "SIGXFSZ: a file too large",
        152 => "a bad configuration",
        153 => "bad arguments",
        154 => "SIGXCPU: out of processor time",
        155 => "SIGPIPE",
        156 => "SIGHUP",
        157 => "SIGILL",
        _ => return None,
    })
}

fn unpaused(error: ApiError) -> PauseError {
    match error {
        ApiError::Gone { .. } => PauseError::Gone,
        other => PauseError::Refused { answer: other.to_string() },
    }
}

/// Why a call did not help to keep a machine.
fn unsaved(error: ApiError) -> SaveError {
    match error {
        ApiError::Gone { .. } => SaveError::Gone,
        ApiError::TimedOut { waited_ms, .. } => SaveError::TimedOut { waited_ms },
        other => SaveError::Refused { answer: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_read_and_named() {
        assert_eq!(
            exit_code("exit status 148").and_then(meaning).map(|why| &why[..8]),
            Some("a system")
        );
        assert_eq!(exit_code("exit status 0"), Some(0));
        assert_eq!(exit_code("signal 9"), None);
        assert_eq!(meaning(42), None);
    }
}
