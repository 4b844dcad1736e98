//! How an operator stops a server.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

/// SIGINT and SIGTERM: the first asks to stop, the second stops waiting for it.
pub(crate) struct StopSignals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl StopSignals {
    pub(crate) fn new() -> Result<StopSignals> {
        Ok(StopSignals {
            interrupt: signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?,
        })
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
