//! The log oracle: did anything warn that the test did not expect?

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
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
}
