//! What processes say and do, copied line by line for the host's log of this sandbox.
//!
//! ```text
//! output of a process ──► LogStream: lines ──► allowance ──► queue ──► control port
//!                                                 └── used up: counted, not kept
//! ```
//!
//! The copy never holds a process back. What the allowance does not cover, or the queue has no
//! room for, is left out, and a later line says how much that was; counting costs one look for
//! line feeds. Before a host asks for logs nothing is kept at all. After a snapshot is prepared lines
//! are kept and not given out: the machine that goes on sends them, a clone throws them away.

mod lines;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use belljar_wire::guest::{LOG_COMMAND_MAX_BYTES, LogEvent, LogLevel, LogLine, cut_text};
use belljar_wire::rpc::process::ProcessConfig;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use self::lines::{Author, Lines, Speaker};
use super::output::{End, Source};
use crate::clock;

/// Collects the lines of every process until the control port takes them.
#[derive(Debug, Default)]
pub(crate) struct LogTap {
    /// As in `lines`, for a look without the lock.
    wanted: AtomicBool,
    /// Whether what is kept must stay here.
    held: AtomicBool,
    /// Counted up when everything kept was thrown away.
    epoch: AtomicU64,
    /// Rings when there is something to take.
    alarm: OnceLock<OwnedFd>,
    lines: Mutex<Lines>,
}

impl LogTap {
    /// Starts or stops keeping lines. What was kept is thrown away when it stops, and when it was
    /// held back: whoever asks now is not who was to hear it.
    pub(crate) fn want(&self, wanted: bool) {
        if self.held.swap(false, Ordering::AcqRel) {
            self.clear();
        }
        let mut lines = self.lock();
        lines.wanted = wanted;
        self.wanted.store(wanted, Ordering::Release);
        if !wanted {
            lines.clear();
        }
    }

    /// Whether lines are kept.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Gives out nothing until [`LogTap::release`] or [`LogTap::want`].
    pub(crate) fn hold(&self) {
        self.held.store(true, Ordering::Release);
    }

    /// Gives out again what was held back.
    pub(crate) fn release(&self) {
        self.held.store(false, Ordering::Release);
    }

    /// Whether nothing is given out.
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Throws away everything kept: it is of no use to the host, or none of its business.
    pub(crate) fn clear(&self) {
        self.lock().clear();
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Changes with [`LogTap::clear`]: lines taken before are not to be sent any more.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// A timer that expires when lines are worth taking.
    ///
    /// # Errors
    /// As `timerfd_create(2)`.
    pub(crate) fn alarm(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(alarm) = self.alarm.get() {
            return Ok(alarm.as_fd());
        }
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let alarm = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(self.alarm.get_or_init(|| alarm).as_fd())
    }

    /// The next lines for the host, oldest first; `None` when there are none.
    pub(crate) fn batch(&self) -> Option<Vec<LogLine>> {
        let now = Instant::now();
        let mut lines = self.lock();
        let batch = lines.batch(now);
        self.ring_for(&mut lines, now);
        batch
    }

    /// Opens the log of a process and writes its start.
    pub(super) fn process(self: &Arc<Self>, pid: u32, config: &ProcessConfig) -> ProcessLog {
        let author = Arc::new(Author { pid, command: command_line(config) });
        let log = ProcessLog { tap: Arc::clone(self), author };
        let text = format!("Process with pid {pid} started");
        log.say(LogLevel::Info, LogEvent::ProcessStart, text);
        log
    }

    /// The lines to add to and the time, with the allowance that time brings; `None` when no lines
    /// are kept.
    fn wanted_lines(&self) -> Option<(MutexGuard<'_, Lines>, Instant)> {
        if !self.is_wanted() {
            return None;
        }
        let now = Instant::now();
        let mut lines = self.lock();
        if !lines.wanted {
            return None;
        }
        lines.allowance.refill(now);
        Some((lines, now))
    }

    fn ring_for(&self, lines: &mut Lines, now: Instant) {
        let (Some(alarm), Some(at)) = (self.alarm.get(), lines.next_due(now)) else { return };
        if lines.alarm_at.is_some_and(|set| set > now && set <= at) {
            return;
        }
        lines.alarm_at = Some(at);
        // Zero would switch the timer off.
        let wait = at.saturating_duration_since(now).max(Duration::from_millis(1));
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(1),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        // It only fails for arguments that are not valid; the port looks once a second anyway.
        let _ = timerfd_settime(alarm, TimerfdTimerFlags::empty(), &once);
    }

    /// A panic of a holder may at worst lose lines.
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One process's log.
#[derive(Debug)]
pub(super) struct ProcessLog {
    tap: Arc<LogTap>,
    author: Arc<Author>,
}

impl ProcessLog {
    /// The log of one of its outputs.
    pub(super) fn stream(&self, source: Source) -> LogStream {
        let mut lines = self.tap.lock();
        lines.streams += 1;
        let (level, event) = match source {
            Source::Stdout => (LogLevel::Info, LogEvent::Stdout),
            // The usual reading, the system journal's for services and containers among others:
            // what a program has to say besides its result.
            Source::Stderr => (LogLevel::Error, LogEvent::Stderr),
            Source::Terminal => (LogLevel::Info, LogEvent::Pty),
        };
        let tap = Arc::clone(&self.tap);
        let speaker = Speaker { author: Arc::clone(&self.author), level, event };
        LogStream { tap, id: lines.streams, speaker, skipping: false }
    }

    /// Writes the end.
    pub(super) fn ended(&self, end: &End) {
        let level = if end.error.is_none() { LogLevel::Info } else { LogLevel::Warn };
        let text = format!("Process with pid {} ended: {}", self.author.pid, end.status);
        self.say(level, LogEvent::ProcessEnd, text);
    }

    fn say(&self, level: LogLevel, event: LogEvent, text: String) {
        let Some((mut lines, now)) = self.tap.wanted_lines() else { return };
        let speaker = Speaker { author: Arc::clone(&self.author), level, event };
        lines.push(&speaker, &text, false, clock::unix_millis());
        self.tap.ring_for(&mut lines, now);
    }
}

/// One output of a process, on its way into lines. Dropping it ends its last line.
#[derive(Debug)]
pub(super) struct LogStream {
    tap: Arc<LogTap>,
    id: u64,
    speaker: Speaker,
    /// The line that comes now has lost its start.
    skipping: bool,
}

impl LogStream {
    /// Keeps the lines of a piece of output. Never waits for anything but the lock.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        let Some((mut lines, now)) = self.tap.wanted_lines() else { return };
        self.skipping = lines.take(self.id, &self.speaker, bytes, self.skipping, now);
        self.tap.ring_for(&mut lines, now);
    }
}

impl Drop for LogStream {
    fn drop(&mut self) {
        let mut lines = self.tap.lock();
        if let Some(partial) = lines.partials.remove(&self.id) {
            lines.finish(partial);
            self.tap.ring_for(&mut lines, Instant::now());
        }
    }
}

/// Has a process say `text` on its standard output.
#[cfg(test)]
pub(crate) fn test_lines(tap: &Arc<LogTap>, text: &str) {
    let author = Arc::new(Author { pid: 7, command: "test".to_owned() });
    let log = ProcessLog { tap: Arc::clone(tap), author };
    log.stream(Source::Stdout).take(text.as_bytes());
}

/// A program and its arguments, on one line, no longer than a log needs to tell commands apart.
fn command_line(config: &ProcessConfig) -> String {
    let mut text = String::new();
    for word in std::iter::once(&config.cmd).chain(&config.args) {
        if !text.is_empty() {
            text.push(' ');
        }
        let word = cut_text(word, LOG_COMMAND_MAX_BYTES);
        text.extend(word.chars().map(|c| if c.is_control() { ' ' } else { c }));
        if text.len() >= LOG_COMMAND_MAX_BYTES {
            break;
        }
    }
    cut_text(&text, LOG_COMMAND_MAX_BYTES).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cmd: &str, args: &[&str]) -> ProcessConfig {
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        ProcessConfig { cmd: cmd.to_owned(), args, ..ProcessConfig::default() }
    }

    fn tap() -> Arc<LogTap> {
        let tap = Arc::<LogTap>::default();
        tap.want(true);
        tap
    }

    fn end(code: i32) -> End {
        End::new(Some(crate::children::Ended::Exited(code)))
    }

    #[test]
    fn a_process_is_logged_from_its_start_to_its_end() {
        let tap = tap();
        let log = tap.process(12, &config("/bin/bash", &["-l", "-c", "echo\tx\ny"]));
        let (mut stdout, mut stderr) = (log.stream(Source::Stdout), log.stream(Source::Stderr));
        stdout.take(b"out\nmore");
        stderr.take(b"err\n");
        drop(stdout);
        log.stream(Source::Terminal).take(b"tty\r\n");
        log.ended(&end(3));
        let lines = tap.batch().expect("lines");
        let seen: Vec<_> =
            lines.iter().map(|line| (line.event, line.level, line.text.as_str())).collect();
        assert_eq!(
            seen,
            [
                (LogEvent::ProcessStart, LogLevel::Info, "Process with pid 12 started"),
                (LogEvent::Stdout, LogLevel::Info, "out"),
                (LogEvent::Stderr, LogLevel::Error, "err"),
                (LogEvent::Stdout, LogLevel::Info, "more"),
                (LogEvent::Pty, LogLevel::Info, "tty"),
                (LogEvent::ProcessEnd, LogLevel::Warn, "Process with pid 12 ended: exit status 3"),
            ]
        );
        assert!(lines.iter().all(|line| line.pid == 12));
        assert!(lines.iter().all(|line| line.command == "/bin/bash -l -c echo x y"));
        assert!(lines.iter().all(|line| line.at_unix_ms > 1_600_000_000_000));
        assert_eq!(tap.batch(), None);
    }

    #[test]
    fn nothing_is_kept_that_nobody_wants() {
        let tap = Arc::<LogTap>::default();
        let log = tap.process(12, &config("true", &[]));
        let mut stream = log.stream(Source::Stdout);
        stream.take(b"before\nhalf");
        tap.want(true);
        assert_eq!(tap.batch(), None);
        stream.take(b"a line\nhalf");
        tap.want(false);
        stream.take(b" after\n");
        tap.want(true);
        drop(stream);
        assert_eq!(tap.batch(), None);
    }

    #[test]
    fn long_commands_are_cut_without_being_copied_whole() {
        let long = "\u{fc}".repeat(1000);
        let line = command_line(&config("sh", &["-c", &long, "never"]));
        assert_eq!(line, format!("sh -c {}", "\u{fc}".repeat(125)));
        assert_eq!(line.len(), LOG_COMMAND_MAX_BYTES);
    }

    #[test]
    fn the_alarm_rings_once_lines_are_there_and_for_a_line_that_stays_unfinished() {
        use rustix::event::{PollFd, PollFlags, poll};
        let tap = tap();
        let rings = |tap: &LogTap, limit_ms: i64| {
            let alarm = tap.alarm().expect("a timer");
            let mut polled = [PollFd::new(&alarm, PollFlags::IN)];
            let limit = Timespec { tv_sec: 0, tv_nsec: limit_ms * 1_000_000 };
            poll(&mut polled, Some(&limit)).expect("polls") == 1
        };
        assert!(!rings(&tap, 0), "nothing is there");
        let log = ProcessLog {
            tap: Arc::clone(&tap),
            author: Arc::new(Author { pid: 1, command: String::new() }),
        };
        let mut stream = log.stream(Source::Stdout);
        stream.take(b"line\n");
        assert!(rings(&tap, 900));
        assert_eq!(tap.batch().expect("a line").len(), 1);
        stream.take(b"prompt> ");
        assert_eq!(tap.batch(), None, "it may still be finished");
        assert!(!rings(&tap, 300));
        assert!(rings(&tap, 900));
        let lines = tap.batch().expect("the prompt");
        assert_eq!((lines[0].text.as_str(), lines[0].cut), ("prompt> ", false));
        stream.take(b"\nnext\n");
        let lines = tap.batch().expect("the next line");
        assert_eq!(lines.len(), 1, "the prompt's own end is no line");
    }
}
