//! The Firecracker driver: stock releases on KVM, several side by side.
//!
//! A process is one machine, driven over its API socket. It runs as its own user with a folder of its
//! run folder as its root, in namespaces and a cgroup of its own, and dies with this process. Its
//! files are bound into that folder under fixed names, so a saved machine finds them there in
//! any other jail. A machine that is restored maps its memory file privately; its snapshots are the
//! device state Firecracker writes and the pages the process does not share with that file. What a
//! release saved, that release restores: the fingerprint names it.
//!
//! The control stream goes over the socket device ([`channel`]). See
//! `docs/decisions/2026-11-22-firecracker-without-jailer.md`.

pub mod api;

mod channel;
mod collect;
mod jail;
mod machine;
mod memory;
mod release;
mod snapshot;
mod start;

pub use release::DetectError;

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use belljar_domain::Tier;
use serde_json::Value;
use tracing::debug;

use crate::cgroup::Cgroups;
use crate::keeper::Keeper;
use crate::leftovers;
use crate::machine::{BootSource, Identity, KillError, Machine, MachineSpec, Runtime, StartError};
use crate::pages::{SavedMachine, SavedMemory};
use crate::qemu::detect::{kvm_runs_guests, processor};
use crate::saved::Shape;
use collect::Figures;
use release::Release;

/// Generation of the machine this driver makes: names of files and devices, and their order. A saved
/// machine restores only into the same; any change gets a new number.
const LAYOUT: u32 = 1;
/// A processor template is some thousand bytes.
const TEMPLATE_MAX_BYTES: u64 = 1 << 20;

/// Serves the page faults of machines whose memory is not in one file.
pub trait PageHandler: fmt::Debug + Send + Sync {
    /// Listens on `socket`, which is not there yet, for the one Firecracker that will connect to it,
    /// and serves it `memory`. Dropping what is returned ends that; it is dropped after the process.
    /// May block for a moment.
    ///
    /// # Errors
    /// I/O errors.
    fn serve(&self, socket: &Path, memory: &SavedMemory) -> io::Result<Box<dyn Send + Sync>>;
}

/// What the driver is told.
#[derive(Debug, Clone)]
pub struct FirecrackerConfig {
    /// Absolute paths of releases, 1.10 or later, each another. The first boots machines; all
    /// restore those they saved.
    pub programs: Vec<PathBuf>,
    /// Name of the folder the machines' cgroups are in, below each root.
    pub cgroup_parent: String,
    /// A processor template in Firecracker's format, for hosts of several kinds.
    pub cpu_template: Option<PathBuf>,
    /// Who serves memory that is not in one file. Without one such memory is put into a file first.
    pub page_handler: Option<Arc<dyn PageHandler>>,
    /// How long each step of a start may take: from exec to an API that answers (some 10 ms alone),
    /// and each call. 20 s; more where the processor is emulated.
    pub step_limit: Duration,
}

impl FirecrackerConfig {
    /// Defaults for these programs.
    pub fn new(programs: Vec<PathBuf>) -> FirecrackerConfig {
        FirecrackerConfig {
            programs,
            cgroup_parent: "belljar".to_owned(),
            cpu_template: None,
            page_handler: None,
            step_limit: Duration::from_secs(20),
        }
    }
}

/// The driver. Machines may outlive it.
#[derive(Debug)]
pub struct FirecrackerRuntime {
    config: FirecrackerConfig,
    releases: Vec<Release>,
    processor: String,
    cpu_template: Option<Value>,
    cgroups: Arc<Cgroups>,
    keeper: Arc<Keeper>,
    figures: Mutex<HashMap<String, Weak<Mutex<Option<String>>>>>,
}

/// Finds out whether this host's KVM runs guests, by running one (up to 30 s); says how well.
///
/// # Errors
/// [`DetectError::NoKvm`] and [`DetectError::Io`].
pub async fn try_kvm() -> Result<String, DetectError> {
    let tried = tokio::task::spawn_blocking(kvm_runs_guests).await;
    let tried =
        tried.map_err(|e| DetectError::Io { step: "try the processor", source: e.into() })?;
    tried.map_err(|sentence| DetectError::NoKvm { sentence })
}

impl FirecrackerRuntime {
    /// Asks each program for its version. It does not try KVM: see [`try_kvm`].
    ///
    /// # Errors
    /// [`DetectError`].
    pub async fn detect(config: FirecrackerConfig) -> Result<FirecrackerRuntime, DetectError> {
        if !rustix::process::geteuid().is_root() {
            return Err(DetectError::NotRoot);
        }
        let mut releases: Vec<Release> = Vec::new();
        for program in &config.programs {
            let release = Release::of(program).await?;
            if let Some(same) = releases.iter().find(|known| known.version == release.version) {
                return Err(DetectError::Twice {
                    one: same.program.clone(),
                    other: release.program,
                    version: release.version,
                });
            }
            releases.push(release);
        }
        if releases.is_empty() {
            return Err(DetectError::NoneNamed);
        }
        let cpu_template = config.cpu_template.as_deref().map(read_template).transpose()?;
        let keeper = Keeper::start().map_err(|source| DetectError::Io {
            step: "start the thread that starts machines",
            source,
        })?;
        let cgroups = Arc::new(Cgroups::discover(&config.cgroup_parent));
        debug!(limits = %cgroups, releases = releases.len(), "Firecracker driver is up");
        let figures = Mutex::default();
        let processor = processor();
        Ok(FirecrackerRuntime {
            config,
            releases,
            processor,
            cpu_template,
            cgroups,
            keeper,
            figures,
        })
    }

    /// What bounds the machines' processes, for people: the cgroups' place, or why nothing does.
    pub fn limited_by(&self) -> String {
        self.cgroups.to_string()
    }

    /// The releases, for people, the one that boots first.
    pub fn versions(&self) -> Vec<String> {
        self.releases.iter().map(|release| release.version.clone()).collect()
    }

    /// What the machine `name` counted last, as Firecracker wrote it: one JSON object. `None` before it
    /// has, a minute after its start, and when there is no such machine.
    pub fn figures(&self, name: &str) -> Option<String> {
        let known = self.figures.lock().unwrap_or_else(PoisonError::into_inner);
        let figures = known.get(name)?.upgrade()?;
        figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn new_figures(&self, name: &str) -> Figures {
        let figures = Figures::default();
        let mut known = self.figures.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, figures| figures.strong_count() > 0);
        known.insert(name.to_owned(), Arc::downgrade(&figures));
        figures
    }

    /// The release that boots.
    fn current(&self) -> &Release {
        self.releases.first().expect("detected with one at least")
    }

    fn fingerprint_of(&self, release: &Release) -> String {
        let template = match &self.cpu_template {
            // Its content decides what the guest saw.
            Some(template) => {
                format!(", processor template {:016x}", digest(&template.to_string()))
            }
            None => String::new(),
        };
        let (version, processor) = (&release.version, &self.processor);
        format!("firecracker {version} layout {LAYOUT}, kvm on {processor}{template}")
    }

    fn shape(&self, spec: &MachineSpec, release: &Release) -> Shape {
        let fingerprint = self.fingerprint_of(release);
        Shape { fingerprint, vcpus: spec.vcpus, memory: spec.memory }
    }
}

/// FNV-1a, 64 bits: the same on every host and release, and nobody attacks it.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn read_template(path: &Path) -> Result<Value, DetectError> {
    let bad = |reason: String| DetectError::Template { path: path.to_owned(), reason };
    let length = fs::metadata(path).map_err(|e| bad(e.to_string()))?.len();
    if length > TEMPLATE_MAX_BYTES {
        return Err(bad(format!("it is {length} bytes long")));
    }
    let text = fs::read(path).map_err(|e| bad(e.to_string()))?;
    let template: Value = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    if template.is_object() { Ok(template) } else { Err(bad("it is no JSON object".to_owned())) }
}

/// The two arguments that mark the process of machine `name`; also its instance's id.
fn marker(name: &str) -> [String; 2] {
    ["--id".to_owned(), format!("belljar-{name}")]
}

fn user_of(identity: Option<Identity>) -> u32 {
    identity.map_or_else(|| rustix::process::geteuid().as_raw(), |identity| identity.uid)
}

#[async_trait]
impl Runtime for FirecrackerRuntime {
    fn tier(&self) -> Tier {
        Tier::Microvm
    }

    fn fingerprint(&self) -> String {
        self.fingerprint_of(self.current())
    }

    fn restores(&self, fingerprint: &str) -> bool {
        self.releases.iter().any(|release| self.fingerprint_of(release) == fingerprint)
    }

    async fn boot(
        &self,
        spec: MachineSpec,
        source: BootSource,
    ) -> Result<Box<dyn Machine>, StartError> {
        Ok(Box::new(start::boot(self, spec, source).await?))
    }

    async fn restore(
        &self,
        spec: MachineSpec,
        saved: SavedMachine,
    ) -> Result<Box<dyn Machine>, StartError> {
        Ok(Box::new(start::restore(self, spec, saved).await?))
    }

    async fn reclaim(&self, name: &str) -> Result<bool, KillError> {
        let fail = |reason: String| KillError {
            name: name.to_owned(),
            what: "what an earlier process left",
            reason,
        };
        if !MachineSpec::is_name(name) {
            return Err(fail("that is no name of a machine".to_owned()));
        }
        let group = self.cgroups.group(name);
        let owned = name.to_owned();
        let removing = move || {
            let [option, value] = marker(&owned);
            leftovers::remove(&owned, [&option, &value], &group)
        };
        tokio::task::spawn_blocking(removing).await.map_err(|e| fail(e.to_string()))?
    }
}
