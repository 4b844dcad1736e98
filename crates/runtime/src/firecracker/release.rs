//! Which releases of Firecracker are there: a program's path, and what it says of itself.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::api::Dialect;

/// Why this host cannot run the driver.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// No program was named.
    #[error("find Firecracker: no program was named")]
    NoneNamed,
    /// This process may not make jails.
    #[error("run Firecracker: root is needed for its jails")]
    NotRoot,
    /// KVM does not run guests.
    #[error("use KVM: {sentence}")]
    NoKvm {
        /// What was found, as a sentence without a full stop.
        sentence: String,
    },
    /// The program is not there.
    #[error("find Firecracker at {}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It did not say its version.
    #[error("learn the version of {}: it printed `{printed}`", path.display())]
    NoVersion {
        /// The program.
        path: PathBuf,
        /// The first line of its output.
        printed: String,
    },
    /// It is too old.
    #[error("use Firecracker {found}: version {needed} or later is needed")]
    TooOld {
        /// Its version.
        found: String,
        /// The oldest that will do.
        needed: String,
    },
    /// Two programs say the same version.
    #[error("tell {} from {}: both are Firecracker {version}", one.display(), other.display())]
    Twice {
        /// A program.
        one: PathBuf,
        /// Another.
        other: PathBuf,
        /// What both say.
        version: String,
    },
    /// The template of the processor is none.
    #[error("use {} as a processor template: {reason}", path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
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

/// The oldest release whose calls this driver makes.
pub(super) const OLDEST: (u32, u32) = (1, 10);
/// Printing a version takes milliseconds, on a busy host a thousand times that.
const VERSION_LIMIT: Duration = Duration::from_secs(60);
/// Folders of libraries that a program needs that is not static, as Debian has them.
const LIBRARIES: [&str; 3] = ["/lib", "/lib64", "/usr/lib"];
/// Head and program headers of an ELF file are within this.
const ELF_HEAD_BYTES: u64 = 4096;

/// One program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Release {
    pub(super) program: PathBuf,
    /// As it says it, `1.17.0` or with a word behind it.
    pub(super) version: String,
    pub(super) dialect: Dialect,
    /// Folders it needs beside itself.
    pub(super) libraries: Vec<&'static str>,
}

impl Release {
    /// Asks the program. What is learned is kept as long as the driver.
    ///
    /// # Errors
    /// [`DetectError`].
    pub(super) async fn of(program: &Path) -> Result<Release, DetectError> {
        let head = match fs::metadata(program) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => {
                head_of(program)
            }
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no program")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(DetectError::Missing { path: program.to_owned() });
            }
            Err(e) => Err(e),
        };
        let head =
            head.map_err(|source| DetectError::Io { step: "read Firecracker's program", source })?;
        let line = first_line(program).await?;
        let Some((number, version)) = parse(&line) else {
            let printed = line.chars().take(200).collect();
            return Err(DetectError::NoVersion { path: program.to_owned(), printed });
        };
        if number < OLDEST {
            let needed = format!("{}.{}", OLDEST.0, OLDEST.1);
            return Err(DetectError::TooOld { found: version, needed });
        }
        let dialect = if number < (1, 13) { Dialect::Before113 } else { Dialect::Since113 };
        let libraries = if needs_loader(&head) {
            LIBRARIES.into_iter().filter(|folder| Path::new(folder).is_dir()).collect()
        } else {
            Vec::new()
        };
        Ok(Release { program: program.to_owned(), version, dialect, libraries })
    }
}

fn head_of(program: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    fs::File::open(program)?.take(ELF_HEAD_BYTES).read_to_end(&mut head)?;
    Ok(head)
}

async fn first_line(program: &Path) -> Result<String, DetectError> {
    const STEP: &str = "learn the version of Firecracker";
    let running =
        tokio::process::Command::new(program).arg("--version").kill_on_drop(true).output();
    match tokio::time::timeout(VERSION_LIMIT, running).await {
        Ok(Ok(output)) => {
            let printed = String::from_utf8_lossy(&output.stdout);
            Ok(printed.lines().next().unwrap_or_default().to_owned())
        }
        Ok(Err(source)) => Err(DetectError::Io { step: STEP, source }),
        Err(_) => {
            let waited_ms = u64::try_from(VERSION_LIMIT.as_millis()).unwrap_or(u64::MAX);
            Err(DetectError::TimedOut { step: STEP, waited_ms })
        }
    }
}

/// `Firecracker v1.17.0-dev` gives (1, 17) and the text after the v.
fn parse(line: &str) -> Option<((u32, u32), String)> {
    let version = line.trim().strip_prefix("Firecracker v")?;
    let mut parts = version.split('.');
    let number = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next()?;
    Some((number, version.to_owned()))
}

/// Whether a 64-bit ELF program names a loader (`PT_INTERP`), and so needs libraries.
fn needs_loader(head: &[u8]) -> bool {
    const INTERPRETER: u32 = 3;
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let field = head.get(at..at + bytes)?;
        field.iter().rev().try_fold(0_usize, |sum, byte| Some((sum << 8) | usize::from(*byte)))
    };
    let Some(b"\x7fELF\x02\x01") = head.get(..6) else { return false };
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2))
    else {
        return false;
    };
    (0..count).any(|place| {
        let at = place.checked_mul(size).and_then(|offset| offset.checked_add(table));
        let kind = at.filter(|at| *at < head.len()).and_then(|at| number(at, 4));
        kind == usize::try_from(INTERPRETER).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed_or_refused() {
        let parsed = parse("Firecracker v1.12.1\n").expect("a release");
        assert_eq!(parsed, ((1, 12), "1.12.1".to_owned()));
        assert_eq!(parse("Firecracker v1.17.0-dev").expect("a build").1, "1.17.0-dev");
        for bad in ["", "Firecracker 1.12.1", "Firecracker v1", "Firecracker v1.x.0", "QEMU v1.2.3"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn what_is_no_release_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let script = |name: &str, says: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).expect("write a script");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
            path
        };
        let missing = Release::of(&folder.path().join("none")).await.expect_err("not there");
        assert!(matches!(missing, DetectError::Missing { .. }), "{missing}");
        let odd = Release::of(&script("odd", "hello")).await.expect_err("no Firecracker");
        assert!(odd.to_string().contains("hello"), "{odd}");
        let old = Release::of(&script("old", "Firecracker v1.9.1")).await.expect_err("too old");
        assert!(matches!(old, DetectError::TooOld { .. }), "{old}");
        let none = Release::of(folder.path()).await.expect_err("a folder");
        assert!(matches!(none, DetectError::Io { .. }), "{none}");
        let one = Release::of(&script("one", "Firecracker v1.12.0")).await.expect("a release");
        let two = Release::of(&script("two", "Firecracker v1.13.2")).await.expect("a release");
        assert_eq!((one.dialect, two.dialect), (Dialect::Before113, Dialect::Since113));
        assert!(one.libraries.is_empty());
    }

    #[test]
    fn a_program_that_needs_libraries_is_told_from_one_that_does_not() {
        // This test's own program is one or the other; what reads it agrees with the kernel.
        let own = head_of(Path::new("/proc/self/exe")).expect("a program");
        let maps = fs::read_to_string("/proc/self/maps").expect("a process");
        assert_eq!(needs_loader(&own), maps.contains("/ld-linux"));
        assert!(!needs_loader(b"\x7fELF\x02\x01") && !needs_loader(b"#!/bin/sh"));
    }
}
