//! `belljar sandbox list|kill|exec`.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use base64::Engine as _;
use belljar_wire::ENVD_PORT;
use belljar_wire::rest::{ListedSandbox, Sandbox};
use belljar_wire::rpc::process::{
    ProcessClient, ProcessConfig, StartRequest, StartResponse, process_event,
};
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use serde::Serialize;
use serde_json::json;

use crate::api::{Api, Target};
use crate::output;

/// Listed a page at a time; the API's own limit.
const PAGE: u32 = 100;
/// `exec` asks for this much more life, in seconds, so that the sandbox outlives a short command.
const EXEC_TIMEOUT_S: u32 = 60;

pub(crate) async fn list(target: Target, as_json: bool) -> Result<ExitCode> {
    let sandboxes = running(&Api::new(target)).await?;
    if as_json {
        output::json(&sandboxes)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = sandboxes
        .iter()
        .map(|s| {
            vec![
                s.sandbox_id.clone(),
                s.alias.clone().unwrap_or_else(|| s.template_id.clone()),
                s.started_at.format("%Y-%m-%d %H:%M:%S").to_string(),
                s.end_at.format("%Y-%m-%d %H:%M:%S").to_string(),
                s.cpu_count.to_string(),
                format!("{} MiB", s.memory_mb),
            ]
        })
        .collect();
    let header = ["SANDBOX", "TEMPLATE", "STARTED (UTC)", "ENDS (UTC)", "CPUS", "MEMORY"];
    output::table(&header, rows, "No sandbox runs.")?;
    Ok(ExitCode::SUCCESS)
}

async fn running(api: &Api) -> Result<Vec<ListedSandbox>> {
    // A hundred at most here: the operator's list is for people. Scripts page through the API.
    api.get(&format!("/v2/sandboxes?state=running&limit={PAGE}")).await
}

#[derive(Serialize)]
struct Killed {
    killed: Vec<String>,
    missing: Vec<String>,
}

pub(crate) async fn kill(
    target: Target,
    as_json: bool,
    ids: Vec<String>,
    all: bool,
) -> Result<ExitCode> {
    let api = Api::new(target);
    let mut outcome = Killed { killed: Vec::new(), missing: Vec::new() };
    let mut wanted = ids;
    loop {
        if all {
            wanted = running(&api).await?.into_iter().map(|s| s.sandbox_id).collect();
            wanted.retain(|id| !outcome.missing.contains(id));
        }
        if wanted.is_empty() {
            break;
        }
        for id in wanted.drain(..) {
            let there = api.delete(&format!("/sandboxes/{}", path_segment(&id))).await?;
            if there { &mut outcome.killed } else { &mut outcome.missing }.push(id);
        }
        if !all {
            break;
        }
    }
    if as_json {
        output::json(&outcome)?;
    } else {
        for id in &outcome.killed {
            output::line(&format!("{id} killed"))?;
        }
        for id in &outcome.missing {
            output::line(&format!("{id} was not running"))?;
        }
    }
    let failed = !all && !outcome.missing.is_empty();
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Keeps a hostile or mistyped id inside its own path segment.
pub(crate) fn path_segment(id: &str) -> String {
    id.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(b).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// What to run where.
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) user: String,
    pub(crate) cwd: Option<String>,
    pub(crate) command: Vec<String>,
}

#[derive(Default, Serialize)]
struct ExecOutcome {
    /// `None` until the end was seen.
    exit_code: Option<i32>,
    stdout: String,
    stderr: String,
}

pub(crate) async fn exec(target: Target, as_json: bool, exec: Exec) -> Result<ExitCode> {
    let api = Api::new(target.clone());
    let path = format!("/sandboxes/{}/connect", path_segment(&exec.id));
    let sandbox: Sandbox = api.post(&path, &json!({ "timeout": EXEC_TIMEOUT_S })).await?;
    let client = guest_client(&target)?;
    let request = StartRequest {
        process: process_config(&exec).into(),
        stdin: Some(false),
        ..StartRequest::default()
    };
    let options = call_options(&exec.user, &sandbox)?;
    let mut stream = client
        .start_with_options(request, options)
        .await
        .map_err(|e| anyhow!("failed to start the command: {e}"))?;
    let mut outcome = ExecOutcome::default();
    while let Some(message) =
        stream.message().await.map_err(|e| anyhow!("failed to read the command's output: {e}"))?
    {
        let message: StartResponse = message.to_owned_message();
        let Some(event) = message.event.as_option().and_then(|e| e.event.clone()) else { continue };
        if let Some(code) = on_event(event, as_json, &mut outcome)? {
            outcome.exit_code = Some(code);
        }
    }
    let Some(code) = outcome.exit_code else {
        bail!("the sandbox ended before the command did");
    };
    if as_json {
        output::json(&outcome)?;
    }
    // A shell's convention: a command that was killed has no code of its own.
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
}

fn process_config(exec: &Exec) -> ProcessConfig {
    let (cmd, args) = match exec.command.as_slice() {
        [line] => ("/bin/bash".to_owned(), vec!["-l".to_owned(), "-c".to_owned(), line.clone()]),
        [cmd, args @ ..] => (cmd.clone(), args.to_vec()),
        [] => unreachable!("clap requires a command"),
    };
    ProcessConfig { cmd, args, cwd: exec.cwd.clone(), ..ProcessConfig::default() }
}

fn guest_client(target: &Target) -> Result<ProcessClient<HttpClient>> {
    let uri = target
        .sandbox_url
        .parse()
        .with_context(|| format!("the sandbox URL {} is not a URL", target.sandbox_url))?;
    Ok(ProcessClient::new(HttpClient::plaintext(), ClientConfig::new(uri)))
}

fn call_options(user: &str, sandbox: &Sandbox) -> Result<CallOptions> {
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
    let mut options = CallOptions::default()
        // Longer than any sandbox lives: the command decides when it ends.
        .with_timeout(Duration::from_secs(24 * 3600))
        .try_with_header("authorization", format!("Basic {basic}"))?
        .try_with_header("e2b-sandbox-id", sandbox.sandbox_id.clone())?
        .try_with_header("e2b-sandbox-port", ENVD_PORT.to_string())?;
    if let Some(token) = &sandbox.envd_access_token {
        options = options.try_with_header("x-access-token", token.clone())?;
    }
    Ok(options)
}

/// Prints or keeps what an event carries; answers the exit code when it is the last.
fn on_event(
    event: process_event::Event,
    as_json: bool,
    outcome: &mut ExecOutcome,
) -> Result<Option<i32>> {
    use process_event::Event;
    use process_event::data_event::Output;
    match event {
        Event::Start(_) | Event::Keepalive(_) => Ok(None),
        Event::Data(data) => {
            match data.output {
                Some(Output::Stdout(bytes) | Output::Pty(bytes)) if as_json => {
                    outcome.stdout.push_str(&String::from_utf8_lossy(&bytes));
                }
                Some(Output::Stderr(bytes)) if as_json => {
                    outcome.stderr.push_str(&String::from_utf8_lossy(&bytes));
                }
                Some(Output::Stdout(bytes) | Output::Pty(bytes)) => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&bytes)?;
                    out.flush()?;
                }
                Some(Output::Stderr(bytes)) => std::io::stderr().write_all(&bytes)?,
                None => {}
            }
            Ok(None)
        }
        Event::End(end) => {
            if let Some(error) = end.error.as_ref().filter(|_| !end.exited && end.exit_code == 0) {
                bail!("the command failed: {error}");
            }
            Ok(Some(end.exit_code))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_leave_their_path_segment() {
        assert_eq!(path_segment("iabc9"), "iabc9");
        assert_eq!(path_segment("../x?y"), "%2E%2E%2Fx%3Fy");
    }
}
