//! Runs other programs: output to a log, a deadline, and an end when the scope is cancelled.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use belljar_daemon::Scope;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

/// How much of a program's last output an error carries.
const TAIL_BYTES: usize = 2000;
/// How long a program may clean up after itself before it is killed.
const TERM_GRACE: Duration = Duration::from_secs(15);

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It is not installed.
    #[error("run `{program}`: it is not installed (Debian package `{package}`)")]
    Missing {
        /// The program.
        program: &'static str,
        /// The Debian package it comes from.
        package: &'static str,
    },
    /// It could not be started or watched.
    #[error("run `{program}`")]
    Io {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said that it failed.
    #[error("run `{program}`: {status}; whole output in {}, which ends with:\n{tail}", log.display())]
    Failed {
        /// The program.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// Where all its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// It took too long and was killed.
    #[error(
        "run `{program}` within {waited_s} s; whole output in {}, which ends with:\n{tail}",
        log.display()
    )]
    TimedOut {
        /// The program.
        program: &'static str,
        /// How long was waited.
        waited_s: u64,
        /// Where all its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// The build was cancelled and the program killed.
    #[error("run `{program}` to its end: the build was cancelled")]
    Cancelled {
        /// The program.
        program: &'static str,
    },
}

/// A program to run.
pub(crate) struct Program<'a> {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(&'static str, &'static str)>,
    pub(crate) current_dir: &'a Path,
    /// Gets standard output and error, added to what is there.
    pub(crate) log: &'a Path,
    pub(crate) deadline: Duration,
}

impl Program<'_> {
    /// Runs it and hands each line of its output to `on_line`.
    ///
    /// The program gets a process group of its own, which ends as a whole: package tools start
    /// many others. Not cancel-safe: a dropped call kills the program but not what that has started;
    /// cancel the scope instead.
    pub(crate) async fn run(
        self,
        scope: &Scope,
        mut on_line: impl FnMut(&str),
    ) -> Result<(), ProgramError> {
        let program = self.name;
        let io = |source| ProgramError::Io { program, source };
        let (mut output, mut child) = self.spawn()?;
        let mut log = tokio::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log)
            .await
            .map_err(io)?;
        let mut tail = Tail::default();
        let outcome = tokio::select! {
            outcome = tokio::time::timeout(self.deadline, async {
                copy(&mut output, &mut log, &mut tail, &mut on_line).await?;
                child.wait().await
            }) => outcome,
            () = scope.cancelled() => {
                end(&mut child).await.map_err(io)?;
                return Err(ProgramError::Cancelled { program });
            }
        };
        let log = self.log.to_owned();
        match outcome {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(ProgramError::Failed { program, status, log, tail: tail.text() }),
            Ok(Err(source)) => Err(io(source)),
            Err(_) => {
                end(&mut child).await.map_err(io)?;
                let waited_s = self.deadline.as_secs();
                Err(ProgramError::TimedOut { program, waited_s, log, tail: tail.text() })
            }
        }
    }

    fn spawn(&self) -> Result<(pipe::Receiver, Child), ProgramError> {
        let io = |source| ProgramError::Io { program: self.name, source };
        let (reader, writer) = std::io::pipe().map_err(io)?;
        let child = Command::new(self.name)
            .args(&self.args)
            .envs(self.env.iter().copied())
            .current_dir(self.current_dir)
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(io)?)
            .stderr(writer)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => {
                    ProgramError::Missing { program: self.name, package: self.package }
                }
                _ => io(e),
            })?;
        Ok((pipe::Receiver::from_owned_fd(reader.into()).map_err(io)?, child))
    }
}

/// Asks the program and all it started to end, and makes them end when they do not.
async fn end(child: &mut Child) -> io::Result<()> {
    // Without an id the program has been waited for, and its group may be somebody else's by now.
    let Some(group) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else {
        return Ok(());
    };
    // It may have ended by itself; the wait tells.
    let _gone = kill_process_group(group, Signal::TERM).is_err();
    let ended = tokio::time::timeout(TERM_GRACE, child.wait()).await;
    if ended.is_err() {
        let _gone = kill_process_group(group, Signal::KILL).is_err();
        child.wait().await?;
    }
    Ok(())
}

async fn copy(
    output: &mut pipe::Receiver,
    log: &mut File,
    tail: &mut Tail,
    on_line: &mut impl FnMut(&str),
) -> io::Result<()> {
    let mut buf = [0; 4096];
    let mut line = Vec::new();
    loop {
        let len = output.read(&mut buf).await?;
        if len == 0 {
            break;
        }
        log.write_all(&buf[..len]).await?;
        tail.push(&buf[..len]);
        for byte in &buf[..len] {
            match byte {
                b'\n' => {
                    on_line(String::from_utf8_lossy(&line).trim_end());
                    line.clear();
                }
                byte if line.len() < TAIL_BYTES => line.push(*byte),
                _ => {}
            }
        }
    }
    log.flush().await
}

/// The last bytes of an output.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let surplus = self.0.len().saturating_sub(TAIL_BYTES);
        self.0.drain(..surplus);
    }

    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        // A cut-off first line says nothing.
        let whole = match text.split_once('\n') {
            Some((_, rest)) if self.0.len() == TAIL_BYTES => rest,
            _ => &text,
        };
        whole.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, dir: &Path, deadline: Duration) -> (PathBuf, Vec<OsString>, Duration) {
        (dir.join("log"), vec!["-c".into(), script.into()], deadline)
    }

    async fn run(
        scope: &Scope,
        script: &str,
        dir: &Path,
        deadline: Duration,
    ) -> (Result<(), ProgramError>, Vec<String>) {
        let (log, args, deadline) = sh(script, dir, deadline);
        let program = Program {
            name: "sh",
            package: "dash",
            args,
            env: vec![],
            current_dir: dir,
            log: &log,
            deadline,
        };
        let mut lines = Vec::new();
        let outcome = program.run(scope, |line| lines.push(line.to_owned())).await;
        (outcome, lines)
    }

    #[tokio::test]
    async fn a_failure_shows_the_end_of_the_output() {
        let dir = tempfile::tempdir().expect("temp folder");
        let scope = Scope::root("test");
        let minute = Duration::from_secs(60);
        let script = "seq 1 2000; echo out; echo err >&2; exit 3";
        let (outcome, lines) = run(&scope, script, dir.path(), minute).await;
        assert_eq!(lines.len(), 2002);
        let text = outcome.expect_err("exit 3").to_string();
        assert!(text.contains("exit status: 3") && text.ends_with("2000\nout\nerr"), "{text}");
        let log = std::fs::read_to_string(dir.path().join("log")).expect("log");
        assert!(log.starts_with("1\n2\n"));
        let (outcome, _) = run(&scope, "true", dir.path(), minute).await;
        outcome.expect("true succeeds");
    }

    #[tokio::test]
    async fn a_program_ends_with_its_deadline_or_its_scope() {
        let dir = tempfile::tempdir().expect("temp folder");
        let scope = Scope::root("test");
        let short = Duration::from_millis(100);
        let (outcome, _) = run(&scope, "exec sleep 600", dir.path(), short).await;
        assert!(matches!(outcome, Err(ProgramError::TimedOut { .. })));
        scope.cancel();
        let minute = Duration::from_secs(60);
        let (outcome, _) = run(&scope, "exec sleep 600", dir.path(), minute).await;
        assert!(matches!(outcome, Err(ProgramError::Cancelled { .. })));
    }

    #[tokio::test]
    async fn a_missing_program_names_its_package() {
        let dir = tempfile::tempdir().expect("temp folder");
        let log = dir.path().join("log");
        let program = Program {
            name: "belljar-no-such-program",
            package: "nothing",
            args: vec![],
            env: vec![],
            current_dir: dir.path(),
            log: &log,
            deadline: Duration::from_secs(1),
        };
        let outcome = program.run(&Scope::root("test"), |_| {}).await;
        assert!(matches!(outcome, Err(ProgramError::Missing { package: "nothing", .. })));
    }
}
