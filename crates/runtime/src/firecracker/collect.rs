//! What a machine's process prints, logs and counts: taken off its pipes, the last of it kept.
//!
//! A guest decides how much its console says, so nothing of this goes to a disk: what nobody takes
//! in time fills a pipe, and then Firecracker drops it and counts what it dropped.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::buffer::spare_capacity;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// How much is kept of what is printed, and of the log, bytes.
const KEPT_BYTES: usize = 4096;
/// Longest line of figures that is kept, bytes. One has some 10,000.
const FIGURES_MAX_BYTES: usize = 256 << 10;
const CHUNK_BYTES: usize = 16 << 10;

/// The last bytes of a pipe.
#[derive(Debug)]
struct Tail {
    pipe: AsyncFd<OwnedFd>,
    kept: Vec<u8>,
    max_bytes: usize,
    ended: bool,
}

impl Tail {
    fn new(pipe: OwnedFd, max_bytes: usize) -> io::Result<Tail> {
        let pipe = sys::watch_readable(pipe)?;
        Ok(Tail { pipe, kept: Vec::new(), max_bytes, ended: false })
    }

    /// Takes what is there, waiting for something. Cancel-safe. For ever at the end of the pipe.
    async fn pump(&mut self) {
        if self.ended {
            std::future::pending::<()>().await;
        }
        match self.pipe.readable().await {
            Ok(mut ready) => {
                let mut chunk = Vec::with_capacity(CHUNK_BYTES);
                match rustix::io::read(ready.get_inner(), spare_capacity(&mut chunk)) {
                    Ok(0) => self.ended = true,
                    Ok(_) => keep(&mut self.kept, &chunk, self.max_bytes),
                    Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => self.ended = true,
                }
            }
            Err(_) => self.ended = true,
        }
    }

    /// Takes what is there now, without waiting.
    fn drain(&mut self) {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        while let Ok(1..) = rustix::io::read(self.pipe.get_ref(), spare_capacity(&mut chunk)) {
            keep(&mut self.kept, &chunk, self.max_bytes);
            chunk.clear();
        }
    }

    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept);
        text.lines().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>().join(" | ")
    }
}

fn keep(kept: &mut Vec<u8>, more: &[u8], max_bytes: usize) {
    kept.extend_from_slice(more);
    let beyond = kept.len().saturating_sub(max_bytes);
    kept.drain(..beyond);
}

/// The newest figures of a machine: what Firecracker wrote last, one JSON object.
pub(super) type Figures = Arc<Mutex<Option<String>>>;

/// Everything a process says.
#[derive(Debug)]
pub(super) struct Collected {
    printed: Tail,
    log: Tail,
    counted: Tail,
    figures: Figures,
}

impl Collected {
    /// # Errors
    /// I/O errors of the runtime.
    pub(super) fn new(
        printed: OwnedFd,
        log: OwnedFd,
        counted: OwnedFd,
        figures: Figures,
    ) -> io::Result<Collected> {
        Ok(Collected {
            printed: Tail::new(printed, KEPT_BYTES)?,
            log: Tail::new(log, KEPT_BYTES)?,
            counted: Tail::new(counted, FIGURES_MAX_BYTES)?,
            figures,
        })
    }

    /// Takes whatever comes next. Cancel-safe; returns now and then.
    pub(super) async fn pump(&mut self) {
        tokio::select! {
            () = self.printed.pump() => {}
            () = self.log.pump() => {}
            () = self.counted.pump() => self.note_figures(),
        }
    }

    /// The newest whole line is the figures.
    fn note_figures(&mut self) {
        let kept = &self.counted.kept;
        let Some(end) = kept.iter().rposition(|byte| *byte == b'\n') else { return };
        let start = kept[..end].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let line = String::from_utf8_lossy(&kept[start..end]).into_owned();
        self.counted.kept.drain(..=end);
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner) = Some(line);
    }

    /// The last lines of what was printed and logged, as one.
    pub(super) fn tail(&mut self) -> String {
        self.printed.drain();
        self.log.drain();
        match (self.log.text(), self.printed.text()) {
            (log, printed) if log.is_empty() && printed.is_empty() => "it said nothing".to_owned(),
            (log, printed) if log.is_empty() => printed,
            (log, printed) if printed.is_empty() => log,
            (log, printed) => format!("{log} || {printed}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe")
    }

    #[tokio::test]
    async fn the_last_of_it_is_kept_and_figures_are_the_newest_line() {
        let ((printed, to_print), (log, to_log), (counted, to_count)) = (pipe(), pipe(), pipe());
        let figures = Figures::default();
        let mut collected =
            Collected::new(printed, log, counted, figures.clone()).expect("a runtime");
        assert_eq!(collected.tail(), "it said nothing");
        let long = "x".repeat(3 * KEPT_BYTES) + "\nlast\n";
        rustix::io::write(&to_print, long.as_bytes()).expect("room");
        rustix::io::write(&to_log, b"warned\n").expect("room");
        rustix::io::write(&to_count, b"{\"a\":1}\n{\"a\":2}\n{\"a\"").expect("room");
        let seen = || figures.lock().expect("no panic").clone();
        while seen().is_none() {
            collected.pump().await;
        }
        assert_eq!(seen().as_deref(), Some("{\"a\":2}"));
        rustix::io::write(&to_count, b":3}\n").expect("room");
        while seen().as_deref() != Some("{\"a\":3}") {
            collected.pump().await;
        }
        let tail = collected.tail();
        assert!(tail.starts_with("warned || x") && tail.ends_with("x | last"), "{tail}");
        assert!(tail.len() <= KEPT_BYTES + 32, "{}", tail.len());
    }
}
