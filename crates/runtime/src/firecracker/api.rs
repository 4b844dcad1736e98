//! Firecracker's API: one call is one exchange over a connection of its own.
//!
//! A [`Call`] says its method, path and body, and nothing that was not asked for: releases refuse
//! fields they do not know. Every exchange has a deadline and every answer a bound, because whoever
//! answers runs a hostile guest. Source: Firecracker's API description, 1.10 to 1.17.

mod exchange;
mod types;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use rustix::fs::{FileType, Mode, OFlags};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use exchange::{ANSWER_MAX_BYTES, FAULT_MAX_BYTES};
pub use types::{
    Action, Balloon, BalloonStatistics, BalloonStatisticsUpdate, BalloonUpdate, BootSource,
    Dialect, Drive, DriveUpdate, Id, IdError, InstanceInfo, InstanceState, Logger, MachineConfig,
    MemoryBackend, Metrics, MmdsConfig, MmdsVersion, NetworkInterface, NetworkInterfaceUpdate,
    NetworkOverride, RateLimiter, RunState, SnapshotCreate, SnapshotKind, SnapshotLoad,
    TokenBucket, Version, Vsock,
};

use exchange::Exchanged;

/// One call.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// What runs, and whether.
    Describe,
    /// The release.
    AskVersion,
    /// The whole configuration, as Firecracker has it.
    AskConfig,
    /// The processors and the memory, as they are.
    AskMachine,
    /// What to boot.
    BootSource(BootSource),
    /// Processors and memory.
    Machine(MachineConfig),
    /// Changes of them before the start.
    ChangeMachine(MachineConfig),
    /// Bits of the processors, by Firecracker's own template format.
    Cpu(Value),
    /// A disk.
    Drive(Drive),
    /// Another file or rate for a disk that is there.
    ChangeDrive(DriveUpdate),
    /// A network card.
    Network(NetworkInterface),
    /// Other rates for a card that is there.
    ChangeNetwork(NetworkInterfaceUpdate),
    /// The socket device.
    Vsock(Vsock),
    /// The random number device, with a rate or none.
    Entropy(Option<RateLimiter>),
    /// A balloon.
    Balloon(Balloon),
    /// The balloon, as it is.
    AskBalloon,
    /// Another size of it.
    ChangeBalloon(BalloonUpdate),
    /// What the guest says of its memory.
    AskBalloonStatistics,
    /// How often it says so.
    ChangeBalloonStatistics(BalloonStatisticsUpdate),
    /// Which cards reach the metadata service, and how.
    MmdsConfig(MmdsConfig),
    /// All of what it serves: an object.
    Mmds(Value),
    /// Changes of that.
    ChangeMmds(Value),
    /// What it serves.
    AskMmds,
    /// Where log lines go.
    Logger(Logger),
    /// Where figures go.
    Metrics(Metrics),
    /// Start it, or flush the figures.
    Act(Action),
    /// Stop or go on.
    Run(RunState),
    /// Write state and memory of a machine that is stopped.
    CreateSnapshot(SnapshotCreate),
    /// Become a machine that was saved. The fields depend on the release.
    LoadSnapshot(SnapshotLoad, Dialect),
}

impl Call {
    /// Method, path and body on the wire.
    pub fn request(&self) -> (Method, String, Option<Value>) {
        fn json(body: &impl serde::Serialize) -> Option<Value> {
            Some(serde_json::to_value(body).expect("plain structures with text keys"))
        }
        let plain = |method, path: &str, body| (method, path.to_owned(), body);
        let (put, patch, get) = (Method::PUT, Method::PATCH, Method::GET);
        match self {
            Call::Describe => plain(get, "/", None),
            Call::AskVersion => plain(get, "/version", None),
            Call::AskConfig => plain(get, "/vm/config", None),
            Call::AskMachine => plain(get, "/machine-config", None),
            Call::BootSource(body) => plain(put, "/boot-source", json(body)),
            Call::Machine(body) => plain(put, "/machine-config", json(body)),
            Call::ChangeMachine(body) => plain(patch, "/machine-config", json(body)),
            Call::Cpu(body) => plain(put, "/cpu-config", Some(body.clone())),
            Call::Drive(body) => (put, format!("/drives/{}", body.drive_id), json(body)),
            Call::ChangeDrive(body) => (patch, format!("/drives/{}", body.drive_id), json(body)),
            Call::Network(body) => {
                (put, format!("/network-interfaces/{}", body.iface_id), json(body))
            }
            Call::ChangeNetwork(body) => {
                (patch, format!("/network-interfaces/{}", body.iface_id), json(body))
            }
            Call::Vsock(body) => plain(put, "/vsock", json(body)),
            Call::Entropy(rate) => plain(put, "/entropy", types::entropy(rate.as_ref())),
            Call::Balloon(body) => plain(put, "/balloon", json(body)),
            Call::AskBalloon => plain(get, "/balloon", None),
            Call::ChangeBalloon(body) => plain(patch, "/balloon", json(body)),
            Call::AskBalloonStatistics => plain(get, "/balloon/statistics", None),
            Call::ChangeBalloonStatistics(body) => plain(patch, "/balloon/statistics", json(body)),
            Call::MmdsConfig(body) => plain(put, "/mmds/config", json(body)),
            Call::Mmds(body) => plain(put, "/mmds", Some(body.clone())),
            Call::ChangeMmds(body) => plain(patch, "/mmds", Some(body.clone())),
            Call::AskMmds => plain(get, "/mmds", None),
            Call::Logger(body) => plain(put, "/logger", json(body)),
            Call::Metrics(body) => plain(put, "/metrics", json(body)),
            Call::Act(action) => plain(put, "/actions", types::action(*action)),
            Call::Run(state) => plain(patch, "/vm", types::run_state(*state)),
            Call::CreateSnapshot(body) => plain(put, "/snapshot/create", json(body)),
            Call::LoadSnapshot(body, dialect) => {
                plain(put, "/snapshot/load", Some(body.in_dialect(*dialect)))
            }
        }
    }

    /// Method and path, for people.
    fn name(&self) -> String {
        let (method, path, _) = self.request();
        format!("{method} {path}")
    }
}

/// Why a call has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody answers, or the connection ended in the middle.
    #[error("call {call}: the connection ended")]
    Gone {
        /// Method and path.
        call: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It said no.
    #[error("call {call}: Firecracker answered `{fault}`")]
    Refused {
        /// Method and path.
        call: String,
        /// Its `fault_message`, cut to [`FAULT_MAX_BYTES`].
        fault: String,
    },
    /// The answer is none that the call has.
    #[error("call {call}: understand its answer: {what}")]
    Unexpected {
        /// Method and path.
        call: String,
        /// What is odd about it.
        what: String,
    },
    /// It said nothing in time.
    #[error("call {call} within {waited_ms} ms")]
    TimedOut {
        /// Method and path.
        call: String,
        /// How long was waited.
        waited_ms: u64,
    },
}

/// A Firecracker's API socket.
#[derive(Debug)]
pub struct Api {
    /// The socket itself: what its folder's owner puts in its place later is not called.
    socket: OwnedFd,
}

impl Api {
    /// Takes hold of the socket at `path`.
    ///
    /// # Errors
    /// I/O errors; [`io::ErrorKind::InvalidInput`] when something else is there.
    pub fn open(path: &Path) -> io::Result<Api> {
        Ok(Api { socket: hold_socket(path)? })
    }

    /// Makes a call that answers nothing. Cancel-safe for this side: the call may have been obeyed.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn tell(&self, call: &Call, limit: Duration) -> Result<(), ApiError> {
        let answer = self.exchange(call, limit).await?;
        if answer.status == 204 {
            return Ok(());
        }
        let what = format!("status {} instead of 204", answer.status);
        Err(ApiError::Unexpected { call: call.name(), what })
    }

    /// Makes a call that answers a value. Cancel-safe.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn ask<T: DeserializeOwned>(
        &self,
        call: &Call,
        limit: Duration,
    ) -> Result<T, ApiError> {
        let answer = self.exchange(call, limit).await?;
        let odd = |what| ApiError::Unexpected { call: call.name(), what };
        if answer.status != 200 {
            return Err(odd(format!("status {} instead of 200", answer.status)));
        }
        serde_json::from_slice(&answer.body).map_err(|e| odd(e.to_string()))
    }

    async fn exchange(&self, call: &Call, limit: Duration) -> Result<Exchanged, ApiError> {
        let exchanging = exchange::exchange(reopened(&self.socket), call.request());
        let answer = match tokio::time::timeout(limit, exchanging).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(source)) => return Err(ApiError::Gone { call: call.name(), source }),
            Err(_) => {
                let waited_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                return Err(ApiError::TimedOut { call: call.name(), waited_ms });
            }
        };
        match answer.fault() {
            Some(fault) => Err(ApiError::Refused { call: call.name(), fault }),
            None => Ok(answer),
        }
    }
}

/// Takes hold of a socket file without following links.
///
/// # Errors
/// As [`Api::open`].
pub(super) fn hold_socket(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode);
    if kind != FileType::Socket {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no socket"));
    }
    Ok(socket)
}

/// A path that means the file behind a descriptor of this process, however it was named.
pub(super) fn reopened(file: &impl std::os::fd::AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The folder of a socket whose own path may be too long for an address.
pub(super) fn short_path(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

#[cfg(test)]
mod tests;
