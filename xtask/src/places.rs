//! Where things are: the checkout, cargo's target directory and the cache outside the build tree.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command;

/// What `main` read from the environment.
pub(crate) struct Settings {
    /// The cargo that runs us, so that nested builds use the same toolchain.
    pub(crate) cargo: OsString,
    /// `BELLJAR_CACHE_DIR`.
    pub(crate) cache_override: Option<PathBuf>,
    /// `XDG_CACHE_HOME`.
    pub(crate) xdg_cache: Option<PathBuf>,
    /// `HOME`.
    pub(crate) home: Option<PathBuf>,
    /// `BELLJAR_DATA_DIR`.
    pub(crate) data_override: Option<PathBuf>,
    /// `PATH`.
    pub(crate) search_path: OsString,
    /// What commands inside the outer machine find in their environment.
    pub(crate) handed_on: Vec<(OsString, OsString)>,
}

/// Absolute paths every verb works with.
pub(crate) struct Places {
    /// Root of the checkout.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// What outlives `cargo clean` and is shared by every checkout of this user.
    pub(crate) cache: PathBuf,
    /// The cargo program.
    pub(crate) cargo: OsString,
    /// The members of the workspace, for tidy.
    pub(crate) packages: Vec<Package>,
    data_override: Option<PathBuf>,
    /// `PATH` as it was at the start.
    pub(crate) search_path: OsString,
    /// See [`Settings::handed_on`].
    pub(crate) handed_on: Vec<(OsString, OsString)>,
}

/// One member of the workspace, as `cargo metadata` names it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest_path: PathBuf,
    pub(crate) dependencies: Vec<Dependency>,
}

/// One line of a `[dependencies]` table.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// `None` for a normal dependency, else `dev` or `build`.
    pub(crate) kind: Option<String>,
    /// Set for crates of this workspace only.
    pub(crate) path: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

impl Places {
    /// Asks cargo where the workspace is and decides where the cache goes.
    pub(crate) fn find(settings: Settings) -> Result<Places> {
        let output = Command::new(&settings.cargo)
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .output()
            .context("cannot start cargo")?;
        if !output.status.success() {
            bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let metadata: Metadata =
            serde_json::from_slice(&output.stdout).context("cannot read cargo metadata")?;
        Ok(Places {
            cache: cache_dir(&settings)?,
            root: metadata.workspace_root,
            target: metadata.target_directory,
            cargo: settings.cargo,
            packages: metadata.packages,
            data_override: settings.data_override.map(std::path::absolute).transpose()?,
            search_path: settings.search_path,
            handed_on: settings.handed_on,
        })
    }

    /// A cargo command in the root of the checkout.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = command::tied(&self.cargo);
        command.current_dir(&self.root);
        command
    }

    /// What tests and templates are made from: `vmlinux`, `rootfs.ext4`, `belljar-envd`.
    pub(crate) fn assets(&self) -> PathBuf {
        self.cache.join("assets")
    }

    /// The guest kernel in [`Places::assets`].
    pub(crate) fn kernel(&self) -> PathBuf {
        self.assets().join("vmlinux")
    }

    /// The root file system of the base template in [`Places::assets`].
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.assets().join("rootfs.ext4")
    }

    /// The static guest daemon in [`Places::assets`].
    pub(crate) fn envd(&self) -> PathBuf {
        self.assets().join("belljar-envd")
    }

    /// The data folder of the demo: the one `belljar up` uses by itself, so that the template is
    /// there afterwards. The server runs as root, whoever runs us.
    pub(crate) fn demo_data(&self) -> PathBuf {
        self.data_override.clone().unwrap_or_else(|| PathBuf::from("/var/lib/belljar"))
    }

    /// The data folder of the tests, apart from anything a user keeps.
    pub(crate) fn test_data(&self) -> PathBuf {
        self.cache.join("test-data")
    }

    /// One log for each step and each server start.
    pub(crate) fn logs(&self) -> PathBuf {
        self.cache.join("logs")
    }

    /// Takes the cache for this process, waiting for another one that has it. Held until dropped.
    pub(crate) fn lock(&self) -> Result<File> {
        std::fs::create_dir_all(self.logs())
            .with_context(|| format!("cannot create the cache {}", self.cache.display()))?;
        let path = self.cache.join("lock");
        let file =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting for another cargo xtask that uses {}", self.cache.display());
                file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        self.remove_abandoned()?;
        Ok(file)
    }

    /// A work folder of a process that was killed: whoever has the lock may remove it.
    fn remove_abandoned(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.cache)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) {
                std::fs::remove_dir_all(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }

    /// A folder in the cache that is removed when it goes out of scope.
    pub(crate) fn work_folder(&self, name: &str) -> Result<WorkFolder> {
        let path = self.cache.join(format!("{WORK_PREFIX}{name}"));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(WorkFolder { path })
    }
}

const WORK_PREFIX: &str = "work-";

/// See [`Places::work_folder`].
pub(crate) struct WorkFolder {
    path: PathBuf,
}

impl WorkFolder {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("warning: cannot remove {}: {error}", self.path.display());
        }
    }
}

fn cache_dir(settings: &Settings) -> Result<PathBuf> {
    if let Some(path) = &settings.cache_override {
        return std::path::absolute(path).context("BELLJAR_CACHE_DIR is not a usable path");
    }
    // The XDG base directory rules: a relative XDG_CACHE_HOME is to be ignored.
    if let Some(path) = settings.xdg_cache.as_ref().filter(|path| path.is_absolute()) {
        return Ok(path.join("belljar"));
    }
    match &settings.home {
        Some(home) => Ok(home.join(".cache/belljar")),
        None => bail!("neither BELLJAR_CACHE_DIR, XDG_CACHE_HOME nor HOME is set"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(over: Option<&str>, xdg: Option<&str>, home: Option<&str>) -> Settings {
        Settings {
            cargo: "cargo".into(),
            cache_override: over.map(Into::into),
            xdg_cache: xdg.map(Into::into),
            home: home.map(Into::into),
            data_override: None,
            search_path: OsString::new(),
            handed_on: Vec::new(),
        }
    }

    #[test]
    fn cache_prefers_the_override_then_xdg_then_home() {
        let all = settings(Some("/a"), Some("/b"), Some("/c"));
        assert_eq!(cache_dir(&all).unwrap(), Path::new("/a"));
        let xdg = settings(None, Some("/b"), Some("/c"));
        assert_eq!(cache_dir(&xdg).unwrap(), Path::new("/b/belljar"));
        let relative = settings(None, Some("b"), Some("/c"));
        assert_eq!(cache_dir(&relative).unwrap(), Path::new("/c/.cache/belljar"));
        assert!(cache_dir(&settings(None, None, None)).is_err());
    }
}
