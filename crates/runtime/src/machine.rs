//! The trait every isolation driver implements, and what it is told about a machine.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use async_trait::async_trait;
use belljar_domain::{Kind, MiB, Tier, Vcpus};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::pages::{PageSink, SavedMachine, SnapshotTarget};

/// Bytes to and from the guest daemon's control port (`wire::guest` lines).
pub trait ControlStreamIo: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> ControlStreamIo for T {}

/// An owned control stream.
pub type ControlStream = Box<dyn ControlStreamIo>;

/// Starts machines. One implementation a driver.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// What isolates this driver's machines.
    fn tier(&self) -> Tier;

    /// What a saved machine depends on: a saved machine restores only under the same text.
    fn fingerprint(&self) -> String;

    /// Whether it restores a machine that was saved under this fingerprint: its own, and perhaps those
    /// of other versions that it has.
    fn restores(&self, fingerprint: &str) -> bool {
        fingerprint == self.fingerprint()
    }

    /// Whether its machines read their root disk. Where none does, callers need not serve one.
    fn reads_disks(&self) -> bool {
        true
    }

    /// Cold-boots a machine.
    ///
    /// Returns once the machine runs; its guest says by the control stream when it is up.
    ///
    /// # Errors
    /// [`StartError`]; nothing of the machine is left then.
    async fn boot(
        &self,
        spec: MachineSpec,
        source: BootSource,
    ) -> Result<Box<dyn Machine>, StartError>;

    /// Starts a machine from what [`Machine::save`] or [`Machine::snapshot`] left. It shares the
    /// base of the saved memory privately with every other machine over it; the pages over the base
    /// are its own.
    ///
    /// Returns once the machine runs.
    ///
    /// # Errors
    /// [`StartError`]; nothing of the machine is left then.
    async fn restore(
        &self,
        spec: MachineSpec,
        saved: SavedMachine,
    ) -> Result<Box<dyn Machine>, StartError>;

    /// Kills what an earlier process left of the machine `name`: its process and cgroups. Says
    /// whether there was anything. Idempotent.
    ///
    /// # Errors
    /// [`KillError`] when something is there and cannot be removed.
    async fn reclaim(&self, name: &str) -> Result<bool, KillError>;
}

/// One running machine. Dropping it kills it; [`Machine::kill`] also waits.
#[async_trait]
pub trait Machine: Send + Sync {
    /// The guest's control stream; `None` when it was taken before.
    fn take_control(&mut self) -> Option<ControlStream>;

    /// Stops the virtual processors.
    ///
    /// # Errors
    /// [`PauseError`].
    async fn freeze(&mut self) -> Result<(), PauseError>;

    /// Lets them go on.
    ///
    /// # Errors
    /// [`PauseError`].
    async fn thaw(&mut self) -> Result<(), PauseError>;

    /// Writes the machine's memory and state into the folder given at boot. The machine must have
    /// been booted with [`BootMemory::Saveable`], and is frozen for good afterwards: the caller
    /// kills it.
    ///
    /// # Errors
    /// [`SaveError`].
    async fn save(&mut self) -> Result<(), SaveError>;

    /// Writes the state of a frozen machine into the target's folder, and every page of its memory
    /// that it does not share with its base to the target's sink. Files are not yet on stable
    /// storage: see [`crate::sync_saved`]. The machine stays frozen, to be thawed or killed.
    ///
    /// Any machine but one booted with [`BootMemory::Saveable`] can be snapshotted, any number of
    /// times. When this is cancelled, a thread may read on for a moment; its sink is dropped then.
    ///
    /// # Errors
    /// [`SaveError`]; nothing is left in the folder then, and the machine is as frozen as before.
    async fn snapshot(&mut self, into: SnapshotTarget) -> Result<Box<dyn PageSink>, SaveError>;

    /// Waits until the machine is gone by itself or by [`Machine::kill`]. Cancel-safe.
    async fn exited(&mut self) -> ExitCause;

    /// Kills the machine and waits until its process, sockets and cgroups are gone. Idempotent.
    ///
    /// # Errors
    /// [`KillError`] naming what is left.
    async fn kill(&mut self) -> Result<(), KillError>;

    /// The machine's process, where it has one, for measurements and fault tests.
    fn process_id(&self) -> Option<u32>;
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Unique on this host, `[a-z0-9-]`, at most 40 bytes. Part of the process's command line, so
    /// that [`Runtime::reclaim`] finds it.
    pub name: String,
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: MiB,
    /// The root disk, in every form it can be had; a driver takes the first it can use.
    pub root_disk: Vec<DiskExport>,
    /// The network slot, if the machine gets one.
    pub network: Option<NetworkAttachment>,
    /// An existing folder, private to this machine, for its sockets and log.
    pub run_dir: PathBuf,
    /// Who the machine's process runs as; `None` keeps the daemon's user. That user must be able
    /// to pass through the folders of the root disk and of the saved machine.
    pub identity: Option<Identity>,
}

impl MachineSpec {
    /// Whether `name` can be a machine's. It becomes part of a path and of a command line.
    pub fn is_name(name: &str) -> bool {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=40).contains(&name.len()) && name.bytes().all(plain)
    }

    pub(crate) fn check_name(&self) -> Result<(), StartError> {
        if MachineSpec::is_name(&self.name) {
            return Ok(());
        }
        let source = std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "1 to 40 lower-case letters, digits and hyphens are",
        );
        Err(StartError::Io { step: "use a name that is no machine name", source })
    }
}

/// An unprivileged user of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A way to reach a disk's blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskExport {
    /// An NBD server on a unix socket, default export.
    NbdSocket(PathBuf),
    /// A raw file, written in place.
    RawFile(PathBuf),
}

/// A prepared network slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkAttachment {
    /// Path of the network namespace; `None` in rigs without root.
    pub netns: Option<PathBuf>,
    /// Name of the tap device inside that namespace.
    pub tap: String,
    /// The guest card's hardware address.
    pub guest_mac: [u8; 6],
    /// Where the host reaches the guest.
    pub host_ip: Ipv4Addr,
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct BootSource {
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Words added to the kernel's command line.
    pub cmdline: Vec<String>,
    /// Where its memory is, and with that what can be kept of it.
    pub memory: BootMemory,
}

/// Where the memory of a booted machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootMemory {
    /// In a file that others will map: what [`Machine::save`] needs.
    Saveable {
        /// An existing folder for the memory file and what [`Machine::save`] writes.
        artifacts: PathBuf,
    },
    /// With the machine alone: what [`Machine::snapshot`] needs.
    Private,
}

/// Why a machine is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitCause {
    /// [`Machine::kill`] was called.
    Killed,
    /// The guest powered off or rebooted.
    GuestStopped,
    /// The process ended by itself: status and the last lines of its log.
    Crashed {
        /// For the log; never shown to clients.
        detail: String,
    },
}

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A program or file the driver needs is missing.
    #[error("find {what} at {}", path.display())]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// None of the disk's exports suits this driver.
    #[error("attach the root disk: this driver takes {takes}")]
    NoUsableDisk {
        /// What would do.
        takes: &'static str,
    },
    /// The saved machine was made by another driver, version or machine type.
    #[error("restore a machine saved under `{saved}` with `{current}`")]
    Incompatible {
        /// Fingerprint of the saved machine.
        saved: String,
        /// Fingerprint of this driver.
        current: String,
    },
    /// A file of the saved machine is not what was saved.
    #[error("use the saved machine's {}: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The saved pages could not be read, or not be put into the machine's memory.
    #[error("install the saved memory")]
    Pages {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{step}")]
    Io {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The machine monitor refused a command.
    #[error("{step}: the machine monitor answered `{answer}`")]
    Refused {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Its answer.
        answer: String,
    },
    /// The process died while starting.
    #[error("start the machine process: it ended early: {detail}")]
    Died {
        /// Exit status and the last lines of its log.
        detail: String,
    },
    /// It took too long.
    #[error("{step} within {waited_ms} ms")]
    TimedOut {
        /// The step, as a verb phrase.
        step: &'static str,
        /// How long was waited.
        waited_ms: u64,
    },
}

impl StartError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            StartError::Missing { .. }
            | StartError::NoUsableDisk { .. }
            | StartError::Incompatible { .. }
            | StartError::Corrupt { .. }
            | StartError::Pages { .. }
            | StartError::Io { .. }
            | StartError::Refused { .. } => Kind::Internal,
            StartError::Died { .. } => Kind::Unavailable,
            StartError::TimedOut { .. } => Kind::Timeout,
        }
    }
}

/// Why a machine could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// The machine is gone.
    #[error("reach a machine that is gone")]
    Gone,
    /// The machine monitor refused.
    #[error("change the run state: the machine monitor answered `{answer}`")]
    Refused {
        /// Its answer.
        answer: String,
    },
}

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The machine's memory is private to it.
    #[error("save a machine without a memory file of its own: snapshot it instead")]
    NotSaveable,
    /// The machine's memory is in a file that is shared with others.
    #[error("snapshot a machine that was booted to be saved: save it instead")]
    NotPrivate,
    /// The machine runs.
    #[error("snapshot a machine that runs: freeze it first")]
    NotFrozen,
    /// The machine is gone.
    #[error("reach a machine that is gone")]
    Gone,
    /// The machine monitor refused.
    #[error("save the machine state: the machine monitor answered `{answer}`")]
    Refused {
        /// Its answer.
        answer: String,
    },
    /// The machine's memory could not be read.
    #[error("read the machine's memory")]
    Memory {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The sink did not take the pages.
    #[error("pass on the machine's memory")]
    Sink {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It took too long.
    #[error("save the machine within {waited_ms} ms")]
    TimedOut {
        /// How long was waited.
        waited_ms: u64,
    },
}

/// Why something of a machine may be left.
#[derive(Debug, thiserror::Error)]
#[error("remove {what} of machine {name}: {reason}")]
pub struct KillError {
    /// The machine.
    pub name: String,
    /// What may be left.
    pub what: &'static str,
    /// Why.
    pub reason: String,
}
