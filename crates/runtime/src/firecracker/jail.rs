//! A machine's own file system: a folder below its run folder that its process has as its root.
//!
//! ```text
//! jail/            ours: nothing in it can be replaced from inside
//!   firecracker    the program                          bound, for reading
//!   kernel state memory disk    what this machine uses  bound
//!   out/           state and memory of snapshots, log and figures (pipes): ours, writable files
//!   run/           its sockets: the only folder its user may write
//!   dev/           kvm, tun, urandom of its own, in memory, seen by its process alone
//! ```
//!
//! Files that the process writes are made here first and kept open: what is read of them later is
//! read through our own descriptors, so that no link leads this process elsewhere.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

use crate::machine::{Identity, StartError};
use crate::sys::jail::{Bind, Device, Root};

/// What Firecracker opens by name; those that this host lacks are left out.
const DEVICES: [(&str, &str); 4] = [
    ("kvm", "/dev/kvm"),
    ("net/tun", "/dev/net/tun"),
    ("urandom", "/dev/urandom"),
    ("userfaultfd", "/dev/userfaultfd"),
];

/// The folder. It goes when this is dropped.
#[derive(Debug)]
pub(super) struct Jail {
    folder: PathBuf,
    identity: Option<Identity>,
    binds: Vec<Bind>,
}

impl Jail {
    /// Makes it in a machine's run folder.
    ///
    /// # Errors
    /// [`StartError::Io`]; nothing is left then.
    pub(super) fn make(run_dir: &Path, identity: Option<Identity>) -> Result<Jail, StartError> {
        let folder = run_dir.join("jail");
        fs::create_dir(&folder).map_err(failed)?;
        let jail = Jail { folder, identity, binds: Vec::new() };
        jail.furnish().map_err(failed)?;
        Ok(jail)
    }

    fn furnish(&self) -> io::Result<()> {
        let pass = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o755));
        pass(&self.folder)?;
        for name in ["out", "dev", "run"] {
            let folder = self.folder.join(name);
            fs::create_dir(&folder)?;
            pass(&folder)?;
        }
        let run = self.folder.join("run");
        fs::set_permissions(&run, Permissions::from_mode(0o700))?;
        self.give_path(&run)
    }

    /// Where something inside is on this host.
    pub(super) fn outside(&self, inside: &str) -> PathBuf {
        self.folder.join(inside.trim_start_matches('/'))
    }

    /// Shows a file or a folder of the host inside, under a name without folders.
    ///
    /// # Errors
    /// [`StartError::Missing`] naming `what`, or [`StartError::Io`].
    pub(super) fn show(
        &mut self,
        what: &'static str,
        from: &Path,
        to: &'static str,
        writable: bool,
    ) -> Result<(), StartError> {
        let found = fs::metadata(from).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StartError::Missing { what, path: from.to_owned() },
            _ => StartError::Io { step: "look for the machine's files", source },
        })?;
        let place = self.folder.join(to);
        let made = if found.is_dir() {
            fs::create_dir_all(&place)
        } else if place.exists() {
            // One of our own files, which gives its place to the host's.
            Ok(())
        } else {
            File::create_new(&place).map(drop)
        };
        made.map_err(failed)?;
        self.binds.push(Bind { from: from.to_owned(), to, writable });
        Ok(())
    }

    /// A new file that the process may write and nobody replace, and our own handle of it.
    ///
    /// # Errors
    /// [`StartError::Io`].
    pub(super) fn output(&self, inside: &str) -> Result<File, StartError> {
        let make = || -> io::Result<File> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(self.outside(inside))?;
            self.give(&file)?;
            Ok(file)
        };
        make().map_err(failed)
    }

    /// A named pipe that the process may write, and its end for reading.
    ///
    /// # Errors
    /// [`StartError::Io`].
    pub(super) fn pipe(&self, inside: &str) -> Result<OwnedFd, StartError> {
        let path = self.outside(inside);
        let make = || -> io::Result<OwnedFd> {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                FileType::Fifo,
                Mode::RUSR | Mode::WUSR,
                0,
            )?;
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let ours = rustix::fs::open(&path, flags, Mode::empty())?;
            self.give_path(&path)?;
            Ok(ours)
        };
        make().map_err(failed)
    }

    /// Gives a file to the process's user.
    pub(super) fn give(&self, file: &File) -> io::Result<()> {
        match self.identity {
            Some(Identity { uid, gid }) => std::os::unix::fs::fchown(file, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// The same, for what has a name and was made by us before the process ran.
    pub(super) fn give_path(&self, path: &Path) -> io::Result<()> {
        match self.identity {
            Some(Identity { uid, gid }) => std::os::unix::fs::lchown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// What the process's file system becomes.
    ///
    /// # Errors
    /// [`StartError::Io`].
    pub(super) fn root(&self) -> Result<Root, StartError> {
        let device = |(name, path): (&'static str, &str)| match fs::metadata(path) {
            Ok(found) => Some(Device { name, number: found.rdev() }),
            Err(_) => None,
        };
        let devices: Vec<Device> = DEVICES.into_iter().filter_map(device).collect();
        Root::new(&self.folder, &self.binds, &devices, self.identity).map_err(failed)
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        // Its mounts are its process's alone; what lies under them here are empty files.
        if let Err(e) = fs::remove_dir_all(&self.folder) {
            let folder = self.folder.display();
            tracing::warn!(%folder, error = %e, "a machine's jail stays until its run folder goes");
        }
    }
}

fn failed(source: io::Error) -> StartError {
    StartError::Io { step: "make the machine's jail", source }
}
