//! The outer machine's monitor (QMP): a command, its answer, and what happens meanwhile.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Everything but the transfer of a state is a matter of milliseconds.
const LIMIT: Duration = Duration::from_secs(30);

/// A monitor that took its first command.
pub(super) struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Greets the monitor at the other end of `stream`, which may still be starting.
    pub(super) fn greet(stream: UnixStream) -> Result<Monitor> {
        let mut monitor = Monitor { lines: BufReader::new(stream) };
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Has everything but memory written to `path`: the memory is a file already.
    pub(super) fn save(&mut self, path: &str) -> Result<()> {
        self.transfer("migrate", path)
    }

    /// Loads what [`Monitor::save`] wrote; the machine goes on where it was.
    pub(super) fn load(&mut self, path: &str) -> Result<()> {
        self.transfer("migrate-incoming", path)
    }

    /// Ends the machine's process.
    pub(super) fn quit(&mut self) -> Result<()> {
        self.execute("quit", json!({}))
    }

    fn transfer(&mut self, command: &str, path: &str) -> Result<()> {
        let capabilities = json!({ "capabilities": [
            { "capability": "x-ignore-shared", "state": true },
            { "capability": "events", "state": true },
        ]});
        self.execute("migrate-set-capabilities", capabilities)?;
        self.execute(command, json!({ "uri": format!("file:{path}") }))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let message = self.message(deadline)?;
            if message["event"] != "MIGRATION" {
                continue;
            }
            match message["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("{command} of {path} failed"),
                _ => {}
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<()> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        let deadline = Instant::now() + LIMIT;
        let mut stream = self.lines.get_ref();
        stream.set_write_timeout(Some(LIMIT))?;
        stream.write_all(format!("{line}\n").as_bytes()).context("the monitor is gone")?;
        loop {
            let message = self.message(deadline)?;
            if let Some(error) = message.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("refused"));
            }
            if message.get("return").is_some() {
                return Ok(());
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        let line = read_line(&mut self.lines, deadline)?.context("the monitor is gone")?;
        serde_json::from_str(&line).with_context(|| format!("the monitor said `{}`", line.trim()))
    }
}

/// One line before the deadline; `None` at the end of the stream.
///
/// # Errors
/// The deadline passed: its text says so.
pub(super) fn read_line(
    lines: &mut BufReader<UnixStream>,
    deadline: Instant,
) -> Result<Option<String>> {
    let mut line = String::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the outer machine did not answer in time");
        }
        lines.get_ref().set_read_timeout(Some(left))?;
        match lines.read_line(&mut line) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(line)),
            // What was read so far stays in `line`.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error).context("cannot read from the outer machine"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor that gives these lines as answers, one for each command.
    fn monitor(answers: &[&'static str]) -> (UnixStream, std::thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers = answers.to_vec();
        let thread = std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs);
            let mut seen = Vec::new();
            for answer in answers {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap() == 0 {
                    break;
                }
                seen.push(line);
                lines.get_ref().write_all(answer.as_bytes()).unwrap();
            }
            seen
        });
        (ours, thread)
    }

    #[test]
    fn a_transfer_waits_for_its_end() {
        let (stream, thread) = monitor(&[
            "{\"QMP\":{}}\n{\"return\":{}}\n",
            "{\"return\":{}}\n",
            "{\"return\":{}}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"active\"}}\n\
             {\"event\":\"STOP\"}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"completed\"}}\n",
        ]);
        Monitor::greet(stream).unwrap().save("/a/state").unwrap();
        let seen = thread.join().unwrap();
        assert!(seen[1].contains("x-ignore-shared"));
        assert!(seen[2].contains("file:/a/state"));
    }

    #[test]
    fn refusals_failures_and_silence_are_told_apart() {
        let (stream, thread) = monitor(&["{\"error\":{\"desc\":\"not now\"}}\n"]);
        let error = Monitor::greet(stream).err().unwrap();
        assert!(error.to_string().contains("not now"), "{error}");
        thread.join().unwrap();
        let failed =
            "{\"return\":{}}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"failed\"}}\n";
        let (stream, thread) = monitor(&["{\"return\":{}}\n", "{\"return\":{}}\n", failed]);
        let error = Monitor::greet(stream).unwrap().load("/s").unwrap_err();
        assert!(error.to_string().contains("failed"), "{error}");
        thread.join().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let late = read_line(&mut BufReader::new(ours), Instant::now()).unwrap_err();
        assert!(late.to_string().contains("in time"), "{late}");
        drop(theirs);
    }
}
