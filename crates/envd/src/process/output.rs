//! What a process says, to everyone who listens.
//!
//! Each subscriber has a short queue. The process's output is read only as fast as the slowest
//! subscriber takes it, so memory stays bounded; one that is gone is dropped. Output nobody
//! listens to is in the sandbox's log at most.
//!
//! The output ends with the process, not with whatever it left in the background: all it wrote
//! itself is delivered, and what its helpers add within a moment. What comes later is read and
//! thrown away, for as long as somebody writes: a full or broken pipe would stop or kill the
//! program a user left running on purpose. The log has that too.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::channel::Channel;
use super::log_tap::LogStream;
use crate::children::Ended;

/// Pieces of output a subscriber may lag behind.
const QUEUE_PIECES: usize = 16;

/// How long, in all, the output of a process that has ended is waited for. Long enough for the last
/// words of what it piped into (`exec > >(tee log)`), short enough for a command that leaves a
/// server behind to answer promptly.
const TAIL_LIMIT: Duration = Duration::from_millis(500);

/// Most bytes taken beyond those that were there when the process ended: more than a helper can
/// hold in a pipe of its own, and an end to one that never stops writing.
const TAIL_MAX_BYTES: u64 = 1024 * 1024;

/// What an output pipe may hold: four times the usual, so that its writer and this daemon wake each
/// other less often.
pub(super) const PIPE_BYTES: usize = 256 * 1024;

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Output {
    /// Standard output.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// The terminal.
    Terminal(Bytes),
}

/// Where a piece of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The terminal.
    Terminal,
}

impl Source {
    /// Longest piece, bytes.
    ///
    /// Source: `contract/e2b-wire.md` section 2.3.
    fn piece_max_bytes(self) -> usize {
        match self {
            Source::Stdout | Source::Stderr => 32 * 1024,
            Source::Terminal => 16 * 1024,
        }
    }

    fn output(self, bytes: Bytes) -> Output {
        match self {
            Source::Stdout => Output::Stdout(bytes),
            Source::Stderr => Output::Stderr(bytes),
            Source::Terminal => Output::Terminal(bytes),
        }
    }
}

/// How a process ended, in the wire's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    /// The exit code, or -1.
    pub(super) exit_code: i32,
    /// Whether it returned by itself.
    pub(super) exited: bool,
    /// `exit status N` or `signal: name`.
    pub(super) status: String,
    /// The status again, unless it is success.
    pub(super) error: Option<String>,
}

impl End {
    /// Describes an end; `None` is one that nobody saw.
    pub(super) fn new(ended: Option<Ended>) -> End {
        let (exit_code, exited, status) = match ended {
            Some(Ended::Exited(code)) => (code, true, format!("exit status {code}")),
            Some(Ended::Killed { signal, core_dumped }) => {
                let core = if core_dumped { " (core dumped)" } else { "" };
                (-1, false, format!("signal: {}{core}", signal_name(signal)))
            }
            None => (-1, false, "unknown".to_owned()),
        };
        let error = (exit_code != 0).then(|| status.clone());
        End { exit_code, exited, status, error }
    }
}

/// The names clients of the contract know signals by.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

/// One process's output and end.
#[derive(Debug, Default)]
pub(super) struct Hub {
    listeners: Mutex<Listeners>,
}

#[derive(Debug, Default)]
struct Listeners {
    queues: Vec<mpsc::Sender<Event>>,
    end: Option<End>,
}

#[derive(Debug, Clone)]
enum Event {
    Output(Output),
    End(End),
}

/// What a subscriber gets next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Output.
    Output(Output),
    /// Nothing for that long.
    Silence,
    /// The end; the last thing but for `Closed`.
    End(End),
    /// Nothing more will come.
    Closed,
}

/// A place in the audience.
#[derive(Debug)]
pub(super) struct Subscription {
    queue: Option<mpsc::Receiver<Event>>,
    end: Option<End>,
}

impl Hub {
    /// Joins from now on. After the end it yields the end at once.
    pub(super) fn subscribe(&self) -> Subscription {
        let mut listeners = self.lock();
        if let Some(end) = &listeners.end {
            return Subscription { queue: None, end: Some(end.clone()) };
        }
        let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
        listeners.queues.push(sender);
        Subscription { queue: Some(receiver), end: None }
    }

    /// Reads the channel to its end and gives every piece to the log and every subscriber, until the process
    /// has `exited` and its output was taken; then drops `behind` and throws the rest away.
    pub(super) async fn pump(
        &self,
        channel: &Channel,
        source: Source,
        exited: &CancellationToken,
        behind: mpsc::Sender<()>,
        log: LogStream,
    ) {
        let mut pieces = Pieces::new(channel, source, log);
        while !exited.is_cancelled() {
            tokio::select! {
                biased;
                piece = pieces.next() => match piece {
                    Some(piece) => self.publish(Event::Output(source.output(piece))).await,
                    None => return,
                },
                () = exited.cancelled() => {}
            }
        }
        // Only waiting counts against the time: a slow subscriber costs the output nothing.
        let mut patience = TAIL_LIMIT;
        let mut left_bytes = pieces.waiting_bytes() + TAIL_MAX_BYTES;
        while left_bytes > 0 {
            let began = Instant::now();
            match tokio::time::timeout(patience, pieces.next()).await {
                Ok(Some(piece)) => {
                    patience = patience.saturating_sub(began.elapsed());
                    left_bytes = left_bytes.saturating_sub(piece.len() as u64);
                    self.publish(Event::Output(source.output(piece))).await;
                }
                Ok(None) => return,
                Err(_) => break,
            }
        }
        drop(behind);
        while pieces.next().await.is_some() {}
    }

    /// Ends at once for everyone who asks, and returns the announcement to those who listen.
    /// Later subscribers get the end too; later output is lost.
    pub(super) fn finish(&self, end: End) -> impl Future<Output = ()> + Send + use<> {
        let queues = {
            let mut listeners = self.lock();
            listeners.end = Some(end.clone());
            std::mem::take(&mut listeners.queues)
        };
        async move {
            for queue in queues {
                // A subscriber that is gone needs no end.
                let _ = queue.send(Event::End(end.clone())).await;
            }
        }
    }

    async fn publish(&self, event: Event) {
        let queues = self.lock().queues.clone();
        let mut someone_left = false;
        for queue in &queues {
            someone_left |= queue.send(event.clone()).await.is_err();
        }
        if someone_left {
            self.lock().queues.retain(|queue| !queue.is_closed());
        }
    }

    /// Each change under the lock is one assignment, so a panic of a holder leaves it whole.
    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a channel piece by piece, and tells the log.
struct Pieces<'a> {
    channel: &'a Channel,
    source: Source,
    log: LogStream,
    buffer: Vec<u8>,
    /// Read already.
    ready: Bytes,
    /// Whether there was more than fits a piece: then the next read takes all a pipe can hold.
    more: bool,
}

impl Pieces<'_> {
    fn new(channel: &Channel, source: Source, log: LogStream) -> Pieces<'_> {
        let (buffer, ready) = (Vec::new(), Bytes::new());
        Pieces { channel, source, log, buffer, ready, more: false }
    }

    /// The next piece; `None` is the end. Cancel-safe.
    async fn next(&mut self) -> Option<Bytes> {
        let most = self.source.piece_max_bytes();
        if self.ready.is_empty() {
            let wanted = if self.more { PIPE_BYTES } else { most };
            match self.channel.read(&mut self.buffer, wanted).await {
                Ok(0) => return None,
                Ok(_) => self.keep(),
                Err(error) => {
                    tracing::warn!(%error, source = ?self.source, "failed to read a process's output");
                    return None;
                }
            }
        }
        Some(self.ready.split_to(self.ready.len().min(most)))
    }

    /// Makes what was read ready. What nearly fills the buffer travels on in it. Less is copied, so
    /// that many short pieces that wait weigh no more than they hold.
    fn keep(&mut self) {
        self.log.take(&self.buffer);
        self.more = self.buffer.len() == self.buffer.capacity();
        if self.buffer.len() > self.buffer.capacity() / 2 {
            self.ready = std::mem::take(&mut self.buffer).into();
            return;
        }
        self.ready = Bytes::copy_from_slice(&self.buffer);
        self.buffer.clear();
        if self.buffer.capacity() > self.source.piece_max_bytes() {
            self.buffer = Vec::new();
        }
    }

    /// Bytes that can be taken without waiting.
    fn waiting_bytes(&self) -> u64 {
        self.ready.len() as u64 + self.channel.waiting_bytes()
    }
}

impl Subscription {
    /// The next thing, or silence after `patience`. Cancel-safe.
    pub(super) async fn next(&mut self, patience: Duration) -> Next {
        if let Some(end) = self.end.take() {
            return Next::End(end);
        }
        let Some(queue) = &mut self.queue else { return Next::Closed };
        // The timer is for silence: what waits already needs none.
        let waiting = match queue.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(_) => tokio::time::timeout(patience, queue.recv()).await,
        };
        match waiting {
            Ok(Some(Event::Output(output))) => Next::Output(output),
            Ok(Some(Event::End(end))) => {
                self.queue = None;
                Next::End(end)
            }
            Ok(None) => {
                self.queue = None;
                Next::Closed
            }
            Err(_) => Next::Silence,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use belljar_wire::rpc::process::ProcessConfig;

    use super::super::log_tap::LogTap;
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn piece(text: &'static str) -> Event {
        Event::Output(Output::Stdout(Bytes::from_static(text.as_bytes())))
    }

    #[test]
    fn ends_are_told_in_the_wires_words() {
        let end = End::new(Some(Ended::Exited(0)));
        assert_eq!((end.exit_code, end.exited, end.error), (0, true, None));
        assert_eq!(end.status, "exit status 0");
        let end = End::new(Some(Ended::Exited(7)));
        assert_eq!(end.error.as_deref(), Some("exit status 7"));
        let end = End::new(Some(Ended::Killed { signal: 9, core_dumped: false }));
        assert_eq!((end.exit_code, end.exited), (-1, false));
        assert_eq!(end.status, "signal: killed");
        let end = End::new(Some(Ended::Killed { signal: 11, core_dumped: true }));
        assert_eq!(end.status, "signal: segmentation fault (core dumped)");
    }

    #[tokio::test]
    async fn everyone_hears_everything_from_when_they_joined() {
        let hub = Hub::default();
        hub.publish(piece("lost")).await;
        let mut first = hub.subscribe();
        hub.publish(piece("a")).await;
        let mut second = hub.subscribe();
        let gone = hub.subscribe();
        drop(gone);
        hub.publish(piece("b")).await;
        hub.finish(End::new(Some(Ended::Exited(0)))).await;

        let stdout =
            |text: &'static str| Next::Output(Output::Stdout(Bytes::from_static(text.as_bytes())));
        let end = Next::End(End::new(Some(Ended::Exited(0))));
        assert_eq!(first.next(SOON).await, stdout("a"));
        assert_eq!(first.next(SOON).await, stdout("b"));
        assert_eq!(first.next(SOON).await, end);
        assert_eq!(first.next(SOON).await, Next::Closed);
        assert_eq!(second.next(SOON).await, stdout("b"));
        assert_eq!(second.next(SOON).await, end);
        assert_eq!(hub.subscribe().next(SOON).await, end, "late is not too late");
    }

    #[tokio::test]
    async fn a_slow_subscriber_holds_the_process_back_and_a_gone_one_does_not() {
        let hub = Hub::default();
        let slow = hub.subscribe();
        for _ in 0..QUEUE_PIECES {
            hub.publish(piece("x")).await;
        }
        let held = tokio::time::timeout(Duration::from_millis(20), hub.publish(piece("x"))).await;
        assert!(held.is_err(), "the queue is full");
        drop(slow);
        hub.publish(piece("x")).await;
        assert!(hub.lock().queues.is_empty());
    }

    #[tokio::test]
    async fn a_slow_subscriber_gets_all_that_waits_at_the_end_and_the_rest_is_drained() {
        const WAITING: usize = 1 << 20;
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        rustix::pipe::fcntl_setpipe_size(&writer, WAITING).expect("the usual limit");
        std::io::Write::write_all(
            &mut std::fs::File::from(writer.try_clone().expect("a copy")),
            &vec![b'x'; WAITING],
        )
        .expect("all of it fits");
        let channel = Channel::new(reader, tokio::io::Interest::READABLE).expect("a pipe");
        let (hub, exited) = (Hub::default(), CancellationToken::new());
        let mut slow = hub.subscribe();
        exited.cancel();
        let (behind, mut caught_up) = mpsc::channel::<()>(1);
        let log = Arc::<LogTap>::default().process(1, &ProcessConfig::default());
        let pump = hub.pump(&channel, Source::Stdout, &exited, behind, log.stream(Source::Stdout));
        let listen = async {
            // The stall itself: longer than the end waits for anything but the subscriber.
            tokio::time::sleep(TAIL_LIMIT * 2).await;
            let mut taken = 0;
            while taken < WAITING {
                match slow.next(SOON).await {
                    Next::Output(Output::Stdout(bytes)) => taken += bytes.len(),
                    other => panic!("{other:?} after {taken} bytes"),
                }
            }
            // The writer's end is still open, and the pump says that it has caught up.
            assert_eq!(caught_up.recv().await, None);
            drop(slow);
            let mut writer = std::fs::File::from(writer);
            tokio::task::spawn_blocking(move || {
                std::io::Write::write_all(&mut writer, &vec![b'y'; 3 * WAITING])
            })
            .await
            .expect("no panic")
            .expect("what comes later is read on");
        };
        tokio::time::timeout(SOON, async { tokio::join!(pump, listen) }).await.expect("in time");
    }
}
