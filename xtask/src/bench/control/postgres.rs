//! A PostgreSQL server of the benchmark's own: Debian's programs, a fresh cluster, as shipped.

use std::fs::File;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::command;

/// Where Debian keeps the server's programs, one folder a version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// The user Debian's package makes; the server refuses to run as root.
const USER: &str = "postgres";
const READY_LIMIT: Duration = Duration::from_secs(60);

/// A running server; it is stopped and its folder removed when dropped.
pub(super) struct Postgres {
    folder: PathBuf,
    programs: PathBuf,
    server: Child,
}

impl Postgres {
    /// Makes a cluster and starts it on a socket in its folder.
    pub(super) fn start() -> Result<Postgres> {
        let programs = programs()?;
        // Not in the cache: its user need not be able to pass through the folders above that.
        let folder = std::env::temp_dir().join(format!("belljar-bench-{}", std::process::id()));
        std::fs::create_dir(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Postgres::start_in(&folder, programs).inspect_err(|_| remove(&folder))
    }

    fn start_in(folder: &Path, programs: PathBuf) -> Result<Postgres> {
        if command::is_root() {
            let mut id = Command::new("id");
            id.args(["-u", USER]);
            let user = command::output(id)?.trim().parse().context("a user id")?;
            chown(folder, Some(user), None)?;
        }
        let data = folder.join("data");
        let mut make = its_own(&programs, "initdb");
        make.args(["--auth=trust", "--encoding=UTF8", "--locale=C", "-U", USER, "-D"]).arg(&data);
        command::output(make)?;
        let mut server = its_own(&programs, "postgres");
        server.arg("-D").arg(&data).arg("-k").arg(folder);
        server.args(["-c", "listen_addresses=", "-c", "max_connections=100"]);
        let log = File::create(folder.join("server.log"))?;
        server.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let server = server.spawn().context("cannot start PostgreSQL")?;
        let postgres = Postgres { folder: folder.to_owned(), programs, server };
        postgres.wait()?;
        Ok(postgres)
    }

    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + READY_LIMIT;
        loop {
            let mut asked = its_own(&self.programs, "pg_isready");
            asked.arg("-q").arg("-h").arg(&self.folder);
            if asked.status()?.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let log = command::tail(&self.folder.join("server.log"), 10).join("\n    ");
                bail!("PostgreSQL does not answer:\n    {log}");
            }
        }
    }

    /// The address of its database.
    pub(super) fn address(&self) -> String {
        let folder = self.folder.display().to_string();
        let folder: String = folder.bytes().map(|byte| format!("%{byte:02X}")).collect();
        format!("postgres://{USER}@{folder}/postgres")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGINT is its fast shutdown. It may have ended by itself.
        let _ = rustix::process::kill_process(command::pid_of(&self.server), Signal::INT);
        if let Err(error) = self.server.wait() {
            eprintln!("warning: PostgreSQL was not waited for: {error}");
        }
        remove(&self.folder);
    }
}

fn remove(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder) {
        eprintln!("warning: cannot remove {}: {error}", folder.display());
    }
}

fn programs() -> Result<PathBuf> {
    let found = std::fs::read_dir(VERSIONS).ok().into_iter().flatten().flatten();
    let mut versions: Vec<PathBuf> = found.map(|version| version.path().join("bin")).collect();
    versions.retain(|programs| programs.join("initdb").exists());
    versions.sort();
    versions.pop().context("PostgreSQL is not installed: apt-get install postgresql")
}

/// A program of the server, as the user it wants, ended by the kernel with this process.
fn its_own(programs: &Path, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "INT"]);
    if command::is_root() {
        command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
    }
    command.arg("--").arg(programs.join(program)).current_dir("/");
    command
}
