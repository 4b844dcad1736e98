//! What a process says, to everyone who listens.
//!
//! Each subscriber has a short queue. The process's output is read only as fast as the slowest
//! subscriber takes it, so memory stays bounded; one that is gone is dropped. Output nobody
//! listens to is in the sandbox's log at most.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::channel::Channel;
use super::log_tap::LogStream;
use crate::children::Ended;

/// Pieces of output a subscriber may lag behind.
const QUEUE_PIECES: usize = 16;

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

    /// Whether the end was announced.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Reads until the channel ends and gives every piece to every subscriber and to the log.
    pub(super) async fn pump(&self, channel: &Channel, source: Source, mut log: LogStream) {
        let mut buffer = vec![0; source.piece_max_bytes()];
        loop {
            match channel.read(&mut buffer).await {
                Ok(0) => return,
                Ok(length) => {
                    log.take(&buffer[..length]);
                    let piece = Bytes::copy_from_slice(&buffer[..length]);
                    self.publish(Event::Output(source.output(piece))).await;
                }
                Err(error) => {
                    tracing::warn!(%error, ?source, "failed to read a process's output");
                    return;
                }
            }
        }
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

impl Subscription {
    /// The next thing, or silence after `patience`. Cancel-safe.
    pub(super) async fn next(&mut self, patience: Duration) -> Next {
        if let Some(end) = self.end.take() {
            return Next::End(end);
        }
        let Some(queue) = &mut self.queue else { return Next::Closed };
        match tokio::time::timeout(patience, queue.recv()).await {
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
}
