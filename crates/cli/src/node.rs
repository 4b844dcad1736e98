//! `belljar node`: this host's sandboxes alone, for a control plane in another process.
//!
//! Start order: lock → isolation → network → sandboxes (reclaim) → node RPC. Stop order is the
//! reverse. Sandboxes outlive a control plane that goes away: only the end of this process, or
//! their own time, ends them.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use belljar_daemon::Scope;
use serde::Serialize;

use crate::args::Node;
use crate::blob::AwsEnv;
use crate::host::{Host, SANDBOXES_GRACE, remove_run_dirs};
use crate::lock;
use crate::output;
use crate::preset::Local;
use crate::stop::StopSignals;

/// How long open calls get.
const CALLS_GRACE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    /// What `belljar up --node` is given.
    socket: &'a Path,
    tier: &'a str,
    tier_reason: &'a str,
    templates: Vec<String>,
    reclaimed_sandboxes: usize,
    /// Part of the name of everything this node makes on the host.
    host_tag: &'a str,
    pid: u32,
}

pub(crate) async fn run(
    local: Local,
    options: Node,
    aws: AwsEnv,
    as_json: bool,
) -> Result<ExitCode> {
    let mut stop = StopSignals::new()?;
    let _lock = lock::take(&local.lock_file())?;
    let socket = std::path::absolute(options.socket.unwrap_or_else(|| local.node_socket()))
        .context("failed to resolve the path given with --socket")?;
    let root = Scope::root("node");
    let host = Host::open(&local, &options.host, aws, &root).await?;
    let outcome = serve(&host, &socket, &root, &mut stop, as_json).await;
    let clean = tokio::select! {
        clean = host.close() => clean,
        // Machines die with this process, and the next start reclaims what they leave.
        () = stop.next() => bail!("stopped at once by another signal"),
    };
    remove_run_dirs(&local);
    outcome?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn serve(
    host: &Host,
    socket: &Path,
    root: &Scope,
    stop: &mut StopSignals,
    as_json: bool,
) -> Result<()> {
    let node = root.child("node");
    host.start_node(socket.to_owned(), &node).await?;
    announce(host, socket, as_json)?;
    tokio::select! {
        () = stop.next() => {}
        () = node.cancelled() => {}
    }
    let failed = node.is_cancelled();
    let in_order = async {
        host.sandboxes.close(SANDBOXES_GRACE).await;
        node.close(CALLS_GRACE).await;
    };
    tokio::select! {
        () = in_order => {}
        () = stop.next() => bail!("stopped at once by a second signal"),
    }
    if failed {
        bail!("the node failed; its log line says why")
    }
    Ok(())
}

fn announce(host: &Host, socket: &Path, as_json: bool) -> Result<()> {
    let tier = host.isolation.runtime.tier().as_str();
    if as_json {
        return output::json(&Ready {
            event: "ready",
            socket,
            tier,
            tier_reason: &host.isolation.reason,
            templates: host.template_names(),
            reclaimed_sandboxes: host.reclaimed.len(),
            host_tag: &host.tag,
            pid: std::process::id(),
        });
    }
    output::line(&format!("The node is up. Isolation: {tier} ({}).", host.isolation.reason))?;
    host.announce()?;
    output::line(&format!("Serve it with: belljar up --node {}", socket.display()))
}
