//! Debian's package manager: what is installed, what is on offer, and installing it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt_sources::{self, Release};
use super::packages::Package;
use crate::command;
use crate::steps::{OrFix, StepContext, StepError};

/// Name → version of the packages that are fully installed.
pub(super) struct Installed(BTreeMap<String, String>);

impl Installed {
    /// Asks dpkg about these packages.
    pub(super) fn read<'a>(names: impl Iterator<Item = &'a str>) -> Result<Installed> {
        // It exits with 1 if it does not know one of the names: its list is right all the same.
        let output = Command::new("dpkg-query")
            .args(["-W", "-f", "${db:Status-Abbrev}\\t${Package}\\t${Version}\\n"])
            .args(names)
            .output()
            .context("cannot start dpkg-query")?;
        Ok(Installed::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    fn parse(text: &str) -> Installed {
        let mut found = BTreeMap::new();
        for line in text.lines() {
            let mut fields = line.split('\t');
            let (Some(status), Some(name), Some(version)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            // Second letter: what is; the first one is only what is wanted.
            if status.as_bytes().get(1) == Some(&b'i') {
                found.insert(name.to_owned(), version.to_owned());
            }
        }
        Installed(found)
    }

    /// Whether the package is there in a version that will do.
    pub(super) fn satisfies(&self, package: &Package) -> Result<bool> {
        match self.0.get(package.name) {
            None => Ok(false),
            Some(version) => is_new_enough(version, package),
        }
    }

    /// The installed version.
    pub(super) fn version(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

fn is_new_enough(version: &str, package: &Package) -> Result<bool> {
    let Some(minimum) = package.minimum else { return Ok(true) };
    let status = Command::new("dpkg")
        .args(["--compare-versions", version, "ge", minimum])
        .status()
        .context("cannot start dpkg")?;
    Ok(status.success())
}

/// Installs packages, from the release itself where it has them and from its backports where not.
pub(super) fn install(context: &StepContext<'_>, missing: &[&Package]) -> Result<(), StepError> {
    update(context)?;
    let (plain, late) = split_by_origin(missing)?;
    if !plain.is_empty() {
        install_from(context, None, &plain)?;
    }
    if !late.is_empty() {
        let suite = enable_backports(context, &late)?;
        install_from(context, Some(&suite), &late)?;
    }
    Ok(())
}

/// Reads the mirrors' lists.
pub(super) fn update(context: &StepContext<'_>) -> Result<(), StepError> {
    context.say("apt-get update");
    apt_get(context, ["update"])
        .or_fix("`apt-get update` must work: check /etc/apt and the network")
}

/// What the package that would be installed says about itself under this name.
pub(super) fn field(package: &str, name: &str) -> Result<String> {
    let mut show = apt_cache("show");
    show.args(["--no-all-versions", package]);
    let text = command::output(show)?;
    field_in(&text, name).with_context(|| format!("apt knows no {name} of {package}"))
}

/// What the release's candidate satisfies, and what only backports can.
fn split_by_origin<'a>(missing: &[&'a Package]) -> Result<(Vec<&'a Package>, Vec<&'a Package>)> {
    let mut split = (Vec::new(), Vec::new());
    for package in missing {
        let mut policy = apt_cache("policy");
        policy.arg(package.name);
        let candidate = candidate(&command::output(policy)?);
        let will_do = match candidate {
            None => false,
            Some(version) => is_new_enough(&version, package)?,
        };
        if will_do { split.0.push(*package) } else { split.1.push(*package) }
    }
    Ok(split)
}

/// Makes sure that every package is on offer in backports; gives back the suite's name.
fn enable_backports(context: &StepContext<'_>, packages: &[&Package]) -> Result<String, StepError> {
    let release = Release::of_this_machine()?;
    let suite = release.backports();
    if all_on_offer(packages, &suite)? {
        return Ok(suite);
    }
    let source = apt_sources::backports_from_own(Path::new("/etc/apt"), &release)
        .or_fix(format!("add the suite {suite} to apt's sources by hand, then try again"))?;
    context.note(&format!("adds {}: {suite}, from apt's own Debian entry", source.path.display()));
    let work = context.places.work_folder("apt-source")?;
    let copy = work.path().join("source");
    std::fs::write(&copy, &source.text)?;
    let mut install = command::as_root("install");
    install.args(["-m", "0644"]).arg(&copy).arg(&source.path);
    context.run_to_the_end(install, |_| {})?;
    context.say("apt-get update with backports");
    apt_get(context, ["update"])?;
    if !all_on_offer(packages, &suite)? {
        let names: Vec<_> = packages.iter().map(|package| package.name).collect();
        let error: Result<()> = (|| bail!("{suite} does not offer {}", names.join(", ")))();
        error.or_fix(format!("use a mirror that carries {suite}, then try again"))?;
    }
    Ok(suite)
}

fn all_on_offer(packages: &[&Package], suite: &str) -> Result<bool> {
    for package in packages {
        let mut madison = apt_cache("madison");
        madison.arg(package.name);
        let mut is_offered = false;
        for version in versions_in(&command::output(madison)?, suite) {
            is_offered |= is_new_enough(&version, package)?;
        }
        if !is_offered {
            return Ok(false);
        }
    }
    Ok(true)
}

fn install_from(
    context: &StepContext<'_>,
    suite: Option<&str>,
    packages: &[&Package],
) -> Result<()> {
    let count = packages.len();
    context.say(&format!("installs {count} packages from {}", suite.unwrap_or("the release")));
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    if let Some(suite) = suite {
        // Also what they depend on must come from there; other packages stay where they are.
        arguments.extend(["-t", suite]);
    }
    arguments.extend(packages.iter().map(|package| package.name));
    apt_get(context, arguments)
}

fn apt_get<'a>(
    context: &StepContext<'_>,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Result<()> {
    // Not tied to this program: a package half installed is worse than one too many.
    let mut command = if command::is_root() { Command::new("env") } else { Command::new("sudo") };
    if !command::is_root() {
        command.args(["-n", "env"]);
    }
    // In runlevel 1 Debian's packages start no services: we want programs, not a web server.
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "LC_ALL=C", "apt-get", "-q"])
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"])
        .args(arguments);
    context.run_to_the_end(command, |line| {
        if ["Get:", "Unpacking", "Setting up"].iter().any(|start| line.starts_with(start)) {
            context.say(line);
        }
    })
}

fn apt_cache(verb: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("apt-cache");
    command.env("LC_ALL", "C").arg(verb);
    command
}

/// The version that `apt-get install` would take, from `apt-cache policy`.
fn candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

/// One field of one package, from `apt-cache show`.
fn field_in(show: &str, name: &str) -> Option<String> {
    let fields = show.lines().filter_map(|line| line.split_once(": "));
    let (_, value) = fields.into_iter().find(|(key, _)| *key == name)?;
    Some(value.trim().to_owned())
}

/// The versions a suite offers, from `apt-cache madison`.
fn versions_in(madison: &str, suite: &str) -> Vec<String> {
    let mut versions = Vec::new();
    for line in madison.lines() {
        let fields: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, version, origin] = fields[..] else { continue };
        if origin.split_whitespace().any(|word| word.split('/').next() == Some(suite)) {
            versions.push(version.to_owned());
        }
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fully_installed_packages_count() {
        let text = "ii \tbc\t1.07\nrc \tflex\t2.6\nun \tbison\t\niHR\tmake\t4\nhi \tgcc\t12\n";
        let installed = Installed::parse(text);
        assert_eq!(installed.version("bc"), Some("1.07"));
        assert_eq!(installed.version("gcc"), Some("12"));
        assert_eq!(installed.version("flex"), None);
        assert_eq!(installed.version("bison"), None);
        assert_eq!(installed.version("make"), None);
    }

    #[test]
    fn candidate_is_read_from_policy() {
        let text = "qemu:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7\n  Version table:\n";
        assert_eq!(candidate(text).as_deref(), Some("1:7.2+dfsg-7"));
        assert_eq!(candidate("qemu:\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn a_field_is_read_by_its_whole_name() {
        let text = "Package: a\nPre-Depends: x\nDepends: b (= 1), c\nDescription: Depends: no\n";
        assert_eq!(field_in(text, "Depends").as_deref(), Some("b (= 1), c"));
        assert_eq!(field_in(text, "Version"), None);
    }

    #[test]
    fn madison_lines_are_filtered_by_suite() {
        let text = "\
            qemu | 1:10.0.2~bpo12+1 | http://mirror.test/debian bookworm-backports/main amd64 Packages\n\
            qemu | 1:7.2 | http://mirror.test/debian bookworm/main amd64 Packages\n";
        assert_eq!(versions_in(text, "bookworm-backports"), ["1:10.0.2~bpo12+1"]);
        assert_eq!(versions_in(text, "bookworm"), ["1:7.2"]);
        assert!(versions_in(text, "trixie").is_empty());
    }
}
