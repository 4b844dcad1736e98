//! What can this host's QEMU and processor do? Answered by running them.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_domain::Tier;

use super::args::Accelerator;
use super::{Acceleration, QemuConfig};
use crate::sys::kvm::{self, Outcome};

/// The oldest version this driver is tested with.
const OLDEST_MAJOR: u32 = 10;
/// Printing a version takes 30 ms; a busy host may need a hundred times that, and one whose own
/// processor is emulated more than 10 s when it is busy as well.
const VERSION_LIMIT: Duration = Duration::from_secs(60);
/// When KVM counts as running guests. An emulated KVM needs 2 s of processor time for the trial, a
/// nested one 10 ms.
struct Bar {
    /// How long a trial may take.
    limit: Duration,
    /// Processor time it may use.
    usable: Duration,
}

/// Ten times what nested KVM needs, a twentieth of an emulated one.
const BY_ITSELF: Bar = Bar { limit: Duration::from_secs(1), usable: Duration::from_millis(100) };
/// Asked for by name, KVM is refused only when it is surely emulated: on a busy host with an emulated
/// processor (`cargo xtask nested`) the processor time of a trial was 400 ms, because what the host
/// gives to others counts there.
const BY_NAME: Bar = Bar { limit: Duration::from_secs(10), usable: Duration::from_secs(1) };
/// How often KVM is tried before it counts as emulated. Where the host is a machine whose processor
/// is emulated (`cargo xtask nested`), whatever runs for the first time is translated first: the
/// first trial took 184 ms there, the next 10 to 20.
const KVM_TRIALS: u32 = 3;
/// The longer, the finer: 50 ms against a clock read in 100 ns is 2 in a million.
#[cfg(target_arch = "x86_64")]
const TSC_SPAN: Duration = Duration::from_millis(50);

/// Why a tier was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierReason {
    /// The tier.
    pub tier: Tier,
    /// For people: a sentence without a full stop.
    pub sentence: String,
}

/// Why this host cannot run the driver.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// QEMU is not there.
    #[error("find QEMU at {}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// QEMU did not say its version.
    #[error("learn the version of QEMU: it printed `{printed}`")]
    NoVersion {
        /// The first line of its output.
        printed: String,
    },
    /// QEMU is too old.
    #[error("use QEMU {found}: version {needed} or later is needed")]
    TooOld {
        /// Its version.
        found: String,
        /// The oldest major version that will do.
        needed: u32,
    },
    /// KVM was asked for and does not run guests.
    #[error("use KVM: {sentence}")]
    NoKvm {
        /// What was found, as a sentence without a full stop.
        sentence: String,
    },
    /// A system call failed.
    #[error("{step}")]
    Io {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
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

/// What was found.
pub(super) struct Found {
    pub(super) version: String,
    pub(super) accelerator: Accelerator,
    pub(super) reason: TierReason,
}

pub(super) async fn detect(config: &QemuConfig) -> Result<Found, DetectError> {
    let version = version(&config.binary).await?;
    let wish = config.acceleration;
    // Three trials within the bar's limit each, and a measurement of 50 ms.
    let (accelerator, reason) = tokio::task::spawn_blocking(move || choose(wish))
        .await
        .map_err(|e| DetectError::Io { step: "try the processor", source: e.into() })??;
    Ok(Found { version, accelerator, reason })
}

async fn version(binary: &Path) -> Result<String, DetectError> {
    const STEP: &str = "learn the version of QEMU";
    let running = tokio::process::Command::new(binary).arg("--version").kill_on_drop(true).output();
    let output = match tokio::time::timeout(VERSION_LIMIT, running).await {
        Ok(Ok(output)) => output,
        Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => {
            return Err(DetectError::Missing { path: binary.to_owned() });
        }
        Ok(Err(source)) => return Err(DetectError::Io { step: STEP, source }),
        Err(_) => {
            let waited_ms = u64::try_from(VERSION_LIMIT.as_millis()).unwrap_or(u64::MAX);
            return Err(DetectError::TimedOut { step: STEP, waited_ms });
        }
    };
    let printed = String::from_utf8_lossy(&output.stdout);
    let line = printed.lines().next().unwrap_or_default();
    let Some((major, version)) = parse_version(line) else {
        return Err(DetectError::NoVersion { printed: line.chars().take(200).collect() });
    };
    if major < OLDEST_MAJOR {
        return Err(DetectError::TooOld { found: version, needed: OLDEST_MAJOR });
    }
    Ok(version)
}

/// `QEMU emulator version 10.0.2 (Debian ...)` gives major 10 and the text after "version".
fn parse_version(line: &str) -> Option<(u32, String)> {
    let version = line.split_once(" version ")?.1;
    let major = version.split('.').next()?.parse().ok()?;
    Some((major, version.to_owned()))
}

fn choose(wish: Acceleration) -> Result<(Accelerator, TierReason), DetectError> {
    if wish == Acceleration::Emulated {
        return emulated("emulation was asked for".to_owned());
    }
    let bar = if wish == Acceleration::Kvm { BY_NAME } else { BY_ITSELF };
    match (try_kvm(&bar), wish) {
        (Ok(sentence), _) => Ok((Accelerator::Kvm, TierReason { tier: Tier::Microvm, sentence })),
        (Err(sentence), Acceleration::Kvm) => Err(DetectError::NoKvm { sentence }),
        (Err(sentence), _) => emulated(sentence),
    }
}

fn emulated(sentence: String) -> Result<(Accelerator, TierReason), DetectError> {
    let tsc_khz = measure_tsc_khz()
        .map_err(|source| DetectError::Io { step: "measure the time stamp counter", source })?;
    Ok((Accelerator::Emulated { tsc_khz }, TierReason { tier: Tier::Emulated, sentence }))
}

/// Whether KVM runs guests; both answers are sentences for people. Blocks up to 30 s.
pub(crate) fn kvm_runs_guests() -> Result<String, String> {
    try_kvm(&BY_NAME)
}

/// Runs a guest; both answers are sentences for people.
fn try_kvm(bar: &Bar) -> Result<String, String> {
    let device: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| format!("/dev/kvm does not open: {e}"))?
        .into();
    let million = kvm::INSTRUCTIONS / 1_000_000;
    let mut outcome = kvm::try_guest(&device, bar.limit);
    for _ in 1..KVM_TRIALS {
        match outcome {
            Ok(Outcome::Ran(used)) if used > bar.usable => {
                outcome = kvm::try_guest(&device, bar.limit);
            }
            _ => break,
        }
    }
    match outcome {
        Ok(Outcome::Ran(used)) if used <= bar.usable => Ok(format!(
            "KVM runs guests: {million} million instructions took {} ms",
            used.as_millis()
        )),
        Ok(Outcome::Ran(used)) => Err(format!(
            "/dev/kvm opens but is emulated: {million} million instructions took {} ms instead \
             of about 10",
            used.as_millis()
        )),
        Ok(Outcome::TooSlow) => Err(format!(
            "/dev/kvm opens but is emulated: {million} million instructions took more than {} ms \
             instead of about 10",
            bar.limit.as_millis()
        )),
        Ok(Outcome::Failed(step)) => Err(format!("/dev/kvm opens but failed to {step}")),
        Err(e) => Err(format!("KVM could not be tried: {e}")),
    }
}

/// The frequency of the time stamp counter in kHz, measured against the raw monotonic clock.
#[cfg(target_arch = "x86_64")]
fn measure_tsc_khz() -> io::Result<u64> {
    use rustix::time::{ClockId, clock_gettime};

    /// One reading of both: of a few, the one least disturbed between its two clock reads.
    fn reading() -> (i128, u64) {
        let clock = || {
            let now = clock_gettime(ClockId::MonotonicRaw);
            i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
        };
        let once = || {
            let before = clock();
            let stamp = crate::sys::time_stamp();
            let after = clock();
            (after - before, (before + after) / 2, stamp)
        };
        let (_, at, stamp) =
            (0..8).map(|_| once()).min_by_key(|taken| taken.0).expect("eight were taken");
        (at, stamp)
    }

    let (began_ns, began) = reading();
    let span = rustix::event::Timespec::try_from(TSC_SPAN).map_err(io::Error::other)?;
    // A wait cut short by a signal is a coarser reading; the floor below refuses a useless one.
    let _ = rustix::event::poll(&mut [], Some(&span));
    let (ended_ns, ended) = reading();
    let elapsed_ns = u128::try_from(ended_ns - began_ns).unwrap_or(0);
    if elapsed_ns < 1_000_000 {
        return Err(io::ErrorKind::Interrupted.into());
    }
    let ticks = u128::from(ended.wrapping_sub(began));
    u64::try_from(ticks * 1_000_000 / elapsed_ns).map_err(io::Error::other)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure_tsc_khz() -> io::Result<u64> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "the machines are x86-64"))
}

/// The processor's name, for fingerprints of machines that see it.
pub(crate) fn processor() -> String {
    let table = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = table.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| "unknown processor".to_owned(), |(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debian_version_is_parsed() {
        let (major, version) =
            parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2)").expect("a version");
        assert_eq!((major, version.as_str()), (10, "10.0.2 (Debian 1:10.0.2)"));
        assert_eq!(parse_version("bash: no such thing"), None);
    }

    #[test]
    fn two_measurements_of_the_counter_agree() {
        let first = measure_tsc_khz().expect("a counter");
        let second = measure_tsc_khz().expect("a counter");
        // A loaded host may disturb a reading; a wrong unit would be off by a thousand.
        assert!(first.abs_diff(second) * 100 < first, "{first} kHz and {second} kHz");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let config = QemuConfig { binary: "/nonexistent/qemu".into(), ..QemuConfig::default() };
        let missing = detect(&config).await.err().expect("it is not there");
        assert!(matches!(missing, DetectError::Missing { .. }), "{missing}");
    }
}
