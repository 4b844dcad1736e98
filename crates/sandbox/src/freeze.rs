//! Keeping a sandbox: its memory and its disk of one moment, as a snapshot.
//!
//! ```text
//! guest flushes → machine stands still → memory, state → disk → (a copy goes on) → stable storage
//! ```
//!
//! Memory and disk are taken while the machine stands still. What takes time, putting them on stable
//! storage, comes after that. Until the snapshot is published nothing depends on it: a failure at any
//! step leaves the sandbox as it was, only later.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use belljar_blockstore::{BLOCK_BYTES, LayeredImage, MemoryLayerWriter, Overlay};
use belljar_daemon::clock;
use belljar_daemon::fault::{Point, reach};
use belljar_domain::lifecycle::Goal;
use belljar_domain::{BuildId, Kind, SandboxId, UnixMillis};
use belljar_runtime::control::{ControlError, GuestControl};
use belljar_runtime::{Machine, PageSink, PauseError, SaveError, SnapshotTarget};
use tracing::{info, warn};

use crate::info::SandboxInfo;
use crate::record::RecordError;
use crate::shelf::Shelf;
use crate::snapshot::{SnapshotDraft, SnapshotMeta};
use crate::source::Source;

/// How long a guest may take to say that it goes on. It was told, so nothing but a line in the log depends
/// on that.
const GOES_ON_LIMIT: Duration = Duration::from_secs(5);

/// How a sandbox is to be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepSandbox {
    /// The id its snapshot gets.
    pub snapshot_id: BuildId,
    /// Whether to keep its disk alone.
    pub filesystem_only: bool,
    /// Whether to fail when its guest does not answer. Otherwise it is frozen as it is.
    pub require_healthy_guest: bool,
}

/// Why a sandbox was not kept. It runs on, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// It does not run here, or ended meanwhile.
    #[error("find sandbox {sandbox_id} on this node")]
    NotFound {
        /// Which.
        sandbox_id: SandboxId,
    },
    /// There is a snapshot of this id.
    #[error("make snapshot {snapshot_id}: it exists")]
    Exists {
        /// Which.
        snapshot_id: BuildId,
    },
    /// Its guest does not answer, and it must.
    #[error("keep sandbox {sandbox_id}: its guest does not answer")]
    Unhealthy {
        /// Which.
        sandbox_id: SandboxId,
        /// What it did instead.
        #[source]
        source: ControlError,
    },
    /// The machine could not be stopped or started again.
    #[error("hold the machine still")]
    Hold {
        /// Why.
        #[source]
        source: PauseError,
    },
    /// The machine could not be saved.
    #[error("save the machine")]
    Save {
        /// Why.
        #[source]
        source: SaveError,
    },
    /// A layer, a map or a record could not be written.
    #[error("{step}")]
    Io {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl KeepError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            KeepError::NotFound { .. } => Kind::NotFound,
            KeepError::Exists { .. } | KeepError::Unhealthy { .. } => Kind::Conflict,
            _ if self.is_disk_full() => Kind::Quota,
            KeepError::Hold { source: PauseError::Gone }
            | KeepError::Save { source: SaveError::Gone } => Kind::Unavailable,
            KeepError::Hold { .. } | KeepError::Save { .. } | KeepError::Io { .. } => {
                Kind::Internal
            }
        }
    }

    /// Whether the disk has no room for it.
    pub fn is_disk_full(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            let io = error.downcast_ref::<io::Error>();
            if io.is_some_and(|e| e.kind() == io::ErrorKind::StorageFull) {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

/// What a running sandbox is made of, besides its machine.
pub(crate) struct Held {
    pub(crate) source: Arc<Source>,
    /// Its private disk; `None` where machines read none.
    pub(crate) disk: Option<Arc<Overlay>>,
    /// What its memory held when it started.
    pub(crate) memory: Arc<LayeredImage>,
    /// Whether it has layers open that may be nobody else's when it ends.
    pub(crate) leaves_layers: bool,
}

/// The sandbox that is kept, and where.
pub(crate) struct Subject<'a> {
    pub(crate) info: &'a SandboxInfo,
    pub(crate) held: &'a Held,
    pub(crate) shelf: &'a Shelf,
    /// How long the guest may take for each answer.
    pub(crate) guest_deadline: Duration,
}

/// A machine and whom to talk to in it.
pub(crate) struct Guest<'a> {
    pub(crate) machine: &'a mut dyn Machine,
    pub(crate) control: &'a mut GuestControl,
}

/// Keeps a sandbox. A copy runs when this returns; after a pause the machine stands still, for good
/// if it went well. After an error it runs again, or is gone.
pub(crate) async fn keep(
    subject: &Subject<'_>,
    guest: &mut Guest<'_>,
    order: &KeepSandbox,
    goal: Goal,
) -> Result<Arc<SnapshotMeta>, KeepError> {
    let draft = begin(subject, order)?;
    reach(Point::KeepDrafted);
    let still = stop(subject, guest, order).await;
    if still.is_err() {
        // It was told to be ready for this, or may hear of it yet.
        tell(subject, guest.control).await;
    }
    let unresponsive = still?;
    reach(Point::KeepMachineStill);
    let frozen_at = clock::now();
    let taken = match take(subject, guest.machine, order, &draft).await {
        Ok(taken) => taken,
        Err(e) => {
            go_on(subject, guest).await;
            return Err(e);
        }
    };
    reach(Point::KeepTaken);
    if goal == Goal::Copy {
        go_on(subject, guest).await;
    }
    let meta = describe(subject, order, goal, unresponsive, frozen_at, taken.own_bytes);
    let published = publish(subject.shelf, draft, meta, taken).await;
    if published.is_err() && goal == Goal::Pause {
        go_on(subject, guest).await;
    }
    reach(Point::KeepPublished);
    published
}

/// What was taken of a machine that stood still.
struct Taken {
    disk: Arc<LayeredImage>,
    /// `None`: only the disk was wanted.
    memory: Option<Arc<LayeredImage>>,
    /// What of both is not in the layers the sandbox was started from.
    own_bytes: u64,
}

fn begin(subject: &Subject<'_>, order: &KeepSandbox) -> Result<SnapshotDraft, KeepError> {
    if subject.shelf.get(&order.snapshot_id).is_some() {
        return Err(KeepError::Exists { snapshot_id: order.snapshot_id.clone() });
    }
    subject.shelf.draft(&order.snapshot_id).map_err(|e| io_of("make the snapshot's folder", e))
}

/// Has the machine stand still; answers whether its guest was not ready for that.
async fn stop(
    subject: &Subject<'_>,
    guest: &mut Guest<'_>,
    order: &KeepSandbox,
) -> Result<bool, KeepError> {
    let unresponsive = prepare(subject, guest.control, order).await?;
    reach(Point::KeepGuestPrepared);
    guest.machine.freeze().await.map_err(|source| KeepError::Hold { source })?;
    Ok(unresponsive)
}

/// Has the guest flush; answers whether it did not.
async fn prepare(
    subject: &Subject<'_>,
    control: &mut GuestControl,
    order: &KeepSandbox,
) -> Result<bool, KeepError> {
    let Err(source) = control.prepare_snapshot(subject.guest_deadline).await else {
        return Ok(false);
    };
    let sandbox_id = subject.info.sandbox_id.clone();
    if order.require_healthy_guest {
        return Err(KeepError::Unhealthy { sandbox_id, source });
    }
    info!(%sandbox_id, error = %source, "the guest is frozen as it is: it does not answer");
    Ok(true)
}

/// Takes memory and disk of a machine that stands still.
async fn take(
    subject: &Subject<'_>,
    machine: &mut dyn Machine,
    order: &KeepSandbox,
    draft: &SnapshotDraft,
) -> Result<Taken, KeepError> {
    let (mut memory, mut own_bytes) = (None, 0);
    if !order.filesystem_only {
        let (image, written_bytes) = take_memory(subject, machine, draft).await?;
        memory = Some(image);
        own_bytes += written_bytes;
    }
    let (held, shelf) = (subject.held, subject.shelf);
    let Some(overlay) = held.disk.clone() else {
        return Ok(Taken { disk: held.source.root_disk.clone(), memory, own_bytes });
    };
    own_bytes += overlay.stats().written_blocks * BLOCK_BYTES;
    let layers = shelf.layers().clone();
    let seal = move || overlay.checkpoint(&layers).map_err(io::Error::other);
    let disk = blocking("take the disk", seal).await?;
    Ok(Taken { disk, memory, own_bytes })
}

async fn take_memory(
    subject: &Subject<'_>,
    machine: &mut dyn Machine,
    draft: &SnapshotDraft,
) -> Result<(Arc<LayeredImage>, u64), KeepError> {
    const STEP: &str = "take the memory";
    let (base, layers) = (subject.held.memory.clone(), subject.shelf.layers().clone());
    let writer =
        blocking(STEP, move || MemoryLayerWriter::new(base, &layers).map_err(io::Error::other));
    let writer = Arc::new(Mutex::new(Some(writer.await?)));
    let target =
        SnapshotTarget { folder: draft.files().dir.clone(), pages: Box::new(Sink(writer.clone())) };
    let saved = machine.snapshot(target).await;
    let writer = writer.lock().unwrap_or_else(PoisonError::into_inner).take();
    saved.map_err(|source| KeepError::Save { source })?;
    let writer = writer.expect("nobody else takes it");
    let written_bytes = writer.written_bytes();
    // The last part of it may still have to be written.
    let image = blocking(STEP, move || Ok(writer.finish())).await?;
    Ok((image, written_bytes))
}

/// Pages on their way into a layer.
struct Sink(Arc<Mutex<Option<MemoryLayerWriter>>>);

impl PageSink for Sink {
    fn write(&mut self, offset: u64, pages: &[u8]) -> io::Result<()> {
        // A writer that panicked has written nothing more; its layer is never finished then.
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(writer) = writer.as_mut() else {
            return Err(io::Error::other("the snapshot was given up"));
        };
        writer.write(offset, pages).map_err(io::Error::from)
    }
}

/// Lets the machine run again, and tells its guest. One that cannot run again ends by itself.
async fn go_on(subject: &Subject<'_>, guest: &mut Guest<'_>) {
    let sandbox_id = &subject.info.sandbox_id;
    if let Err(e) = guest.machine.thaw().await {
        warn!(%sandbox_id, error = %e, "a frozen machine does not run again");
        return;
    }
    tell(subject, guest.control).await;
}

/// Tells the guest that it goes on. One that does not answer was told all the same.
async fn tell(subject: &Subject<'_>, control: &mut GuestControl) {
    if let Err(e) = control.continue_after_snapshot(GOES_ON_LIMIT).await {
        let sandbox_id = &subject.info.sandbox_id;
        info!(%sandbox_id, error = %e, "the guest goes on and does not answer");
    }
}

fn describe(
    subject: &Subject<'_>,
    order: &KeepSandbox,
    goal: Goal,
    guest_unresponsive: bool,
    frozen_at: UnixMillis,
    own_bytes: u64,
) -> SnapshotMeta {
    let (info, source) = (subject.info, &subject.held.source);
    SnapshotMeta {
        snapshot_id: order.snapshot_id.clone(),
        sandbox_id: info.sandbox_id.clone(),
        execution_id: info.execution_id.clone(),
        template_id: info.template_id.clone(),
        build_id: info.build_id.clone(),
        kernel_build_id: source.kernel_build.clone(),
        paused: goal == Goal::Pause,
        filesystem_only: order.filesystem_only,
        guest_unresponsive,
        vcpus: info.vcpus,
        memory: info.memory,
        disk: info.disk,
        envd_version: info.envd_version.to_string(),
        tier: subject.shelf.tier(),
        fingerprint: subject.shelf.fingerprint().to_owned(),
        terms: info.terms.to_string(),
        started_at: info.started_at,
        created_at: frozen_at,
        own_bytes,
    }
}

/// Puts layers, maps and record on stable storage, the record last.
async fn publish(
    shelf: &Shelf,
    draft: SnapshotDraft,
    meta: SnapshotMeta,
    taken: Taken,
) -> Result<Arc<SnapshotMeta>, KeepError> {
    let shelf = shelf.clone();
    blocking("put the snapshot on stable storage", move || {
        let Taken { disk, memory, .. } = taken;
        let write = |image: &LayeredImage, map: &std::path::Path| {
            image.sync().map_err(io::Error::other)?;
            image.save(map).map_err(io::Error::other)
        };
        write(&disk, &draft.files().disk_map)?;
        if let Some(memory) = &memory {
            write(memory, &draft.files().memory_map)?;
        }
        let files = draft.publish(&meta).map_err(io::Error::other)?;
        let meta = Arc::new(meta);
        shelf.put(&meta, &files, (disk, memory));
        Ok(meta)
    })
    .await
}

async fn blocking<T: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, KeepError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(io::Error::other);
    done.flatten().map_err(|source| KeepError::Io { step, source })
}

fn io_of(step: &'static str, error: RecordError) -> KeepError {
    KeepError::Io { step, source: io::Error::other(error) }
}
