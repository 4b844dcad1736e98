//! Logs: one line an event, to standard error, level from `BELLJAR_LOG`.

use tracing_subscriber::EnvFilter;

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
        LogFormat::Text => builder.try_init().is_err(),
        LogFormat::Json => builder.json().try_init().is_err(),
    };
}
