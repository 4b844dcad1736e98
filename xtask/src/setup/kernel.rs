//! The guest kernel: our options, Debian's source, built once and kept by content.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Installed;
use super::{content_key, publish};
use crate::command::tied;
use crate::steps::{OrFix, Outcome, StepContext, StepError};

/// Debian's source package; its files are named after it.
const SOURCE_PACKAGE: &str = "linux-source-6.12";
/// Goes into the key: raise it when the commands below change what they make.
const RECIPE_VERSION: &str = "1";
/// Files compiled for our options in 6.12, counted in a build's output. Only the bar depends on it.
const EXPECTED_FILES: u64 = 1371;
/// Unpacked source (1.7 GB) and build folder (0.4 GB), with room to spare.
const NEEDED_BYTES: u64 = 3 << 30;

/// Brings `vmlinux` into the assets folder.
pub(super) fn build(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let fragment_path = context.places.root.join("guest/kernel/config.fragment");
    let fragment = std::fs::read_to_string(&fragment_path)
        .with_context(|| format!("cannot read {}", fragment_path.display()))?;
    let installed = Installed::read(std::iter::once(SOURCE_PACKAGE))?;
    let source_version = installed
        .version(SOURCE_PACKAGE)
        .with_context(|| format!("{SOURCE_PACKAGE} is not installed"))?;
    let parts = [fragment.as_bytes(), source_version.as_bytes(), RECIPE_VERSION.as_bytes()];
    let folder = context.places.cache.join(format!("kernel-{}", content_key(parts)));
    let kernel = folder.join("vmlinux");
    let is_cached = kernel.is_file();
    if !is_cached {
        let work = context.places.work_folder("kernel")?;
        require_space(work.path()).or_fix(format!(
            "free some disk space, or set BELLJAR_CACHE_DIR to a folder with at least {} GiB",
            NEEDED_BYTES >> 30
        ))?;
        let stripped = compile(context, &fragment_path, &fragment, work.path())?;
        std::fs::create_dir_all(&folder)?;
        std::fs::rename(stripped, &kernel)?;
    }
    publish(&kernel, &context.places.kernel())?;
    let text = format!("{source_version}, {}", folder.display());
    Ok(if is_cached { Outcome::Cached(text) } else { Outcome::Done(text) })
}

/// Unpacks, configures, compiles and strips in `work`; gives back the path of the result.
fn compile(
    context: &StepContext<'_>,
    fragment_path: &Path,
    fragment: &str,
    work: &Path,
) -> Result<std::path::PathBuf, StepError> {
    context.say("unpacks the kernel source");
    let mut unpack = tied("tar");
    unpack.arg("-xJf").arg(format!("/usr/src/{SOURCE_PACKAGE}.tar.xz")).arg("-C").arg(work);
    context.run(unpack, |_| {})?;
    let (source, out) = (work.join(SOURCE_PACKAGE), work.join("out"));

    context.say("configures the kernel");
    let mut configure = make(&source, &out);
    configure.env("KCONFIG_ALLCONFIG", fragment_path).arg("allnoconfig");
    context.run(configure, |_| {})?;
    let config = std::fs::read_to_string(out.join(".config"))?;
    let lost = lost_options(fragment, &config);
    if !lost.is_empty() {
        let error: Result<()> =
            (|| bail!("the kernel's own rules dropped options: {}", lost.join(", ")))();
        error.or_fix(
            "add what those options depend on to guest/kernel/config.fragment, or drop them",
        )?;
    }

    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let mut compile = make(&source, &out);
    compile.arg(format!("-j{jobs}")).arg("vmlinux");
    let mut files = 0;
    context.run(compile, |line| {
        if line.trim_start().starts_with("CC ") {
            files += 1;
            context.progress(files, EXPECTED_FILES, "files of the guest kernel");
        }
    })?;

    let stripped = work.join("vmlinux");
    let mut strip = tied("strip");
    strip.arg("-o").arg(&stripped).arg(out.join("vmlinux"));
    context.run(strip, |_| {})?;
    Ok(stripped)
}

/// `make` for a build outside the source tree whose result names neither time, user nor machine.
fn make(source: &Path, out: &Path) -> Command {
    let mut output = OsString::from("O=");
    output.push(out);
    let mut command = tied("make");
    command
        .arg("-C")
        .arg(source)
        .arg(output)
        .env("LC_ALL", "C")
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("KBUILD_BUILD_USER", "belljar")
        .env("KBUILD_BUILD_HOST", "belljar");
    command
}

/// The requested options that the final configuration does not have.
///
/// An option that is to be off may be absent: then it cannot be switched on at all.
fn lost_options(fragment: &str, config: &str) -> Vec<String> {
    let has = |wanted: &str| config.lines().any(|line| line == wanted);
    let is_set = |name: &str| {
        config.lines().any(|line| line.split_once('=').is_some_and(|(key, _)| key == name))
    };
    let mut lost = Vec::new();
    for line in fragment.lines().map(str::trim) {
        let off = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set"));
        let is_kept = match off {
            Some(name) => !is_set(name),
            None if line.starts_with("CONFIG_") => has(line),
            None => true,
        };
        if !is_kept {
            lost.push(line.to_owned());
        }
    }
    lost
}

fn require_space(folder: &Path) -> Result<()> {
    let stat = rustix::fs::statvfs(folder).context("cannot read the free disk space")?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < NEEDED_BYTES {
        bail!(
            "{} has {} MiB free; the kernel build needs {} MiB",
            folder.display(),
            free >> 20,
            NEEDED_BYTES >> 20
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_are_named() {
        let fragment = "# a comment\nCONFIG_A=y\nCONFIG_B=\"x\"\n# CONFIG_C is not set\n\
            # CONFIG_D is not set\nCONFIG_E=y\n# CONFIG_F is not set\n";
        let config = "CONFIG_A=y\nCONFIG_B=\"y\"\n# CONFIG_C is not set\nCONFIG_F=m\n";
        assert_eq!(
            lost_options(fragment, config),
            ["CONFIG_B=\"x\"", "CONFIG_E=y", "# CONFIG_F is not set"]
        );
    }
}
