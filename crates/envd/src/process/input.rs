//! What a process is told: one task owns its standard input and writes in order.

use std::io;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::channel::Channel;
use crate::task;

/// Pieces of input that may wait for a process that does not read.
const QUEUE_PIECES: usize = 8;

/// The way to a process's standard input or terminal. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Input {
    queue: mpsc::Sender<Order>,
}

enum Order {
    Write { bytes: Vec<u8>, done: oneshot::Sender<io::Result<()>> },
    Close { done: oneshot::Sender<()> },
}

impl Input {
    /// Starts the task that writes into `channel`.
    pub(super) fn new(tasks: &task::Group, channel: Arc<Channel>) -> Input {
        let (queue, mut orders) = mpsc::channel(QUEUE_PIECES);
        tasks.spawn(async move {
            let mut channel = Some(channel);
            while let Some(order) = orders.recv().await {
                match (order, &channel) {
                    (Order::Write { bytes, done }, Some(open)) => {
                        // The sender of the order may have left; the bytes are written anyway.
                        let _ = done.send(open.write_all(&bytes).await);
                    }
                    (Order::Write { done, .. }, None) => {
                        let _ = done.send(Err(io::ErrorKind::BrokenPipe.into()));
                    }
                    (Order::Close { done }, _) => {
                        channel = None;
                        let _ = done.send(());
                    }
                }
            }
        });
        Input { queue }
    }

    /// Writes everything and returns when the kernel has it.
    ///
    /// # Errors
    /// `BrokenPipe` when the process closed its input, or it was closed here.
    pub(super) async fn write(&self, bytes: Vec<u8>) -> io::Result<()> {
        let (done, outcome) = oneshot::channel();
        let order = Order::Write { bytes, done };
        self.queue.send(order).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        outcome.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    /// Closes it once everything before is written, so the process reads end of file. Closing
    /// twice is fine.
    pub(super) async fn close(&self) {
        let (done, outcome) = oneshot::channel();
        if self.queue.send(Order::Close { done }).await.is_ok() {
            let _ = outcome.await;
        }
    }
}
