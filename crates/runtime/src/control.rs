//! The host's end of the guest control channel: whole messages, matched answers, deadlines.
//!
//! The guest is hostile and its logs may never end: what it says is read at a pace that costs this
//! host little, and the rest waits in the guest.

use std::collections::VecDeque;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::Kind;
use belljar_wire::guest::{self, FROM_GUEST_LINE_MAX_BYTES, FromGuest, Init, LineError, ToGuest};
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::lines::Lines;
use crate::machine::ControlStream;

/// What is read of a guest at once, and a second, bytes. A daemon of ours says a quarter of that at
/// its busiest, spelled as JSON at its worst.
const BURST_BYTES: u64 = 4 * 1024 * 1024;
/// What a line costs besides its bytes: an empty one is read, too.
const LINE_COST_BYTES: usize = 64;
const BYTES_PER_SECOND: u64 = 2 * 1024 * 1024;
/// Messages with logs that are kept while an answer is waited for; the oldest go first. One has at
/// most [`FROM_GUEST_LINE_MAX_BYTES`], a daemon of ours puts some 32 KiB into it.
const KEPT_LOGS: usize = 16;

/// Talks to the guest daemon over a [`ControlStream`].
pub struct GuestControl {
    incoming: Lines<ControlStream>,
    pace: Pace,
    /// Logs that came while an answer was waited for.
    kept: VecDeque<FromGuest>,
    /// Grows with every question of a snapshot.
    last_nonce: u64,
}

/// What becomes of logs that come before an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EarlyLogs {
    /// They are of a guest that is not this sandbox yet.
    Dropped,
    Kept,
}

/// Why the guest did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The machine is gone, or its daemon closed the channel.
    #[error("reach the guest: its control channel is closed")]
    Closed,
    /// Reading or writing failed.
    #[error("use the guest's control channel")]
    Io {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The guest sent something that is not a message.
    #[error("understand the guest")]
    Line {
        /// Why.
        #[source]
        source: LineError,
    },
    /// The guest says it could not.
    #[error("{step}: the guest answered `{message}`")]
    Failed {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Hostile text: for the log, never for clients.
        message: String,
    },
    /// It did not answer in time.
    #[error("{step} within {waited_ms} ms")]
    TimedOut {
        /// The step, as a verb phrase.
        step: &'static str,
        /// How long was waited.
        waited_ms: u64,
    },
}

impl ControlError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            ControlError::Closed | ControlError::Io { .. } => Kind::Unavailable,
            ControlError::Line { .. } | ControlError::Failed { .. } => Kind::Internal,
            ControlError::TimedOut { .. } => Kind::Timeout,
        }
    }
}

impl GuestControl {
    /// Takes over a machine's control stream.
    pub fn new(stream: ControlStream) -> GuestControl {
        let incoming = Lines::new(stream, FROM_GUEST_LINE_MAX_BYTES);
        // A restored guest may still answer questions of its last run: none has this number.
        let last_nonce = unix_millis() << 20;
        let kept = VecDeque::new();
        GuestControl { incoming, pace: Pace::new(), kept, last_nonce }
    }

    /// The guest's next message, or logs that came while an answer was waited for. Waits longer for
    /// a guest that says too much. Cancel-safe.
    ///
    /// # Errors
    /// [`ControlError`]; after anything but a time-out the channel is of no more use.
    pub async fn receive(&mut self) -> Result<FromGuest, ControlError> {
        match self.kept.pop_front() {
            Some(message) => Ok(message),
            None => self.read().await,
        }
    }

    /// The next message off the channel. Cancel-safe.
    async fn read(&mut self) -> Result<FromGuest, ControlError> {
        loop {
            let next_at = self.pace.next_at();
            if next_at > Instant::now() {
                // On the heap, because few guests ever say too much and all of them are heard.
                Box::pin(sleep_until(next_at)).await;
            }
            let line = match self.incoming.next().await {
                Ok(Some(line)) => line,
                Ok(None) => return Err(ControlError::Closed),
                Err(source) => return Err(ControlError::Io { source }),
            };
            self.pace.count(line.len() + LINE_COST_BYTES, Instant::now());
            if !line.is_empty() {
                return guest::decode(&line).map_err(|source| ControlError::Line { source });
            }
        }
    }

    /// Sends one message. Not cancel-safe: half a line may be out.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn send(&mut self, message: &ToGuest, limit: Duration) -> Result<(), ControlError> {
        let line = guest::encode(message);
        let writing = async {
            let guest = self.incoming.peer();
            guest.write_all(&line).await?;
            guest.flush().await
        };
        match tokio::time::timeout(limit, writing).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(ControlError::Closed),
            Ok(Err(source)) => Err(ControlError::Io { source }),
            Err(_) => Err(timed_out("send a message to the guest", limit)),
        }
    }

    /// Waits for the guest of a cold boot and says its daemon's version. Cancel-safe.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn booted(&mut self, limit: Duration) -> Result<String, ControlError> {
        const STEP: &str = "boot the guest";
        // Nothing was asked yet, so a failure of any nonce is that of the boot.
        self.answer(STEP, limit, EarlyLogs::Dropped, |message| match message {
            FromGuest::Booted { envd_version } => Some(Ok(envd_version)),
            FromGuest::Failed { message, .. } => Some(Err(message)),
            FromGuest::Ready { .. }
            | FromGuest::Prepared { .. }
            | FromGuest::Continued { .. }
            | FromGuest::Log { .. } => None,
        })
        .await?
        .map_err(|message| ControlError::Failed { step: STEP, message })
    }

    /// Gives the guest its identity and waits until it serves; says its daemon's version.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn init(&mut self, init: Init, limit: Duration) -> Result<String, ControlError> {
        const STEP: &str = "make the guest ready";
        let wanted = init.nonce;
        // What was kept is of an earlier identity.
        self.kept.clear();
        self.send(&ToGuest::Init(init), limit).await?;
        self.matching(STEP, wanted, limit, EarlyLogs::Dropped, |message| match message {
            FromGuest::Ready { nonce, envd_version } if nonce == wanted => Some(envd_version),
            _ => None,
        })
        .await
    }

    /// Has the guest flush its file systems before a snapshot, and keep its logs to itself from
    /// then on. What it says before goes to [`GuestControl::receive`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn prepare_snapshot(&mut self, limit: Duration) -> Result<(), ControlError> {
        const STEP: &str = "prepare the guest for its snapshot";
        let nonce = self.next_nonce();
        self.send(&ToGuest::PrepareSnapshot { nonce }, limit).await?;
        self.matching(STEP, nonce, limit, EarlyLogs::Kept, |message| {
            (message == FromGuest::Prepared { nonce }).then_some(())
        })
        .await
    }

    /// Has a guest go on that was prepared for a snapshot: its clock is set, its logs come again.
    ///
    /// # Errors
    /// [`ControlError`]; a guest daemon from before this message fails to parse it, and says so.
    pub async fn continue_after_snapshot(&mut self, limit: Duration) -> Result<(), ControlError> {
        const STEP: &str = "have the guest go on after its snapshot";
        let nonce = self.next_nonce();
        let time_unix_ns = unix_millis().saturating_mul(1_000_000);
        self.send(&ToGuest::Continue { nonce, time_unix_ns }, limit).await?;
        self.answer(STEP, limit, EarlyLogs::Kept, |message| match message {
            FromGuest::Continued { nonce: of } if of == nonce => Some(Ok(())),
            // Whoever cannot read a message does not know its number.
            FromGuest::Failed { nonce: of, message } if of == nonce || of == 0 => {
                Some(Err(message))
            }
            _ => None,
        })
        .await?
        .map_err(|message| ControlError::Failed { step: STEP, message })
    }

    fn next_nonce(&mut self) -> u64 {
        self.last_nonce += 1;
        self.last_nonce
    }

    /// As [`GuestControl::answer`], and a failure of the same nonce ends the wait.
    async fn matching<T>(
        &mut self,
        step: &'static str,
        wanted: u64,
        limit: Duration,
        logs: EarlyLogs,
        pick: impl Fn(FromGuest) -> Option<T>,
    ) -> Result<T, ControlError> {
        self.answer(step, limit, logs, |message| match message {
            FromGuest::Failed { nonce, message } if nonce == wanted => Some(Err(message)),
            other => pick(other).map(Ok),
        })
        .await?
        .map_err(|message| ControlError::Failed { step, message })
    }

    /// Waits for the message `pick` takes; others but logs answer something nobody waits for any
    /// more.
    async fn answer<T>(
        &mut self,
        step: &'static str,
        limit: Duration,
        logs: EarlyLogs,
        pick: impl Fn(FromGuest) -> Option<T>,
    ) -> Result<T, ControlError> {
        let deadline = Instant::now() + limit;
        loop {
            let message =
                timeout_at(deadline, self.read()).await.map_err(|_| timed_out(step, limit))??;
            if matches!(message, FromGuest::Log { .. }) {
                if logs == EarlyLogs::Kept {
                    self.keep(message);
                }
                continue;
            }
            if let Some(found) = pick(message) {
                return Ok(found);
            }
        }
    }

    fn keep(&mut self, logs: FromGuest) {
        if self.kept.len() >= KEPT_LOGS {
            self.kept.pop_front();
        }
        self.kept.push_back(logs);
    }
}

fn unix_millis() -> u64 {
    u64::try_from(clock::now().0).unwrap_or(0)
}

/// Spreads what is read of a guest over time.
struct Pace {
    /// When everything so far would have been read at the steady rate.
    paid_at: Instant,
}

impl Pace {
    fn new() -> Pace {
        Pace { paid_at: Instant::now() }
    }

    /// When the next line may be read.
    fn next_at(&self) -> Instant {
        self.paid_at.checked_sub(time_of(BURST_BYTES)).unwrap_or(self.paid_at)
    }

    fn count(&mut self, bytes: usize, now: Instant) {
        let cost = time_of(u64::try_from(bytes).unwrap_or(u64::MAX));
        self.paid_at = self.paid_at.max(now) + cost;
    }
}

fn time_of(bytes: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / BYTES_PER_SECOND)
}

fn timed_out(step: &'static str, limit: Duration) -> ControlError {
    ControlError::TimedOut { step, waited_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    const LIMIT: Duration = Duration::from_secs(5);

    fn pair() -> (GuestControl, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(4096);
        (GuestControl::new(Box::new(ours)), theirs)
    }

    #[tokio::test]
    async fn answers_to_older_questions_are_passed_over() {
        let (mut control, mut guest) = pair();
        for nonce in [1, 2] {
            let old = FromGuest::Ready { nonce, envd_version: format!("v{nonce}") };
            guest.write_all(&guest::encode(&old)).await.expect("room in the pipe");
        }
        let version = control.init(Init { nonce: 2, ..Init::default() }, LIMIT).await;
        assert_eq!(version.expect("the second answer matches"), "v2");
    }

    #[tokio::test]
    async fn empty_lines_and_logs_of_nobody_are_passed_over() {
        let (mut control, mut guest) = pair();
        let log = FromGuest::Log { lines: Vec::new() };
        let ready = FromGuest::Ready { nonce: 5, envd_version: "v".into() };
        let said = [&b"\n"[..], &guest::encode(&log), b"\n\n", &guest::encode(&ready)].concat();
        guest.write_all(&said).await.expect("room in the pipe");
        let version = control.init(Init { nonce: 5, ..Init::default() }, LIMIT).await;
        assert_eq!(version.expect("ready"), "v");
    }

    #[tokio::test]
    async fn logs_around_a_snapshot_are_kept_and_bounded() {
        let (ours, mut guest) = tokio::io::duplex(64 * 1024);
        let mut control = GuestControl::new(Box::new(ours));
        let log = |of: usize| {
            let line = guest::LogLine {
                at_unix_ms: 0,
                level: guest::LogLevel::Info,
                event: guest::LogEvent::Stdout,
                pid: 1,
                command: String::new(),
                text: of.to_string(),
                cut: false,
            };
            FromGuest::Log { lines: vec![line] }
        };
        let (first, second) = (control.last_nonce + 1, control.last_nonce + 2);
        let mut said: Vec<FromGuest> = (0..KEPT_LOGS).map(log).collect();
        said.push(FromGuest::Prepared { nonce: first });
        said.push(log(KEPT_LOGS));
        said.push(FromGuest::Continued { nonce: first });
        said.push(FromGuest::Continued { nonce: second });
        said.push(log(KEPT_LOGS + 1));
        for message in &said {
            guest.write_all(&guest::encode(message)).await.expect("room in the pipe");
        }
        control.prepare_snapshot(LIMIT).await.expect("prepared");
        control.continue_after_snapshot(LIMIT).await.expect("going on");
        for of in 1..=KEPT_LOGS + 1 {
            assert_eq!(control.receive().await.expect("logs"), log(of), "the oldest one is gone");
        }
    }

    #[tokio::test]
    async fn a_daemon_that_does_not_know_how_to_go_on_is_heard() {
        let (mut control, mut guest) = pair();
        let failed = FromGuest::Failed { nonce: 0, message: "parse".into() };
        guest.write_all(&guest::encode(&failed)).await.expect("room in the pipe");
        let error = control.continue_after_snapshot(LIMIT).await.expect_err("it does not know");
        assert!(matches!(error, ControlError::Failed { ref message, .. } if message == "parse"));
    }

    #[test]
    fn a_guest_that_never_stops_is_read_at_a_steady_pace() {
        let start = Instant::now();
        let mut pace = Pace { paid_at: start };
        let (mut now, mut heard) = (start, 0);
        while now < start + Duration::from_secs(30) {
            pace.count(100_000, now);
            heard += 100_000;
            // A flood: the next line is there whenever it may be read.
            now = now.max(pace.next_at());
        }
        let fair = BURST_BYTES + 30 * BYTES_PER_SECOND;
        assert!((fair - 200_000..fair + 200_000).contains(&heard), "{heard} bytes in 30 s");
        // After a while of silence it may speak at once again, and has not saved up more than that.
        let later = now + Duration::from_secs(3600);
        pace.count(1, later);
        assert!(pace.next_at() <= later);
        assert!(pace.paid_at <= later + Duration::from_millis(1));
    }

    #[tokio::test(start_paused = true)]
    async fn empty_lines_are_not_free() {
        let (mut control, mut guest) = pair();
        let flood = async {
            for _ in 0..200 {
                guest.write_all(&[b'\n'; 4096]).await.expect("someone reads");
            }
        };
        let started = Instant::now();
        tokio::select! {
            said = control.receive() => panic!("nothing was said, but heard {said:?}"),
            () = flood => {}
        }
        assert!(started.elapsed() > Duration::from_secs(10), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_ends_the_channel() {
        let (mut control, mut guest) = pair();
        let long = vec![b'x'; FROM_GUEST_LINE_MAX_BYTES + 2];
        let (said, heard) = tokio::join!(guest.write_all(&long), control.receive());
        said.expect("it was taken");
        assert!(matches!(heard, Err(ControlError::Io { .. })), "{heard:?}");
    }

    #[tokio::test]
    async fn a_failure_a_hang_and_an_end_are_told_apart() {
        let (mut control, mut guest) = pair();
        let nonce = control.last_nonce + 1;
        let failed = FromGuest::Failed { nonce, message: "disk".into() };
        guest.write_all(&guest::encode(&failed)).await.expect("room in the pipe");
        let error = control.prepare_snapshot(LIMIT).await.expect_err("the guest failed");
        assert!(matches!(error, ControlError::Failed { ref message, .. } if message == "disk"));
        let error = control.booted(Duration::from_millis(20)).await.expect_err("silence");
        assert_eq!(error.kind(), Kind::Timeout);
        guest.read_u8().await.expect("the request is there");
        drop(guest);
        assert!(matches!(control.booted(LIMIT).await, Err(ControlError::Closed)));
    }
}
