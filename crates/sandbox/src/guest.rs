//! The host's end of the guest control channel (`wire::guest`).
//!
//! The guest is hostile: a line that is too long, or no message, ends the channel.

use std::time::Duration;

use belljar_runtime::ControlStream;
use belljar_wire::guest::{FromGuest, Init, LINE_MAX_BYTES, LineError, ToGuest, decode, encode};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::time::timeout;

/// Why the guest did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The channel closed: the machine is gone or the daemon in it is.
    #[error("hear from the guest: its control channel closed while {waiting_for}")]
    Closed {
        /// What was waited for.
        waiting_for: &'static str,
    },
    /// It said nothing in time.
    #[error("hear from the guest within {waited_ms} ms while {waiting_for}")]
    TimedOut {
        /// What was waited for.
        waiting_for: &'static str,
        /// How long.
        waited_ms: u64,
    },
    /// The channel failed.
    #[error("use the guest control channel")]
    Io {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What it said is no message.
    #[error("understand the guest")]
    Line {
        /// Why.
        #[source]
        source: LineError,
    },
    /// It said that it could not.
    #[error("set up the guest: it answered `{message}`")]
    Refused {
        /// Its words, cut to 200 characters. Hostile text.
        message: String,
    },
}

/// The host's end of one machine's control channel.
pub struct GuestControl {
    reader: BufReader<ReadHalf<ControlStream>>,
    writer: WriteHalf<ControlStream>,
    line: Vec<u8>,
}

impl GuestControl {
    /// Takes over a machine's control stream.
    pub fn new(stream: ControlStream) -> GuestControl {
        let (reader, writer) = tokio::io::split(stream);
        GuestControl { reader: BufReader::new(reader), writer, line: Vec::new() }
    }

    /// Waits until a cold-booted guest says it is up; answers its daemon's version.
    ///
    /// # Errors
    /// [`GuestError`]; the channel is not usable afterwards.
    pub async fn wait_booted(&mut self, deadline: Duration) -> Result<String, GuestError> {
        let waiting_for = "waiting for it to boot";
        self.await_answer(deadline, waiting_for, |message| match message {
            FromGuest::Booted { envd_version } => Some(Ok(envd_version)),
            _ => None,
        })
        .await
    }

    /// Tells the guest who it is and waits until it serves as that; answers its daemon's version.
    ///
    /// # Errors
    /// [`GuestError`]; the channel is not usable afterwards.
    pub async fn init(&mut self, init: Init, deadline: Duration) -> Result<String, GuestError> {
        let wanted = init.nonce;
        self.send(&ToGuest::Init(init)).await?;
        self.await_answer(deadline, "waiting for it to become ready", |message| match message {
            FromGuest::Ready { nonce, envd_version } if nonce == wanted => Some(Ok(envd_version)),
            FromGuest::Failed { nonce, message } if nonce == wanted => Some(Err(refused(&message))),
            _ => None,
        })
        .await
    }

    /// Has the guest flush its file systems for a snapshot.
    ///
    /// # Errors
    /// [`GuestError`]; the channel is not usable afterwards.
    pub async fn prepare_snapshot(&mut self, deadline: Duration) -> Result<(), GuestError> {
        const NONCE: u64 = 1;
        self.send(&ToGuest::PrepareSnapshot { nonce: NONCE }).await?;
        self.await_answer(deadline, "waiting for it to flush its disk", |message| match message {
            FromGuest::Prepared { nonce: NONCE } => Some(Ok(())),
            FromGuest::Failed { nonce: NONCE, message } => Some(Err(refused(&message))),
            _ => None,
        })
        .await
    }

    /// Reads and drops what the guest says until the channel ends. Cancel-safe: only whole
    /// sessions end here, and nothing read is ever answered.
    pub async fn drain(&mut self) {
        let mut scratch = [0_u8; 4096];
        loop {
            match self.reader.read(&mut scratch).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    async fn send(&mut self, message: &ToGuest) -> Result<(), GuestError> {
        let io = |source| GuestError::Io { source };
        self.writer.write_all(&encode(message)).await.map_err(io)?;
        self.writer.flush().await.map_err(io)
    }

    async fn await_answer<T>(
        &mut self,
        deadline: Duration,
        waiting_for: &'static str,
        mut wanted: impl FnMut(FromGuest) -> Option<Result<T, GuestError>>,
    ) -> Result<T, GuestError> {
        let search = async {
            loop {
                let message = self.next(waiting_for).await?;
                if let Some(answer) = wanted(message) {
                    return answer;
                }
            }
        };
        timeout(deadline, search).await.unwrap_or_else(|_| {
            let waited_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
            Err(GuestError::TimedOut { waiting_for, waited_ms })
        })
    }

    async fn next(&mut self, waiting_for: &'static str) -> Result<FromGuest, GuestError> {
        self.line.clear();
        let cap = LINE_MAX_BYTES as u64 + 1;
        let mut capped = (&mut self.reader).take(cap);
        let len = capped
            .read_until(b'\n', &mut self.line)
            .await
            .map_err(|source| GuestError::Io { source })?;
        if len == 0 {
            return Err(GuestError::Closed { waiting_for });
        }
        decode(&self.line).map_err(|source| GuestError::Line { source })
    }
}

fn refused(message: &str) -> GuestError {
    GuestError::Refused { message: message.chars().take(200).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (GuestControl, tokio::io::DuplexStream) {
        let (host, guest) = duplex(64 * 1024);
        (GuestControl::new(Box::new(host)), guest)
    }

    #[tokio::test]
    async fn init_waits_for_its_own_nonce() {
        let (mut host, mut guest) = pair();
        let stale = FromGuest::Ready { nonce: 1, envd_version: "0".into() };
        let ready = FromGuest::Ready { nonce: 2, envd_version: "0.6.13".into() };
        guest.write_all(&encode(&stale)).await.expect("open");
        guest.write_all(&encode(&ready)).await.expect("open");
        let version = host.init(Init { nonce: 2, ..Init::default() }, SOON).await.expect("ready");
        assert_eq!(version, "0.6.13");
    }

    #[tokio::test]
    async fn a_guest_that_talks_nonsense_is_cut_off() {
        let (mut host, mut guest) = pair();
        guest.write_all(b"hello\n").await.expect("open");
        assert!(matches!(host.wait_booted(SOON).await, Err(GuestError::Line { .. })));
    }

    #[tokio::test]
    async fn a_silent_guest_runs_into_the_deadline() {
        let (mut host, _guest) = pair();
        let outcome = host.wait_booted(Duration::from_millis(10)).await;
        assert!(matches!(outcome, Err(GuestError::TimedOut { .. })));
    }

    #[tokio::test]
    async fn a_closed_channel_is_named() {
        let (mut host, guest) = pair();
        drop(guest);
        assert!(matches!(
            host.prepare_snapshot(SOON).await,
            Err(GuestError::Closed { .. } | GuestError::Io { .. })
        ));
    }
}
