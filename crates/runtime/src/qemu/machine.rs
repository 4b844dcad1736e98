//! One QEMU machine: freezing, saving, watching and killing it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;

use super::qmp::{Qmp, QmpError};
use super::snapshot;
use super::start::{Started, capabilities, log_tail, state_file};
use crate::keeper::{Exit, Process};
use crate::machine::{ControlStream, ExitCause, KillError, Machine, PauseError, SaveError};
use crate::memory::MemoryFile;
use crate::pages::{PageSink, SnapshotTarget};
use crate::saved::{self, SavedFiles, Shape};

/// Freezing takes a millisecond; a busy host may need a thousand.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
/// The state takes milliseconds to write.
pub(super) const SAVE_LIMIT: Duration = Duration::from_secs(30);
/// The memory goes to the disk, all of it: gibibytes on a slow one.
pub(super) const SEAL_LIMIT: Duration = Duration::from_secs(300);
/// The end of a killed process, and of its cgroup (2 s).
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Reading what a monitor said before it ended.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// What makes a machine one that can be saved.
pub(super) struct Booted {
    pub(super) files: SavedFiles,
    pub(super) shape: Shape,
    /// What the process calls the file its state goes to, which we made for it.
    pub(super) state_file: String,
}

/// What makes a machine one that can be snapshotted.
pub(super) struct Private {
    pub(super) memory: MemoryFile,
    pub(super) shape: Shape,
    /// Where its process writes its state.
    pub(super) state: File,
    /// What the process calls that file.
    pub(super) state_file: String,
}

/// What can be kept of a machine.
pub(super) enum Keeps {
    /// Its memory is a file that others will map: it can be saved once.
    File(Booted),
    /// The pages it has written are its own: it can be snapshotted.
    Pages(Private),
}

/// A running machine.
pub(super) struct QemuMachine {
    name: String,
    process: Process,
    qmp: Qmp,
    control: Option<ControlStream>,
    log: PathBuf,
    keeps: Keeps,
    /// Set once the process is gone.
    cause: Option<ExitCause>,
    /// Whether the end of the process is our doing.
    killing: bool,
}

impl QemuMachine {
    pub(super) fn new(started: Started, keeps: Keeps) -> QemuMachine {
        let Started { name, process, qmp, control, log } = started;
        let control = Some(control);
        QemuMachine { name, process, qmp, control, log, keeps, cause: None, killing: false }
    }

    async fn change_run_state(&mut self, command: &str) -> Result<(), PauseError> {
        match self.qmp.execute(command, json!({}), PAUSE_LIMIT).await {
            Ok(_) => Ok(()),
            Err(QmpError::Gone) => Err(PauseError::Gone),
            Err(QmpError::Refused(answer)) => Err(PauseError::Refused { answer }),
            Err(QmpError::TimedOut(limit)) => {
                Err(PauseError::Refused { answer: format!("nothing within {} s", limit.as_secs()) })
            }
        }
    }

    /// Says why the process is gone, which it is.
    async fn settle(&mut self, exit: &Exit) -> ExitCause {
        if let Some(cause) = &self.cause {
            return cause.clone();
        }
        // Its last words are in the socket although it is gone.
        let last_words = async { while self.qmp.pump().await.is_ok() {} };
        drop(tokio::time::timeout(LAST_WORDS_LIMIT, last_words).await);
        let stopped = |reason: &str| reason.starts_with("guest-");
        let cause = if self.qmp.seen().shutdown.as_deref().is_some_and(stopped) {
            ExitCause::GuestStopped
        } else if self.killing {
            ExitCause::Killed
        } else {
            let detail = format!("{}; {}", exit.status, log_tail(&self.log));
            ExitCause::Crashed { detail }
        };
        self.cause.insert(cause).clone()
    }

    async fn write_state(&mut self) -> Result<(), SaveError> {
        let Keeps::File(booted) = &self.keeps else { return Err(SaveError::NotSaveable) };
        let name = booted.state_file.clone();
        let limit = SAVE_LIMIT;
        self.qmp
            .execute("migrate-set-capabilities", capabilities(), limit)
            .await
            .map_err(refused)?;
        // The machine is not stopped first: the state says "running", and its restored copies
        // run without being told. The monitor stops it when everything else is written.
        self.qmp.migrate("migrate", state_file(&name), limit).await.map_err(refused)
    }

    async fn save_all(&mut self) -> Result<(), SaveError> {
        self.write_state().await?;
        let Keeps::File(Booted { files, shape, .. }) = &self.keeps else {
            return Err(SaveError::NotSaveable);
        };
        let (files, shape, folder) = (files.clone(), shape.clone(), files.folder.clone());
        let sealing = tokio::task::spawn_blocking(move || saved::seal(&files, &shape));
        match tokio::time::timeout(SEAL_LIMIT, sealing).await {
            Ok(Ok(sealed)) => sealed.map_err(|(path, source)| SaveError::Io { path, source }),
            Ok(Err(e)) => Err(SaveError::Io { path: folder, source: e.into() }),
            Err(_) => Err(SaveError::TimedOut { waited_ms: millis(SEAL_LIMIT) }),
        }
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn take_control(&mut self) -> Option<ControlStream> {
        self.control.take()
    }

    async fn freeze(&mut self) -> Result<(), PauseError> {
        self.change_run_state("stop").await
    }

    async fn thaw(&mut self) -> Result<(), PauseError> {
        self.change_run_state("cont").await
    }

    async fn save(&mut self) -> Result<(), SaveError> {
        if matches!(self.keeps, Keeps::Pages(_)) {
            return Err(SaveError::NotSaveable);
        }
        if self.process.ended().is_some() {
            return Err(SaveError::Gone);
        }
        let result = self.save_all().await;
        if let (Err(_), Keeps::File(booted)) = (&result, &self.keeps) {
            // A state without a description is nothing; what is left of it goes with the folder.
            drop(fs::remove_file(booted.files.unfinished_state()));
        }
        result
    }

    async fn snapshot(&mut self, into: SnapshotTarget) -> Result<Box<dyn PageSink>, SaveError> {
        let Keeps::Pages(private) = &self.keeps else { return Err(SaveError::NotPrivate) };
        if self.process.ended().is_some() {
            return Err(SaveError::Gone);
        }
        snapshot::take(private, &self.process, &mut self.qmp, into).await
    }

    async fn exited(&mut self) -> ExitCause {
        // The monitor is read meanwhile, so that what it says never piles up.
        loop {
            if self.qmp.is_closed() {
                break;
            }
            tokio::select! {
                biased;
                _ = self.process.wait() => break,
                _ = self.qmp.pump() => {}
            }
        }
        let exit = self.process.wait().await;
        self.settle(&exit).await
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
        self.settle(&exit).await;
        Ok(())
    }

    fn process_id(&self) -> Option<u32> {
        Some(self.process.pid())
    }
}

/// Why a monitor did not help to keep a machine.
pub(super) fn refused(error: QmpError) -> SaveError {
    match error {
        QmpError::Gone => SaveError::Gone,
        QmpError::Refused(answer) => SaveError::Refused { answer },
        QmpError::TimedOut(limit) => SaveError::TimedOut { waited_ms: millis(limit) },
    }
}

pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
