//! Turns a tree of Debian packages into what a sandbox looks like inside.
//!
//! Everything here is data where it can be ([`FILES`]), so that the cache key of the tree follows a
//! change by itself; what is code is versioned by [`STEPS_VERSION`].

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown};
use std::path::{Path, PathBuf};

use crate::sources::Sources;

/// Raise it with every change of what [`customise`] does beyond [`FILES`].
pub(crate) const STEPS_VERSION: u32 = 1;

/// The user commands run as, and its group.
const USER_ID: u32 = 1000;
const HOME: &str = "home/user";

/// A file put into the tree as it is, owned by root.
struct File {
    path: &'static str,
    mode: u32,
    text: &'static str,
}

/// `/etc/profile` of Debian forks `id` twice; every `bash -l -c` reads it, and on an emulated
/// processor a fork and exec cost some 50 ms. Root's `.profile` runs `mesg` likewise.
const FILES: &[File] = &[
    File { path: "etc/hostname", mode: 0o644, text: "sandbox\n" },
    File {
        path: "etc/hosts",
        mode: 0o644,
        text: "127.0.0.1 localhost\n127.0.1.1 sandbox\n::1 localhost ip6-localhost ip6-loopback\n",
    },
    // The guest daemon writes what the kernel's command line says over it.
    File { path: "etc/resolv.conf", mode: 0o644, text: "nameserver 8.8.8.8\n" },
    File { path: "etc/machine-id", mode: 0o444, text: "" },
    File {
        path: "etc/fstab",
        mode: 0o644,
        text: "# The guest daemon mounts what a sandbox needs.\n",
    },
    File { path: "etc/sudoers.d/user", mode: 0o440, text: "user ALL=(ALL:ALL) NOPASSWD: ALL\n" },
    File {
        path: "etc/profile",
        mode: 0o644,
        text: r#"# Read by every login shell: starts no program.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
if [ -n "${PS1-}" ] && [ -n "${BASH-}" ] && [ "$BASH" != /bin/sh ] && [ -r /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi
for i in /etc/profile.d/*.sh; do
  if [ -r "$i" ]; then . "$i"; fi
done
unset i
"#,
    },
    File {
        path: "root/.profile",
        mode: 0o644,
        text: "# Read by root's login shells: starts no program.\n\
               if [ -n \"${BASH-}\" ] && [ -r ~/.bashrc ]; then . ~/.bashrc; fi\n",
    },
    // Packages a user installs later leave out the same files.
    File { path: "etc/dpkg/dpkg.cfg.d/99mmdebstrap", mode: 0o644, text: DPKG_OPTIONS },
];

/// Documentation nobody reads in a sandbox; licences stay.
pub(crate) const DPKG_OPTIONS: &str = "\
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/lintian/*
path-exclude=/usr/share/locale/*
path-include=/usr/share/locale/locale.alias
";

/// A line added to an account file.
const ACCOUNTS: [(&str, &str); 4] = [
    ("etc/passwd", "user:x:1000:1000::/home/user:/bin/bash\n"),
    ("etc/group", "user:x:1000:\n"),
    // `*`: no password fits, so only sudo, which asks for none, and the guest daemon get in.
    ("etc/shadow", "user:*:19000:0:99999:7:::\n"),
    ("etc/gshadow", "user:!::\n"),
];

/// Folders whose files are made anew by whoever needs them.
const EMPTIED: [&str; 5] =
    ["var/cache/apt", "var/cache/ldconfig", "var/lib/apt/lists", "var/log", "tmp"];

/// Left by package scripts, of no use in the guest.
const REMOVED: [&str; 9] = [
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/.pwd.lock",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/diversions-old",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
];

/// A part of the tree could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("{step} {} in the package tree", path.display())]
pub struct TreeError {
    /// The step, as a verb.
    pub step: &'static str,
    /// The file or folder, from the tree's root.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Everything of this file that the finished tree depends on, for the cache key.
pub(crate) fn recipe() -> Vec<u8> {
    let mut recipe = STEPS_VERSION.to_le_bytes().to_vec();
    for file in FILES {
        recipe.extend(file.path.as_bytes());
        recipe.extend(file.mode.to_le_bytes());
        recipe.extend(file.text.as_bytes());
    }
    for (path, line) in ACCOUNTS {
        recipe.extend(path.as_bytes());
        recipe.extend(line.as_bytes());
    }
    recipe
}

/// Makes the package tree at `root` a sandbox's file system. Needs root. Blocks on file I/O.
pub(crate) fn customise(
    root: &Path,
    sources: &Sources,
    apt_options: &[String],
) -> Result<(), TreeError> {
    let tree = Tree(root);
    for file in FILES {
        tree.write(file.path, file.mode, file.text.as_bytes())?;
    }
    for (path, line) in ACCOUNTS {
        tree.append(path, line)?;
    }
    tree.make_home()?;
    tree.write_apt(sources, apt_options)?;
    tree.free_pip()?;
    for path in REMOVED {
        tree.remove(path)?;
    }
    for path in EMPTIED {
        tree.empty(path)?;
    }
    Ok(())
}

/// Bytes of the tree's files, hard links once.
pub(crate) fn used_bytes(root: &Path) -> Result<u64, TreeError> {
    use std::os::unix::fs::MetadataExt as _;
    let mut seen = std::collections::HashSet::new();
    let mut bytes = 0;
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let failed = |source| TreeError { step: "measure", path: folder.clone(), source };
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let metadata = entry.metadata().map_err(failed)?;
            if metadata.is_dir() {
                folders.push(entry.path());
            }
            if seen.insert(metadata.ino()) {
                bytes += metadata.blocks() * 512;
            }
        }
    }
    Ok(bytes)
}

/// The tree, addressed from its root. Package trees hold symbolic links that are right only inside
/// (`/etc/mtab`, `/var/run`): every parent is checked to lie inside before anything is touched, and
/// a link in the last place is replaced, never followed.
struct Tree<'a>(&'a Path);

impl Tree<'_> {
    fn place(&self, step: &'static str, path: &str) -> Result<PathBuf, TreeError> {
        let failed = |source| TreeError { step, path: path.into(), source };
        let full = self.0.join(path);
        let parent = full.parent().unwrap_or(self.0);
        let inside = fs::canonicalize(parent)
            .and_then(|real| Ok(real.starts_with(fs::canonicalize(self.0)?)))
            .map_err(failed)?;
        if inside {
            return Ok(full);
        }
        Err(failed(io::Error::other("its folder is a link that leaves the tree")))
    }

    fn write(&self, path: &str, mode: u32, content: &[u8]) -> Result<(), TreeError> {
        self.remove(path)?;
        let full = self.place("write", path)?;
        fs::write(&full, content)
            .and_then(|()| fs::set_permissions(&full, fs::Permissions::from_mode(mode)))
            .map_err(|source| TreeError { step: "write", path: path.into(), source })
    }

    fn append(&self, path: &str, line: &str) -> Result<(), TreeError> {
        use std::io::Write as _;
        let full = self.place("append to", path)?;
        let is_link = fs::symlink_metadata(&full).is_ok_and(|m| m.is_symlink());
        let opened = if is_link {
            Err(io::Error::other("it is a link"))
        } else {
            fs::OpenOptions::new().append(true).open(&full)
        };
        opened.and_then(|mut file| file.write_all(line.as_bytes())).map_err(|source| TreeError {
            step: "append to",
            path: path.into(),
            source,
        })
    }

    /// Removes a file or link if it is there.
    fn remove(&self, path: &str) -> Result<(), TreeError> {
        let full = self.place("remove", path)?;
        match fs::remove_file(&full) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(TreeError { step: "remove", path: path.into(), source: e })
            }
            _ => Ok(()),
        }
    }

    /// Removes every file under a folder; folders stay, because programs expect them.
    fn empty(&self, path: &str) -> Result<(), TreeError> {
        let failed = |source| TreeError { step: "empty", path: path.into(), source };
        let mut folders = vec![self.place("empty", path)?];
        while let Some(folder) = folders.pop() {
            if !fs::symlink_metadata(&folder).is_ok_and(|m| m.is_dir()) {
                continue;
            }
            for entry in fs::read_dir(&folder).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if entry.file_type().map_err(failed)?.is_dir() {
                    folders.push(entry.path());
                } else {
                    fs::remove_file(entry.path()).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn make_home(&self) -> Result<(), TreeError> {
        let home = self.place("make", HOME)?;
        let failed = |source| TreeError { step: "make", path: HOME.into(), source };
        fs::create_dir(&home)
            .and_then(|()| fs::set_permissions(&home, fs::Permissions::from_mode(0o755)))
            .and_then(|()| chown(&home, Some(USER_ID), Some(USER_ID)))
            .map_err(failed)?;
        for entry in fs::read_dir(self.0.join("etc/skel")).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_file() {
                let copy = home.join(entry.file_name());
                fs::copy(entry.path(), &copy)
                    .and_then(|_| lchown(&copy, Some(USER_ID), Some(USER_ID)))
                    .map_err(failed)?;
            }
        }
        Ok(())
    }

    /// The guest's apt uses the host's mirrors and its checks of dates, but not its proxy, which
    /// is the host's own affair and may hold a password.
    fn write_apt(&self, sources: &Sources, apt_options: &[String]) -> Result<(), TreeError> {
        self.empty("etc/apt/sources.list.d")?;
        self.remove("etc/apt/sources.list")?;
        self.write("etc/apt/sources.list.d/debian.sources", 0o644, sources.text.as_bytes())?;
        for keyring in &sources.keyrings {
            let inside = keyring.strip_prefix("/").unwrap_or(keyring).to_string_lossy();
            let full = self.0.join(&*inside);
            if !full.exists() {
                let failed = |source| TreeError { step: "copy", path: keyring.clone(), source };
                fs::create_dir_all(full.parent().unwrap_or(self.0)).map_err(failed)?;
                self.write(&inside, 0o644, &fs::read(keyring).map_err(failed)?)?;
            }
        }
        let kept: String = apt_options
            .iter()
            .filter(|option| !option.to_lowercase().contains("proxy"))
            .map(|option| format!("{option}\n"))
            .collect();
        self.write("etc/apt/apt.conf.d/99mmdebstrap", 0o644, kept.as_bytes())
    }

    /// Lets `pip install` work outside a virtual environment: the sandbox is the environment.
    fn free_pip(&self) -> Result<(), TreeError> {
        let lib = self.0.join("usr/lib");
        let failed = |source| TreeError { step: "list", path: "usr/lib".into(), source };
        for entry in fs::read_dir(&lib).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("python3.") {
                self.remove(&format!("usr/lib/{name}/EXTERNALLY-MANAGED"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn sources() -> Sources {
        Sources { text: "Types: deb\n".to_owned(), keyrings: Vec::new() }
    }

    /// The folders and files `customise` expects of a package tree.
    fn package_tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp folder");
        for folder in [
            "etc/skel",
            "etc/sudoers.d",
            "etc/apt/apt.conf.d",
            "etc/apt/sources.list.d",
            "home",
            "etc/dpkg/dpkg.cfg.d",
            "root",
            "usr/lib/python3.11",
            "var/cache/apt/archives",
            "var/cache/debconf",
            "var/lib/apt/lists",
            "var/lib/dpkg",
            "var/log/apt",
            "tmp",
        ] {
            fs::create_dir_all(dir.path().join(folder)).expect("mkdir");
        }
        for (path, _) in ACCOUNTS {
            fs::write(dir.path().join(path), "root:x:0:0\n").expect("write");
        }
        fs::write(dir.path().join("etc/skel/.bashrc"), "# rc\n").expect("write");
        fs::write(dir.path().join("usr/lib/python3.11/EXTERNALLY-MANAGED"), "").expect("write");
        fs::write(dir.path().join("var/log/apt/term.log"), "x").expect("write");
        dir
    }

    #[test]
    fn a_package_tree_becomes_a_sandbox() {
        if !belljar_testkit::is_root() {
            belljar_testkit::skip("giving files to another user needs root");
            return;
        }
        use std::os::unix::fs::MetadataExt as _;
        let dir = package_tree();
        let outside = tempfile::tempdir().expect("temp folder");
        let victim = outside.path().join("resolv.conf");
        fs::write(&victim, "host\n").expect("write");
        symlink(&victim, dir.path().join("etc/resolv.conf")).expect("link");
        let options =
            ["Acquire::Check-Date \"false\";", "Acquire::http::Proxy \"http://u:p@proxy\";"];
        customise(dir.path(), &sources(), &options.map(str::to_owned)).expect("customise");

        let read = |path: &str| fs::read_to_string(dir.path().join(path)).expect("read");
        assert_eq!(fs::read_to_string(&victim).expect("read"), "host\n", "a link was followed");
        assert_eq!(read("etc/resolv.conf"), "nameserver 8.8.8.8\n");
        assert!(read("etc/passwd").ends_with("user:x:1000:1000::/home/user:/bin/bash\n"));
        assert_eq!(read("etc/apt/apt.conf.d/99mmdebstrap"), "Acquire::Check-Date \"false\";\n");
        let rc = fs::metadata(dir.path().join("home/user/.bashrc")).expect("stat");
        assert_eq!((rc.uid(), rc.gid()), (1000, 1000));
        let sudoers = fs::metadata(dir.path().join("etc/sudoers.d/user")).expect("stat");
        assert_eq!(sudoers.mode() & 0o7777, 0o440);
        assert!(!dir.path().join("usr/lib/python3.11/EXTERNALLY-MANAGED").exists());
        assert!(dir.path().join("var/log/apt").exists());
        assert!(!dir.path().join("var/log/apt/term.log").exists());
    }

    #[test]
    fn a_folder_that_leads_out_is_not_entered() {
        let dir = tempfile::tempdir().expect("temp folder");
        let outside = tempfile::tempdir().expect("temp folder");
        symlink(outside.path(), dir.path().join("etc")).expect("link");
        let e = Tree(dir.path()).write("etc/hostname", 0o644, b"x").expect_err("it leaves");
        assert!(e.to_string().contains("etc/hostname"));
        assert_eq!(fs::read_dir(outside.path()).expect("list").count(), 0);
    }

    #[test]
    fn hard_links_are_measured_once() {
        let dir = tempfile::tempdir().expect("temp folder");
        fs::write(dir.path().join("a"), vec![1; 100_000]).expect("write");
        let alone = used_bytes(dir.path()).expect("measure");
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).expect("link");
        assert_eq!(used_bytes(dir.path()).expect("measure"), alone);
    }
}
