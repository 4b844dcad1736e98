//! A wall clock that a test moves under a running process.
//!
//! The host's clock belongs to everybody on it. So a test moves only what one process makes of it, and
//! wakes what the kernel wakes when the host's is set. Only builds with debug assertions can be
//! moved: in an optimised build the shift is always nothing, and [`follow`] refuses.

use std::io;
use std::path::{Path, PathBuf};

/// Why the clock of this process cannot be moved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// This is an optimised build.
    #[error("follow a clock's shifts: this build cannot; use one with debug assertions")]
    NotBuiltIn,
    /// The pipe cannot be read.
    #[error("read a clock's shifts from {}", path.display())]
    Pipe {
        /// The named pipe.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// From now on the wall clock of this process is as many milliseconds off the host's as the last line
/// of a named pipe says, below zero for behind. A thread reads the pipe until the process ends.
///
/// # Errors
/// [`FollowError`] in an optimised build, or when the pipe cannot be opened.
pub fn follow(pipe: &Path) -> Result<(), FollowError> {
    built::follow(pipe)
}

pub(super) use built::{Shifts, ms};

#[cfg(not(debug_assertions))]
mod built {
    use super::{FollowError, Path};

    pub(super) fn follow(_pipe: &Path) -> Result<(), FollowError> {
        Err(FollowError::NotBuiltIn)
    }

    #[inline(always)]
    pub(in super::super) fn ms() -> i64 {
        0
    }

    /// Shifts to come: none.
    pub(in super::super) struct Shifts;

    impl Shifts {
        pub(in super::super) fn from_now() -> Shifts {
            Shifts
        }

        pub(in super::super) async fn next(&mut self) {
            std::future::pending().await
        }
    }
}

#[cfg(debug_assertions)]
mod built {
    use std::fs::OpenOptions;
    use std::io::{self, BufReader};
    use std::sync::LazyLock;

    use tokio::sync::watch;

    use super::{FollowError, Path};

    /// How far this process's clock is off, ms.
    static SHIFT_MS: LazyLock<watch::Sender<i64>> = LazyLock::new(watch::Sender::default);

    pub(super) fn follow(pipe: &Path) -> Result<(), FollowError> {
        let failed = |source| FollowError::Pipe { path: pipe.to_owned(), source };
        // Open for writing as well, it does not end when the test closes its end.
        let pipe = OpenOptions::new().read(true).write(true).open(pipe).map_err(failed)?;
        let read = move || {
            if let Err(e) = each_shift(BufReader::new(pipe)) {
                tracing::error!(error = %e, "the clock follows no more shifts");
            }
        };
        std::thread::Builder::new().name("clock shifts".to_owned()).spawn(read).map_err(failed)?;
        Ok(())
    }

    fn each_shift(pipe: impl io::BufRead) -> io::Result<()> {
        for line in pipe.lines() {
            let shift_ms = line?.trim().parse().map_err(io::Error::other)?;
            SHIFT_MS.send_replace(shift_ms);
        }
        Ok(())
    }

    pub(in super::super) fn ms() -> i64 {
        *SHIFT_MS.borrow()
    }

    /// Shifts to come.
    pub(in super::super) struct Shifts {
        seen: watch::Receiver<i64>,
    }

    impl Shifts {
        pub(in super::super) fn from_now() -> Shifts {
            Shifts { seen: SHIFT_MS.subscribe() }
        }

        /// Ends with the next shift. Cancel-safe.
        pub(in super::super) async fn next(&mut self) {
            // The sender is static, so this is never an error.
            let _never = self.seen.changed().await.is_err();
        }
    }
}
