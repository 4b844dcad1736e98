//! A PostgreSQL server of a test's own: Debian's binaries, a fresh cluster, a socket in its folder.
//!
//! It listens on no port, so two of them never meet, and it dies with the test that started it.

use std::fmt::Write as _;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use crate::environment::{is_root, skip};

/// Where Debian keeps the server's programs, one folder a version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// The user Debian's package makes; the server refuses to run as root.
const USER: &str = "postgres";
const STEP_DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// How much a server does for its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// As shipped: every commit reaches the disk. For measurements and crash tests.
    Full,
    /// Nothing is synced; quick, and gone after a power cut.
    None,
}

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Connections are dropped, data is written.
    Fast,
    /// As if the machine had lost power.
    Immediate,
}

/// A running server. Dropping it stops it and removes its folder.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    folder: PathBuf,
    durability: Durability,
    server: Mutex<Option<Child>>,
    databases: AtomicU32,
}

static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
static FOLDERS: AtomicU32 = AtomicU32::new(0);

impl Postgres {
    /// A server for the test alone; `None`, after a loud skip, where PostgreSQL is not installed.
    ///
    /// # Panics
    /// When it is installed and does not start.
    pub fn start(durability: Durability) -> Option<Postgres> {
        let Some(programs) = programs() else {
            skip("PostgreSQL is not installed (Debian package postgresql)");
            return None;
        };
        let folder = fresh_folder();
        let this = Postgres {
            programs,
            folder,
            durability,
            server: Mutex::new(None),
            databases: AtomicU32::new(0),
        };
        let data = this.data();
        let mut make = this.command("initdb");
        make.args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", USER]);
        finish(make.arg("-D").arg(data), "initdb");
        this.launch();
        Some(this)
    }

    /// One quick server for all tests of this process that run at the same time.
    ///
    /// # Panics
    /// As [`Postgres::start`].
    pub fn shared() -> Option<Arc<Postgres>> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = shared.upgrade() {
            return Some(running);
        }
        let started = Arc::new(Postgres::start(Durability::None)?);
        *shared = Arc::downgrade(&started);
        Some(started)
    }

    /// Makes an empty database; answers its address.
    ///
    /// # Panics
    /// When the server does not make it.
    pub fn database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        finish(self.client("createdb").arg(&name), "createdb");
        self.address(&name)
    }

    /// The address of the database `name`.
    pub fn address(&self, name: &str) -> String {
        let mut folder = String::new();
        for byte in self.folder.display().to_string().bytes() {
            write!(folder, "%{byte:02X}").expect("a string takes everything");
        }
        format!("postgres://{USER}@{folder}/{name}")
    }

    /// Stops the server. [`Postgres::launch`] starts it again with the same data.
    ///
    /// # Panics
    /// When it does not stop in a minute.
    pub fn stop(&self, how: Shutdown) {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut child) = server.take() else { return };
        let signal = match how {
            Shutdown::Fast => rustix::process::Signal::INT,
            Shutdown::Immediate => rustix::process::Signal::QUIT,
        };
        let pid = rustix::process::Pid::from_child(&child);
        // It may have ended by itself; then there is nothing to stop.
        let _ended = rustix::process::kill_process(pid, signal).is_err();
        let deadline = Instant::now() + STEP_DEADLINE;
        while child.try_wait().expect("a child of ours").is_none() {
            assert!(Instant::now() < deadline, "PostgreSQL did not stop");
            pause();
        }
    }

    /// Starts the server on its data and waits until it answers.
    ///
    /// # Panics
    /// When it does not answer in a minute.
    pub fn launch(&self) {
        let mut server = self.command("postgres");
        server.arg("-D").arg(self.data()).arg("-k").arg(&self.folder);
        server.args(["-c", "listen_addresses=", "-c", "max_connections=200"]);
        if self.durability == Durability::None {
            server.args(["-F", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"]);
        }
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("server.log"))
            .expect("a log file");
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = spawn(server).expect("PostgreSQL starts");
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        let deadline = Instant::now() + STEP_DEADLINE;
        while !run(&mut self.client("pg_isready")).status.success() {
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(self.folder.join("server.log"));
                panic!("PostgreSQL does not answer: {}", log.unwrap_or_default());
            }
            pause();
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// A program of the server, as the user it wants, ended by the kernel when this test is.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if is_root() {
            command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
        }
        command.arg(self.programs.join(program)).current_dir(&self.folder);
        command
    }

    fn client(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command.arg("-h").arg(&self.folder).args(["-U", USER]);
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop(Shutdown::Immediate);
        if let Err(e) = std::fs::remove_dir_all(&self.folder) {
            // A panic here would hide the test's own; the leak shows in the folder's name.
            eprintln!("{} was not removed: {e}", self.folder.display());
        }
    }
}

/// The newest installed version's programs.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir(VERSIONS).ok()?.flatten();
    let newest = versions
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|version| bin(*version).join("postgres").exists())
        .max()?;
    Some(bin(newest))
}

fn bin(version: u32) -> PathBuf {
    Path::new(VERSIONS).join(version.to_string()).join("bin")
}

/// A folder the server's user owns, with a name short enough for a socket in it.
fn fresh_folder() -> PathBuf {
    let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
    let name = format!("belljar-postgres-{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir(&folder).expect("a fresh folder");
    if is_root() {
        let lookup = run(Command::new("id").args(["-u", USER]));
        let text = String::from_utf8_lossy(&lookup.stdout).trim().to_owned();
        let uid = text.parse().expect("the package made the user postgres");
        chown(&folder, Some(uid), None).expect("root may give a folder away");
        let owner = std::fs::metadata(&folder).expect("the folder").uid();
        assert_eq!(owner, uid, "the folder belongs to the server");
    }
    folder
}

/// Spawns on a thread that lives as long as the process: the kernel's signal at the parent's death
/// comes when the thread that spawned ends, and a shared server outlives the test that began it.
fn spawn(command: Command) -> std::io::Result<Child> {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                // Whoever asked waits below.
                let _gone = answer.send(command.spawn()).is_err();
            }
        });
        Mutex::new(orders)
    });
    let (answer, child) = mpsc::channel();
    let orders = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    orders.send((command, answer)).expect("the thread lives as long as the process");
    child.recv().expect("the thread answers")
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at another program, up to a deadline"
)]
fn pause() {
    std::thread::sleep(POLL);
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

fn finish(command: &mut Command, what: &str) {
    let output = run(command);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what} failed: {errors}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_keeps_its_data_over_a_restart_and_leaves_nothing() {
        let Some(server) = Postgres::start(Durability::Full) else { return };
        let address = server.database();
        let ask = |sql: &str| {
            let mut psql = server.command("psql");
            let output = run(psql.args([&address, "-Atc", sql]));
            (output.status.success(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        assert!(ask("CREATE TABLE t AS SELECT 42 AS n").0);
        server.stop(Shutdown::Immediate);
        assert!(!ask("SELECT n FROM t").0, "it is stopped");
        server.launch();
        assert_eq!(ask("SELECT n FROM t"), (true, "42".to_owned()));
        let folder = server.folder.clone();
        drop(server);
        assert!(!folder.exists());
    }
}
