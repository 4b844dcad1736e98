//! Boots a machine once and saves it as a template.
//!
//! ```text
//! draft folder → disk copy → NBD server → network slot → machine → guest up → warm → flushed
//!              → saved → machine killed → record written → folder renamed into place
//! ```
//!
//! What is acquired is given back in reverse order whatever happens; a failed build leaves nothing.

use std::fs::Permissions;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use belljar_blockstore::{
    BindError, CloneError, LayerStore, LayeredImage, NbdServer, OpenError, RawImage, SocketOwner,
    clone_file,
};
use belljar_daemon::{Scope, Teardown, clock};
use belljar_domain::{BuildId, Kind, MiB, TemplateId, Vcpus};
use belljar_network::{EgressPolicy, GATEWAY_IP, GUEST_IP, GUEST_PREFIX_LEN, LeaseError, Slots};
use belljar_runtime::control::{ControlError, GuestControl};
use belljar_runtime::{
    BootMemory, BootSource, DiskExport, ExitCause, Identity, KillError, Machine, MachineSpec,
    NetworkAttachment, Runtime, SaveError, StartError,
};
use belljar_sandbox::RecordError;
use belljar_sandbox::template::{Template, TemplateDraft, TemplateMeta};
use belljar_wire::guest::Init;

use crate::blocking::blocking;
use crate::progress::{Event, OnProgress};
use crate::warm::{COMMANDS, Guest, WarmError};

/// An emulated processor needs some 5 s; a loaded host several times that.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
const READY_DEADLINE: Duration = Duration::from_secs(60);
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);
/// For one request to the guest; the first Python start on an emulated processor takes seconds.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
const UNDO_DEADLINE: Duration = Duration::from_secs(30);

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildConfig {
    /// Where templates live; made if absent.
    pub templates_dir: PathBuf,
    /// An existing folder for the machine's sockets and log, on a short path.
    pub run_dir: PathBuf,
    /// Before the build's own part in the machine's name: `[a-z0-9-]`, at most 20 bytes.
    pub name_prefix: String,
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The root disk to start from; it is copied. A whole number of MiB.
    pub rootfs: PathBuf,
    /// The template this becomes a build of.
    pub template_id: TemplateId,
    /// Names users may say instead of the id.
    pub aliases: Vec<String>,
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: MiB,
    /// The guest's name server.
    pub dns: Ipv4Addr,
    /// Who the machine's process runs as; `None` keeps this process's user.
    pub identity: Option<Identity>,
    /// What [`source_key`] said of the inputs.
    pub source_key: String,
    /// Whether the guest is used once before it is saved. Only a guest that runs programs can be:
    /// the fake one cannot.
    pub warm_up: bool,
}

/// What a build works with.
#[derive(Clone)]
pub struct Deps {
    /// Boots the machine; its sandboxes must be restored by the same driver.
    pub runtime: Arc<dyn Runtime>,
    /// Where the machine's network slot comes from.
    pub slots: Arc<dyn Slots>,
}

/// Why no template was built. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The template could not be written.
    #[error("write the template")]
    Template(#[from] RecordError),
    /// The root disk is no whole number of MiB.
    #[error("use root disk {}: its {size_bytes} bytes are not a whole number of MiB", path.display())]
    DiskSize {
        /// The disk.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// The root disk could not be copied.
    #[error("copy the root disk")]
    Copy(#[from] CloneError),
    /// The copy could not be opened.
    #[error("open the root disk")]
    Disk(#[from] OpenError),
    /// The copy could not be served.
    #[error("serve the root disk")]
    Serve(#[from] BindError),
    /// No network slot.
    #[error("get a network slot")]
    Network(#[from] LeaseError),
    /// The machine did not start.
    #[error("start the machine")]
    Start(#[from] StartError),
    /// The guest did not come up or did not obey.
    #[error("reach the guest")]
    Guest(#[from] ControlError),
    /// The machine ended before it was saved.
    #[error("save the machine: it ended by itself: {cause:?}")]
    MachineEnded {
        /// Why.
        cause: ExitCause,
    },
    /// The guest does not do what every sandbox must do.
    #[error("warm up the guest")]
    Warm(#[from] WarmError),
    /// The machine could not be saved.
    #[error("save the machine")]
    Save(#[from] SaveError),
    /// The machine could not be removed whole.
    #[error("remove the machine")]
    Kill(#[from] KillError),
    /// A file could not be read or written.
    #[error("{step} {}", path.display())]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The scope was cancelled.
    #[error("build a template to its end: it was cancelled")]
    Cancelled,
}

impl BuildError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            BuildError::DiskSize { .. } => Kind::Invalid,
            BuildError::Network(source) => source.kind(),
            BuildError::Start(source) => source.kind(),
            BuildError::Guest(_) | BuildError::Warm(_) | BuildError::MachineEnded { .. } => {
                Kind::Unavailable
            }
            BuildError::Cancelled => Kind::Cancelled,
            BuildError::Template(_)
            | BuildError::Copy(_)
            | BuildError::Disk(_)
            | BuildError::Serve(_)
            | BuildError::Save(_)
            | BuildError::Kill(_)
            | BuildError::Io { .. } => Kind::Internal,
        }
    }
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError + use<> {
    let path = path.to_owned();
    move |source| BuildError::Io { step, path, source }
}

/// What is in the folder of a build that this program makes; part of its key, so that those of an
/// earlier program are built again. 2: with the kernel.
const FOLDER: u32 = 2;

/// A digest of everything a build depends on: equal keys make equal templates. Reads both files;
/// call it from a blocking thread.
///
/// # Errors
/// [`BuildError::Io`] and [`BuildError::Disk`] when a file cannot be read.
pub fn source_key(
    kernel: &Path,
    rootfs: &Path,
    vcpus: Vcpus,
    memory: MiB,
    fingerprint: &str,
) -> Result<String, BuildError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&FOLDER.to_le_bytes());
    let mut content = blake3::Hasher::new();
    std::fs::File::open(kernel)
        .and_then(|file| content.update_reader(file).map(drop))
        .map_err(io_error("read", kernel))?;
    hasher.update(content.finalize().as_bytes());
    hasher.update(disk_digest(rootfs)?.as_bytes());
    hasher.update(&vcpus.0.to_le_bytes());
    hasher.update(&memory.0.to_le_bytes());
    hasher.update(fingerprint.as_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}

/// Reads the disk as an image, because reading the file would fill the page cache with its holes.
fn disk_digest(path: &Path) -> Result<blake3::Hash, BuildError> {
    let folder = path.parent().unwrap_or(path);
    let store = LayerStore::open(folder).map_err(|e| io_error("list", folder)(e.source))?;
    let name = store.name_of(path).map_err(|e| io_error("open", path)(io::Error::other(e)))?;
    let disk = LayeredImage::raw(&store, &name)?;
    let mut content = blake3::Hasher::new();
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < disk.size_bytes() {
        let left = usize::try_from(disk.size_bytes() - at).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        disk.read_at(&mut buf[..len], at).map_err(io_error("read", path))?;
        content.update(&buf[..len]);
        at += u64::try_from(len).expect("at most 1 MiB");
    }
    Ok(content.finalize())
}

/// Builds one template: 5 to 15 s on an emulated processor.
///
/// Not cancel-safe; to stop it, cancel `scope`: it then gives everything back and ends with
/// [`BuildError::Cancelled`].
///
/// # Errors
/// [`BuildError`]; nothing of the build is left.
pub async fn build(
    config: &BuildConfig,
    deps: &Deps,
    scope: &Scope,
    on: OnProgress<'_>,
) -> Result<Template, BuildError> {
    // Teardown must run although the scope is cancelled: its steps are not spawned on it.
    let mut undo = Teardown::new(scope, UNDO_DEADLINE);
    let outcome = acquire_and_save(config, deps, scope, &mut undo, on).await;
    on(Event::Step("clean up"));
    // A step that fails is logged there; the caller hears how the build went.
    let _leaks = undo.run().await;
    outcome
}

async fn acquire_and_save(
    config: &BuildConfig,
    deps: &Deps,
    scope: &Scope,
    undo: &mut Teardown,
    on: OnProgress<'_>,
) -> Result<Template, BuildError> {
    let build_id = BuildId::random();
    let short_id = build_id.as_str().split('-').next().unwrap_or_default().to_owned();
    let name = format!("{}-build-{short_id}", config.name_prefix);

    on(Event::Step("copy the root disk"));
    let draft = make_draft(config, &build_id, undo)?;
    let disk = copy_disk(config, &draft).await?;
    copy_kernel(config, &draft).await?;
    let run_dir = make_run_dir(config, &name, undo)?;
    let disk_socket = serve_disk(config, &draft, &run_dir, undo)?;
    let network = lease_slot(deps, undo).await?;
    let guest = Guest { host_ip: network.host_ip, deadline: REQUEST_DEADLINE };

    on(Event::Step("boot the machine"));
    let spec = MachineSpec {
        name,
        vcpus: config.vcpus,
        memory: config.memory,
        root_disk: vec![DiskExport::NbdSocket(disk_socket)],
        network: Some(network),
        run_dir,
        identity: config.identity,
    };
    let source = BootSource {
        kernel: config.kernel.clone(),
        cmdline: kernel_words(config.dns),
        memory: BootMemory::Saveable { artifacts: draft.dir().to_owned() },
    };
    let mut machine = deps.runtime.boot(spec, source).await?;
    let baked = tokio::select! {
        baked = bake(&mut *machine, config, guest, on) => baked,
        () = scope.cancelled() => Err(BuildError::Cancelled),
    };
    // Killed whether it was saved or not; the first error is the one to tell.
    let killed = machine.kill().await;
    let envd_version = baked?;
    killed?;

    on(Event::Step("publish the template"));
    let meta = TemplateMeta {
        template_id: config.template_id.clone(),
        build_id,
        aliases: config.aliases.clone(),
        vcpus: config.vcpus,
        memory: config.memory,
        disk,
        envd_version,
        tier: deps.runtime.tier(),
        fingerprint: deps.runtime.fingerprint(),
        created_at: clock::now(),
        source_key: config.source_key.clone(),
    };
    publish(draft, meta).await
}

/// From the machine's first instruction to its saved state; answers the guest daemon's version.
async fn bake(
    machine: &mut dyn Machine,
    config: &BuildConfig,
    guest: Guest,
    on: OnProgress<'_>,
) -> Result<String, BuildError> {
    let stream = machine.take_control().ok_or(ControlError::Closed)?;
    // A machine that is gone is told at once; otherwise the guest's silence would run into the
    // deadline of whatever was asked last.
    let envd_version = tokio::select! {
        biased;
        prepared = prepare(GuestControl::new(stream), config, guest, on) => prepared?,
        cause = machine.exited() => return Err(BuildError::MachineEnded { cause }),
    };
    on(Event::Step("save the machine"));
    machine.save().await?;
    Ok(envd_version)
}

/// Everything the guest does before it is saved; answers its daemon's version.
async fn prepare(
    mut control: GuestControl,
    config: &BuildConfig,
    guest: Guest,
    on: OnProgress<'_>,
) -> Result<String, BuildError> {
    let booted = control.booted(BOOT_DEADLINE).await?;
    on(Event::Detail(format!("guest daemon {booted} is up")));
    let init = Init {
        nonce: 1,
        template_id: config.template_id.to_string(),
        time_unix_ns: u64::try_from(clock::now().0).unwrap_or(0).saturating_mul(1_000_000),
        default_user: Some("user".to_owned()),
        default_workdir: Some("/home/user".to_owned()),
        ..Init::default()
    };
    let envd_version = control.init(init, READY_DEADLINE).await?;
    on(Event::Step("warm up the guest"));
    guest.health().await?;
    if config.warm_up {
        for command in COMMANDS {
            guest.run(command).await?;
        }
    }
    control.prepare_snapshot(FLUSH_DEADLINE).await?;
    Ok(envd_version)
}

/// The guest's network, as the guest daemon reads it from the kernel's command line.
fn kernel_words(dns: Ipv4Addr) -> Vec<String> {
    vec![
        format!("belljar.ip={GUEST_IP}/{GUEST_PREFIX_LEN}"),
        format!("belljar.gw={GATEWAY_IP}"),
        format!("belljar.dns={dns}"),
    ]
}

fn make_draft(
    config: &BuildConfig,
    build_id: &BuildId,
    undo: &mut Teardown,
) -> Result<Arc<TemplateDraft>, BuildError> {
    let templates = &config.templates_dir;
    std::fs::create_dir_all(templates).map_err(io_error("make", templates))?;
    let draft = Arc::new(TemplateDraft::create(templates, build_id)?);
    let discarded = draft.clone();
    undo.push("template draft", async move {
        blocking(move || discarded.discard()).await.map_err(|e| e.to_string())
    });
    // The folder stays ours: the machine's user is handed its files by descriptor, and could
    // otherwise put links where we later take files back.
    Ok(draft)
}

/// Copies the root disk into the draft; answers its size.
async fn copy_disk(config: &BuildConfig, draft: &Arc<TemplateDraft>) -> Result<MiB, BuildError> {
    let (from, to) = (config.rootfs.clone(), draft.rootfs());
    let size_bytes = std::fs::metadata(&from).map_err(io_error("find", &from))?.len();
    let disk = MiB::at_least(size_bytes);
    if size_bytes == 0 || disk.bytes() != size_bytes {
        return Err(BuildError::DiskSize { path: from, size_bytes });
    }
    blocking(move || clone_file(&from, &to)).await?;
    Ok(disk)
}

/// Copies the kernel into the draft, with the words machines are booted with.
async fn copy_kernel(config: &BuildConfig, draft: &Arc<TemplateDraft>) -> Result<(), BuildError> {
    let (draft, kernel, words) = (draft.clone(), config.kernel.clone(), kernel_words(config.dns));
    Ok(blocking(move || draft.put_kernel(&kernel, &words)).await?)
}

fn make_run_dir(
    config: &BuildConfig,
    name: &str,
    undo: &mut Teardown,
) -> Result<PathBuf, BuildError> {
    let run_dir = config.run_dir.join(name);
    std::fs::create_dir(&run_dir).map_err(io_error("make", &run_dir))?;
    let removed = run_dir.clone();
    undo.push("run folder", async move {
        blocking(move || std::fs::remove_dir_all(removed)).await.map_err(|e| e.to_string())
    });
    give(&run_dir, config.identity)?;
    Ok(run_dir)
}

fn serve_disk(
    config: &BuildConfig,
    draft: &TemplateDraft,
    run_dir: &Path,
    undo: &mut Teardown,
) -> Result<PathBuf, BuildError> {
    let disk = Arc::new(RawImage::open(&draft.rootfs())?);
    let socket = run_dir.join("disk.sock");
    let owner = config.identity.map(|id| SocketOwner { uid: id.uid, gid: id.gid });
    let server = NbdServer::bind(&socket, disk, owner)?;
    undo.push("disk server", async move {
        blocking(move || server.close()).await.map_err(|e| e.to_string())
    });
    Ok(socket)
}

async fn lease_slot(deps: &Deps, undo: &mut Teardown) -> Result<NetworkAttachment, BuildError> {
    // The guest of a template has no business outside.
    let slot = deps.slots.lease(EgressPolicy::None).await?;
    let network = NetworkAttachment {
        netns: slot.netns.clone(),
        tap: slot.tap.clone(),
        guest_mac: slot.guest_mac,
        host_ip: slot.host_ip,
    };
    let slots = deps.slots.clone();
    undo.push("network slot", async move { slots.release(slot).await.map_err(|e| e.to_string()) });
    Ok(network)
}

/// Lets the machine's own user work in a folder.
fn give(folder: &Path, identity: Option<Identity>) -> Result<(), BuildError> {
    match identity {
        Some(id) => {
            chown(folder, Some(id.uid), Some(id.gid)).map_err(io_error("give away", folder))
        }
        None => Ok(()),
    }
}

/// Takes the finished files back from the machine's user, makes them read-only and shows them.
async fn publish(draft: Arc<TemplateDraft>, meta: TemplateMeta) -> Result<Template, BuildError> {
    blocking(move || {
        let folder = draft.dir();
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let take_back = |path: &Path| chown(path, Some(uid.as_raw()), Some(gid.as_raw()));
        take_back(folder).map_err(io_error("take back", folder))?;
        for entry in std::fs::read_dir(folder).map_err(io_error("list", folder))? {
            let path = entry.map_err(io_error("list", folder))?.path();
            take_back(&path)
                .and_then(|()| std::fs::set_permissions(&path, Permissions::from_mode(0o444)))
                .map_err(io_error("take back", &path))?;
        }
        Ok(draft.publish(&meta)?)
    })
    .await
}
