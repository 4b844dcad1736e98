//! Starts one program: its user, directory, environment and standard streams.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::OpenptFlags;
use tokio::sync::oneshot;

use super::channel::window_size;
use crate::accounts::User;
use crate::children::{self, Ended};
use crate::sys::{self, ChildSetup, Credentials};
use crate::workload::Workload;

/// How early the kernel kills user processes when memory ends: well before the daemon.
///
/// Source: `contract/e2b-wire.md` section 2.3.
const OOM_SCORE_ADJ: &str = "100";

/// What to start.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub(super) cmd: String,
    pub(super) args: Vec<String>,
    /// The complete environment.
    pub(super) env: BTreeMap<String, String>,
    pub(super) cwd: PathBuf,
    pub(super) user: User,
    pub(super) streams: Streams,
}

/// What is behind the standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Streams {
    /// Two pipes, and a third for standard input or the null device.
    Pipes {
        /// Whether standard input is a pipe.
        stdin: bool,
    },
    /// One terminal for all three.
    Terminal {
        /// Width, character cells.
        columns: u16,
        /// Height, character cells.
        rows: u16,
    },
}

/// This side of the standard streams.
#[derive(Debug)]
pub(super) enum Ends {
    /// Pipes.
    Pipes {
        /// Into the program; `None` when it reads the null device.
        stdin: Option<OwnedFd>,
        /// Out of it.
        stdout: OwnedFd,
        /// Out of it.
        stderr: OwnedFd,
    },
    /// The controlling side of the terminal.
    Terminal(OwnedFd),
}

/// A program that runs.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) pid: u32,
    pub(super) ended: oneshot::Receiver<Ended>,
    pub(super) ends: Ends,
}

/// Why a program did not start.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// Its directory is not there.
    #[error("cwd '{}' does not exist", .0.display())]
    NoDirectory(PathBuf),
    /// Its directory is something else.
    #[error("cwd '{}' is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// Only root can become another user.
    #[error("run as user '{0}': this daemon runs as another user and not as root")]
    OtherUser(String),
    /// The kernel gave no pipe or terminal.
    #[error("open the standard streams")]
    Streams(#[source] io::Error),
    /// The host froze the sandbox and did not thaw it.
    #[error("start '{0}': the sandbox is frozen for a snapshot; try again")]
    Frozen(String),
    /// The program could not be run.
    #[error("start '{cmd}'")]
    Run {
        /// What was to be run.
        cmd: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Starts a program, in a control group of `workload` when there is one. Blocks for the length of
/// a fork and an exec, and while the sandbox is frozen.
///
/// # Errors
/// [`StartError`]; nothing of it is left behind then.
pub(super) fn start(program: Program, workload: Option<&Workload>) -> Result<Started, StartError> {
    check_directory(&program.cwd)?;
    let credentials = credentials(&program.user)?;
    let cwd = CString::new(program.cwd.as_os_str().as_bytes())
        .map_err(|_| StartError::NoDirectory(program.cwd.clone()))?;
    let mut command = Command::new(&program.cmd);
    command.args(&program.args).env_clear().envs(&program.env);
    let ends = connect(&mut command, program.streams).map_err(StartError::Streams)?;
    let terminal = matches!(program.streams, Streams::Terminal { .. });
    let setup = ChildSetup {
        group: workload.map(|workload| workload.group(terminal)),
        terminal,
        oom_score_adj: OOM_SCORE_ADJ,
        credentials,
        cwd,
    };
    sys::install_child_setup(&mut command, setup);
    let starting = workload.map(Workload::start).transpose();
    let starting = starting.map_err(|_| StartError::Frozen(program.cmd.clone()))?;
    let outcome = children::spawn(&mut command);
    drop(starting);
    let (pid, ended) = outcome.map_err(|source| StartError::Run { cmd: program.cmd, source })?;
    // `command` still holds the child's ends of the pipes: they close here, so that reading
    // reaches the end when the last program that holds one is gone.
    drop(command);
    Ok(Started { pid, ended, ends })
}

fn check_directory(path: &Path) -> Result<(), StartError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(StartError::NotADirectory(path.to_owned())),
        Err(_) => Err(StartError::NoDirectory(path.to_owned())),
    }
}

fn credentials(user: &User) -> Result<Option<Credentials>, StartError> {
    let own = rustix::process::geteuid();
    if own.is_root() {
        let User { uid, gid, .. } = *user;
        return Ok(Some(Credentials { uid, gid, groups: user.groups.clone() }));
    }
    if own.as_raw() == user.uid {
        return Ok(None);
    }
    Err(StartError::OtherUser(user.name.clone()))
}

fn connect(command: &mut Command, streams: Streams) -> io::Result<Ends> {
    match streams {
        Streams::Pipes { stdin } => {
            let (stdout, child_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
            let (stderr, child_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
            command.stdout(child_stdout).stderr(child_stderr);
            let stdin = if stdin {
                let (child_stdin, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
                command.stdin(child_stdin);
                Some(stdin)
            } else {
                command.stdin(Stdio::null());
                None
            };
            Ok(Ends::Pipes { stdin, stdout, stderr })
        }
        Streams::Terminal { columns, rows } => {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let ours = rustix::pty::openpt(flags)?;
            rustix::pty::unlockpt(&ours)?;
            let child = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
            rustix::termios::tcsetwinsize(&child, window_size(columns, rows))?;
            command.stdin(child.try_clone()?).stdout(child.try_clone()?).stderr(child);
            Ok(Ends::Terminal(ours))
        }
    }
}
