//! What is asked of one sandbox, in order, for its owner to do.
//!
//! A channel of the usual kind keeps room for dozens of messages, a kilobyte for each sandbox of a
//! host that holds thousands. Here an empty one holds nothing. It is bounded by who asks: every
//! caller waits for its answer, and what nobody waits for any more makes room.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::owner::Command;

#[derive(Debug, Default)]
struct Shared {
    // Held to put in or take out, never across a wait.
    letters: Mutex<Letters>,
    came: Notify,
}

#[derive(Debug, Default)]
struct Letters {
    waiting: VecDeque<Command>,
    closed: bool,
}

impl Shared {
    fn letters(&self) -> MutexGuard<'_, Letters> {
        // A panic while it was held left at most one command out.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner's end. Closed when it is dropped.
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

/// Both ends of an empty inbox.
pub(crate) fn inbox() -> (Slit, Inbox) {
    let shared = Arc::new(Shared::default());
    (Slit { shared: shared.clone() }, Inbox { shared })
}

impl Slit {
    /// Puts a command in, after all that are there.
    pub(crate) fn put(&self, command: Command) -> Result<(), Closed> {
        let mut letters = self.shared.letters();
        if letters.closed {
            return Err(Closed);
        }
        letters.waiting.retain(|command| !command.is_abandoned());
        letters.waiting.push_back(command);
        drop(letters);
        self.shared.came.notify_one();
        Ok(())
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
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut letters = self.shared.letters();
        letters.closed = true;
        // Whoever waits for an answer hears that there is none.
        letters.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_domain::UnixMillis;
    use tokio::sync::oneshot;

    fn move_to(at: i64) -> (Command, oneshot::Receiver<()>) {
        let (done, heard) = oneshot::channel();
        (Command::SetEnd(UnixMillis(at), done), heard)
    }

    #[tokio::test]
    async fn commands_come_in_order_and_wake_the_owner() {
        let (slit, mut inbox) = inbox();
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
    async fn a_closed_one_takes_nothing_and_answers_nobody() {
        let (slit, inbox) = inbox();
        let (moved, waits) = move_to(5);
        slit.put(moved).expect("open");
        drop(inbox);
        assert!(waits.await.is_err());
        assert_eq!(slit.put(Command::Kill), Err(Closed));
    }

    #[test]
    fn who_left_leaves_nothing_behind() {
        let (slit, inbox) = inbox();
        for at in 0..1000 {
            drop(move_to(at).1);
            let (moved, waits) = move_to(at);
            drop(waits);
            slit.put(moved).expect("open");
        }
        assert_eq!(inbox.shared.letters().waiting.len(), 1);
    }
}
