//! Bringing a machine up: files, descriptors, process, and the first words with its monitor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::QemuRuntime;
use super::args::{
    Accelerator, Card, Disk, Execution, Mapping, Origin, Plan, TRANSLATION_CACHE_MIB,
};
use super::files::{Handed, NewFiles, open_for};
use super::machine::{Booted, Keeps, Private, QemuMachine};
use super::qmp::{Qmp, QmpError};
use crate::cgroup::Limits;
use crate::keeper::{Launch, Process};
use crate::machine::{BootMemory, BootSource, ControlStream, DiskExport, MachineSpec, StartError};
use crate::memory::{Abandon, GuestMemory, MemoryFile};
use crate::pages::{PageSource, SavedMachine};
use crate::saved::{self, Checked, SavedFiles, Shape};
use crate::tap;
use belljar_domain::{MiB, Tier};

/// Copying pages into a new machine: gibibytes, read from a slow disk.
const INSTALL_LIMIT: Duration = Duration::from_secs(300);
/// From the end of a connection to the end of its process.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Memory of the process beside the guest's own: 25 to 30 MB measured, and slack for I/O.
const OVERHEAD_MIB: u32 = 128;
/// The main loop, processors, and up to 64 threads of the block layer.
const THREADS: u32 = 96;
/// How much of a log an error carries.
const LOG_TAIL_BYTES: u64 = 2048;

pub(super) async fn boot(
    runtime: &QemuRuntime,
    spec: MachineSpec,
    source: BootSource,
) -> Result<QemuMachine, StartError> {
    spec.check_name()?;
    let shape = runtime.shape(&spec);
    let kernel = Handed::open("guest kernel", &source.kernel)?;
    let origin = Origin::Boot { kernel: kernel.name(), cmdline: source.cmdline };
    match source.memory {
        BootMemory::Saveable { artifacts } => {
            let files = SavedFiles::within(&artifacts);
            let mut made = NewFiles::default();
            let memory = made.create(&files.memory, spec.memory.bytes(), spec.identity)?;
            let state = made.create(&files.unfinished_state(), 0, spec.identity)?;
            let state_file = state.name();
            let plan = Memory { name: memory.name(), mapping: Mapping::Shared };
            let handed = vec![kernel, memory, state];
            let started = launch(runtime, &spec, plan, origin, handed).await?;
            made.keep();
            Ok(QemuMachine::new(started, Keeps::File(Booted { files, shape, state_file })))
        }
        BootMemory::Private => {
            let memory = Handed::zeros(&spec.run_dir, spec.memory.bytes(), spec.identity)?;
            let (keeps, state) = private(&spec, &memory, shape)?;
            let plan = Memory { name: memory.name(), mapping: Mapping::Private };
            let handed = vec![kernel, memory, state];
            let started = launch(runtime, &spec, plan, origin, handed).await?;
            Ok(QemuMachine::new(started, keeps))
        }
    }
}

pub(super) async fn restore(
    runtime: &QemuRuntime,
    spec: MachineSpec,
    saved: SavedMachine,
) -> Result<QemuMachine, StartError> {
    spec.check_name()?;
    let shape = runtime.shape(&spec);
    let Checked { state, kind } = saved::check(&saved, &shape)?;
    let memory = match &saved.memory.base {
        Some(base) => Handed::open("saved memory", base)?,
        None => Handed::zeros(&spec.run_dir, spec.memory.bytes(), spec.identity)?,
    };
    let memory_file = memory.memory_file()?;
    let (keeps, snapshot_state) = private(&spec, &memory, shape)?;
    let state = Handed::open("saved machine state", &state)?;
    let state_file = state.name();
    let plan = Memory { name: memory.name(), mapping: Mapping::Private };
    let handed = vec![memory, state, snapshot_state];
    let mut started = launch(runtime, &spec, plan, Origin::Saved(kind), handed).await?;
    if let Some(pages) = saved.memory.pages
        && let Err(e) = install(&started.process, memory_file, pages).await
    {
        if !started.process.handle().is_alive() {
            let (process, log) = (&mut started.process, &started.log);
            return Err(failure("install the saved memory", QmpError::Gone, process, log).await);
        }
        started.process.kill();
        started.process.wait().await;
        return Err(e);
    }
    match load(&mut started.qmp, &state_file, runtime.config.step_limit).await {
        Ok(()) => Ok(QemuMachine::new(started, keeps)),
        Err(e) => {
            Err(failure("load the saved machine", e, &mut started.process, &started.log).await)
        }
    }
}

/// What a machine with private memory needs for its snapshots: what it keeps, and the file its
/// process is handed for it.
fn private(
    spec: &MachineSpec,
    memory: &Handed,
    shape: Shape,
) -> Result<(Keeps, Handed), StartError> {
    let (handed, state) = Handed::state(spec.identity)?;
    let memory = memory.memory_file()?;
    let state_file = handed.name();
    Ok((Keeps::Pages(Private { memory, shape, state, state_file }), handed))
}

/// Puts the saved pages into the memory of a process that has not run yet.
async fn install(
    process: &Process,
    memory: MemoryFile,
    pages: Arc<dyn PageSource>,
) -> Result<(), StartError> {
    let handle = process.handle();
    let abandon = Abandon::default();
    let abandoned = abandon.flag();
    let installing = tokio::task::spawn_blocking(move || {
        GuestMemory::open(&handle, memory)?.install(&*pages, &abandoned)
    });
    let outcome = match tokio::time::timeout(INSTALL_LIMIT, installing).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(e)) => Err(e.into()),
        Err(_) => {
            let waited_ms = u64::try_from(INSTALL_LIMIT.as_millis()).unwrap_or(u64::MAX);
            return Err(StartError::TimedOut { step: "install the saved memory", waited_ms });
        }
    };
    match outcome {
        Ok(bytes) => {
            tracing::debug!(bytes, "installed the saved memory");
            Ok(())
        }
        Err(source) => Err(StartError::Pages { source }),
    }
}

/// The capabilities both sides of a saved state must agree on. Pages of a shared memory file are
/// not part of the state; progress comes as events.
pub(super) fn capabilities() -> Value {
    json!({ "capabilities": [
        { "capability": "x-ignore-shared", "state": true },
        { "capability": "events", "state": true },
    ]})
}

/// The arguments of `migrate` and `migrate-incoming` for a state in a file.
pub(super) fn state_file(path: &str) -> Value {
    json!({ "channels": [{
        "channel-type": "main",
        "addr": { "transport": "file", "filename": path, "offset": 0 },
    }]})
}

/// Loads a saved state and has the machine run.
async fn load(qmp: &mut Qmp, state: &str, limit: Duration) -> Result<(), QmpError> {
    qmp.execute("migrate-set-capabilities", capabilities(), limit).await?;
    qmp.migrate("migrate-incoming", state_file(state), limit).await?;
    if !qmp.seen().resumed {
        // It was saved while frozen, and the state remembers that.
        qmp.execute("cont", json!({}), limit).await?;
    }
    Ok(())
}

/// A process whose monitor answers.
pub(super) struct Started {
    pub(super) name: String,
    pub(super) process: Process,
    pub(super) qmp: Qmp,
    pub(super) control: ControlStream,
    pub(super) log: PathBuf,
}

/// The memory file, as the process knows it.
struct Memory {
    name: String,
    mapping: Mapping,
}

async fn launch(
    runtime: &QemuRuntime,
    spec: &MachineSpec,
    file: Memory,
    origin: Origin,
    handed: Vec<Handed>,
) -> Result<Started, StartError> {
    const STEP: &str = "open the machine's channels";
    let channel = |source| StartError::Io { step: STEP, source };
    let disk = pick_disk(&spec.root_disk)?;
    let uplink = match &spec.network {
        Some(network) => Some(tap::open(network).await?),
        None => None,
    };
    let (qmp, monitor) = socket_pair().map_err(channel)?;
    let (control, guest) = socket_pair().map_err(channel)?;
    let (execution, kvm) = execution(runtime.accelerator)?;
    let mac = spec.network.as_ref().map(|network| network.guest_mac);
    let console = spec.run_dir.join("console.log");
    let plan = Plan {
        name: spec.name.clone(),
        execution,
        vcpus: spec.vcpus,
        memory: spec.memory,
        memory_file: file.name,
        mapping: file.mapping,
        origin,
        disk,
        card: uplink
            .as_ref()
            .zip(mac)
            .map(|(uplink, mac)| Card { tap: uplink.tap.as_raw_fd(), mac }),
        monitor: monitor.as_raw_fd(),
        control: guest.as_raw_fd(),
        console: runtime.config.console_log.then(|| text(&console)).transpose()?,
    };
    let log = spec.run_dir.join("qemu.log");
    let mut inherit = vec![monitor, guest];
    inherit.extend(handed.into_iter().map(Handed::into_fd));
    let (tap, netns) = uplink.map_or((None, None), |uplink| (Some(uplink.tap), uplink.netns));
    inherit.extend(tap);
    inherit.extend(kvm);
    if plan.console.is_some() {
        open_for(&console, spec.identity)
            .map_err(|source| StartError::Io { step: "open the machine's console log", source })?;
    }
    let launch = Launch {
        name: spec.name.clone(),
        program: runtime.config.binary.clone(),
        args: plan.arguments(),
        inherit,
        netns,
        root: None,
        identity: spec.identity,
        log: open_for(&log, None)
            .map_err(|source| StartError::Io { step: "open the machine's log", source })?,
        cgroups: runtime.cgroups.clone(),
        limits: limits(runtime, spec),
    };
    let mut process = runtime.keeper.launch(launch).await?;
    let mut qmp = Qmp::new(qmp);
    match qmp.execute("qmp_capabilities", json!({}), runtime.config.step_limit).await {
        Ok(_) => {
            let name = spec.name.clone();
            Ok(Started { name, process, qmp, control: Box::new(control), log })
        }
        Err(e) => Err(failure("start the machine monitor", e, &mut process, &log).await),
    }
}

/// How one machine runs, and the device it inherits for that: `/dev/kvm` is for root and its group,
/// and a machine's user is neither.
fn execution(accelerator: Accelerator) -> Result<(Execution, Option<OwnedFd>), StartError> {
    Ok(match accelerator {
        Accelerator::Kvm => {
            let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
            let device: OwnedFd = device
                .map_err(|source| StartError::Io { step: "open /dev/kvm for the machine", source })?
                .into();
            (Execution::Kvm { device: device.as_raw_fd() }, Some(device))
        }
        Accelerator::Emulated { tsc_khz } => (Execution::Emulated { tsc_khz }, None),
    })
}

/// What the process may use.
fn limits(runtime: &QemuRuntime, spec: &MachineSpec) -> Limits {
    let translated = if runtime.tier == Tier::Emulated { TRANSLATION_CACHE_MIB } else { 0 };
    let extra = MiB(OVERHEAD_MIB + translated);
    Limits {
        memory_bytes: spec.memory.bytes() + extra.bytes(),
        processes: THREADS.saturating_add(spec.vcpus.0),
        vcpus: spec.vcpus.0,
    }
}

/// The error for a monitor that failed at `step`; kills the process and waits for its end.
async fn failure(
    step: &'static str,
    error: QmpError,
    process: &mut Process,
    log: &Path,
) -> StartError {
    if error != QmpError::Gone {
        process.kill();
    }
    // A closed connection comes a moment before the end of the process.
    let exit = match tokio::time::timeout(END_LIMIT, process.wait()).await {
        Ok(exit) => exit,
        Err(_) => {
            process.kill();
            process.wait().await
        }
    };
    match error {
        QmpError::Gone => {
            StartError::Died { detail: format!("{}; {}", exit.status, log_tail(log)) }
        }
        QmpError::Refused(answer) => StartError::Refused { step, answer },
        QmpError::TimedOut(limit) => StartError::TimedOut {
            step,
            waited_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        },
    }
}

/// The last lines of a machine's log, as one.
pub(super) fn log_tail(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    match read() {
        Ok(tail) if tail.is_empty() => "its log is empty".to_owned(),
        Ok(tail) => {
            let text = String::from_utf8_lossy(&tail);
            text.lines().collect::<Vec<_>>().join(" | ")
        }
        Err(e) => format!("its log cannot be read: {e}"),
    }
}

fn pick_disk(exports: &[DiskExport]) -> Result<Disk, StartError> {
    let takes = "an NBD socket or a raw file";
    let first = exports.first().ok_or(StartError::NoUsableDisk { takes })?;
    Ok(match first {
        DiskExport::NbdSocket(path) => {
            exists("root disk's socket", path)?;
            Disk::NbdSocket(text(path)?)
        }
        DiskExport::RawFile(path) => {
            exists("root disk", path)?;
            Disk::RawFile(text(path)?)
        }
    })
}

fn exists(what: &'static str, path: &Path) -> Result<(), StartError> {
    match fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(StartError::Missing { what, path: path.to_owned() })
        }
        Err(source) => Err(StartError::Io { step: "look for the machine's files", source }),
    }
}

/// A path for the command line, which is JSON in places.
fn text(path: &Path) -> Result<String, StartError> {
    path.to_str().map(str::to_owned).ok_or_else(|| StartError::Io {
        step: "name a file to the machine monitor",
        source: io::Error::new(io::ErrorKind::InvalidInput, "its path is not UTF-8"),
    })
}

/// Our end, and the end the process inherits.
fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_tail_is_one_bounded_line() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = folder.path().join("log");
        assert!(log_tail(&log).contains("cannot be read"));
        fs::write(&log, "x".repeat(5000) + "\nlast\n").expect("write a log");
        let tail = log_tail(&log);
        assert!(tail.ends_with("x | last") && tail.len() < 3000, "{tail}");
    }
}
