//! Bringing one sandbox up: every acquisition beside its undo.
//!
//! ```text
//! ledger entry → run folder → network slot → overlay → NBD server → machine → guest ready
//! ```
//!
//! A failure at any step runs the undos of the steps before it, in reverse, and nothing is left.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use belljar_blockstore::{LayeredImage, NbdServer, Overlay, SocketOwner};
use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{Scope, Teardown, clock};
use belljar_domain::{BuildId, Kind, SandboxId, UnixMillis};
use belljar_network::{EgressPolicy, LeaseError};
use belljar_runtime::control::{ControlError, GuestControl};
use belljar_runtime::{
    BootMemory, BootSource, DiskExport, Identity, Machine, MachineSpec, NetworkAttachment,
    StartError,
};
use belljar_wire::guest::Init;

use crate::admission::Refused;
use crate::archive::FetchError;
use crate::freeze::Held;
use crate::info::{CreateSandbox, SandboxInfo};
use crate::ledger::{Entry, Ledger, Line, Run};
use crate::record::RecordError;
use crate::settings::{Deps, Settings};
use crate::source::{Saved, Source};
use crate::template::Kernel;

/// Why a sandbox did not start. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// No such build on this node.
    #[error("find template build {build_id} on this node")]
    NoTemplate {
        /// The build asked for.
        build_id: BuildId,
    },
    /// The id is taken.
    #[error("create sandbox {sandbox_id}: it exists")]
    Exists {
        /// The id.
        sandbox_id: SandboxId,
    },
    /// The build was saved under another driver, version or tier than this host's.
    #[error("restore template build {build_id} on this node: it must be built again")]
    Incompatible {
        /// The build asked for.
        build_id: BuildId,
    },
    /// The build cannot be booted from its disk: it was made before templates kept their kernel.
    #[error("boot build {build_id} without its memory: its template must be built again")]
    NoKernel {
        /// The build asked for.
        build_id: BuildId,
        /// What is missing.
        #[source]
        source: RecordError,
    },
    /// It is in the blob store, and could not be fetched from there.
    #[error("fetch snapshot {snapshot_id}")]
    Fetch {
        /// The snapshot asked for.
        snapshot_id: BuildId,
        /// Why.
        #[source]
        source: Arc<FetchError>,
    },
    /// This host takes no more.
    #[error("create a sandbox: {limit}")]
    Refused {
        /// Which limit was met.
        limit: Refused,
    },
    /// It was killed before it ran.
    #[error("create sandbox {sandbox_id}: it was killed meanwhile")]
    Killed {
        /// The id.
        sandbox_id: SandboxId,
    },
    /// The node is stopping.
    #[error("create a sandbox: the node is stopping")]
    Closing,
    /// No network slot.
    #[error("get a network slot")]
    Network {
        /// Why.
        #[source]
        source: LeaseError,
    },
    /// A file or socket of the sandbox could not be made.
    #[error("{step}")]
    Io {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine did not start.
    #[error("start the machine")]
    Machine {
        /// Why.
        #[source]
        source: StartError,
    },
    /// The guest did not become ready.
    #[error("reach the guest")]
    Guest {
        /// Why.
        #[source]
        source: ControlError,
    },
}

impl CreateError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            CreateError::NoTemplate { .. } => Kind::NotFound,
            CreateError::Exists { .. } | CreateError::Killed { .. } => Kind::Conflict,
            CreateError::Incompatible { .. } | CreateError::NoKernel { .. } => Kind::NotFound,
            CreateError::Fetch { source, .. } => source.kind(),
            CreateError::Refused { limit } => limit.kind(),
            CreateError::Closing => Kind::Unavailable,
            CreateError::Network { source } => source.kind(),
            CreateError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Kind::Quota
            }
            CreateError::Io { .. } => Kind::Internal,
            CreateError::Machine { source } => source.kind(),
            CreateError::Guest { source } => source.kind(),
        }
    }
}

/// A sandbox that runs, and how to give it back.
pub(crate) struct Booted {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) control: GuestControl,
    pub(crate) undo: Teardown,
    pub(crate) info: SandboxInfo,
    pub(crate) held: Held,
}

/// The files of one sandbox on this host.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) machine: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) overlay: PathBuf,
}

impl Places {
    pub(crate) fn of(settings: &Settings, sandbox_id: &SandboxId) -> Places {
        Places {
            machine: format!("{}-{sandbox_id}", settings.host_tag),
            run_dir: settings.run_dir.join(sandbox_id.as_str()),
            overlay: settings.overlay_dir.join(format!("{sandbox_id}.overlay")),
        }
    }
}

/// Starts a sandbox from a template build or a snapshot. Not cancel-safe: run it shielded.
pub(crate) async fn boot(
    deps: &Deps,
    settings: &Settings,
    ledger: &Ledger,
    scope: &Scope,
    source: &Arc<Source>,
    request: &CreateSandbox,
) -> Result<Booted, CreateError> {
    let mut undo = Teardown::new(scope, settings.teardown_step_deadline);
    match acquire(deps, settings, ledger, source, request, &mut undo).await {
        Ok((machine, control, info, held)) => Ok(Booted { machine, control, undo, info, held }),
        Err(e) => {
            // Failed steps are logged where they fail; the caller hears why the boot did.
            let _leaks = undo.run().await;
            Err(e)
        }
    }
}

async fn acquire(
    deps: &Deps,
    settings: &Settings,
    ledger: &Ledger,
    source: &Arc<Source>,
    request: &CreateSandbox,
    undo: &mut Teardown,
) -> Result<(Box<dyn Machine>, GuestControl, SandboxInfo, Held), CreateError> {
    let started_at = clock::now();
    let places = Places::of(settings, &request.sandbox_id);
    enter_ledger(ledger, &entry_of(request, source, &places, started_at), undo)?;
    reach(Point::BootInLedger);
    let wanted = Wanted { internet: request.allow_internet_access, cold: request.cold_boot };
    let stood = stand_up(deps, settings, source, &places, wanted, undo).await?;
    reach(Point::BootMachineStarted);
    let Stood { mut machine, memory, disk, route_ip, boots } = stood;
    let (control, envd_version) =
        match become_sandbox(&mut *machine, guest_init(request), settings, boots).await {
            Ok(ready) => ready,
            Err(source) => return Err(not_ready(machine, source, undo).await),
        };
    reach(Point::BootGuestReady);
    let info = describe(request, source, (route_ip, started_at), &envd_version);
    let leaves_layers = source.snapshot.is_some();
    let held = Held { source: Arc::clone(source), disk, memory, leaves_layers };
    Ok((machine, control, info, held))
}

/// The error of a guest that did not become ready; kills its machine.
pub(crate) async fn not_ready(
    mut machine: Box<dyn Machine>,
    source: ControlError,
    undo: &mut Teardown,
) -> CreateError {
    if let Err(e) = machine.kill().await {
        undo.note_leak("machine", e.to_string());
    }
    CreateError::Guest { source }
}

/// What a machine is stood up with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Whether it may reach out.
    pub(crate) internet: bool,
    /// Whether it boots from its disk alone.
    pub(crate) cold: bool,
}

/// A machine that runs, and whose guest was told nothing.
pub(crate) struct Stood {
    pub(crate) machine: Box<dyn Machine>,
    /// What its memory started from.
    pub(crate) memory: Arc<LayeredImage>,
    /// Its private disk; `None` where machines read none.
    pub(crate) disk: Option<Arc<Overlay>>,
    pub(crate) route_ip: Ipv4Addr,
    /// Whether its guest boots, instead of going on.
    pub(crate) boots: bool,
}

/// Acquires what a machine needs, and starts it. What it holds is in the ledger already.
pub(crate) async fn stand_up(
    deps: &Deps,
    settings: &Settings,
    source: &Arc<Source>,
    places: &Places,
    wanted: Wanted,
    undo: &mut Teardown,
) -> Result<Stood, CreateError> {
    make_run_dir(&places.run_dir, undo)?;
    reach(Point::BootFolderMade);
    let (network, slot_index) = lease_slot(deps, wanted.internet, undo).await?;
    reach(Point::BootSlotLeased);
    let route_ip = network.host_ip;
    let identity = settings
        .machine_uid_base
        .map(|base| Identity { uid: base + slot_index, gid: base + slot_index });
    let (mut root_disk, mut disk) = (Vec::new(), None);
    if deps.runtime.reads_disks() {
        let (export, overlay) = export_disk(&source.root_disk, places, identity, undo)?;
        root_disk.push(export);
        disk = Some(overlay);
    }
    let spec = MachineSpec {
        name: places.machine.clone(),
        vcpus: source.vcpus,
        memory: source.memory,
        root_disk,
        network: Some(network),
        run_dir: places.run_dir.clone(),
        identity,
    };
    reach(Point::BootDiskReady);
    let saved = source.saved.as_ref().filter(|_| !wanted.cold);
    let (machine, memory) = match saved {
        Some(saved) => restore(deps, saved, spec).await?,
        None => cold_boot(deps, &settings.templates_dir(), source, spec).await?,
    };
    Ok(Stood { machine, memory, disk, route_ip, boots: saved.is_none() })
}

pub(crate) fn describe(
    request: &CreateSandbox,
    source: &Source,
    (route_ip, started_at): (Ipv4Addr, UnixMillis),
    envd_version: &str,
) -> SandboxInfo {
    // One text for all sandboxes of a template, wherever theirs is the same.
    fn shared<T: PartialEq + Clone>(own: &T, known: &T) -> T {
        if own == known { known.clone() } else { own.clone() }
    }
    SandboxInfo {
        sandbox_id: request.sandbox_id.clone(),
        execution_id: request.execution_id.clone(),
        template_id: shared(&request.template_id, &source.template_id),
        build_id: shared(&request.build_id, &source.build_id),
        route_ip,
        started_at,
        end_at: request.end_at,
        vcpus: source.vcpus,
        memory: source.memory,
        disk: source.disk,
        // Guests say what was saved, as a rule.
        envd_version: shared(&envd_version.into(), &source.envd_version),
        terms: Arc::clone(&request.terms),
    }
}

/// A machine, and what its memory starts from.
type Started = (Box<dyn Machine>, Arc<LayeredImage>);

/// Restores the machine with its memory.
async fn restore(deps: &Deps, saved: &Saved, spec: MachineSpec) -> Result<Started, CreateError> {
    let machine = saved
        .machine()
        .await
        .map_err(|source| CreateError::Io { step: "put the saved memory together", source })?;
    let machine = deps.runtime.restore(spec, machine).await;
    let machine = machine.map_err(|source| CreateError::Machine { source })?;
    Ok((machine, Arc::clone(&saved.image)))
}

/// Boots the machine from its disk alone.
async fn cold_boot(
    deps: &Deps,
    templates_dir: &Path,
    source: &Source,
    spec: MachineSpec,
) -> Result<Started, CreateError> {
    let kernel = Kernel::load(templates_dir, &source.kernel_build).map_err(|source_error| {
        CreateError::NoKernel { build_id: source.build_id.clone(), source: source_error }
    })?;
    let memory = LayeredImage::zero(spec.memory.bytes())
        .map_err(|source| CreateError::Io { step: "measure the memory", source })?;
    let Kernel { path, words } = kernel;
    let boot = BootSource { kernel: path, cmdline: words, memory: BootMemory::Private };
    let machine = deps.runtime.boot(spec, boot).await;
    let machine = machine.map_err(|source| CreateError::Machine { source })?;
    Ok((machine, Arc::new(memory)))
}

/// Takes the guest's control channel and tells it who it is.
pub(crate) async fn become_sandbox(
    machine: &mut dyn Machine,
    init: Init,
    settings: &Settings,
    boots: bool,
) -> Result<(GuestControl, String), ControlError> {
    let stream = machine.take_control().ok_or(ControlError::Closed)?;
    let mut control = GuestControl::new(stream);
    if boots {
        control.booted(settings.boot_deadline).await?;
    }
    let version = control.init(init, settings.ready_deadline).await?;
    Ok((control, version))
}

/// The ledger's entry of a sandbox.
pub(crate) fn entry_of(
    request: &CreateSandbox,
    source: &Source,
    places: &Places,
    started_at: UnixMillis,
) -> Entry {
    let run = Run {
        template_id: request.template_id.to_string(),
        build_id: request.build_id.to_string(),
        end_at_unix_ms: request.end_at.0,
        vcpus: source.vcpus.0,
        memory_mib: source.memory.0,
        disk_mib: source.disk.0,
        terms: request.terms.to_string(),
    };
    Entry::new(
        (request.sandbox_id.as_str(), request.execution_id.as_str()),
        &places.machine,
        (places.run_dir.clone(), places.overlay.clone()),
        started_at.0,
        run,
    )
}

/// Writes what is about to be held into the ledger.
pub(crate) fn enter_ledger(
    ledger: &Ledger,
    entry: &Entry,
    undo: &mut Teardown,
) -> Result<Line, CreateError> {
    let line = Line::write(ledger, entry)
        .map_err(|source| CreateError::Io { step: "write the ledger entry", source })?;
    let written = line.clone();
    undo.push_if_clean("ledger entry", async move { written.remove().map_err(|e| e.to_string()) });
    Ok(line)
}

fn make_run_dir(run_dir: &Path, undo: &mut Teardown) -> Result<(), CreateError> {
    std::fs::create_dir(run_dir)
        .map_err(|source| CreateError::Io { step: "make the run folder", source })?;
    let run_dir = run_dir.to_owned();
    undo.push(
        "run folder",
        async move { std::fs::remove_dir_all(&run_dir).map_err(|e| e.to_string()) },
    );
    Ok(())
}

/// Leases a slot; answers the machine's view of it and its index.
async fn lease_slot(
    deps: &Deps,
    internet: bool,
    undo: &mut Teardown,
) -> Result<(NetworkAttachment, u32), CreateError> {
    let policy = if internet { EgressPolicy::Internet } else { EgressPolicy::None };
    let slot = deps.slots.lease(policy).await.map_err(|source| CreateError::Network { source })?;
    let attachment = NetworkAttachment {
        netns: slot.netns.clone(),
        tap: slot.tap.clone(),
        guest_mac: slot.guest_mac,
        host_ip: slot.host_ip,
    };
    let index = slot.index;
    let slots = deps.slots.clone();
    undo.push("network slot", async move { slots.release(slot).await.map_err(|e| e.to_string()) });
    Ok((attachment, index))
}

/// Lays a private overlay over the source's disk and serves it on a socket in the run folder.
fn export_disk(
    base: &Arc<LayeredImage>,
    places: &Places,
    identity: Option<Identity>,
    undo: &mut Teardown,
) -> Result<(DiskExport, Arc<Overlay>), CreateError> {
    let overlay = Overlay::create(base.clone(), &places.overlay)
        .map_err(|e| CreateError::Io { step: "make the disk overlay", source: e.source })?;
    let overlay = Arc::new(overlay);
    let file = overlay.clone();
    undo.push("disk overlay", async move { file.remove().map_err(|e| e.to_string()) });
    let socket = places.run_dir.join("disk.sock");
    let owner = identity.map(|id| SocketOwner { uid: id.uid, gid: id.gid });
    let server = NbdServer::bind(&socket, overlay.clone(), owner)
        .map_err(|e| CreateError::Io { step: "serve the disk", source: io::Error::other(e) })?;
    undo.push("disk server", async move {
        let closed = tokio::task::spawn_blocking(move || server.close()).await;
        closed.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    });
    Ok((DiskExport::NbdSocket(socket), overlay))
}

/// What the guest is told.
pub(crate) fn guest_init(request: &CreateSandbox) -> Init {
    let entropy: [u8; 32] = rand::random();
    Init {
        nonce: rand::random(),
        sandbox_id: request.sandbox_id.to_string(),
        template_id: request.template_id.to_string(),
        access_token: request.envd_access_token.as_ref().map(|t| t.expose().clone()),
        env_vars: request.env_vars.clone(),
        time_unix_ns: u64::try_from(clock::now().0).unwrap_or(0).saturating_mul(1_000_000),
        entropy_hex: hex::encode(entropy),
        default_user: None,
        default_workdir: None,
        logs: true,
    }
}
