//! Every sandbox on this host, and the door to them.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_blockstore::LayerStore;
use belljar_daemon::{OnError, Scope, clock};
use belljar_domain::lifecycle::Goal;
use belljar_domain::{BuildId, ExecutionId, SandboxId, UnixMillis};
use tokio::sync::{Semaphore, broadcast, oneshot};
use tracing::info;

use crate::admission::{Allocated, Limits, Status};
use crate::boot::CreateError;
pub(crate) use crate::chain::chain;
use crate::fetches::Fetches;
use crate::freeze::{KeepError, KeepSandbox};
use crate::inbox::{Slit, inbox};
use crate::info::{CreateSandbox, Ended, SandboxInfo, Starting, Untold};
use crate::ledger::Ledger;
use crate::log::{LogEntry, LogQuery};
use crate::metrics::{Figures, MetricsQuery, Sample, made};
use crate::owner::Command;
use crate::probe::Places;
use crate::ready::{Ready, load_templates, sources};
use crate::reclaim::{Reclaimed, reclaim};
use crate::record::RecordError;
use crate::settings::{Deps, MetricsFrom, Settings};
use crate::shelf::{DeleteSnapshotError, Shelf};
use crate::snapshot::SnapshotMeta;
use crate::table::{Entry, Running, Table};
use crate::template::Template;
use crate::untold::UntoldEnds;
use crate::uploads;
use crate::warm::Keepers;

/// End notices a slow listener may fall behind by, before it must list again.
const ENDED_MAX: usize = 4096;

/// Why the sandboxes of this host cannot be managed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A folder cannot be used.
    #[error("use {}", path.display())]
    Dir {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder of templates or of snapshots cannot be read.
    #[error("load the templates and snapshots")]
    Records {
        /// Why.
        #[source]
        source: RecordError,
    },
    /// The layers of disks and memories cannot be used.
    #[error("open the layers of disks and memories")]
    Layers {
        /// Why.
        #[source]
        source: belljar_blockstore::OpenStoreError,
    },
    /// Sandboxes are to stand ready of a template that cannot be started here.
    #[error("keep sandboxes of {template:?} warm: templates that can be started here are: {known}")]
    Warm {
        /// What was asked for.
        template: String,
        /// Names of those that can be.
        known: String,
    },
    /// An earlier sandbox cannot be removed.
    #[error("reclaim sandbox {sandbox_id}: {reason}")]
    Reclaim {
        /// Which.
        sandbox_id: String,
        /// Why.
        reason: String,
    },
}

/// No such sandbox runs here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("find sandbox {sandbox_id} on this node")]
pub struct SandboxNotFound {
    /// Which.
    pub sandbox_id: SandboxId,
}

/// Every sandbox on this host. Cheap to clone.
#[derive(Clone)]
pub struct Sandboxes {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) deps: Deps,
    pub(crate) settings: Settings,
    pub(crate) ledger: Ledger,
    pub(crate) untold: UntoldEnds,
    pub(crate) scope: Scope,
    pub(crate) starting: Semaphore,
    pub(crate) probes: Places,
    pub(crate) keepers: Keepers,
    pub(crate) templates: HashMap<BuildId, Ready>,
    pub(crate) unusable: Vec<Template>,
    pub(crate) shelf: Shelf,
    pub(crate) fetches: Option<Fetches>,
    pub(crate) ended: broadcast::Sender<Ended>,
    // Held for look-ups and single changes only, never across a wait.
    pub(crate) table: Mutex<Table>,
    pub(crate) created: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// What sandboxes make of this host now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Sandboxes whose guest is ready, and those on their way out.
    pub running: usize,
    /// Sandboxes whose guest is not ready yet.
    pub starting: usize,
    /// What all of them hold, as their templates say.
    pub allocated: Allocated,
    /// Machines that stand ready. What they hold is in no other figure: it is given up on demand.
    pub spares: u32,
    /// What they may hold.
    pub limits: Limits,
    /// Room left where private disks are, MiB; `None` where that cannot be known.
    pub disk_free_mib: Option<u64>,
    /// Whether new ones are taken, and since when that is so.
    pub status: (Status, UnixMillis),
    /// Starts that went well since this program started.
    pub created: u64,
    /// Starts that were begun and failed; refusals are none.
    pub failed: u64,
}

impl Sandboxes {
    /// Makes the folders, loads the templates and removes whatever an earlier server left.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(
        settings: Settings,
        deps: Deps,
        scope: Scope,
    ) -> Result<(Sandboxes, Reclaimed), OpenError> {
        let (templates_dir, snapshots_dir) = (settings.templates_dir(), settings.snapshots_dir());
        for dir in [&settings.run_dir, &settings.overlay_dir, &templates_dir] {
            std::fs::create_dir_all(dir)
                .map_err(|source| OpenError::Dir { path: dir.clone(), source })?;
        }
        // What sandboxes had in memory is nobody's business.
        let private = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&snapshots_dir);
        private.map_err(|source| OpenError::Dir { path: snapshots_dir.clone(), source })?;
        let ledger = Ledger::open(settings.ledger_dir.clone())
            .map_err(|source| OpenError::Dir { path: settings.ledger_dir.clone(), source })?;
        let untold = UntoldEnds::open(settings.untold_dir.clone())
            .map_err(|source| OpenError::Dir { path: settings.untold_dir.clone(), source })?;
        let layers =
            LayerStore::open(&settings.data_dir).map_err(|source| OpenError::Layers { source })?;
        let (templates, unusable) = load_templates(&templates_dir, &layers, &*deps.runtime)?;
        let (keepers, unstarted) = Keepers::plan(&settings.warm, &templates)?;
        let store = deps.archive.as_ref().map(|archive| archive.store_name());
        let shelf = Shelf::open(snapshots_dir, layers, deps.runtime.clone(), store)
            .map_err(|source| OpenError::Records { source })?;
        let paused = shelf.paused_runs();
        let reclaimed = reclaim(&ledger, &untold, &paused, &settings, &deps).await?;
        if let Some(archive) = &deps.archive {
            uploads::start(&shelf, archive, &scope);
        }
        let inner = Inner {
            fetches: deps.archive.clone().map(|archive| Fetches::new(archive, sources(&templates))),
            starting: Semaphore::new(settings.limits.starting_max),
            probes: Places::default(),
            keepers,
            deps,
            ledger,
            untold,
            scope,
            templates,
            unusable,
            shelf,
            ended: broadcast::channel(ENDED_MAX).0,
            table: Mutex::new(Table::new(clock::now())),
            created: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            settings,
        };
        let inner = Arc::new(inner);
        inner.keep_warm(unstarted);
        Ok((Sandboxes { inner }, reclaimed))
    }

    /// The templates this host can start sandboxes from.
    pub fn templates(&self) -> Vec<Template> {
        self.inner.templates.values().map(|ready| ready.template.clone()).collect()
    }

    /// Templates saved under another driver, version or tier: they must be built again.
    pub fn unusable_templates(&self) -> &[Template] {
        &self.inner.unusable
    }

    /// Starts a sandbox; answers once its guest is ready.
    ///
    /// Cancelling the call does not cancel the start: the sandbox then lives until its end.
    ///
    /// # Errors
    /// [`CreateError`]; nothing of the sandbox is left then.
    pub async fn create(&self, request: CreateSandbox) -> Result<SandboxInfo, CreateError> {
        let source = self.inner.source_or_fetch(&request.build_id).await?;
        if self.inner.scope.is_cancelled() {
            return Err(CreateError::Closing);
        }
        let (commands, inbox) = inbox(request.end_at);
        let entry = Entry {
            execution_id: request.execution_id.clone(),
            terms: Arc::clone(&request.terms),
            commands,
            share: Allocated::one(source.vcpus, source.memory, source.disk),
            running: None,
        };
        let promised = self.inner.enter(&request, &entry).await?;
        let (answer, answered) = oneshot::channel();
        let life = self.inner.clone().live(request, source, promised, inbox, answer);
        self.inner.scope.spawn_shielded("sandbox owner", OnError::Log, life);
        answered.await.unwrap_or(Err(CreateError::Closing))
    }

    /// Sandboxes that run and whose ids come after `after`, in the order of their ids.
    pub fn list(&self, after: Option<&SandboxId>) -> Vec<SandboxInfo> {
        let mut infos: Vec<SandboxInfo> = self
            .inner
            .table()
            .iter()
            .filter(|(id, _)| after.is_none_or(|after| id.as_str() > after.as_str()))
            .filter_map(|(_, entry)| entry.now())
            .collect();
        infos.sort_by(|a, b| a.sandbox_id.as_str().cmp(b.sandbox_id.as_str()));
        infos
    }

    /// Sandboxes whose guest is not ready yet, in no order.
    pub fn starting(&self) -> Vec<Starting> {
        let table = self.inner.table();
        let starting = table.iter().filter(|(_, entry)| entry.running.is_none());
        starting
            .map(|(id, entry)| Starting {
                sandbox_id: id.clone(),
                execution_id: entry.execution_id.clone(),
                terms: Arc::clone(&entry.terms),
            })
            .collect()
    }

    /// What sandboxes make of this host now.
    pub fn usage(&self) -> Usage {
        let disk_free_mib = self.inner.disk_free_mib();
        let table = self.inner.table();
        let (running, starting) = table.counts();
        Usage {
            running,
            starting,
            allocated: table.allocated(),
            spares: table.spares(),
            limits: self.inner.settings.limits.clone(),
            disk_free_mib,
            status: table.status(),
            created: self.inner.created.load(Ordering::Relaxed),
            failed: self.inner.failed.load(Ordering::Relaxed),
        }
    }

    /// Folders whose file systems sandboxes fill.
    pub fn folders(&self) -> Vec<PathBuf> {
        let settings = &self.inner.settings;
        vec![settings.overlay_dir.clone(), settings.data_dir.clone(), settings.run_dir.clone()]
    }

    /// Says whether new sandboxes are taken from now on. Those that start or run live on.
    pub fn set_status(&self, status: Status) {
        self.inner.table().set_status(status, clock::now());
        info!(status = status.as_str(), "this node's status was set");
    }

    /// Ends that nobody could be told of, in no order, as many as fit one answer: ask again when
    /// these are forgotten.
    ///
    /// # Errors
    /// An I/O error of their folder.
    pub async fn untold(&self) -> io::Result<Vec<Untold>> {
        let untold = self.inner.untold.clone();
        tokio::task::spawn_blocking(move || untold.list()).await.map_err(io::Error::other)?
    }

    /// Lets go of ends, because somebody has recorded them. Unknown ones are passed over.
    ///
    /// # Errors
    /// An I/O error of their folder; some may be gone then.
    pub async fn forget_untold(&self, executions: Vec<ExecutionId>) -> io::Result<()> {
        let untold = self.inner.untold.clone();
        let forget = move || executions.iter().try_for_each(|id| untold.forget(id));
        tokio::task::spawn_blocking(forget).await.map_err(io::Error::other)?
    }

    /// Moves a sandbox's end. One that starts is told when it runs.
    ///
    /// # Errors
    /// [`SandboxNotFound`] when it is not here, or is on its way out.
    pub async fn set_end(
        &self,
        sandbox_id: &SandboxId,
        end_at: UnixMillis,
    ) -> Result<(), SandboxNotFound> {
        let missing = || SandboxNotFound { sandbox_id: sandbox_id.clone() };
        let commands = self.inner.commands_of(sandbox_id).ok_or_else(missing)?;
        let (done, heard) = oneshot::channel();
        commands.put(Command::SetEnd(end_at, done)).map_err(|_| missing())?;
        heard.await.map_err(|_| missing())
    }

    /// Kills a sandbox; answers once nothing of it is left. One that waits for its turn to start, or
    /// starts, ends as soon as it can, and its create fails.
    ///
    /// # Errors
    /// [`SandboxNotFound`] when it does not run here, or is already on its way out.
    pub async fn kill(&self, sandbox_id: &SandboxId) -> Result<(), SandboxNotFound> {
        let missing = || SandboxNotFound { sandbox_id: sandbox_id.clone() };
        let commands = self.inner.commands_of(sandbox_id).ok_or_else(missing)?;
        commands.put(Command::Kill).map_err(|_| missing())?;
        commands.gone().await;
        Ok(())
    }

    /// Freezes a sandbox, keeps it as a snapshot, and gives everything else of it back; answers once
    /// all of that is done. It can be started again from the snapshot, under the same id.
    ///
    /// # Errors
    /// [`KeepError`]; the sandbox runs on, unless it is the one that says it ended.
    pub async fn pause(
        &self,
        sandbox_id: &SandboxId,
        order: KeepSandbox,
    ) -> Result<Arc<SnapshotMeta>, KeepError> {
        self.keep(sandbox_id, order, Goal::Pause).await
    }

    /// Takes a snapshot of a sandbox, which goes on.
    ///
    /// # Errors
    /// [`KeepError`].
    pub async fn snapshot(
        &self,
        sandbox_id: &SandboxId,
        order: KeepSandbox,
    ) -> Result<Arc<SnapshotMeta>, KeepError> {
        self.keep(sandbox_id, order, Goal::Copy).await
    }

    async fn keep(
        &self,
        sandbox_id: &SandboxId,
        order: KeepSandbox,
        goal: Goal,
    ) -> Result<Arc<SnapshotMeta>, KeepError> {
        let missing = || KeepError::NotFound { sandbox_id: sandbox_id.clone() };
        let running = |entry: &Entry| entry.running.is_some().then(|| entry.commands.clone());
        let commands = self.inner.table().get(sandbox_id).and_then(running);
        let commands = commands.ok_or_else(missing)?;
        let (done, heard) = oneshot::channel();
        commands.put(Command::Keep(Box::new(order), goal, done)).map_err(|_| missing())?;
        heard.await.unwrap_or_else(|_| Err(missing()))
    }

    /// Snapshots of this host whose ids come after `after`, in the order of their ids.
    pub fn snapshots(&self, after: Option<&BuildId>) -> Vec<Arc<SnapshotMeta>> {
        self.inner.shelf.list(after)
    }

    /// Whether a snapshot of this host is in the blob store, too.
    pub fn is_uploaded(&self, snapshot_id: &BuildId) -> bool {
        self.inner.shelf.is_uploaded(snapshot_id)
    }

    /// Removes a snapshot, here and from the blob store, and of its disk and memory what nothing else is
    /// made of. What runs from it goes on.
    ///
    /// # Errors
    /// [`DeleteSnapshotError`].
    pub async fn delete_snapshot(&self, snapshot_id: &BuildId) -> Result<(), DeleteSnapshotError> {
        let (shelf, id) = (self.inner.shelf.clone(), snapshot_id.clone());
        let deleted = tokio::task::spawn_blocking(move || shelf.delete(&id)).await;
        deleted.unwrap_or_else(|broke| std::panic::resume_unwind(broke.into_panic()))
    }

    /// What its processes said, as far as it is kept. It goes with the sandbox.
    ///
    /// # Errors
    /// [`SandboxNotFound`] when it does not run here.
    pub fn logs(
        &self,
        sandbox_id: &SandboxId,
        query: &LogQuery,
    ) -> Result<Vec<LogEntry>, SandboxNotFound> {
        let running = self.inner.table().get(sandbox_id).and_then(|entry| entry.running.clone());
        let running = running.ok_or_else(|| SandboxNotFound { sandbox_id: sandbox_id.clone() })?;
        Ok(running.log.read(query))
    }

    /// What a sandbox used, oldest first: one sample every 5 seconds for the last hour, and one a minute
    /// for the 23 before it. They go with the sandbox.
    ///
    /// # Errors
    /// [`SandboxNotFound`] when it does not run here.
    pub fn metrics(
        &self,
        sandbox_id: &SandboxId,
        query: MetricsQuery,
    ) -> Result<Vec<Sample>, SandboxNotFound> {
        let missing = || SandboxNotFound { sandbox_id: sandbox_id.clone() };
        let table = self.inner.table();
        let running = table.get(sandbox_id).and_then(|entry| entry.running.as_ref());
        Ok(self.inner.samples(running.ok_or_else(missing)?, query))
    }

    /// The newest sample of every sandbox that has one, in no order.
    pub fn metrics_of_all(&self, query: MetricsQuery) -> Vec<(SandboxId, Vec<Sample>)> {
        let query = MetricsQuery { latest_only: true, ..query };
        let table = self.inner.table();
        let running = table.iter().filter_map(|(id, entry)| Some((id, entry.running.as_ref()?)));
        running.map(|(id, running)| (id.clone(), self.inner.samples(running, query))).collect()
    }

    /// Every end from now on. A receiver that lags must list again.
    pub fn watch(&self) -> broadcast::Receiver<Ended> {
        self.inner.ended.subscribe()
    }

    /// Ends every sandbox and waits for it, at most `grace`. Says whether all ended.
    pub async fn close(&self, grace: Duration) -> bool {
        self.inner.scope.close(grace).await
    }
}

impl Inner {
    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        // A panic while it was held left at most one entry unmade: the map itself is whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room left where private disks are. One system call.
    pub(crate) fn disk_free_mib(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.settings.overlay_dir).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
    }

    fn samples(&self, running: &Running, query: MetricsQuery) -> Vec<Sample> {
        match self.settings.metrics {
            MetricsFrom::Guests => running.samples.read(query),
            MetricsFrom::Made(figures) => {
                let info = &running.info;
                let figures = Figures {
                    cpu_count: info.vcpus.0,
                    mem_total_bytes: info.memory.bytes(),
                    disk_total_bytes: info.disk.bytes(),
                    ..figures
                };
                made(figures, info.started_at, self.deps.clock.now(), query)
            }
        }
    }

    fn commands_of(&self, sandbox_id: &SandboxId) -> Option<Slit> {
        self.table().get(sandbox_id).map(|entry| entry.commands.clone())
    }
}
