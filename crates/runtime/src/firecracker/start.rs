//! Bringing a machine up: jail, process, and the calls that configure or load it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_domain::MiB;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::time::Instant;

use super::api::{
    Action, Api, ApiError, BootSource as BootSourceCall, Call, Drive, Id, InstanceInfo, Logger,
    MachineConfig, Metrics, NetworkInterface, SnapshotLoad, Vsock,
};
use super::channel::{self, Door};
use super::collect::Collected;
use super::jail::Jail;
use super::machine::{FirecrackerMachine, Keeps, Own, Template};
use super::memory::{Backing, back};
use super::release::Release;
use super::{FirecrackerRuntime, marker, user_of};
use crate::cgroup::Limits;
use crate::keeper::{Launch, Process};
use crate::machine::{BootMemory, BootSource, DiskExport, MachineSpec, StartError};
use crate::pages::SavedMachine;
use crate::saved::{self, SavedFiles};
use crate::tap;

/// Names inside the jail.
pub(super) const MEMORY_OUT: &str = "/out/memory";
pub(super) const STATE_OUT: &str = "/out/state";
const API: &str = "/run/api";
const LOG: &str = "/out/log";
const FIGURES: &str = "/out/figures";
/// The guest's number on its socket device. Each machine has a device of its own.
const GUEST_CID: u32 = 3;
/// Looking again for the API: it says nothing when it begins to listen.
const LOOK_AGAIN: Duration = Duration::from_millis(3);
/// From the end of a connection to the end of its process.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Memory of the process beside the guest's own: 5 MB by its makers' word, and slack for pages in flight.
const OVERHEAD_MIB: u32 = 64;
/// Its main thread, that of its API, and helpers of its disks.
const THREADS: u32 = 16;

/// A process whose API answers, in its jail.
pub(super) struct Running {
    pub(super) process: Process,
    pub(super) api: Api,
    pub(super) collected: Collected,
    pub(super) door: Door,
    pub(super) jail: Jail,
}

pub(super) async fn boot(
    runtime: &FirecrackerRuntime,
    spec: MachineSpec,
    source: BootSource,
) -> Result<FirecrackerMachine, StartError> {
    spec.check_name()?;
    let release = runtime.current();
    let shape = runtime.shape(&spec, release);
    let mut jail = Jail::make(&spec.run_dir, spec.identity)?;
    jail.show("guest kernel", &source.kernel, "kernel", false)?;
    let (keeps, made) = match source.memory {
        BootMemory::Saveable { artifacts } => {
            let files = SavedFiles::within(&artifacts);
            let mut made = NewFiles::default();
            let outputs =
                [(files.memory.clone(), "out/memory"), (files.unfinished_state(), "out/state")];
            for (path, inside) in outputs {
                made.create(&jail, &path)?;
                jail.show("file of the saved machine", &path, inside, true)?;
            }
            (Keeps::Template(Template { files, shape }), made)
        }
        BootMemory::Private => {
            let own = Own::new(&jail, shape, Backing::anonymous(None))?;
            (Keeps::Own(own), NewFiles::default())
        }
    };
    let mut running = launch(runtime, &spec, release, jail).await?;
    match configure(runtime, &spec, &source.cmdline, &running.api).await {
        Ok(()) => {
            let machine = finish(runtime, spec, running, keeps, None).await?;
            made.keep();
            Ok(machine)
        }
        Err(e) => Err(failure("boot the machine", e, &mut running).await),
    }
}

pub(super) async fn restore(
    runtime: &FirecrackerRuntime,
    spec: MachineSpec,
    saved: SavedMachine,
) -> Result<FirecrackerMachine, StartError> {
    spec.check_name()?;
    // The release that saved it; a machine of another driver is compared with the one that boots.
    let fingerprint = saved::fingerprint_in(&saved.folder)?;
    let by = |release: &&Release| runtime.fingerprint_of(release) == fingerprint;
    let release = runtime.releases.iter().find(by).unwrap_or(runtime.current());
    let shape = runtime.shape(&spec, release);
    let checked = saved::check(&saved, &shape)?;
    let mut jail = Jail::make(&spec.run_dir, spec.identity)?;
    jail.show("saved machine state", &checked.state, "state", false)?;
    let backed = back(runtime, &spec, &mut jail, saved.memory).await?;
    let own = Own::new(&jail, shape, backed.backing)?;
    let mut running = launch(runtime, &spec, release, jail).await?;
    let load = SnapshotLoad {
        snapshot_path: "/state".to_owned(),
        mem_backend: backed.backend,
        track_dirty_pages: own.is_mapped(),
        resume_vm: true,
        // Every slot's tap has the name of the one that the machine was saved with.
        network_overrides: Vec::new(),
    };
    let call = Call::LoadSnapshot(load, release.dialect);
    match running.api.tell(&call, runtime.config.step_limit).await {
        Ok(()) => finish(runtime, spec, running, Keeps::Own(own), backed.handler).await,
        Err(e) => Err(failure("load the saved machine", e, &mut running).await),
    }
}

async fn launch(
    runtime: &FirecrackerRuntime,
    spec: &MachineSpec,
    release: &Release,
    mut jail: Jail,
) -> Result<Running, StartError> {
    const STEP: &str = "open the machine's channels";
    let channel = |source| StartError::Io { step: STEP, source };
    jail.show("machine monitor", &release.program, "firecracker", false)?;
    for folder in &release.libraries {
        jail.show("folder of libraries", Path::new(folder), &folder[1..], false)?;
    }
    jail.show("root disk", pick_disk(&spec.root_disk)?, "disk", true)?;
    let netns = match &spec.network {
        Some(network) => tap::hand_over(network, user_of(spec.identity)).await?,
        None => None,
    };
    let (printed, to_print) =
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(|e| channel(e.into()))?;
    let (log, counted) = (jail.pipe(LOG)?, jail.pipe(FIGURES)?);
    let figures = runtime.new_figures(&spec.name);
    let mut collected = Collected::new(printed, log, counted, figures).map_err(channel)?;
    let door = Door::open(&jail).map_err(channel)?;
    let mut args: Vec<String> = marker(&spec.name).into();
    args.extend(["--api-sock", API].map(String::from));
    let launch = Launch {
        name: spec.name.clone(),
        program: "/firecracker".into(),
        args,
        inherit: Vec::new(),
        netns,
        root: Some(jail.root()?),
        identity: spec.identity,
        log: File::from(to_print),
        cgroups: runtime.cgroups.clone(),
        limits: limits(spec),
    };
    let mut process = runtime.keeper.launch(launch).await?;
    let path = jail.outside(API);
    match reach(&mut process, &mut collected, &path, runtime.config.step_limit).await {
        Ok(api) => {
            let mut running = Running { process, api, collected, door, jail };
            match listen(&running.api, runtime.config.step_limit).await {
                Ok(()) => Ok(running),
                Err(e) => Err(failure("have the machine monitor log", e, &mut running).await),
            }
        }
        Err(e) => {
            process.kill();
            process.wait().await;
            Err(e)
        }
    }
}

/// Waits until the API answers.
async fn reach(
    process: &mut Process,
    collected: &mut Collected,
    path: &Path,
    limit: Duration,
) -> Result<Api, StartError> {
    const STEP: &str = "reach the machine monitor's API";
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match Api::open(path) {
            Ok(api) => match api.ask::<InstanceInfo>(&Call::Describe, left).await {
                Ok(_) => return Ok(api),
                // Bound, and not listening yet.
                Err(ApiError::Gone { .. }) => {}
                Err(e) => return Err(refusal(STEP, e, limit)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(StartError::Io { step: STEP, source }),
        }
        if left.is_zero() {
            return Err(StartError::TimedOut { step: STEP, waited_ms: millis(limit) });
        }
        tokio::select! {
            exit = process.wait() => {
                let detail = format!("{}; {}", exit.status, collected.tail());
                return Err(StartError::Died { detail });
            }
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

/// Has the process log and count into its pipes.
async fn listen(api: &Api, limit: Duration) -> Result<(), ApiError> {
    let logger = Logger {
        log_path: LOG.to_owned(),
        level: "Warning",
        show_level: true,
        show_log_origin: false,
    };
    api.tell(&Call::Logger(logger), limit).await?;
    let metrics = Metrics { metrics_path: FIGURES.to_owned() };
    api.tell(&Call::Metrics(metrics), limit).await
}

/// Every reply is checked: Firecracker would start a machine without a disk it could not open.
async fn configure(
    runtime: &FirecrackerRuntime,
    spec: &MachineSpec,
    words: &[String],
    api: &Api,
) -> Result<(), ApiError> {
    let limit = runtime.config.step_limit;
    for call in calls(runtime, spec, words) {
        api.tell(&call, limit).await?;
    }
    Ok(())
}

/// The machine, device by device. The order is part of [`super::LAYOUT`].
fn calls(runtime: &FirecrackerRuntime, spec: &MachineSpec, words: &[String]) -> Vec<Call> {
    let id = |text| Id::new(text).expect("letters only");
    let mut calls = vec![Call::Machine(MachineConfig {
        vcpu_count: spec.vcpus.0,
        mem_size_mib: spec.memory.0,
        smt: false,
        // Snapshots of a machine that was not restored hold all of its memory.
        track_dirty_pages: false,
    })];
    calls.extend(runtime.cpu_template.clone().map(Call::Cpu));
    calls.push(Call::BootSource(BootSourceCall {
        kernel_image_path: "/kernel".to_owned(),
        boot_args: Some(kernel_words(words)),
        initrd_path: None,
    }));
    calls.push(Call::Drive(Drive {
        drive_id: id("root"),
        path_on_host: "/disk".to_owned(),
        is_root_device: true,
        is_read_only: false,
        // With `Unsafe` a guest's flush would mean nothing.
        cache_type: "Writeback",
        rate_limiter: None,
    }));
    if let Some(network) = &spec.network {
        let mac: Vec<String> = network.guest_mac.iter().map(|byte| format!("{byte:02x}")).collect();
        calls.push(Call::Network(NetworkInterface {
            iface_id: id("eth0"),
            host_dev_name: network.tap.clone(),
            guest_mac: Some(mac.join(":")),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }));
    }
    let uds_path = channel::DEVICE.to_owned();
    calls.push(Call::Vsock(Vsock { guest_cid: GUEST_CID, uds_path }));
    calls.push(Call::Entropy(None));
    calls.push(Call::Act(Action::InstanceStart));
    calls
}

/// Firecracker adds the root device and that there is no PCI.
fn kernel_words(extra: &[String]) -> String {
    // The keyboard controller is there to reboot by; its guest need not look for what is not.
    let words = "quiet panic=-1 reboot=k console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp \
                 i8042.dumbkbd rootfstype=ext4 init=/usr/sbin/belljar-envd";
    let mut words: Vec<&str> = words.split_whitespace().collect();
    words.extend(extra.iter().map(String::as_str));
    words.join(" ")
}

/// The machine of a process that has all it needs.
async fn finish(
    runtime: &FirecrackerRuntime,
    spec: MachineSpec,
    running: Running,
    keeps: Keeps,
    handler: Option<Box<dyn Send + Sync>>,
) -> Result<FirecrackerMachine, StartError> {
    let Running { mut process, api, collected, door, jail } = running;
    let opened = door
        .channel(&jail, &process.handle())
        .and_then(|channel| Ok((channel, block_device(&spec.root_disk)?)));
    match opened {
        Ok(((stream, cut), disk)) => {
            let control = (Box::new(stream) as _, cut);
            let limit = runtime.config.step_limit;
            let parts = (process, api, collected, jail);
            let keeps = (keeps, disk);
            Ok(FirecrackerMachine::new(spec.name, parts, control, keeps, handler, limit))
        }
        Err(source) => {
            process.kill();
            process.wait().await;
            Err(StartError::Io { step: "open the guest's socket device and disk", source })
        }
    }
}

/// What the process may use.
fn limits(spec: &MachineSpec) -> Limits {
    Limits {
        memory_bytes: spec.memory.bytes() + MiB(OVERHEAD_MIB).bytes(),
        processes: THREADS.saturating_add(spec.vcpus.0),
        vcpus: spec.vcpus.0,
    }
}

/// The error for a call that failed at `step`; kills the process and waits for its end.
async fn failure(step: &'static str, error: ApiError, running: &mut Running) -> StartError {
    let Running { process, collected, .. } = running;
    // After some refusals it ends by itself, and a closed connection comes before its end.
    if !matches!(error, ApiError::Gone { .. }) {
        process.kill();
    }
    let exit = match tokio::time::timeout(END_LIMIT, process.wait()).await {
        Ok(exit) => exit,
        Err(_) => {
            process.kill();
            process.wait().await
        }
    };
    match error {
        ApiError::Gone { .. } => {
            StartError::Died { detail: format!("{}; {}", exit.status, collected.tail()) }
        }
        other => refusal(step, other, Duration::ZERO),
    }
}

fn refusal(step: &'static str, error: ApiError, limit: Duration) -> StartError {
    match error {
        ApiError::TimedOut { waited_ms, .. } => StartError::TimedOut { step, waited_ms },
        ApiError::Gone { .. } => StartError::TimedOut { step, waited_ms: millis(limit) },
        ApiError::Refused { call, fault } => {
            StartError::Refused { step, answer: format!("{call}: {fault}") }
        }
        ApiError::Unexpected { call, what } => {
            StartError::Refused { step, answer: format!("{call}: {what}") }
        }
    }
}

fn pick_disk(exports: &[DiskExport]) -> Result<&Path, StartError> {
    let file = exports.iter().find_map(|export| match export {
        DiskExport::RawFile(path) => Some(path.as_path()),
        DiskExport::NbdSocket(_) => None,
    });
    file.ok_or(StartError::NoUsableDisk { takes: "a raw file or a block device" })
}

/// The disk, if it is a block device: a file's pages are the same for all who read it.
fn block_device(exports: &[DiskExport]) -> io::Result<Option<File>> {
    let path = pick_disk(exports).map_err(io::Error::other)?;
    let is_device = fs::metadata(path)?.file_type().is_block_device();
    is_device.then(|| File::open(path)).transpose()
}

/// New files of a machine that will be saved; removed again unless it starts.
#[derive(Default)]
struct NewFiles {
    paths: Vec<PathBuf>,
}

impl NewFiles {
    fn create(&mut self, jail: &Jail, path: &Path) -> Result<(), StartError> {
        let step = "make the machine's memory and state files";
        // Never one that exists: other machines may map it.
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = made.map_err(|source| StartError::Io { step, source })?;
        self.paths.push(path.to_owned());
        jail.give(&file).map_err(|source| StartError::Io { step, source })
    }

    fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(e) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), error = %e, "a new machine's file stays");
            }
        }
    }
}

pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
