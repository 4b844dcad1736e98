//! The machine monitor's protocol: one JSON object a line, answers matched by id, events folded
//! into what they say about the machine.
//!
//! Nothing is queued: the owner reads while it waits for an answer or for the machine's end.
//! Source: QEMU's QMP specification and QAPI schema, version 10.0.

use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout_at};

use crate::lines::Lines;

/// The monitor's answers are some hundred bytes; its longest events some thousand.
const LINE_MAX_BYTES: usize = 1 << 20;

/// A connection to a machine monitor.
pub(super) struct Qmp {
    incoming: Lines<OwnedReadHalf>,
    outgoing: OwnedWriteHalf,
    next_id: u64,
    seen: Seen,
}

/// What the events said so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether the virtual processors were told to run last.
    pub(super) resumed: bool,
    /// Why the machine shut down, in the monitor's word.
    pub(super) shutdown: Option<String>,
    migration: Option<String>,
    closed: bool,
}

/// Why a command has no good answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum QmpError {
    /// The monitor closed the connection: it is gone or going.
    Gone,
    /// It said no.
    Refused(String),
    /// It said nothing in time.
    TimedOut(Duration),
}

/// Any line of the monitor.
#[derive(Debug, Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    pub(super) fn new(stream: UnixStream) -> Qmp {
        let (incoming, outgoing) = stream.into_split();
        let incoming = Lines::new(incoming, LINE_MAX_BYTES);
        Qmp { incoming, outgoing, next_id: 1, seen: Seen::default() }
    }

    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Whether the monitor closed the connection.
    pub(super) fn is_closed(&self) -> bool {
        self.seen.closed
    }

    /// Runs a command and returns its answer. When this is cancelled, the answer is passed over
    /// when it comes; a command fits the socket's buffer, so it is sent whole or not at all.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let deadline = Instant::now() + limit;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        match timeout_at(deadline, self.outgoing.write_all(line.as_bytes())).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(QmpError::Gone),
            Err(_) => return Err(QmpError::TimedOut(limit)),
        }
        loop {
            let line = timeout_at(deadline, self.read())
                .await
                .map_err(|_| QmpError::TimedOut(limit))??;
            if line.id == Some(id) {
                return match (line.answer, line.error) {
                    (_, Some(refusal)) => Err(QmpError::Refused(refusal.desc)),
                    (answer, None) => Ok(answer.unwrap_or(Value::Null)),
                };
            }
        }
    }

    /// Runs `migrate` or `migrate-incoming` and waits until the state is written or read whole.
    ///
    /// # Errors
    /// [`QmpError`]; `Refused` has the monitor's reason.
    pub(super) async fn migrate(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<(), QmpError> {
        let deadline = Instant::now() + limit;
        // What is known is of an earlier one.
        self.seen.migration = None;
        self.execute(command, arguments, limit).await?;
        loop {
            match self.seen.migration.as_deref() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => break,
                _ => {}
            }
            timeout_at(deadline, self.read()).await.map_err(|_| QmpError::TimedOut(limit))??;
        }
        let details = self.execute("query-migrate", json!({}), limit).await?;
        let reason = details["error-desc"].as_str().unwrap_or("no reason given");
        Err(QmpError::Refused(reason.to_owned()))
    }

    /// Reads one line and folds it in. Cancel-safe.
    ///
    /// # Errors
    /// [`QmpError::Gone`] at the end of the connection, for good.
    pub(super) async fn pump(&mut self) -> Result<(), QmpError> {
        self.read().await.map(drop)
    }

    async fn read(&mut self) -> Result<Line, QmpError> {
        let parsed = match self.incoming.next().await {
            Ok(Some(line)) => serde_json::from_slice::<Line>(&line).map_err(io::Error::from),
            Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(e) => Err(e),
        };
        match parsed {
            Ok(line) => {
                self.seen.fold(&line);
                Ok(line)
            }
            // A monitor that talks nonsense is as good as gone.
            Err(_) => {
                self.seen.closed = true;
                Err(QmpError::Gone)
            }
        }
    }
}

impl Seen {
    fn fold(&mut self, line: &Line) {
        let text = |key: &str| line.data[key].as_str().map(str::to_owned);
        match line.event.as_deref() {
            Some("RESUME") => self.resumed = true,
            Some("STOP") => self.resumed = false,
            Some("SHUTDOWN") => self.shutdown = text("reason"),
            Some("MIGRATION") => self.migration = text("status"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt as _, BufReader};

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn answers_are_matched_and_events_folded() {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let mut qmp = Qmp::new(ours);
        let mut monitor = BufReader::new(theirs);
        let monitor_says = concat!(
            r#"{"QMP": {"version": {}, "capabilities": []}}"#,
            "\n",
            r#"{"timestamp": {}, "event": "MIGRATION", "data": {"status": "failed"}}"#,
            "\n",
            r#"{"return": {"late": true}, "id": 99}"#,
            "\n",
            r#"{"return": {"mine": true}, "id": 1}"#,
            "\n",
            r#"{"id": 2, "error": {"class": "GenericError", "desc": "no"}}"#,
            "\n",
            r#"{"event": "MIGRATION", "data": {"status": "active"}}"#,
            "\n",
            r#"{"return": {}, "id": 3}"#,
            "\n",
            r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#,
            "\n",
        );
        monitor.get_mut().write_all(monitor_says.as_bytes()).await.expect("room");
        let answer = qmp.execute("first", json!({}), LIMIT).await.expect("an answer");
        assert_eq!(answer, json!({ "mine": true }));
        let refused = qmp.execute("second", json!({}), LIMIT).await;
        assert_eq!(refused, Err(QmpError::Refused("no".into())));
        qmp.migrate("third", json!({}), LIMIT).await.expect("an older failure does not count");

        let mut sent = String::new();
        monitor.read_line(&mut sent).await.expect("the first command");
        assert_eq!(sent, "{\"arguments\":{},\"execute\":\"first\",\"id\":1}\n");
    }

    #[tokio::test]
    async fn silence_nonsense_and_an_end_are_told_apart() {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let mut qmp = Qmp::new(ours);
        let limit = Duration::from_millis(20);
        let silence = qmp.execute("any", json!({}), limit).await;
        assert_eq!(silence, Err(QmpError::TimedOut(limit)));
        theirs
            .write_all(b"{\"event\":\"SHUTDOWN\",\"data\":{\"reason\":\"guest-reset\"}}\n?\n")
            .await
            .expect("room");
        qmp.pump().await.expect("the event");
        assert_eq!(qmp.seen().shutdown.as_deref(), Some("guest-reset"));
        assert_eq!(qmp.pump().await, Err(QmpError::Gone));
        assert!(qmp.is_closed());
    }
}
