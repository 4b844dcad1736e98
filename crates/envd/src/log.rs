//! A small log: one line an event to standard error, which is the serial console in a guest.
//!
//! The console of an emulated machine is slow and its reader is the host, so lines are few and
//! short. Guest logs carry no secrets.

use std::fmt::Write as _;
use std::io::Write as _;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Writes events of at least its level; spans are not recorded.
#[derive(Debug)]
pub struct Console {
    level: Level,
}

impl Console {
    /// A console for events at `level` and more severe ones.
    pub fn new(level: Level) -> Console {
        Console { level }
    }
}

impl Subscriber for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line { text: format!("envd {}", event.metadata().level()) };
        event.record(&mut line);
        line.text.push('\n');
        // A log that cannot be written has no one to tell.
        let _ = std::io::stderr().write_all(line.text.as_bytes());
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

struct Line {
    text: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let outcome = match field.name() {
            "message" => write!(self.text, " {value:?}"),
            name => write!(self.text, " {name}={value:?}"),
        };
        outcome.expect("writing to a String never fails");
    }
}
