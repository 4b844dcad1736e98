//! What the processes of one sandbox said, as far as this host keeps it: the newest lines, in memory,
//! until the sandbox ends.
//!
//! Everything in a line is the guest's word, so everything is cut to size here. Times only go
//! forward, and entries of two messages never share a millisecond: a reader who goes on after the
//! last time it has seen misses nothing and sees nothing twice.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use belljar_domain::UnixMillis;
use belljar_wire::guest::{
    LOG_COMMAND_MAX_BYTES, LOG_TEXT_MAX_BYTES, LogEvent, LogLevel, LogLine, cut_text,
};

/// Most entries kept.
const ENTRIES_MAX: usize = 10_000;
/// Most bytes kept, counting each entry as its texts and [`ENTRY_COST_BYTES`].
const KEPT_MAX_BYTES: usize = 1024 * 1024;
/// What an entry takes besides its texts.
const ENTRY_COST_BYTES: usize = 96;
/// Most entries of one millisecond. Pages end between two times, so a page of at least as many
/// entries misses nothing.
const SAME_TIME_MAX: usize = 10;
/// How far the times may run ahead of this host's clock: messages and full milliseconds move them on.
/// Only a guest that floods gets there, and what it says then is left out.
const AHEAD_MAX_MS: i64 = 2000;

/// One line of a sandbox's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// When, by the guest's clock, but never before the entry before it, and never more than two
    /// seconds after this host's now.
    pub at: UnixMillis,
    /// How bad.
    pub level: LogLevel,
    /// What it is about.
    pub event: LogEvent,
    /// The process in the guest; 0 when it is about none.
    pub pid: u32,
    /// Its program and arguments, at most [`LOG_COMMAND_MAX_BYTES`].
    pub command: Arc<str>,
    /// The line, at most [`LOG_TEXT_MAX_BYTES`].
    pub text: Box<str>,
    /// Whether the line was longer and goes on in the next one of the same process.
    pub cut: bool,
}

/// Which way to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Oldest first.
    Forward,
    /// Newest first.
    Backward,
}

/// Which entries are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogQuery {
    /// Forward: entries at this time and later. Backward: entries before it. `None` is the end one
    /// reads from.
    pub cursor: Option<UnixMillis>,
    /// Most entries answered.
    pub limit: usize,
    /// Which way.
    pub direction: Direction,
    /// Less bad ones are left out.
    pub min_level: LogLevel,
    /// What the line must contain; empty is everything.
    pub search: String,
}

impl LogQuery {
    fn wants(&self, entry: &LogEntry) -> bool {
        entry.level >= self.min_level
            && self.search.len() <= entry.text.len()
            && entry.text.contains(&self.search)
    }
}

/// The log of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct SandboxLog {
    // Held to add one message or to read one page, never across a wait.
    ring: Mutex<Ring>,
}

impl SandboxLog {
    /// Adds what a guest sent in one message. The oldest entries make room.
    pub(crate) fn add(&self, lines: Vec<LogLine>, now: UnixMillis) {
        self.ring().add(lines, now);
    }

    /// The wanted entries. A page that would end between entries of the same time ends before
    /// them, unless nothing would be left.
    pub(crate) fn read(&self, query: &LogQuery) -> Vec<LogEntry> {
        self.ring().read(query)
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // A panic while it was held may at worst have lost lines.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<LogEntry>,
    kept_bytes: usize,
    /// Of the newest entry there ever was.
    newest: Option<UnixMillis>,
    /// Entries at `newest`.
    same_time: usize,
}

impl Ring {
    fn add(&mut self, lines: Vec<LogLine>, now: UnixMillis) {
        let mut earliest = self.newest.map(|at| UnixMillis(at.0.saturating_add(1)));
        for line in lines {
            if earliest.is_some_and(|at| at.0 > now.0.saturating_add(AHEAD_MAX_MS)) {
                return;
            }
            let mut at = UnixMillis(line.at_unix_ms).min(now);
            at = at.max(earliest.unwrap_or(UnixMillis(0)));
            if self.newest == Some(at) {
                if self.same_time >= SAME_TIME_MAX {
                    at = UnixMillis(at.0.saturating_add(1));
                    self.same_time = 0;
                }
            } else {
                self.same_time = 0;
            }
            self.same_time += 1;
            self.newest = Some(at);
            earliest = Some(at);
            self.push(line, at);
        }
    }

    fn push(&mut self, line: LogLine, at: UnixMillis) {
        let command = cut_text(&line.command, LOG_COMMAND_MAX_BYTES);
        // Lines of one process come together: they share its name.
        let command = match self.entries.back() {
            Some(last) if *last.command == *command => Arc::clone(&last.command),
            _ => Arc::from(command),
        };
        let text = cut_text(&line.text, LOG_TEXT_MAX_BYTES).into();
        let LogLine { level, event, pid, cut, .. } = line;
        let entry = LogEntry { at, level, event, pid, command, text, cut };
        self.kept_bytes += kept_bytes(&entry);
        if self.entries.is_empty() {
            // Many a sandbox says one thing and no more.
            self.entries.reserve_exact(1);
        }
        self.entries.push_back(entry);
        while self.entries.len() > ENTRIES_MAX || self.kept_bytes > KEPT_MAX_BYTES {
            let Some(oldest) = self.entries.pop_front() else { return };
            self.kept_bytes -= kept_bytes(&oldest);
        }
    }

    fn read(&self, query: &LogQuery) -> Vec<LogEntry> {
        let cursor = query.cursor;
        match query.direction {
            Direction::Forward => {
                let start = cursor.map_or(0, |at| self.entries.partition_point(|e| e.at < at));
                page(self.entries.range(start..), query)
            }
            Direction::Backward => {
                let all = self.entries.len();
                let end = cursor.map_or(all, |at| self.entries.partition_point(|e| e.at < at));
                page(self.entries.range(..end).rev(), query)
            }
        }
    }
}

fn page<'a>(entries: impl Iterator<Item = &'a LogEntry>, query: &LogQuery) -> Vec<LogEntry> {
    let mut wanted = entries.filter(|entry| query.wants(entry));
    let mut page: Vec<LogEntry> = wanted.by_ref().take(query.limit).cloned().collect();
    if let (Some(last), Some(next)) = (page.last(), wanted.next())
        && last.at == next.at
    {
        let at = last.at;
        let whole = page.iter().take_while(|entry| entry.at != at).count();
        if whole > 0 {
            page.truncate(whole);
        }
    }
    page
}

fn kept_bytes(entry: &LogEntry) -> usize {
    entry.text.len() + entry.command.len() + ENTRY_COST_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000_000);

    fn line(at_unix_ms: i64, level: LogLevel, text: &str) -> LogLine {
        let (event, command) = (LogEvent::Stdout, "sh -c x".to_owned());
        LogLine { at_unix_ms, level, event, pid: 7, command, text: text.to_owned(), cut: false }
    }

    fn info(at_unix_ms: i64, text: &str) -> LogLine {
        line(at_unix_ms, LogLevel::Info, text)
    }

    fn all() -> LogQuery {
        LogQuery {
            cursor: None,
            limit: 1000,
            direction: Direction::Forward,
            min_level: LogLevel::Debug,
            search: String::new(),
        }
    }

    fn texts(log: &SandboxLog, query: &LogQuery) -> Vec<String> {
        log.read(query).iter().map(|entry| entry.text.to_string()).collect()
    }

    fn times(log: &SandboxLog) -> Vec<i64> {
        log.read(&LogQuery { limit: 10_000, ..all() }).iter().map(|entry| entry.at.0).collect()
    }

    #[test]
    fn entries_are_found_by_time_level_and_content() {
        let log = SandboxLog::default();
        log.add(vec![info(100, "one"), line(200, LogLevel::Error, "two")], NOW);
        log.add(vec![line(300, LogLevel::Warn, "three"), info(400, "four")], NOW);
        assert_eq!(texts(&log, &all()), ["one", "two", "three", "four"]);
        let backward = LogQuery { direction: Direction::Backward, ..all() };
        assert_eq!(texts(&log, &backward), ["four", "three", "two", "one"]);
        let since = LogQuery { cursor: Some(UnixMillis(200)), ..all() };
        assert_eq!(texts(&log, &since), ["two", "three", "four"]);
        let before = LogQuery { cursor: Some(UnixMillis(300)), ..backward };
        assert_eq!(texts(&log, &before), ["two", "one"]);
        let warnings = LogQuery { min_level: LogLevel::Warn, ..all() };
        assert_eq!(texts(&log, &warnings), ["two", "three"]);
        let search = LogQuery { search: "o".to_owned(), limit: 2, ..all() };
        assert_eq!(texts(&log, &search), ["one", "two"]);
        let nothing = LogQuery { search: "One".to_owned(), ..all() };
        assert_eq!(texts(&log, &nothing), [""; 0]);
        assert_eq!(texts(&log, &LogQuery { limit: 0, ..all() }), [""; 0]);
        let entry = &log.read(&all())[0];
        assert_eq!((entry.pid, &*entry.command, entry.event), (7, "sh -c x", LogEvent::Stdout));
    }

    #[test]
    fn whatever_clock_a_guest_has_times_go_forward_and_not_beyond_now() {
        let log = SandboxLog::default();
        log.add(vec![info(500, "a"), info(-5, "b"), info(i64::MAX, "c"), info(i64::MIN, "d")], NOW);
        assert_eq!(times(&log), [500, 500, NOW.0, NOW.0]);
        // The next message starts a millisecond of its own.
        log.add(vec![info(0, "e"), info(0, "f")], NOW);
        assert_eq!(times(&log)[4..], [NOW.0 + 1, NOW.0 + 1]);
        log.add((0..1200).map(|_| info(0, "g")).collect(), UnixMillis(2_000_000));
        let last = *times(&log).last().expect("entries");
        assert_eq!(last, NOW.0 + 121, "no millisecond holds more than ten");
        for _ in 0..10_000 {
            log.add(vec![info(0, "h")], NOW);
        }
        let last = *times(&log).last().expect("entries");
        assert!(last <= NOW.0 + AHEAD_MAX_MS + 1, "{last}: a flood of messages does not run away");
    }

    #[test]
    fn a_reader_that_goes_on_after_the_last_time_sees_everything_once() {
        let log = SandboxLog::default();
        for batch in 0..20 {
            let lines = (0..177).map(|n| info(batch * 10, &format!("{batch}.{n}"))).collect();
            log.add(lines, NOW);
        }
        let expected: Vec<String> =
            (0..20).flat_map(|b| (0..177).map(move |n| format!("{b}.{n}"))).collect();
        let limit = SAME_TIME_MAX;
        let (mut seen, mut query) = (Vec::new(), LogQuery { limit, ..all() });
        loop {
            let page = log.read(&query);
            let Some(last) = page.last() else { break };
            query.cursor = Some(UnixMillis(last.at.0 + 1));
            seen.extend(page.iter().map(|entry| entry.text.to_string()));
        }
        assert_eq!(seen, expected);
        let (mut seen, mut query) =
            (Vec::new(), LogQuery { limit, direction: Direction::Backward, ..all() });
        loop {
            let page = log.read(&query);
            let Some(last) = page.last() else { break };
            query.cursor = Some(last.at);
            seen.extend(page.iter().map(|entry| entry.text.to_string()));
        }
        seen.reverse();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_flood_costs_a_bounded_ring_and_keeps_the_newest() {
        let log = SandboxLog::default();
        for n in 0..30_000 {
            log.add(vec![info(n, &n.to_string())], UnixMillis(n));
        }
        let kept = log.ring().entries.len();
        assert!(kept <= ENTRIES_MAX && kept > 9_000, "{kept}");
        assert_eq!(&*log.ring().entries.back().expect("entries").text, "29999");
        let huge = LogLine { command: "c".repeat(1 << 20), ..info(0, &"\u{20ac}".repeat(1 << 20)) };
        for _ in 0..1000 {
            log.add(vec![huge.clone()], NOW);
        }
        let ring = log.ring();
        assert!(ring.kept_bytes <= KEPT_MAX_BYTES);
        let real: usize = ring.entries.iter().map(|e| e.text.len() + e.command.len()).sum();
        assert!(real <= KEPT_MAX_BYTES, "{real}");
        let newest = ring.entries.back().expect("entries");
        assert_eq!(newest.text.len(), LOG_TEXT_MAX_BYTES - 1, "cut between characters");
        assert_eq!(newest.command.len(), LOG_COMMAND_MAX_BYTES);
    }
}
