//! The step that installs Debian packages, and the list with a reason for each.

use super::apt::{self, Installed};
use crate::command;
use crate::steps::{OrFix, Outcome, StepContext, StepError};

/// A Debian package the project needs.
pub(super) struct Package {
    pub(super) name: &'static str,
    /// Shown when it has to be installed.
    pub(super) why: &'static str,
    /// The oldest usable version. Where the release has only older ones, backports are used.
    pub(super) minimum: Option<&'static str>,
}

const fn any(name: &'static str, why: &'static str) -> Package {
    Package { name, why, minimum: None }
}

const fn at_least(name: &'static str, minimum: &'static str, why: &'static str) -> Package {
    Package { name, why, minimum: Some(minimum) }
}

const PACKAGES: &[Package] = &[
    // An idle clone costs three times the CPU under 7.2, which also cannot migrate to a file.
    at_least("qemu-system-x86", "1:10", "runs the sandboxes"),
    at_least("qemu-utils", "1:10", "independent client in the disk tests"),
    any("linux-source-6.12", "source of the guest kernel"),
    any("flex", "guest kernel build"),
    any("bison", "guest kernel build"),
    any("bc", "guest kernel build"),
    any("libelf-dev", "guest kernel build"),
    any("make", "guest kernel build"),
    any("gcc", "guest kernel build"),
    any("libc6-dev", "guest kernel build and the static daemon"),
    any("xz-utils", "unpacks the kernel source"),
    any("mmdebstrap", "makes the base root file system from Debian packages"),
    any("debian-archive-keyring", "checks those packages"),
    any("e2fsprogs", "writes the root file system image"),
    any("zstd", "keeps the unpacked packages small in the cache"),
    any("nftables", "keeps sandboxes from the host and from each other"),
    any("iproute2", "checks in the network tests"),
    any("libnbd-bin", "independent client in the disk tests"),
    any("python3", "runs the official Python SDK"),
    any("python3-venv", "keeps the Python SDK away from the system"),
    any("ca-certificates", "downloads of the SDKs"),
    any("postgresql", "the other database, in the tests of the store"),
    any("openssl", "certificate for the previous SDK, which speaks TLS only"),
];

/// What only the native benchmark needs.
const NATIVE_BENCH_PACKAGES: &[Package] =
    &[any("nginx-light", "serves the same files as the guest daemon in its benchmark")];

/// What only the outer machine of `cargo xtask nested` needs.
const NESTED_PACKAGES: &[Package] = &[
    at_least("qemu-system-x86", "1:10", "runs the outer machine, and the machines inside it"),
    any("xz-utils", "unpacks kernel modules"),
];

/// Installs what is missing, saying which and why.
pub(super) fn install(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    install_all(context, PACKAGES)
}

/// As [`install`], for the native benchmark.
pub(super) fn install_for_native_bench(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    install_all(context, NATIVE_BENCH_PACKAGES)
}

/// As [`install`], for the outer machine.
pub(super) fn install_for_nested(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    install_all(context, NESTED_PACKAGES)
}

fn install_all(context: &StepContext<'_>, packages: &[Package]) -> Result<Outcome, StepError> {
    let names = packages.iter().map(|package| package.name);
    let installed = Installed::read(names)
        .or_fix("Belljar sets up Debian machines only: dpkg-query must work")?;
    let mut missing = Vec::new();
    for package in packages {
        if !installed.satisfies(package)? {
            missing.push(package);
        }
    }
    if missing.is_empty() {
        return Ok(Outcome::Cached(format!("all {} packages are installed", packages.len())));
    }
    for package in &missing {
        let version = package.minimum.map(|least| format!(" >= {least}")).unwrap_or_default();
        context.note(&format!("needs {}{version}: {}", package.name, package.why));
    }
    command::require_root().or_fix(by_hand(&missing))?;
    apt::install(context, &missing)?;
    Ok(Outcome::Done(format!("installed {} packages", missing.len())))
}

fn by_hand(missing: &[&Package]) -> String {
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    format!(
        "run this as root, or let `sudo` run without a password, or install by hand: apt-get \
         install {}",
        names.join(" ")
    )
}
