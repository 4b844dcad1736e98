//! Bringing a machine up: files, descriptors, process, and the first words with its monitor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::QemuRuntime;
use super::args::{Card, Disk, Origin, Plan, TRANSLATION_CACHE_MIB};
use super::machine::{Booted, QemuMachine};
use super::qmp::{Qmp, QmpError};
use super::tap;
use crate::cgroup::Limits;
use crate::keeper::{Launch, Process};
use crate::machine::{BootSource, ControlStream, DiskExport, Identity, MachineSpec, StartError};
use crate::saved::{self, SavedFiles};
use belljar_domain::{MiB, Tier};

/// From exec to a monitor that answers: 50 ms alone, a second in a crowd.
const START_LIMIT: Duration = Duration::from_secs(20);
/// From naming a saved state to a running machine: 10 ms alone.
const RESTORE_LIMIT: Duration = Duration::from_secs(20);
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
    let files = SavedFiles::within(&source.artifacts);
    let kernel = Handed::open("guest kernel", &source.kernel)?;
    let mut made = NewFiles::default();
    let memory = made.create(&files.memory, spec.memory.bytes(), spec.identity)?;
    let state = made.create(&files.unfinished_state(), 0, spec.identity)?;
    let (memory_file, state_file) = (memory.name(), state.name());
    let origin = Origin::Boot { kernel: kernel.name(), cmdline: source.cmdline };
    let handed = vec![kernel, memory, state];
    let started = launch(runtime, &spec, memory_file, origin, handed).await?;
    made.keep();
    Ok(QemuMachine::new(started, Some(Booted { files, shape, state_file })))
}

pub(super) async fn restore(
    runtime: &QemuRuntime,
    spec: MachineSpec,
    artifacts: &Path,
) -> Result<QemuMachine, StartError> {
    spec.check_name()?;
    let files = saved::check(artifacts, &runtime.shape(&spec))?;
    let memory = Handed::open("saved memory", &files.memory)?;
    let state = Handed::open("saved machine state", &files.state)?;
    let (memory_file, state_file) = (memory.name(), state.name());
    let handed = vec![memory, state];
    let mut started = launch(runtime, &spec, memory_file, Origin::Saved, handed).await?;
    match load(&mut started.qmp, &state_file).await {
        Ok(()) => Ok(QemuMachine::new(started, None)),
        Err(e) => {
            Err(failure("load the saved machine", e, &mut started.process, &started.log).await)
        }
    }
}

/// A file the machine's process inherits and names by its descriptor, so that its user needs the
/// right to the file alone and not to the folders above it.
struct Handed {
    file: OwnedFd,
}

impl Handed {
    fn open(what: &'static str, path: &Path) -> Result<Handed, StartError> {
        match File::open(path) {
            Ok(file) => Ok(Handed { file: file.into() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StartError::Missing { what, path: path.to_owned() })
            }
            Err(source) => Err(StartError::Io { step: "open the machine's files", source }),
        }
    }

    /// What the process calls it. Descriptors keep their numbers over fork and exec.
    fn name(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
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
async fn load(qmp: &mut Qmp, state: &str) -> Result<(), QmpError> {
    qmp.execute("migrate-set-capabilities", capabilities(), RESTORE_LIMIT).await?;
    qmp.migrate("migrate-incoming", state_file(state), RESTORE_LIMIT).await?;
    if !qmp.seen().resumed {
        // It was saved while frozen, and the state remembers that.
        qmp.execute("cont", json!({}), RESTORE_LIMIT).await?;
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

async fn launch(
    runtime: &QemuRuntime,
    spec: &MachineSpec,
    memory_file: String,
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
    let mac = spec.network.as_ref().map(|network| network.guest_mac);
    let console = spec.run_dir.join("console.log");
    let plan = Plan {
        name: spec.name.clone(),
        accelerator: runtime.accelerator,
        vcpus: spec.vcpus,
        memory: spec.memory,
        memory_file,
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
    inherit.extend(handed.into_iter().map(|handed| handed.file));
    let (tap, netns) = uplink.map_or((None, None), |uplink| (Some(uplink.tap), uplink.netns));
    inherit.extend(tap);
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
        identity: spec.identity,
        log: open_for(&log, None)
            .map_err(|source| StartError::Io { step: "open the machine's log", source })?,
        cgroups: runtime.cgroups.clone(),
        limits: limits(runtime, spec),
    };
    let mut process = runtime.keeper.launch(launch).await?;
    let mut qmp = Qmp::new(qmp);
    match qmp.execute("qmp_capabilities", json!({}), START_LIMIT).await {
        Ok(_) => {
            let name = spec.name.clone();
            Ok(Started { name, process, qmp, control: Box::new(control), log })
        }
        Err(e) => Err(failure("start the machine monitor", e, &mut process, &log).await),
    }
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

/// Opens a file to append to, readable by its owner alone.
fn open_for(path: &Path, identity: Option<Identity>) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    give(&file, identity)?;
    Ok(file)
}

fn give(file: &File, identity: Option<Identity>) -> io::Result<()> {
    match identity {
        Some(Identity { uid, gid }) => std::os::unix::fs::fchown(file, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// New files that are removed again unless the machine starts.
#[derive(Default)]
struct NewFiles {
    paths: Vec<PathBuf>,
}

impl NewFiles {
    fn create(
        &mut self,
        path: &Path,
        size_bytes: u64,
        identity: Option<Identity>,
    ) -> Result<Handed, StartError> {
        let io =
            |source| StartError::Io { step: "make the machine's memory and state files", source };
        // Never one that exists: other machines may map it.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        self.paths.push(path.to_owned());
        file.set_len(size_bytes).and_then(|()| give(&file, identity)).map_err(io)?;
        Ok(Handed { file: file.into() })
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

    #[test]
    fn abandoned_files_are_removed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("memory");
        let create = |keep: bool| -> Result<(), StartError> {
            let mut files = NewFiles::default();
            files.create(&path, 1 << 20, None)?;
            if keep {
                files.keep();
            }
            Ok(())
        };
        create(false).expect("a new file");
        assert!(!path.exists());
        create(true).expect("a new file");
        assert_eq!(fs::metadata(&path).expect("kept").len(), 1 << 20);
        assert!(create(true).is_err(), "an existing file is in use");
    }
}
