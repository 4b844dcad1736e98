//! `belljar sandbox logs`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use belljar_wire::rest::{SandboxLogEntry, SandboxLogsV2};

use crate::api::{Api, Target};
use crate::args::LevelChoice;
use crate::output;
use crate::sandbox::path_segment;

/// How often a follower asks: lines are on their way for a tenth of a second as it is.
const ASK_PAUSE: Duration = Duration::from_millis(400);

/// Prints the log from its start; with `follow`, until the sandbox ends.
pub(crate) async fn print(
    target: Target,
    as_json: bool,
    id: &str,
    follow: bool,
    level: LevelChoice,
) -> Result<ExitCode> {
    let api = Api::new(target);
    let level = match level {
        LevelChoice::Debug => "debug",
        LevelChoice::Info => "info",
        LevelChoice::Warn => "warn",
        LevelChoice::Error => "error",
    };
    let path = format!("/v2/sandboxes/{}/logs?direction=forward&level={level}", path_segment(id));
    let mut next_unix_ms = 0;
    let mut found = false;
    loop {
        let page: Option<SandboxLogsV2> =
            api.find(&format!("{path}&cursor={next_unix_ms}")).await?;
        let Some(page) = page else { break };
        found = true;
        for entry in &page.logs {
            if as_json { output::json(entry)? } else { output::line(&text(entry))? }
        }
        match page.logs.last() {
            // The server never puts a later line at a time it has answered already.
            Some(last) => next_unix_ms = last.timestamp.timestamp_millis() + 1,
            None if follow => tokio::time::sleep(ASK_PAUSE).await,
            None => return Ok(ExitCode::SUCCESS),
        }
    }
    if !found {
        bail!("there is no sandbox {id}; `belljar sandbox list` shows those that run");
    }
    Ok(ExitCode::SUCCESS)
}

/// One line for a person. What a sandbox says could command the terminal it is shown on, so
/// control characters are spelled out.
fn text(entry: &SandboxLogEntry) -> String {
    let field = |name: &str| entry.fields.get(name).map_or("-", String::as_str);
    let mut message = String::with_capacity(entry.message.len());
    for character in entry.message.chars() {
        match character {
            '\t' => message.push(character),
            control if control.is_control() => message.extend(control.escape_default()),
            other => message.push(other),
        }
    }
    format!(
        "{} {:<5} {:>5} {:<13} {message}",
        entry.timestamp.format("%Y-%m-%d %H:%M:%S%.3f"),
        entry.level.as_str().to_uppercase(),
        field("pid"),
        field("event_type"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_is_shown_without_obeying_it() {
        let entry: SandboxLogEntry = serde_json::from_value(json!({
            "timestamp": "2023-11-14T22:13:20.001Z",
            "message": "red\u{1b}[31m\tt\u{fc}r\r",
            "level": "error",
            "fields": { "pid": "12", "event_type": "stderr" },
        }))
        .expect("an entry");
        assert_eq!(
            text(&entry),
            "2023-11-14 22:13:20.001 ERROR    12 stderr        red\\u{1b}[31m\tt\u{fc}r\\r"
        );
    }
}
