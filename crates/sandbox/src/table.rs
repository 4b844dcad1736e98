//! The table of sandboxes on this host: who holds an id, and what all of them hold together.
//!
//! One lock guards both, so that what is given away is never counted twice or forgotten: an id and
//! its share come and go in one step.

use std::collections::HashMap;
use std::sync::Arc;

use belljar_domain::{ExecutionId, SandboxId, UnixMillis};

use crate::admission::{Allocated, Host, Limits, Status, admit};
use crate::boot::CreateError;
use crate::inbox::Slit;
use crate::info::SandboxInfo;
use crate::log::SandboxLog;
use crate::metrics::Samples;

/// A sandbox's place in the table, from the moment its id is taken until nothing of it is left.
pub(crate) struct Entry {
    pub(crate) execution_id: ExecutionId,
    pub(crate) terms: Arc<str>,
    pub(crate) commands: Slit,
    /// What it takes of this host.
    pub(crate) share: Allocated,
    /// Set once it runs.
    pub(crate) running: Option<Arc<Running>>,
}

/// What is kept of a sandbox while it runs.
pub(crate) struct Running {
    /// What it was when it started.
    pub(crate) info: SandboxInfo,
    pub(crate) log: SandboxLog,
    pub(crate) samples: Samples,
}

impl Entry {
    /// What it is, with the end it has now; `None` while it starts.
    pub(crate) fn now(&self) -> Option<SandboxInfo> {
        let running = self.running.as_ref()?;
        Some(SandboxInfo { end_at: self.commands.end_at(), ..running.info.clone() })
    }
}

/// Every sandbox on this host.
pub(crate) struct Table {
    entries: HashMap<SandboxId, Entry>,
    allocated: Allocated,
    running: usize,
    status: Status,
    status_changed_at: UnixMillis,
}

impl Table {
    pub(crate) fn new(now: UnixMillis) -> Table {
        Table {
            entries: HashMap::new(),
            allocated: Allocated::default(),
            running: 0,
            status: Status::Ready,
            status_changed_at: now,
        }
    }

    /// Takes an id and its share of the host.
    pub(crate) fn enter(
        &mut self,
        sandbox_id: &SandboxId,
        entry: Entry,
        limits: &Limits,
        disk_free_mib: Option<u64>,
    ) -> Result<(), CreateError> {
        if self.entries.contains_key(sandbox_id) {
            return Err(CreateError::Exists { sandbox_id: sandbox_id.clone() });
        }
        let host = Host {
            limits,
            status: self.status,
            sandboxes: self.entries.len(),
            allocated: self.allocated,
            disk_free_mib,
        };
        admit(host, entry.share).map_err(|limit| CreateError::Refused { limit })?;
        self.allocated = self.allocated.plus(entry.share);
        self.entries.insert(sandbox_id.clone(), entry);
        Ok(())
    }

    /// The sandbox runs from now on.
    pub(crate) fn runs(&mut self, sandbox_id: &SandboxId, running: Arc<Running>) {
        if let Some(entry) = self.entries.get_mut(sandbox_id) {
            self.running += usize::from(entry.running.is_none());
            entry.running = Some(running);
        }
    }

    /// Gives the id and its share back.
    pub(crate) fn leave(&mut self, sandbox_id: &SandboxId) {
        let Some(entry) = self.entries.remove(sandbox_id) else { return };
        self.allocated = self.allocated.minus(entry.share);
        self.running -= usize::from(entry.running.is_some());
    }

    pub(crate) fn get(&self, sandbox_id: &SandboxId) -> Option<&Entry> {
        self.entries.get(sandbox_id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&SandboxId, &Entry)> {
        self.entries.iter()
    }

    pub(crate) fn allocated(&self) -> Allocated {
        self.allocated
    }

    /// How many run, and how many start.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.running, self.entries.len() - self.running)
    }

    pub(crate) fn status(&self) -> (Status, UnixMillis) {
        (self.status, self.status_changed_at)
    }

    pub(crate) fn set_status(&mut self, status: Status, now: UnixMillis) {
        if self.status != status {
            self.status = status;
            self.status_changed_at = now;
        }
    }
}
