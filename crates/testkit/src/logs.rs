//! The log oracle: did anything warn that the test did not expect?

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;

/// Collects every WARN and ERROR event while it lives.
///
/// [`LogOracle::install`] hears the thread that installs it, which is all of a test on a
/// current-thread runtime; tests beside it do not disturb it. A test on a multi-thread runtime
/// that is alone in its process uses [`LogOracle::install_for_process`].
#[must_use = "events are collected only while the oracle lives"]
pub struct LogOracle {
    heard: Arc<Mutex<Vec<String>>>,
    _listening: Option<DefaultGuard>,
}

impl LogOracle {
    /// Listens to this thread until dropped.
    pub fn install() -> LogOracle {
        let heard = Arc::default();
        let listening = tracing::subscriber::set_default(listener(&heard));
        LogOracle { heard, _listening: Some(listening) }
    }

    /// Listens to every thread of the process, for the rest of its life.
    ///
    /// # Panics
    /// When the process already has a global subscriber.
    pub fn install_for_process() -> LogOracle {
        let heard = Arc::default();
        tracing::subscriber::set_global_default(listener(&heard))
            .expect("one test a process installs the global oracle");
        LogOracle { heard, _listening: None }
    }

    /// What was heard so far, one line an event.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fails the test if an event was heard that contains none of the `allowed` texts.
    ///
    /// # Panics
    /// With every unexpected line.
    pub fn assert_quiet(&self, allowed: &[&str]) {
        let mut loud = self.heard();
        loud.retain(|line| !allowed.iter().any(|text| line.contains(text)));
        assert!(loud.is_empty(), "unexpected log lines:\n  {}", loud.join("\n  "));
    }
}

fn listener(heard: &Arc<Mutex<Vec<String>>>) -> impl Subscriber + Send + Sync + use<> {
    Registry::default().with(Listener { heard: Arc::clone(heard) })
}

struct Listener {
    heard: Arc<Mutex<Vec<String>>>,
}

impl<S: Subscriber> Layer<S> for Listener {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let level = *event.metadata().level();
        if level > Level::WARN {
            return;
        }
        let mut line = Line(format!("{level} {}:", event.metadata().target()));
        event.record(&mut line);
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(line.0);
    }
}

/// Everything that is logged, at every level, with the fields of events and of spans.
///
/// For tests that look for what must not be there. It hears the thread that installs it, as
/// [`LogOracle::install`] does.
#[must_use = "lines are collected only while the transcript lives"]
pub struct Transcript {
    lines: Arc<Mutex<Vec<String>>>,
    _listening: DefaultGuard,
}

impl Transcript {
    /// Listens to this thread until dropped.
    pub fn install() -> Transcript {
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let writer = Writer { lines: Arc::clone(&lines) };
        let listening = tracing::subscriber::set_default(Registry::default().with(writer));
        Transcript { lines, _listening: listening }
    }

    /// What was logged so far, one line an event or a span.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fails the test if one of `secrets` is in a line.
    ///
    /// # Panics
    /// With the line; and when nothing was logged, because then nothing was looked at.
    pub fn assert_without(&self, secrets: &[&str]) {
        let lines = self.lines();
        assert!(!lines.is_empty(), "nothing was logged");
        for line in &lines {
            for secret in secrets {
                assert!(!line.contains(secret), "a secret is in the log: {line}");
            }
        }
    }
}

struct Writer {
    lines: Arc<Mutex<Vec<String>>>,
}

impl Writer {
    fn write(&self, line: Line) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line.0);
    }
}

impl<S: Subscriber> Layer<S> for Writer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut line = Line(format!("{} {}:", metadata.level(), metadata.target()));
        event.record(&mut line);
        self.write(line);
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, _id: &Id, _context: Context<'_, S>) {
        let mut line = Line(format!("span {}:", attributes.metadata().name()));
        attributes.record(&mut line);
        self.write(line);
    }

    fn on_record(&self, _id: &Id, values: &Record<'_>, _context: Context<'_, S>) {
        let mut line = Line("span:".to_owned());
        values.record(&mut line);
        self.write(line);
    }
}

/// An event as text: the message, then the fields as `name=value`.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _written = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_warnings_and_errors_are_heard() {
        let oracle = LogOracle::install();
        tracing::info!("all is well");
        tracing::warn!(port = 80, "closed");
        tracing::error!("broken");
        let heard = oracle.heard();
        assert_eq!(heard.len(), 2, "{heard:?}");
        assert!(heard[0].starts_with("WARN ") && heard[0].contains("closed"), "{heard:?}");
        assert!(heard[0].contains("port=80"), "{heard:?}");
        oracle.assert_quiet(&["closed", "broken"]);
    }

    #[test]
    #[should_panic(expected = "unexpected log lines")]
    fn an_unlisted_warning_fails() {
        let oracle = LogOracle::install();
        tracing::warn!("surprise");
        oracle.assert_quiet(&["closed"]);
    }

    #[test]
    fn a_dropped_oracle_hears_nothing() {
        let oracle = LogOracle::install();
        let heard = Arc::clone(&oracle.heard);
        drop(oracle);
        tracing::warn!("too late");
        assert!(heard.lock().expect("no panic holds this lock").is_empty());
    }

    #[test]
    fn a_transcript_has_every_level_and_the_fields_of_spans() {
        let transcript = Transcript::install();
        let span = tracing::trace_span!("request", key = "e2b_1", later = tracing::field::Empty);
        span.record("later", "e2b_2");
        tracing::trace!(token = "e2b_3", "asked");
        let lines = transcript.lines();
        for (line, text) in lines.iter().zip(["e2b_1", "e2b_2", "e2b_3"]) {
            assert!(line.contains(text), "{line}");
        }
        transcript.assert_without(&["e2b_4"]);
    }

    #[test]
    #[should_panic(expected = "a secret is in the log")]
    fn a_secret_in_the_log_fails() {
        let transcript = Transcript::install();
        tracing::debug!("opened with e2b_1");
        transcript.assert_without(&["e2b_1"]);
    }
}
