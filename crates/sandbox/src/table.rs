//! The table of sandboxes on this host: who holds an id, and what all of them hold together.
//!
//! One lock guards both, so that what is given away is never counted twice or forgotten: an id and
//! its share come and go in one step.

use std::collections::HashMap;
use std::sync::Arc;

use belljar_domain::{BuildId, ExecutionId, SandboxId, UnixMillis};

use crate::admission::{Allocated, Host, Limits, Refused, Status, admit};
use crate::boot::CreateError;
use crate::inbox::Slit;
use crate::info::SandboxInfo;
use crate::log::SandboxLog;
use crate::metrics::Samples;

/// A sandbox's place in the table, from the moment its id is taken until nothing of it is left.
#[derive(Clone)]
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

/// Every sandbox on this host, and the machines that are nobody's yet.
pub(crate) struct Table {
    entries: HashMap<SandboxId, Entry>,
    allocated: Allocated,
    spares: Spares,
    running: usize,
    status: Status,
    status_changed_at: UnixMillis,
}

/// Machines that stand ready for whoever comes, are made, or are taken apart.
#[derive(Default)]
struct Spares {
    /// Ready and promised to nobody, by what they were started from.
    ready: HashMap<BuildId, u32>,
    /// All of them.
    count: usize,
    allocated: Allocated,
}

impl Table {
    pub(crate) fn new(now: UnixMillis) -> Table {
        Table {
            entries: HashMap::new(),
            allocated: Allocated::default(),
            spares: Spares::default(),
            running: 0,
            status: Status::Ready,
            status_changed_at: now,
        }
    }

    /// Takes an id and its share of the host. A sandbox that fits the spares of a build is promised one
    /// of those that are ready, and has its share; says whether it was.
    pub(crate) fn enter(
        &mut self,
        sandbox_id: &SandboxId,
        entry: &Entry,
        fits: Option<&BuildId>,
        limits: &Limits,
        disk_free_mib: Option<u64>,
    ) -> Result<bool, CreateError> {
        if self.entries.contains_key(sandbox_id) {
            return Err(CreateError::Exists { sandbox_id: sandbox_id.clone() });
        }
        let promised = fits.is_some_and(|build_id| self.spares_of(build_id) > 0);
        let mut host = self.host(limits, disk_free_mib);
        if promised {
            host.allocated = host.allocated.minus(entry.share);
            host.sandboxes -= 1;
        }
        admit(host, entry.share).map_err(|limit| CreateError::Refused { limit })?;
        if let Some(build_id) = fits.filter(|_| promised) {
            self.withdraw_spare(build_id);
            self.spare_is_gone(entry.share);
        }
        self.allocated = self.allocated.plus(entry.share);
        self.entries.insert(sandbox_id.clone(), entry.clone());
        Ok(promised)
    }

    fn host<'a>(&self, limits: &'a Limits, disk_free_mib: Option<u64>) -> Host<'a> {
        Host {
            limits,
            status: self.status,
            sandboxes: self.entries.len() + self.spares.count,
            allocated: self.allocated.plus(self.spares.allocated),
            disk_free_mib,
        }
    }

    /// Takes a share of the host for a machine that is to stand ready.
    pub(crate) fn enter_spare(
        &mut self,
        share: Allocated,
        limits: &Limits,
        disk_free_mib: Option<u64>,
    ) -> Result<(), Refused> {
        admit(self.host(limits, disk_free_mib), share)?;
        self.spares.count += 1;
        self.spares.allocated = self.spares.allocated.plus(share);
        Ok(())
    }

    /// One more may be promised.
    pub(crate) fn offer_spare(&mut self, build_id: &BuildId) {
        *self.spares.ready.entry(build_id.clone()).or_default() += 1;
    }

    /// One less may be; `false` when all that are ready are promised already.
    pub(crate) fn withdraw_spare(&mut self, build_id: &BuildId) -> bool {
        let Some(ready) = self.spares.ready.get_mut(build_id).filter(|ready| **ready > 0) else {
            return false;
        };
        *ready -= 1;
        true
    }

    /// Gives a spare's share back.
    pub(crate) fn spare_is_gone(&mut self, share: Allocated) {
        self.spares.count -= 1;
        self.spares.allocated = self.spares.allocated.minus(share);
    }

    /// How many machines of a build stand ready, promised to nobody.
    pub(crate) fn spares_of(&self, build_id: &BuildId) -> u32 {
        self.spares.ready.get(build_id).copied().unwrap_or(0)
    }

    /// How many machines stand ready, promised to nobody.
    pub(crate) fn spares(&self) -> u32 {
        self.spares.ready.values().sum()
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

    /// What sandboxes hold. What spares hold is theirs for the asking.
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
