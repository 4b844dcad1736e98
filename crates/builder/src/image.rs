//! ext4 images, by the programs of `e2fsprogs`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_daemon::Scope;
use belljar_domain::MiB;

use crate::program::{Program, ProgramError};

const PACKAGE: &str = "e2fsprogs";
const DEADLINE: Duration = Duration::from_secs(600);

/// Fixed, so that equal trees make equal images: no two of these disks are ever in one machine.
const UUID: &str = "be11ab1e-0000-4000-8000-000000000001";
const HASH_SEED: &str = "be11ab1e-0000-4000-8000-000000000002";
/// A time for every image made; the files keep their own.
pub(crate) const EPOCH_S: &str = "1700000000";

/// A journal is kept although it costs writes: a later snapshot of the disk alone is taken while
/// the guest runs, and must mount without a check. 16 MiB is a fourth of what `mke2fs` would choose
/// and bounds how much of each private overlay the journal can fill.
const JOURNAL_MIB: u32 = 16;

/// Why an image is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file could not be read or written.
    #[error("{step} {}", path.display())]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is in the image is not what was put there.
    #[error("find {inside} in image {} as it was put there", image.display())]
    NotTaken {
        /// The image.
        image: PathBuf,
        /// The file inside.
        inside: String,
    },
}

/// Where programs run and log.
#[derive(Clone, Copy)]
pub(crate) struct Workshop<'a> {
    pub(crate) scope: &'a Scope,
    pub(crate) work_dir: &'a Path,
    pub(crate) log: &'a Path,
}

impl Workshop<'_> {
    async fn run(
        &self,
        name: &'static str,
        args: impl IntoIterator<Item = impl Into<std::ffi::OsString>>,
    ) -> Result<(), ProgramError> {
        let program = Program {
            name,
            package: PACKAGE,
            args: args.into_iter().map(Into::into).collect(),
            env: vec![("E2FSPROGS_FAKE_TIME", EPOCH_S), ("SOURCE_DATE_EPOCH", EPOCH_S)],
            current_dir: self.work_dir,
            log: self.log,
            deadline: DEADLINE,
        };
        program.run(self.scope, |_| {}).await
    }

    /// Makes an ext4 image of the tree. Nothing is left for the guest's kernel to finish later:
    /// background writes after the first mount would land in every sandbox's overlay.
    pub(crate) async fn make_ext4(
        &self,
        tree: &Path,
        image: &Path,
        size: MiB,
    ) -> Result<(), ImageError> {
        let extended =
            format!("hash_seed={HASH_SEED},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0");
        let args = [
            "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-U", UUID, "-L", "belljar", "-E",
            &extended, "-J",
        ];
        let journal = format!("size={JOURNAL_MIB}");
        let mut args: Vec<std::ffi::OsString> = args.map(Into::into).to_vec();
        args.extend([journal.into(), "-d".into(), tree.into(), image.into()]);
        args.push(format!("{}M", size.0).into());
        self.run("mke2fs", args).await?;
        // Freed blocks are told to the disk, so an overlay shrinks when files are deleted.
        self.run("tune2fs", ["-o".into(), "discard".into(), image.as_os_str().to_owned()]).await?;
        self.check(image).await
    }

    /// Puts the file `content` into the image as `<folder>/<name>`, mode 0755, owned by root.
    pub(crate) async fn add_program(
        &self,
        image: &Path,
        content: &Path,
        folder: &str,
        name: &str,
    ) -> Result<(), ImageError> {
        let io = |step, path: &Path| {
            let path = path.to_owned();
            move |source| ImageError::Io { step, path, source }
        };
        // Plain names in the work folder: debugfs has no reliable quoting.
        let staged = self.work_dir.join("staged");
        tokio::fs::copy(content, &staged).await.map_err(io("copy", content))?;
        let taken = self.work_dir.join("taken");
        if let Err(e) = tokio::fs::remove_file(&taken).await
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(io("remove", &taken)(e));
        }
        let script = self.work_dir.join("script");
        let commands = format!(
            "cd {folder}\nwrite staged {name}\nsif {name} mode 0100755\nsif {name} uid 0\n\
             sif {name} gid 0\ndump {folder}/{name} taken\n"
        );
        tokio::fs::write(&script, commands).await.map_err(io("write", &script))?;
        let args = ["-w".into(), "-f".into(), "script".into(), image.as_os_str().to_owned()];
        self.run("debugfs", args).await?;
        // debugfs exits with 0 whatever its commands did.
        let wanted = tokio::fs::read(&staged).await.map_err(io("read", &staged))?;
        match tokio::fs::read(&taken).await {
            Ok(found) if found == wanted => self.check(image).await,
            _ => Err(ImageError::NotTaken {
                image: image.to_owned(),
                inside: format!("{folder}/{name}"),
            }),
        }
    }

    async fn check(&self, image: &Path) -> Result<(), ImageError> {
        Ok(self.run("e2fsck", ["-f".into(), "-n".into(), image.as_os_str().to_owned()]).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    #[tokio::test]
    async fn an_image_takes_a_tree_and_a_program() {
        if Command::new("mke2fs").arg("-V").output().is_err() {
            belljar_testkit::skip("mke2fs is not installed");
            return;
        }
        let dir = tempfile::tempdir().expect("temp folder");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("tree/usr/sbin")).expect("mkdir");
        fs::write(path("tree/hello"), "hello\n").expect("write");
        fs::write(path("program"), vec![7; 300_000]).expect("write");
        let scope = Scope::root("test");
        let log = path("log");
        let shop = Workshop { scope: &scope, work_dir: dir.path(), log: &log };
        let image = path("image");
        shop.make_ext4(&path("tree"), &image, MiB(64)).await.expect("make");
        assert_eq!(fs::metadata(&image).expect("stat").len(), 64 << 20);
        for _ in 0..2 {
            let again = path("again");
            fs::copy(&image, &again).expect("copy");
            shop.add_program(&again, &path("program"), "/usr/sbin", "tool").await.expect("add");
            let debugfs = |request: &str| {
                let output = Command::new("debugfs").args(["-R", request]).arg(&again).output();
                String::from_utf8(output.expect("debugfs runs").stdout).expect("text")
            };
            assert_eq!(debugfs("cat /hello"), "hello\n");
            let stat = debugfs("stat /usr/sbin/tool");
            assert!(stat.contains("Mode:  0755") && stat.contains("Size: 300000"), "{stat}");
            let features = debugfs("features");
            assert!(features.contains("has_journal"), "{features}");
        }
        let missing = shop.add_program(&image, &path("program"), "/no/such", "tool").await;
        // The dump of the round before must not stand in for this one.
        assert!(matches!(missing, Err(ImageError::NotTaken { .. })), "{missing:?}");
    }
}
