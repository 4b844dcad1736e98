//! Every sandbox on this host, and the door to them.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_blockstore::BaseImage;
use belljar_daemon::{OnError, Scope};
use belljar_domain::{BuildId, SandboxId, UnixMillis};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::boot::{Booted, CreateError, ReadyTemplate, boot};
use crate::info::{CreateSandbox, Ended, SandboxInfo};
use crate::ledger::Ledger;
use crate::log::{LogEntry, LogQuery, SandboxLog};
use crate::owner::{Command, own};
use crate::settings::{Deps, Settings};
use crate::template::{Template, TemplateError, load_all};

/// Commands that may wait for one owner.
const COMMANDS_MAX: usize = 16;
/// End notices a slow listener may fall behind by, before it must list again.
const ENDED_MAX: usize = 4096;

/// What an earlier server left and this one removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Sandboxes that were in the ledger.
    pub sandboxes: Vec<String>,
}

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
    /// A template cannot be read.
    #[error("load the templates")]
    Templates {
        /// Why.
        #[source]
        source: TemplateError,
    },
    /// A template's disk cannot be opened.
    #[error("open the disk of template build {build_id}")]
    Disk {
        /// Which.
        build_id: BuildId,
        /// Why.
        #[source]
        source: belljar_blockstore::OpenError,
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

struct Inner {
    deps: Deps,
    settings: Settings,
    ledger: Ledger,
    scope: Scope,
    starting: Semaphore,
    templates: HashMap<BuildId, ReadyTemplate>,
    unusable: Vec<Template>,
    ended: broadcast::Sender<Ended>,
    // Held for look-ups and single inserts only, never across a wait.
    entries: Mutex<HashMap<SandboxId, Entry>>,
}

/// A sandbox's place in the table, from the moment its id is taken until nothing of it is left.
struct Entry {
    commands: mpsc::Sender<Command>,
    /// Set once it runs.
    running: Option<Running>,
    /// Turns true when nothing of it is left.
    gone: watch::Receiver<bool>,
}

struct Running {
    info: SandboxInfo,
    end_at: watch::Receiver<UnixMillis>,
    log: SandboxLog,
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
        let dirs = [&settings.run_dir, &settings.overlay_dir, &settings.templates_dir];
        for dir in dirs {
            std::fs::create_dir_all(dir)
                .map_err(|source| OpenError::Dir { path: dir.clone(), source })?;
        }
        let ledger = Ledger::open(settings.ledger_dir.clone())
            .map_err(|source| OpenError::Dir { path: settings.ledger_dir.clone(), source })?;
        let reclaimed = reclaim(&ledger, &settings, &deps).await?;
        let fingerprint = deps.runtime.fingerprint();
        let (templates, unusable) = load_templates(&settings.templates_dir, &fingerprint)?;
        let inner = Inner {
            starting: Semaphore::new(settings.starting_max),
            deps,
            ledger,
            scope,
            templates,
            unusable,
            ended: broadcast::channel(ENDED_MAX).0,
            entries: Mutex::new(HashMap::new()),
            settings,
        };
        Ok((Sandboxes { inner: Arc::new(inner) }, reclaimed))
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
        let template = self
            .inner
            .templates
            .get(&request.build_id)
            .cloned()
            .ok_or_else(|| CreateError::NoTemplate { build_id: request.build_id.clone() })?;
        if self.inner.scope.is_cancelled() {
            return Err(CreateError::Closing);
        }
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (gone, gone_seen) = watch::channel(false);
        self.inner
            .take_id(&request.sandbox_id, Entry { commands, running: None, gone: gone_seen })?;
        let (answer, answered) = oneshot::channel();
        let inner = self.inner.clone();
        self.inner.scope.spawn_shielded("sandbox owner", OnError::Log, async move {
            inner.live(request, template, inbox, answer).await;
            gone.send_replace(true);
            Ok::<(), std::convert::Infallible>(())
        });
        answered.await.unwrap_or(Err(CreateError::Closing))
    }

    /// Every sandbox that runs, in no order.
    pub fn list(&self) -> Vec<SandboxInfo> {
        self.inner.entries().values().filter_map(|e| e.running.as_ref().map(Running::now)).collect()
    }

    /// Moves a sandbox's end.
    ///
    /// # Errors
    /// [`SandboxNotFound`] when it does not run here, or is on its way out.
    pub async fn set_end(
        &self,
        sandbox_id: &SandboxId,
        end_at: UnixMillis,
    ) -> Result<(), SandboxNotFound> {
        let missing = || SandboxNotFound { sandbox_id: sandbox_id.clone() };
        let commands = self.inner.commands_of(sandbox_id).ok_or_else(missing)?;
        let (done, heard) = oneshot::channel();
        commands.send(Command::SetEnd(end_at, done)).await.map_err(|_| missing())?;
        heard.await.map_err(|_| missing())
    }

    /// Kills a sandbox; answers once nothing of it is left.
    ///
    /// # Errors
    /// [`SandboxNotFound`] when it does not run here, or is already on its way out.
    pub async fn kill(&self, sandbox_id: &SandboxId) -> Result<(), SandboxNotFound> {
        let missing = || SandboxNotFound { sandbox_id: sandbox_id.clone() };
        let commands = self.inner.commands_of(sandbox_id).ok_or_else(missing)?;
        let mut gone = self.inner.gone_of(sandbox_id).ok_or_else(missing)?;
        commands.send(Command::Kill).await.map_err(|_| missing())?;
        // The sender lives in the owner's task, which sets it last; an error means it is over too.
        let _owner_over = gone.wait_for(|gone| *gone).await.is_err();
        Ok(())
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
        let log = self
            .inner
            .entries()
            .get(sandbox_id)
            .and_then(|entry| entry.running.as_ref())
            .map(|running| running.log.clone());
        let log = log.ok_or_else(|| SandboxNotFound { sandbox_id: sandbox_id.clone() })?;
        Ok(log.read(query))
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

impl Running {
    fn now(&self) -> SandboxInfo {
        SandboxInfo { end_at: *self.end_at.borrow(), ..self.info.clone() }
    }
}

impl Inner {
    fn entries(&self) -> MutexGuard<'_, HashMap<SandboxId, Entry>> {
        // A panic while it was held left at most one entry unmade: the map itself is whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_id(&self, sandbox_id: &SandboxId, entry: Entry) -> Result<(), CreateError> {
        let mut entries = self.entries();
        if entries.contains_key(sandbox_id) {
            return Err(CreateError::Exists { sandbox_id: sandbox_id.clone() });
        }
        if entries.len() >= self.settings.sandboxes_max {
            return Err(CreateError::NodeFull { limit: self.settings.sandboxes_max });
        }
        entries.insert(sandbox_id.clone(), entry);
        Ok(())
    }

    fn commands_of(&self, sandbox_id: &SandboxId) -> Option<mpsc::Sender<Command>> {
        let entries = self.entries();
        let entry = entries.get(sandbox_id)?;
        entry.running.as_ref().map(|_| entry.commands.clone())
    }

    fn gone_of(&self, sandbox_id: &SandboxId) -> Option<watch::Receiver<bool>> {
        self.entries().get(sandbox_id).map(|entry| entry.gone.clone())
    }

    /// The whole life of one sandbox. Runs shielded.
    async fn live(
        &self,
        request: CreateSandbox,
        template: ReadyTemplate,
        inbox: mpsc::Receiver<Command>,
        answer: oneshot::Sender<Result<SandboxInfo, CreateError>>,
    ) {
        let booted = self.start(&template, &request).await;
        let reason = match booted {
            Err(e) => {
                warn!(sandbox_id = %request.sandbox_id, error = %chain(&e), "sandbox did not start");
                self.entries().remove(&request.sandbox_id);
                let _caller_gone = answer.send(Err(e)).is_err();
                return;
            }
            Ok(booted) => {
                let info = booted.info.clone();
                let (end_at, end_seen) = watch::channel(info.end_at);
                let log = SandboxLog::default();
                if let Some(entry) = self.entries().get_mut(&request.sandbox_id) {
                    let (info, log) = (info.clone(), log.clone());
                    entry.running = Some(Running { info, end_at: end_seen, log });
                }
                info!(sandbox_id = %request.sandbox_id, build_id = %request.build_id, "sandbox runs");
                let _caller_gone = answer.send(Ok(info)).is_err();
                own(&request.sandbox_id, booted, inbox, end_at, &log, &self.scope).await
            }
        };
        self.entries().remove(&request.sandbox_id);
        let ended =
            Ended { sandbox_id: request.sandbox_id, execution_id: request.execution_id, reason };
        // Nobody may be listening, which is fine.
        let _unheard = self.ended.send(ended).is_err();
    }

    async fn start(
        &self,
        template: &ReadyTemplate,
        request: &CreateSandbox,
    ) -> Result<Booted, CreateError> {
        let _turn = tokio::select! {
            turn = self.starting.acquire() => turn.map_err(|_| CreateError::Closing)?,
            () = self.scope.cancelled() => return Err(CreateError::Closing),
        };
        boot(&self.deps, &self.settings, &self.ledger, &self.scope, template, request).await
    }
}

/// The templates this driver can restore, and those it cannot.
fn load_templates(
    dir: &Path,
    fingerprint: &str,
) -> Result<(HashMap<BuildId, ReadyTemplate>, Vec<Template>), OpenError> {
    let templates = load_all(dir).map_err(|source| OpenError::Templates { source })?;
    let mut ready = HashMap::new();
    let mut unusable = Vec::new();
    for template in templates {
        if template.meta.fingerprint != fingerprint {
            unusable.push(template);
            continue;
        }
        let base = BaseImage::open(&template.rootfs()).map_err(|source| OpenError::Disk {
            build_id: template.meta.build_id.clone(),
            source,
        })?;
        let build_id = template.meta.build_id.clone();
        ready.insert(build_id, ReadyTemplate { template, base: Arc::new(base) });
    }
    Ok((ready, unusable))
}

/// Removes whatever the ledger names, then whatever lies in the folders without an entry.
async fn reclaim(
    ledger: &Ledger,
    settings: &Settings,
    deps: &Deps,
) -> Result<Reclaimed, OpenError> {
    let dir_error = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Dir { path, source }
    };
    let (entries, unreadable) = ledger.entries().map_err(dir_error(&settings.ledger_dir))?;
    let mut reclaimed = Reclaimed::default();
    for entry in entries {
        let failed =
            |reason: String| OpenError::Reclaim { sandbox_id: entry.sandbox_id.clone(), reason };
        deps.runtime.reclaim(&entry.machine).await.map_err(|e| failed(e.to_string()))?;
        remove_if_there(&entry.run_dir).map_err(|e| failed(e.to_string()))?;
        remove_if_there(&entry.overlay).map_err(|e| failed(e.to_string()))?;
        ledger.remove(&entry.sandbox_id).map_err(|e| failed(e.to_string()))?;
        info!(sandbox_id = entry.sandbox_id, "reclaimed a sandbox of an earlier run");
        reclaimed.sandboxes.push(entry.sandbox_id);
    }
    for path in unreadable {
        remove_if_there(&path).map_err(dir_error(&path))?;
    }
    // The server holds its data folder alone, so anything still here belongs to no one.
    for dir in [&settings.run_dir, &settings.overlay_dir] {
        for file in std::fs::read_dir(dir).map_err(dir_error(dir))? {
            let path = file.map_err(dir_error(dir))?.path();
            remove_if_there(&path).map_err(dir_error(&path))?;
        }
    }
    Ok(reclaimed)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The whole chain of an error on one line, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}
