//! Where the interpreters with the official SDKs are, once setup has installed them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::places::Places;

/// The programs that run SDK code.
pub(crate) struct SdkPrograms {
    /// Virtual environment with the current Python SDK.
    pub(crate) python_venv: PathBuf,
    /// Virtual environment with the previous generation of the Python SDK.
    pub(crate) old_python_venv: PathBuf,
    /// Virtual environment with the program that tests the API against its own document.
    pub(crate) schemathesis_venv: PathBuf,
    /// Folder with `node_modules` for the JS SDK.
    pub(crate) js_folder: PathBuf,
    /// The same for the oldest JS SDK.
    pub(crate) old_js_folder: PathBuf,
    /// The same for the official command line.
    pub(crate) cli_folder: PathBuf,
    /// The same for the OpenID Connect provider that tests sign in at.
    pub(crate) oidc_folder: PathBuf,
}

impl SdkPrograms {
    /// The layout of one folder in the cache.
    pub(crate) fn in_folder(folder: &Path) -> SdkPrograms {
        SdkPrograms {
            python_venv: folder.join("python"),
            old_python_venv: folder.join("python-old"),
            schemathesis_venv: folder.join("python-schemathesis"),
            js_folder: folder.join("js"),
            old_js_folder: folder.join("js-old"),
            cli_folder: folder.join("cli"),
            oidc_folder: folder.join("oidc"),
        }
    }

    /// What [`SdkPrograms::publish`] made current.
    ///
    /// # Errors
    /// Setup did not run.
    pub(crate) fn current(places: &Places) -> Result<SdkPrograms> {
        let link = current_link(places);
        let folder = std::fs::read_link(&link)
            .with_context(|| format!("{} is missing: run `cargo xtask setup`", link.display()))?;
        Ok(SdkPrograms::in_folder(&folder))
    }

    /// Makes these the ones to use, and lets programs under `e2e/` import the JS SDKs: node looks
    /// for packages beside a program and in the folders above it, nowhere else.
    pub(crate) fn publish(&self, places: &Places) -> Result<()> {
        let folder = self.js_folder.parent().context("the SDK folder has a parent")?;
        replace_link(folder, &current_link(places))?;
        let e2e = places.root.join("e2e");
        replace_link(&self.js_folder.join("node_modules"), &e2e.join("node_modules"))?;
        replace_link(&self.old_js_folder.join("node_modules"), &e2e.join("js-old/node_modules"))?;
        replace_link(&self.cli_folder.join("node_modules"), &e2e.join("cli/node_modules"))?;
        replace_link(&self.oidc_folder.join("node_modules"), &e2e.join("oidc/node_modules"))
    }

    /// The Python with the current SDK.
    pub(crate) fn python(&self) -> PathBuf {
        self.python_venv.join("bin/python")
    }

    /// The Python with the previous generation of the SDK.
    pub(crate) fn old_python(&self) -> PathBuf {
        self.old_python_venv.join("bin/python")
    }

    /// The Python with schemathesis.
    pub(crate) fn schemathesis_python(&self) -> PathBuf {
        self.schemathesis_venv.join("bin/python")
    }

    /// Our own node where setup had to install one, else the system's.
    pub(crate) fn node(&self) -> PathBuf {
        self.own_or_system("node")
    }

    /// The npm that belongs to [`SdkPrograms::node`].
    pub(crate) fn npm(&self) -> PathBuf {
        self.own_or_system("npm")
    }

    /// `PATH` on which the right node comes first: npm and the suites start it by name.
    pub(crate) fn search_path(&self, places: &Places) -> Result<OsString> {
        let own = std::iter::once(self.python_venv.join("bin"));
        std::env::join_paths(own.chain(std::env::split_paths(&places.search_path)))
            .context("cannot extend PATH")
    }

    fn own_or_system(&self, name: &str) -> PathBuf {
        let own = self.python_venv.join("bin").join(name);
        if own.exists() { own } else { PathBuf::from(name) }
    }
}

fn current_link(places: &Places) -> PathBuf {
    places.cache.join("sdk-current")
}

fn replace_link(target: &Path, link: &Path) -> Result<()> {
    match std::fs::symlink_metadata(link) {
        Ok(found) if found.is_symlink() => std::fs::remove_file(link)?,
        Ok(_) => bail!("{} is in the way: remove it", link.display()),
        Err(_) => {}
    }
    std::os::unix::fs::symlink(target, link)
        .with_context(|| format!("cannot write {}", link.display()))
}

/// Whether a node program is there and new enough for the JS SDK.
pub(crate) fn is_usable_node(program: &Path) -> bool {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    output.is_ok_and(|output| {
        output.status.success() && is_usable_version(&String::from_utf8_lossy(&output.stdout))
    })
}

/// The JS SDK's own rule (`engines` in its package): at least 20.18.1 within 20, or 22 and above.
fn is_usable_version(text: &str) -> bool {
    let mut numbers = text.trim().trim_start_matches('v').split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(20)), Some(Ok(minor)), Some(Ok(patch))) => (minor, patch) >= (18, 1),
        (Some(Ok(major)), ..) => major >= 22,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_versions_follow_the_rule_of_the_sdk() {
        for good in ["v20.18.1\n", "v20.20.2", "v22.0.0", "v24.19.0"] {
            assert!(is_usable_version(good), "{good}");
        }
        for bad in ["v18.20.4", "v20.18.0", "v21.7.3", "", "node"] {
            assert!(!is_usable_version(bad), "{bad}");
        }
    }
}
