//! What is asked of one sandbox, in order, for its owner to do; and what its owner shows of it.
//!
//! A channel of the usual kind keeps room for dozens of messages, a kilobyte for each sandbox of a
//! host that holds thousands. Here an empty one holds nothing. It is bounded by who asks: every
//! caller waits for its answer, and what nobody waits for any more makes room.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use belljar_domain::UnixMillis;
use tokio::sync::Notify;

use crate::owner::Command;

#[derive(Debug)]
struct Shared {
    // Held to put in, take out or look, never across a wait.
    letters: Mutex<Letters>,
    came: Notify,
    gone: Notify,
}

#[derive(Debug)]
struct Letters {
    waiting: VecDeque<Command>,
    taker: Taker,
    end_at: UnixMillis,
}

/// Who empties the inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taker {
    /// The owner.
    There,
    /// Nobody: the sandbox ends.
    Closed,
    /// Nobody: nothing is left of the sandbox.
    Gone,
}

impl Shared {
    fn letters(&self) -> MutexGuard<'_, Letters> {
        // A panic while it was held left at most one command out.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, taker: Taker) {
        let mut letters = self.letters();
        letters.taker = taker;
        // Whoever waits for an answer hears that there is none.
        letters.waiting = VecDeque::new();
    }
}

/// The owner's end. Dropping it says that nothing of the sandbox is left.
#[derive(Debug)]
pub(crate) struct Inbox {
    shared: Arc<Shared>,
}

/// The callers' end.
#[derive(Debug, Clone)]
pub(crate) struct Slit {
    shared: Arc<Shared>,
}

/// The owner takes no more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// Both ends of an empty inbox of a sandbox that ends at `end_at`.
pub(crate) fn inbox(end_at: UnixMillis) -> (Slit, Inbox) {
    let letters = Letters { waiting: VecDeque::new(), taker: Taker::There, end_at };
    let (came, gone) = (Notify::new(), Notify::new());
    let shared = Arc::new(Shared { letters: Mutex::new(letters), came, gone });
    (Slit { shared: shared.clone() }, Inbox { shared })
}

impl Slit {
    /// Puts a command in, after all that are there.
    pub(crate) fn put(&self, command: Command) -> Result<(), Closed> {
        let mut letters = self.shared.letters();
        if letters.taker != Taker::There {
            return Err(Closed);
        }
        letters.waiting.retain(|command| !command.is_abandoned());
        letters.waiting.push_back(command);
        drop(letters);
        self.shared.came.notify_one();
        Ok(())
    }

    /// When the sandbox ends.
    pub(crate) fn end_at(&self) -> UnixMillis {
        self.shared.letters().end_at
    }

    /// Ends when nothing of the sandbox is left. Cancel-safe.
    pub(crate) async fn gone(&self) {
        // Made before the look: it hears of an end in between.
        let notified = self.shared.gone.notified();
        if self.shared.letters().taker != Taker::Gone {
            notified.await;
        }
    }
}

impl Inbox {
    /// The next command. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Command {
        loop {
            // One that comes after this look leaves its mark on the bell.
            if let Some(command) = self.try_next() {
                return command;
            }
            self.shared.came.notified().await;
        }
    }

    /// The next command, if there is one.
    pub(crate) fn try_next(&mut self) -> Option<Command> {
        let mut letters = self.shared.letters();
        let next = letters.waiting.pop_front();
        if letters.waiting.is_empty() {
            letters.waiting = VecDeque::new();
        }
        next
    }

    /// Takes no more commands; who waits for an answer hears that there is none.
    pub(crate) fn close(&mut self) {
        self.shared.close(Taker::Closed);
    }

    /// When the sandbox ends.
    pub(crate) fn end_at(&self) -> UnixMillis {
        self.shared.letters().end_at
    }

    /// Says when the sandbox ends from now on.
    pub(crate) fn set_end_at(&mut self, end_at: UnixMillis) {
        self.shared.letters().end_at = end_at;
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.shared.close(Taker::Gone);
        self.shared.gone.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Poll};
    use tokio::sync::oneshot;

    fn move_to(at: i64) -> (Command, oneshot::Receiver<()>) {
        let (done, heard) = oneshot::channel();
        (Command::SetEnd(UnixMillis(at), done), heard)
    }

    fn poll_once(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> Poll<()> {
        future.poll(&mut Context::from_waker(std::task::Waker::noop()))
    }

    #[tokio::test]
    async fn commands_come_in_order_and_wake_the_owner() {
        let (slit, mut inbox) = inbox(UnixMillis(9));
        assert!(inbox.try_next().is_none());
        let (moved, _waits) = move_to(5);
        slit.put(moved).expect("open");
        slit.put(Command::Kill).expect("open");
        assert!(matches!(inbox.next().await, Command::SetEnd(UnixMillis(5), _)));
        assert!(matches!(inbox.next().await, Command::Kill));
        let late = async { slit.put(Command::Kill).expect("open") };
        let (command, ()) = tokio::join!(inbox.next(), late);
        assert!(matches!(command, Command::Kill));
    }

    #[tokio::test]
    async fn callers_see_the_end_and_wait_until_nothing_is_left() {
        let (slit, mut inbox) = inbox(UnixMillis(9));
        inbox.set_end_at(UnixMillis(5));
        assert_eq!((slit.end_at(), inbox.end_at()), (UnixMillis(5), UnixMillis(5)));
        let gone = slit.gone();
        tokio::pin!(gone);
        assert!(poll_once(gone.as_mut()).is_pending());
        inbox.close();
        assert_eq!(slit.put(Command::Kill), Err(Closed));
        assert!(poll_once(gone.as_mut()).is_pending(), "it ends, and something is left");
        drop(inbox);
        gone.await;
        slit.gone().await;
    }

    #[tokio::test]
    async fn a_closed_one_takes_nothing_and_answers_nobody() {
        let (slit, inbox) = inbox(UnixMillis(9));
        let (moved, waits) = move_to(5);
        slit.put(moved).expect("open");
        drop(inbox);
        assert!(waits.await.is_err());
        assert_eq!(slit.put(Command::Kill), Err(Closed));
    }

    #[test]
    fn who_left_leaves_nothing_behind() {
        let (slit, inbox) = inbox(UnixMillis(9));
        for at in 0..1000 {
            drop(move_to(at).1);
            let (moved, waits) = move_to(at);
            drop(waits);
            slit.put(moved).expect("open");
        }
        assert_eq!(inbox.shared.letters().waiting.len(), 1);
    }
}
