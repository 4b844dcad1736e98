//! What the control port still has to write: answers first, logs when nothing else waits.
//!
//! Lines go out whole. One that is begun must be ended before an answer can follow, so messages
//! with logs are small; one that is not begun gives way.

use belljar_wire::guest::{self, FromGuest};
use rustix::io::Errno;

use crate::process::log_tap::LogTap;

/// Bytes on their way to the host.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    answers: Vec<u8>,
    /// A message with logs that gave way to answers, or to a snapshot.
    held: Vec<u8>,
    sending: Vec<u8>,
    /// How much of `sending` is written.
    sent: usize,
    /// Whether `sending` is a message with logs.
    is_log: bool,
    /// The tap's epoch when the logs here were taken.
    epoch: u64,
}

impl Outbox {
    /// Queues an answer.
    pub(super) fn say(&mut self, message: &FromGuest) {
        self.answers.extend_from_slice(&guest::encode(message));
    }

    /// Writes what the host takes now, answers before logs; the rest waits. While the tap holds its
    /// lines no message with logs is begun.
    ///
    /// # Errors
    /// What `write` fails with, but for a port that takes nothing now and for interruptions.
    pub(super) fn flush(
        &mut self,
        logs: &LogTap,
        mut write: impl FnMut(&[u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let epoch = logs.epoch();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.tear();
        }
        if !logs.is_wanted() {
            self.forget_unsent();
        }
        loop {
            if self.is_log && self.sent == 0 && (logs.is_held() || !self.answers.is_empty()) {
                self.held = std::mem::take(&mut self.sending);
            }
            if self.sent == self.sending.len() && !self.next(logs) {
                return Ok(());
            }
            match write(&self.sending[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Begins the next message. Says whether there is one.
    fn next(&mut self, logs: &LogTap) -> bool {
        self.sent = 0;
        self.is_log = self.answers.is_empty();
        self.sending = if !self.is_log {
            std::mem::take(&mut self.answers)
        } else if logs.is_held() {
            Vec::new()
        } else if !self.held.is_empty() {
            std::mem::take(&mut self.held)
        } else {
            let batch = logs.batch().map(|lines| FromGuest::Log { lines });
            batch.as_ref().map(guest::encode).unwrap_or_default()
        };
        !self.sending.is_empty()
    }

    /// Throws away logs of which nothing is written yet.
    fn forget_unsent(&mut self) {
        self.held.clear();
        if self.is_log && self.sent == 0 {
            self.sending.clear();
        }
    }

    /// Throws away all logs. One that was begun is ended as it is: whoever listens now has not
    /// heard its start, and passes over an empty line.
    fn tear(&mut self) {
        self.forget_unsent();
        if self.is_log && self.sent < self.sending.len() {
            self.sending = b"\n".to_vec();
            self.sent = 0;
            self.is_log = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::process::log_tap::test_lines;

    /// A host that takes a limited number of bytes.
    struct Host {
        heard: Vec<u8>,
        room: usize,
    }

    impl Host {
        fn with_room(room: usize) -> Host {
            Host { heard: Vec::new(), room }
        }

        fn take(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
            let taken = bytes.len().min(self.room);
            self.room -= taken;
            self.heard.extend_from_slice(&bytes[..taken]);
            if taken == 0 { Err(Errno::AGAIN) } else { Ok(taken) }
        }

        fn messages(&self) -> Vec<FromGuest> {
            let lines = self.heard.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            lines.map(|line| guest::decode(line).expect("whole messages")).collect()
        }
    }

    fn prepared(nonce: u64) -> FromGuest {
        FromGuest::Prepared { nonce }
    }

    fn texts(message: &FromGuest) -> Vec<&str> {
        match message {
            FromGuest::Log { lines } => lines.iter().map(|line| line.text.as_str()).collect(),
            _ => Vec::new(),
        }
    }

    fn tap_with(text: &str) -> Arc<LogTap> {
        let tap = Arc::<LogTap>::default();
        tap.want(true);
        test_lines(&tap, text);
        tap
    }

    #[test]
    fn answers_go_before_logs_that_are_not_begun() {
        let tap = tap_with("one\n");
        let mut outbox = Outbox::default();
        outbox.flush(&tap, |_| Err(Errno::AGAIN)).expect("the host is only slow");
        outbox.say(&prepared(1));
        let mut host = Host::with_room(usize::MAX);
        outbox.flush(&tap, |bytes| host.take(bytes)).expect("it takes all");
        let messages = host.messages();
        assert_eq!(messages[0], prepared(1));
        assert_eq!(texts(&messages[1]), ["one"]);
        assert_eq!(messages.len(), 2);
    }

    #[test]
    fn a_line_that_is_begun_is_ended_before_an_answer() {
        let tap = tap_with("one\n");
        let mut outbox = Outbox::default();
        let mut host = Host::with_room(10);
        outbox.flush(&tap, |bytes| host.take(bytes)).expect("it takes ten bytes");
        outbox.say(&prepared(1));
        // A snapshot is being prepared: what is queued stays here, what is begun is not.
        test_lines(&tap, "two\n");
        tap.want(false);
        host.room = usize::MAX;
        outbox.flush(&tap, |bytes| host.take(bytes)).expect("it takes all");
        let messages = host.messages();
        assert_eq!(texts(&messages[0]), ["one"]);
        assert_eq!(messages[1..], [prepared(1)]);
    }

    #[test]
    fn logs_wait_for_the_end_of_a_snapshot_and_a_clone_sends_none() {
        let tap = tap_with("one\n");
        let mut outbox = Outbox::default();
        // A message is made up, and the host takes nothing yet.
        outbox.flush(&tap, |_| Err(Errno::AGAIN)).expect("the host is only slow");
        tap.hold();
        test_lines(&tap, "two\n");
        outbox.say(&prepared(1));
        let mut host = Host::with_room(usize::MAX);
        outbox.flush(&tap, |bytes| host.take(bytes)).expect("it takes all");
        assert_eq!(host.messages(), [prepared(1)]);
        test_lines(&tap, "three\n");

        tap.release();
        outbox.flush(&tap, |bytes| host.take(bytes)).expect("it takes all");
        let said: Vec<_> = host.messages();
        let said: Vec<&str> = said.iter().flat_map(texts).collect();
        assert_eq!(said, ["one", "two", "three"]);

        tap.hold();
        test_lines(&tap, "of the origin\n");
        tap.want(true);
        let mut clone = Host::with_room(usize::MAX);
        outbox.flush(&tap, |bytes| clone.take(bytes)).expect("it takes all");
        assert_eq!(clone.messages(), []);
        test_lines(&tap, "of the clone\n");
        outbox.flush(&tap, |bytes| clone.take(bytes)).expect("it takes all");
        assert_eq!(clone.messages().iter().flat_map(texts).collect::<Vec<_>>(), ["of the clone"]);
    }

    #[test]
    fn nothing_of_another_identity_is_sent() {
        let tap = tap_with("secret\n");
        let mut outbox = Outbox::default();
        let mut origin = Host::with_room(20);
        outbox.flush(&tap, |bytes| origin.take(bytes)).expect("it takes some bytes");
        test_lines(&tap, "unfinished secret");
        tap.clear();
        outbox.say(&prepared(1));
        let mut clone = Host::with_room(usize::MAX);
        outbox.flush(&tap, |bytes| clone.take(bytes)).expect("it takes all");
        assert_eq!(clone.messages(), [prepared(1)]);
        assert!(clone.heard.starts_with(b"\n"), "the half line is ended");
    }

    #[test]
    fn a_host_that_takes_nothing_costs_a_bounded_queue() {
        let tap = tap_with("");
        let mut outbox = Outbox::default();
        for _ in 0..200 {
            test_lines(&tap, &"0123456789abcde\n".repeat(1000));
            outbox.flush(&tap, |_| Err(Errno::AGAIN)).expect("the host is only slow");
        }
        let mut host = Host::with_room(usize::MAX);
        outbox.flush(&tap, |bytes| host.take(bytes)).expect("it takes all");
        assert!(host.heard.len() < 2 * 1024 * 1024, "{} bytes were kept", host.heard.len());
        let messages = host.messages();
        assert!(messages.iter().all(|message| guest::encode(message).len() < 64 * 1024));
        let kept: usize = messages.iter().flat_map(texts).filter(|text| text.len() == 15).count();
        let notice = messages.iter().flat_map(texts).find(|text| text.contains("not in this log"));
        let left_out = notice.expect("it is said").split(' ').next().expect("a number");
        assert_eq!(kept + left_out.parse::<usize>().expect("a number"), 200_000);
    }
}
