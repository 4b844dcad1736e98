//! Output cut into lines, and how many of them are kept.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_wire::guest::{LOG_TEXT_MAX_BYTES, LogEvent, LogLevel, LogLine, cut_text};
use memchr::{memchr, memchr_iter, memchr2};

use crate::clock;

/// What is kept for a host that does not take it now, bytes.
const QUEUE_MAX_BYTES: usize = 512 * 1024;

/// What one message to the host holds, bytes before they become JSON: at worst each becomes six.
const BATCH_MAX_BYTES: usize = 16 * 1024;

/// What a line counts besides its text and its command: about its other fields as JSON.
const LINE_COST_BYTES: usize = 96;

/// What a sandbox may log, all processes together: this much at once, and this much a second.
/// Output beyond that is a file, not a log; it costs the guest and the host next to nothing.
const BURST_BYTES: usize = QUEUE_MAX_BYTES;
const BYTES_PER_SECOND: usize = 256 * 1024;

/// How long lines wait for others to share a message with.
const LINGER: Duration = Duration::from_millis(50);

/// How long an unfinished line waits for its end.
const PARTIAL_WAIT: Duration = Duration::from_secs(1);

/// How often left-out lines are told, at most.
const NOTICE_PAUSE: Duration = Duration::from_secs(1);

/// Whose lines they are.
#[derive(Debug)]
pub(super) struct Author {
    pub(super) pid: u32,
    pub(super) command: String,
}

/// Whose lines they are, and what kind.
#[derive(Debug, Clone)]
pub(super) struct Speaker {
    pub(super) author: Arc<Author>,
    pub(super) level: LogLevel,
    pub(super) event: LogEvent,
}

/// What may still be logged now.
#[derive(Debug)]
pub(super) struct Allowance {
    left_bytes: usize,
    /// Up to when it was filled; `None` before the first line.
    filled_at: Option<Instant>,
}

impl Allowance {
    pub(super) fn refill(&mut self, now: Instant) {
        let since = self.filled_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let earned = since.as_micros().saturating_mul(BYTES_PER_SECOND as u128) / 1_000_000;
        let earned = usize::try_from(earned).unwrap_or(BURST_BYTES);
        // Less than a byte is not lost: it is earned by the next look.
        if earned > 0 || self.filled_at.is_none() {
            self.left_bytes = self.left_bytes.saturating_add(earned).min(BURST_BYTES);
            self.filled_at = Some(now);
        }
    }
}

impl Default for Allowance {
    fn default() -> Allowance {
        Allowance { left_bytes: BURST_BYTES, filled_at: None }
    }
}

/// The start of a line whose end has not come.
#[derive(Debug)]
pub(super) struct Partial {
    speaker: Speaker,
    bytes: Vec<u8>,
    since: Instant,
    at_unix_ms: i64,
    /// A part of it was pushed already: an empty rest is no line.
    is_rest: bool,
}

#[derive(Debug)]
struct Kept {
    speaker: Speaker,
    text: String,
    cut: bool,
    at_unix_ms: i64,
}

impl Kept {
    fn cost_bytes(&self) -> usize {
        cost_bytes(&self.speaker, self.text.len())
    }
}

fn cost_bytes(speaker: &Speaker, text_bytes: usize) -> usize {
    text_bytes + speaker.author.command.len() + LINE_COST_BYTES
}

/// What is kept for the host.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// Whether anything is.
    pub(super) wanted: bool,
    queue: VecDeque<Kept>,
    queued_bytes: usize,
    /// By stream. Each holds at most [`LOG_TEXT_MAX_BYTES`], and ends with its stream.
    pub(super) partials: HashMap<u64, Partial>,
    pub(super) allowance: Allowance,
    dropped_lines: u64,
    dropped_bytes: u64,
    noticed_at: Option<Instant>,
    pub(super) alarm_at: Option<Instant>,
    /// How many streams there have been.
    pub(super) streams: u64,
}

impl Lines {
    /// Throws everything away.
    pub(super) fn clear(&mut self) {
        let (streams, wanted) = (self.streams, self.wanted);
        // The allowance starts anew too: a clone owes nothing for what its origin said.
        *self = Lines { streams, wanted, ..Lines::default() };
    }

    /// Cuts a piece of output into lines. Says whether the rest of the last one is to be skipped.
    pub(super) fn take(
        &mut self,
        id: u64,
        speaker: &Speaker,
        bytes: &[u8],
        skipping: bool,
        now: Instant,
    ) -> bool {
        let mut rest = bytes;
        if skipping {
            // What draws over its own line never ends it otherwise.
            let Some(at) = memchr2(b'\n', b'\r', rest) else {
                self.leave_out(rest);
                return true;
            };
            self.leave_out(&rest[..=at]);
            rest = &rest[at + 1..];
        }
        let at_unix_ms = clock::unix_millis();
        let mut partial = self.partials.remove(&id);
        while !rest.is_empty() {
            let end = memchr(b'\n', rest);
            let line = &rest[..end.unwrap_or(rest.len())];
            let begun = partial.as_ref().map_or(0, |partial| partial.bytes.len());
            // A flood must cost one look, so nothing is cut that would not be kept.
            if !self.has_room(speaker, (begun + line.len()).min(LOG_TEXT_MAX_BYTES)) {
                self.leave_out(rest);
                if let Some(partial) = partial {
                    self.leave_out(&partial.bytes);
                }
                return !rest.ends_with(b"\n");
            }
            let mut open = partial.take().unwrap_or_else(|| Partial {
                speaker: speaker.clone(),
                bytes: Vec::new(),
                since: now,
                at_unix_ms,
                is_rest: false,
            });
            if open.bytes.is_empty() {
                // What there was of it has been told.
                (open.since, open.at_unix_ms) = (now, at_unix_ms);
            }
            let room = LOG_TEXT_MAX_BYTES - open.bytes.len();
            if line.len() > room {
                open.bytes.extend_from_slice(&line[..room]);
                rest = &rest[room..];
                self.push_full(&mut open);
                partial = Some(open);
                continue;
            }
            open.bytes.extend_from_slice(line);
            let Some(end) = end else {
                self.partials.insert(id, open);
                return false;
            };
            rest = &rest[end + 1..];
            self.finish(open);
        }
        if let Some(partial) = partial {
            self.partials.insert(id, partial);
        }
        false
    }

    /// Pushes what there is of a line that is too long for one entry, up to a whole character.
    fn push_full(&mut self, open: &mut Partial) {
        let tail = open.bytes.split_off(whole_characters(&open.bytes));
        let text = String::from_utf8_lossy(&open.bytes).into_owned();
        self.push(&open.speaker, &text, true, open.at_unix_ms);
        open.bytes = tail;
        open.is_rest = true;
    }

    /// Pushes a line that is over.
    pub(super) fn finish(&mut self, open: Partial) {
        let bytes = open.bytes.strip_suffix(b"\r").unwrap_or(&open.bytes);
        if bytes.is_empty() && open.is_rest {
            return;
        }
        self.push(&open.speaker, &String::from_utf8_lossy(bytes), false, open.at_unix_ms);
    }

    /// Keeps one line, or counts it. Bytes that were not UTF-8 have grown: they may need several.
    pub(super) fn push(&mut self, speaker: &Speaker, text: &str, cut: bool, at_unix_ms: i64) {
        let mut rest = text;
        loop {
            let part = cut_text(rest, LOG_TEXT_MAX_BYTES);
            rest = &rest[part.len()..];
            let cost = cost_bytes(speaker, part.len());
            if cost > self.allowance.left_bytes || self.queued_bytes + cost > QUEUE_MAX_BYTES {
                self.dropped_lines += 1;
                self.dropped_bytes += part.len() as u64;
            } else {
                self.allowance.left_bytes -= cost;
                self.queued_bytes += cost;
                let (speaker, cut) = (speaker.clone(), cut || !rest.is_empty());
                self.queue.push_back(Kept { speaker, text: part.to_owned(), cut, at_unix_ms });
            }
            if rest.is_empty() {
                return;
            }
        }
    }

    /// Whether a line of that length would be kept now.
    fn has_room(&self, speaker: &Speaker, text_bytes: usize) -> bool {
        let cost = cost_bytes(speaker, text_bytes);
        self.allowance.left_bytes >= cost && self.queued_bytes + cost <= QUEUE_MAX_BYTES
    }

    fn leave_out(&mut self, bytes: &[u8]) {
        self.dropped_lines += memchr_iter(b'\n', bytes).count() as u64;
        self.dropped_bytes += bytes.len() as u64;
    }

    /// The next lines to send, oldest first.
    pub(super) fn batch(&mut self, now: Instant) -> Option<Vec<LogLine>> {
        self.push_overdue(now);
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(next) = self.queue.front().map(Kept::cost_bytes) {
            if !batch.is_empty() && bytes + next > BATCH_MAX_BYTES {
                break;
            }
            bytes += next;
            self.queued_bytes -= next;
            batch.extend(self.queue.pop_front().map(line));
        }
        batch.extend(self.notice(now));
        (!batch.is_empty()).then_some(batch)
    }

    /// Unfinished lines that have waited long enough: a prompt has no end of its own.
    fn push_overdue(&mut self, now: Instant) {
        let overdue = |partial: &Partial| {
            !partial.bytes.is_empty()
                && now.saturating_duration_since(partial.since) >= PARTIAL_WAIT
        };
        let ids: Vec<u64> = self
            .partials
            .iter()
            .filter(|(_, partial)| overdue(partial))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(mut partial) = self.partials.remove(&id) else { continue };
            let text = String::from_utf8_lossy(&partial.bytes).into_owned();
            self.push(&partial.speaker, &text, false, partial.at_unix_ms);
            partial.bytes.clear();
            partial.is_rest = true;
            self.partials.insert(id, partial);
        }
    }

    /// Says what was left out, if that is due.
    fn notice(&mut self, now: Instant) -> Option<LogLine> {
        let soon = self.noticed_at.is_some_and(|at| now < at + NOTICE_PAUSE);
        if self.dropped_bytes == 0 && self.dropped_lines == 0 || soon {
            return None;
        }
        self.noticed_at = Some(now);
        let lines = std::mem::take(&mut self.dropped_lines);
        let bytes = std::mem::take(&mut self.dropped_bytes);
        Some(LogLine {
            at_unix_ms: clock::unix_millis(),
            level: LogLevel::Warn,
            event: LogEvent::Dropped,
            pid: 0,
            command: String::new(),
            text: format!(
                "{lines} lines ({bytes} bytes) of output are not in this log: it takes {} KiB a \
                 second; write more than that to a file",
                BYTES_PER_SECOND / 1024
            ),
            cut: false,
        })
    }

    /// When there will be something to take.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        if !self.queue.is_empty() {
            return Some(now + LINGER);
        }
        let waiting = self.partials.values().filter(|partial| !partial.bytes.is_empty());
        let partial = waiting.map(|partial| partial.since + PARTIAL_WAIT).min();
        let dropped = (self.dropped_bytes > 0 || self.dropped_lines > 0)
            .then(|| self.noticed_at.map_or(now + LINGER, |at| at + NOTICE_PAUSE));
        partial.into_iter().chain(dropped).min()
    }
}

fn line(kept: Kept) -> LogLine {
    let Kept { speaker: Speaker { author, level, event }, text, cut, at_unix_ms } = kept;
    let command = author.command.clone();
    LogLine { at_unix_ms, level, event, pid: author.pid, command, text, cut }
}

/// How many of the bytes are left when a character that is cut short at their end is taken off.
fn whole_characters(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let at = bytes.len() - back;
        let needed = match bytes[at] {
            0x80..=0xbf => continue,
            0xc0..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf7 => 4,
            _ => 1,
        };
        return if needed > back { at } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speaker() -> Speaker {
        let author = Arc::new(Author { pid: 1, command: "x".to_owned() });
        Speaker { author, level: LogLevel::Info, event: LogEvent::Stdout }
    }

    /// The lines of a stream that comes in `pieces`; `true` for one that is cut.
    fn cut(pieces: &[&[u8]]) -> Vec<(String, bool)> {
        let (mut lines, now) = (Lines::default(), Instant::now());
        let mut seen = Vec::new();
        let mut skipping = false;
        for piece in pieces {
            skipping = lines.take(1, &speaker(), piece, skipping, now);
        }
        if let Some(partial) = lines.partials.remove(&1) {
            lines.finish(partial);
        }
        while let Some(batch) = lines.batch(now) {
            seen.extend(batch.into_iter().map(|line| (line.text, line.cut)));
        }
        seen
    }

    fn whole(texts: &[&str]) -> Vec<(String, bool)> {
        texts.iter().map(|&text| (text.to_owned(), false)).collect()
    }

    #[test]
    fn lines_are_cut_wherever_the_pieces_end() {
        assert_eq!(cut(&[b"a", b"b\nc", b"d\n\ne", b"f"]), whole(&["ab", "cd", "", "ef"]));
        assert_eq!(cut(&[b"dos\r", b"\nx\ry\r\n"]), whole(&["dos", "x\ry"]));
        assert_eq!(cut(&[b"\xff\xfe\n"]), whole(&["\u{fffd}\u{fffd}"]));
        assert_eq!(cut(&[b"h\xc3", b"\xbc\n"]), whole(&["h\u{fc}"]));
        assert_eq!(cut(&[]), []);
    }

    #[test]
    fn long_lines_are_split_between_characters_and_lose_nothing() {
        let long = format!("x{}", "\u{20ac}".repeat(5000));
        let mut with_end = long.clone().into_bytes();
        with_end.extend_from_slice(b"\nnext\n");
        for step in [1, 7, 4096, 100_000] {
            let pieces: Vec<&[u8]> = with_end.chunks(step).collect();
            let seen = cut(&pieces);
            let (last, parts) = seen.split_last().expect("the next line");
            assert_eq!(last, &("next".to_owned(), false));
            assert!(parts.iter().all(|(text, _)| text.len() <= LOG_TEXT_MAX_BYTES));
            let cuts: Vec<bool> = parts.iter().map(|(_, cut)| *cut).collect();
            assert_eq!(cuts, [true, true, true, false]);
            assert_eq!(parts.iter().map(|(text, _)| text.as_str()).collect::<String>(), long);
        }
        let exact = [b"y".repeat(LOG_TEXT_MAX_BYTES), b"\n".to_vec()].concat();
        assert_eq!(cut(&[&exact]).len(), 1);
        // Bytes that are no text grow threefold.
        let seen = cut(&[&[0xff; LOG_TEXT_MAX_BYTES]]);
        assert_eq!(seen.len(), 4);
        assert_eq!(seen.iter().map(|(text, _)| text.chars().count()).sum::<usize>(), 4096);
    }

    #[test]
    fn the_middle_of_a_torn_line_is_no_line() {
        let (mut lines, now) = (Lines::default(), Instant::now());
        assert!(lines.take(1, &speaker(), b"middle", true, now), "there is room, but no line");
        assert!(!lines.take(1, &speaker(), b"end\nwhole\n", true, now));
        let batch = lines.batch(now).expect("a line");
        assert_eq!(batch[0].text, "whole");
        assert!(!lines.take(1, &speaker(), b"50%\r60%", true, now), "drawn over");
    }

    #[test]
    fn what_is_typed_after_a_prompt_waits_like_any_line() {
        let (mut lines, start) = (Lines::default(), Instant::now());
        lines.take(1, &speaker(), b"$ ", false, start);
        let told = start + PARTIAL_WAIT;
        assert_eq!(lines.batch(told).expect("the prompt")[0].text, "$ ");
        let typed = told + Duration::from_secs(600);
        for key in [b"l", b"s"] {
            lines.take(1, &speaker(), key, false, typed);
            assert_eq!(lines.batch(typed), None, "a key is no line");
        }
        let batch = lines.batch(typed + PARTIAL_WAIT).expect("both keys");
        assert_eq!(batch[0].text, "ls");
    }

    #[test]
    fn what_is_too_much_is_counted_and_told_and_then_lines_are_whole_again() {
        let (mut lines, start) = (Lines::default(), Instant::now());
        let speaker = speaker();
        let flood = [b"0123456789".repeat(9), b"\n".to_vec()].concat().repeat(100_000);
        let mut skipping = false;
        for piece in flood.chunks(32 * 1024) {
            lines.allowance.refill(start);
            skipping = lines.take(1, &speaker, piece, skipping, start);
        }
        assert!(!skipping, "the last piece ends with its line");
        let kept = lines.queue.len();
        assert!(kept > 2000 && lines.queued_bytes <= QUEUE_MAX_BYTES, "{kept}");
        lines.allowance.left_bytes = 0;
        assert!(lines.take(1, &speaker, b"torn", true, start), "still no room");
        while !lines.queue.is_empty() {
            lines.batch(start);
        }
        let later = start + Duration::from_secs(2);
        lines.allowance.refill(later);
        lines.take(1, &speaker, b" rest\nfresh\n", true, later);
        let batch = lines.batch(later).expect("a line");
        assert_eq!(batch[0].text, "fresh");
        let told: u64 = batch[1].text.split(' ').next().expect("words").parse().expect("a number");
        assert_eq!(batch[1].event, LogEvent::Dropped);
        assert!(told > 0);
    }

    #[test]
    fn an_allowance_is_earned_by_the_second_and_has_an_end() {
        let (mut allowance, start) = (Allowance::default(), Instant::now());
        allowance.refill(start);
        allowance.left_bytes = 0;
        for step in 1..=1000 {
            allowance.refill(start + Duration::from_micros(step * 1000));
        }
        let earned = allowance.left_bytes;
        assert!((BYTES_PER_SECOND * 9 / 10..=BYTES_PER_SECOND).contains(&earned), "{earned}");
        allowance.refill(start + Duration::from_secs(3600));
        assert_eq!(allowance.left_bytes, BURST_BYTES);
        // The clock of a restored machine may seem to stand still, never to owe.
        allowance.refill(start);
        assert_eq!(allowance.left_bytes, BURST_BYTES);
    }
}
