//! Logs: one line an event, to standard error, level from `BELLJAR_LOG`.
//!
//! Callers' words end up in logs: control characters in them are escaped, so that nobody writes
//! lines of their own or speaks to the terminal of whoever reads.

use std::fmt::{self, Write as _};

use tracing::field::Field;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Starts logging for this process. `directives` is an `EnvFilter` text such as `info,belljar_node=debug`.
///
/// Call once, first thing in `main`; a second call changes nothing.
pub fn init(directives: &str, format: LogFormat) {
    let filter = EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(true);
    // A second initialisation only happens in tests that share a process.
    let _already = match format {
        LogFormat::Text => builder.fmt_fields(fields()).try_init().is_err(),
        LogFormat::Json => builder.json().try_init().is_err(),
    };
}

/// The message, then `name=value` of every field.
fn fields() -> impl for<'a> FormatFields<'a> + Send + Sync + 'static {
    debug_fn(|writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| {
        let mut escaped = Escaped(writer);
        match field.name() {
            "message" => write!(escaped, "{value:?}"),
            name => write!(escaped, "{name}={value:?}"),
        }
    })
    .delimited(" ")
}

/// Writes control characters as their escapes.
struct Escaped<'a, 'w>(&'a mut Writer<'w>);

impl fmt::Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(char::is_control) {
            match part.char_indices().next_back() {
                Some((at, last)) if last.is_control() => {
                    self.0.write_str(&part[..at])?;
                    write!(self.0, "{}", last.escape_default())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_writes_lines_of_their_own() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .fmt_fields(fields())
            .finish();
        let forged = "x\r\n2026-11-22 INFO forged\x1b[31m\u{9b}2J\u{7f}";
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(text = forged, shown = %forged, debugged = ?forged, "said {forged}");
            tracing::info!(number = 7, plain = %"für uns", "done");
        });
        let written = lines.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let written = String::from_utf8(written).expect("text");
        assert_eq!(written.lines().count(), 2, "{written}");
        let control = written.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(control, None, "{written:?}");
        assert!(written.contains(r"shown=x\r\n2026-11-22 INFO forged\u{1b}[31m"), "{written}");
        assert!(written.ends_with("done number=7 plain=für uns\n"), "{written:?}");
    }
}
