//! Child processes: what they say goes to a log, and none outlives this program.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

/// A command whose process gets SIGTERM when the thread that started it ends, however it ends.
///
/// `setpriv` is in util-linux, which every Debian has. The calling thread must outlive the child.
pub(crate) fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// A tied command that runs as root: directly, or by `sudo` without asking for a password.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Command {
    if is_root() {
        return tied(program);
    }
    let mut command = Command::new("sudo");
    command.args(["-n", "setpriv", "--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Fails, with what to do about it, unless [`as_root`] will work.
pub(crate) fn require_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let status = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if status.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    bail!("this needs root, and `sudo -n` may not be used without a password here")
}

/// The command as a person would type it, for messages and logs.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    // The wrapper is about us, not about what was asked for.
    match words.iter().position(|word| word == "--").filter(|_| words[0] == "setpriv") {
        Some(at) => words[at + 1..].join(" "),
        None => words.join(" "),
    }
}

/// Runs a command and gives back what it printed on standard output.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let text = describe(&command);
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{text}`"))?;
    if !output.status.success() {
        bail!(
            "`{text}` ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The children that may be stopped early because another step failed.
#[derive(Default)]
pub(crate) struct Running {
    state: Mutex<RunningState>,
}

#[derive(Default)]
struct RunningState {
    stopping: bool,
    children: HashSet<Pid>,
}

impl Running {
    /// Asks every registered child to end, now and from now on.
    pub(crate) fn stop_all(&self) {
        let mut state = self.lock();
        state.stopping = true;
        for child in &state.children {
            ask_to_end(*child);
        }
    }

    /// Whether [`Running::stop_all`] was called.
    pub(crate) fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    fn enter(&self, child: Pid) {
        let mut state = self.lock();
        state.children.insert(child);
        if state.stopping {
            ask_to_end(child);
        }
    }

    /// Called before the child is waited for, while its id cannot belong to anyone else yet.
    fn leave(&self, child: Pid) {
        self.lock().children.remove(&child);
    }

    fn lock(&self) -> MutexGuard<'_, RunningState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ask_to_end(child: Pid) {
    // It may have ended by itself, which is what was wanted.
    let _ = rustix::process::kill_process(child, Signal::TERM);
}

/// The id of a child that was not waited for yet.
pub(crate) fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Runs a command with both its outputs going line by line to `log` and to `on_line`.
///
/// With `running`, it is stopped when another step fails.
pub(crate) fn run_logged(
    mut command: Command,
    mut log: &File,
    running: Option<&Running>,
    mut on_line: impl FnMut(&str),
) -> Result<()> {
    let text = describe(&command);
    writeln!(log, "$ {text}")?;
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start `{text}`"))?;
    // It holds the write ends: the reader would never see the end.
    drop(command);
    let pid = pid_of(&child);
    if let Some(running) = running {
        running.enter(pid);
    }
    let read = each_line(BufReader::new(reader), |line| {
        writeln!(log, "{line}")?;
        on_line(line);
        Ok(())
    });
    if let Some(running) = running {
        running.leave(pid);
    }
    let status = child.wait()?;
    read?;
    if !status.success() {
        bail!("`{text}` ended with {status}");
    }
    Ok(())
}

/// Runs a command in a process group of its own, hands over each line of its standard output and
/// kills the group at the deadline. Standard error goes where ours goes.
pub(crate) fn run_streamed(
    mut command: Command,
    limit: Duration,
    mut on_line: impl FnMut(&str),
) -> Result<ExitStatus> {
    use std::os::unix::process::CommandExt;
    let text = describe(&command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start `{text}`"))?;
    let stdout = child.stdout.take().context("the child has no standard output")?;
    let (sender, lines) = mpsc::sync_channel::<String>(64);
    let deadline = Instant::now() + limit;
    let in_time = std::thread::scope(|scope| {
        scope.spawn(move || {
            // An error is the receiver being gone: nothing is left to tell.
            let _ = each_line(BufReader::new(stdout), |line| Ok(sender.send(line.to_owned())?));
        });
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => on_line(&line),
                Err(RecvTimeoutError::Disconnected) => break true,
                Err(RecvTimeoutError::Timeout) => {
                    // The group may be gone already; then the pipe is closed as well.
                    let _ = rustix::process::kill_process_group(pid_of(&child), Signal::KILL);
                    break false;
                }
            }
        }
    });
    let status = child.wait()?;
    if !in_time {
        bail!("`{text}` did not end within {} s and was killed", limit.as_secs());
    }
    Ok(status)
}

/// Reads lines that need not be UTF-8; a carriage return ends a line too (progress displays).
pub(crate) fn each_line(
    mut reader: impl BufRead,
    mut on_line: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes)? == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&bytes);
        for line in text.trim_end_matches(['\n', '\r']).split('\r') {
            on_line(line)?;
        }
    }
}

/// The last `count` lines of a log, for an error message.
pub(crate) fn tail(path: &Path, count: usize) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_newlines_and_carriage_returns() {
        let mut seen = Vec::new();
        each_line(&b"one\r\n10%\r20%\r30%\nbad \xff byte"[..], |line| {
            seen.push(line.to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, ["one", "10%", "20%", "30%", "bad \u{fffd} byte"]);
    }

    #[test]
    fn a_streamed_command_is_killed_at_its_deadline_with_its_children() {
        let mut command = tied("sh");
        command.args(["-c", "echo started; sleep 600 & wait"]);
        let mut seen = Vec::new();
        let error =
            run_streamed(command, Duration::from_millis(500), |line| seen.push(line.to_owned()))
                .unwrap_err();
        assert_eq!(seen, ["started"]);
        assert!(error.to_string().contains("did not end within"), "{error}");
    }

    #[test]
    fn the_description_leaves_the_wrapper_out() {
        let mut command = tied("make");
        command.arg("-j2");
        assert_eq!(describe(&command), "make -j2");
    }

    #[test]
    fn a_stopped_registry_ends_what_starts_later() {
        let log = File::create("/dev/null").unwrap();
        let running = Running::default();
        running.stop_all();
        let mut command = tied("sleep");
        command.arg("600");
        let error = run_logged(command, &log, Some(&running), |_| {}).unwrap_err();
        assert!(error.to_string().contains("signal: 15"), "{error}");
    }
}
