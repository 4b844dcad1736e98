//! `belljar up`: control, proxy and node in one process; with `--node`, control and proxy alone.
//!
//! Start order: lock → listeners → isolation → network → sandboxes (reclaim) → node → proxy →
//! control. Stop order is the reverse: no new calls, then sandboxes, then slots, then the lock.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use belljar_control::{ApiKey, Database, Store, WakeDoor, WebhookConfig};
use belljar_daemon::{OnError, Scope};
use belljar_proxy::MemoryCatalog;
use serde::Serialize;
use tokio::net::TcpListener;

use crate::args::Up;
use crate::blob::AwsEnv;
use crate::catalog::{Announcer, Waker};
use crate::host::{Host, SANDBOXES_GRACE, remove_run_dirs};
use crate::lock;
use crate::operator::token_file::{self, AdminEnv};
use crate::output;
use crate::preset::Local;
use crate::server_file::{Server, write_private};
use crate::stop::StopSignals;

/// How long the connection of a control plane that was killed may take to be noticed.
const CLAIM_PATIENCE: Duration = Duration::from_secs(10);
/// How long the services get: 10 s for open requests, 10 more for what they changed to be written.
const SERVICES_GRACE: Duration = Duration::from_secs(25);
/// How long open calls of the node get.
const REQUESTS_GRACE: Duration = Duration::from_secs(5);

/// What a server whose sandboxes run elsewhere says of how they are isolated.
const TIER_OF_NODES: &str = "nodes";

#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    api_url: &'a str,
    sandbox_url: &'a str,
    api_key: &'a str,
    tier: &'a str,
    tier_reason: &'a str,
    /// Of this process's own node.
    templates: Vec<String>,
    reclaimed_sandboxes: usize,
    /// Part of the name of everything this server makes on the host.
    host_tag: &'a str,
    pid: u32,
}

pub(crate) async fn run(
    local: Local,
    options: Up,
    admin: &AdminEnv,
    aws: AwsEnv,
    as_json: bool,
) -> Result<ExitCode> {
    let mut stop = StopSignals::new()?;
    let _lock = lock::take(&local.lock_file())?;
    let api = listen(options.bind, options.api_port, "--api-port").await?;
    let proxy = listen(options.bind, options.proxy_port, "--proxy-port").await?;
    let root = Scope::root("server");
    let host = match options.nodes.is_empty() {
        true => Some(Host::open(&local, &options.host, aws, &root).await?),
        false => None,
    };
    let parts = Parts { local: &local, options: &options, admin, host: host.as_ref() };
    let outcome = serve(&parts, (api, proxy), &root, &mut stop, as_json).await;
    let close = async {
        match &host {
            Some(host) => host.close().await,
            None => true,
        }
    };
    let clean = tokio::select! {
        clean = close => clean,
        // Machines die with this process, and the next start reclaims what they leave.
        () = stop.next() => bail!("stopped at once by another signal"),
    };
    remove_files(&local);
    outcome?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What one server is put together from.
struct Parts<'a> {
    local: &'a Local,
    options: &'a Up,
    admin: &'a AdminEnv,
    /// `None` when its nodes are other processes.
    host: Option<&'a Host>,
}

impl Parts<'_> {
    fn tier(&self) -> &str {
        self.host.map_or(TIER_OF_NODES, |host| host.isolation.runtime.tier().as_str())
    }

    fn tier_reason(&self) -> &str {
        self.host.map_or("each node has its own; see its own readiness line", |host| {
            &host.isolation.reason
        })
    }

    fn node_sockets(&self) -> Vec<PathBuf> {
        match self.host {
            Some(_) => vec![self.local.node_socket()],
            None => self.options.nodes.clone(),
        }
    }
}

async fn serve(
    parts: &Parts<'_>,
    (api, proxy): (TcpListener, TcpListener),
    root: &Scope,
    stop: &mut StopSignals,
    as_json: bool,
) -> Result<()> {
    let services = root.child("services");
    let node = root.child("node");
    if let Some(host) = parts.host {
        host.start_node(parts.local.node_socket(), &node).await?;
    }
    let catalog = Arc::new(MemoryCatalog::new());
    let api_url = format!("http://{}", shown(api.local_addr()?));
    let sandbox_url = format!("http://{}", shown(proxy.local_addr()?));
    let (caller, door) = belljar_control::wake_door();
    start_proxy(catalog.clone(), Waker(caller), proxy, &services);
    let api_key = start_control(parts, (catalog, door), api, &services).await?;
    let tier = parts.tier().to_owned();
    let server = Server { pid: std::process::id(), api_url, sandbox_url, tier };
    server.write(parts.local)?;
    announce(&server, &api_key, parts, as_json)?;
    tokio::select! {
        () = stop.next() => {}
        () = services.cancelled() => {}
        () = node.cancelled() => {}
    }
    let failed = services.is_cancelled() || node.is_cancelled();
    let in_order = async {
        if !services.close(SERVICES_GRACE).await {
            tracing::warn!("a service did not end in time; the store may lack the last changes");
        }
        if let Some(host) = parts.host {
            host.sandboxes.close(SANDBOXES_GRACE).await;
        }
        node.close(REQUESTS_GRACE).await;
    };
    tokio::select! {
        () = in_order => {}
        // Machines die with this process, and the next start reclaims what they leave.
        () = stop.next() => bail!("stopped at once by a second signal"),
    }
    if failed {
        bail!("a part of the server failed; its log line says which")
    }
    Ok(())
}

async fn listen(ip: IpAddr, port: u16, flag: &str) -> Result<TcpListener> {
    TcpListener::bind(SocketAddr::new(ip, port)).await.with_context(|| {
        format!("failed to listen on {ip}:{port}: choose another port with {flag}, or 0 for any")
    })
}

/// An address as a client on this machine writes it.
fn shown(address: SocketAddr) -> String {
    let host = match address.ip() {
        ip if ip.is_loopback() || ip.is_unspecified() => "localhost".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        ip => ip.to_string(),
    };
    format!("{host}:{}", address.port())
}

fn start_proxy(catalog: Arc<MemoryCatalog>, waker: Waker, listener: TcpListener, scope: &Scope) {
    let inner = scope.clone();
    let deps = belljar_proxy::Deps { routes: catalog, wake: Some(Arc::new(waker)) };
    scope.spawn_shielded("proxy", OnError::FailScope, async move {
        belljar_proxy::serve(belljar_proxy::Config::default(), deps, listener, inner).await
    });
}

/// Starts control; answers the API key to use.
async fn start_control(
    parts: &Parts<'_>,
    (catalog, door): (Arc<MemoryCatalog>, WakeDoor),
    listener: TcpListener,
    scope: &Scope,
) -> Result<String> {
    let (local, options) = (parts.local, parts.options);
    let database = options.database.clone().unwrap_or_else(|| Database::Sqlite(local.database()));
    let store = Store::connect(&database).await.context("failed to open the database")?;
    let claim = store.claim(CLAIM_PATIENCE).await.context("failed to start on the database")?;
    let api_key = team_key(local, &store).await?;
    let config = options.platform.apply(belljar_control::Config {
        max_sandbox_length: Duration::from_secs(u64::from(options.timeout_hours_max) * 3600),
        max_concurrent_sandboxes: u32::from(options.host.sandboxes_max),
        webhooks: WebhookConfig {
            allow_private: options.webhook_allow_private,
            ..WebhookConfig::default()
        },
        trusted_proxies: options.trusted_proxies.clone(),
        ..belljar_control::Config::default()
    })?;
    let deps = belljar_control::Deps {
        node_sockets: parts.node_sockets(),
        routes: Arc::new(Announcer(catalog)),
        wake: Some(door),
        admin_token: Some(token_file::for_server(local, parts.admin)?),
        store: store.clone(),
    };
    let inner = scope.clone();
    scope.spawn_shielded("control", OnError::FailScope, async move {
        let outcome = belljar_control::serve(config, deps, listener, inner).await;
        drop(claim);
        store.close().await;
        outcome
    });
    Ok(api_key)
}

/// The default team's key: the one in the key file, which is made on the first start. One that the
/// store does not have was removed there, or belongs to another store, and is never let in again.
async fn team_key(local: &Local, store: &Store) -> Result<String> {
    let team = store.ensure_team("default").await.context("failed to make the default team")?;
    let path = local.key_file();
    let kept = match std::fs::read_to_string(&path) {
        Ok(text) => Some(text.trim().parse::<ApiKey>().with_context(|| {
            format!("failed to use the key in {}: remove the file to get a new one", path.display())
        })?),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(anyhow!(e).context(format!("failed to read {}", path.display()))),
    };
    if let Some(key) = kept
        && store.has_key(&key).await.context("failed to look the API key up")?
    {
        return Ok(key.expose());
    }
    let key = ApiKey::random();
    write_private(&path, &format!("{}\n", key.expose()))?;
    store.add_key(&team.id, &key).await.context("failed to store the API key")?;
    Ok(key.expose())
}

fn announce(server: &Server, api_key: &str, parts: &Parts<'_>, as_json: bool) -> Result<()> {
    if as_json {
        return output::json(&Ready {
            event: "ready",
            api_url: &server.api_url,
            sandbox_url: &server.sandbox_url,
            api_key,
            tier: &server.tier,
            tier_reason: parts.tier_reason(),
            templates: parts.host.map(Host::template_names).unwrap_or_default(),
            reclaimed_sandboxes: parts.host.map_or(0, |host| host.reclaimed.len()),
            host_tag: &parts.local.host_tag,
            pid: server.pid,
        });
    }
    output::line(&format!("Belljar is up. Isolation: {} ({}).", server.tier, parts.tier_reason()))?;
    if let Some(host) = parts.host {
        host.announce()?;
    }
    output::line("")?;
    output::line(&format!("  REST API         {}", server.api_url))?;
    output::line(&format!("  Sandbox traffic  {}", server.sandbox_url))?;
    output::line("")?;
    output::line("Point the E2B SDKs here:")?;
    output::line("")?;
    output::line(&format!("  export E2B_API_KEY={api_key}"))?;
    output::line(&format!("  export E2B_API_URL={}", server.api_url))?;
    output::line(&format!("  export E2B_SANDBOX_URL={}", server.sandbox_url))?;
    output::line("")?;
    output::line("or: eval \"$(belljar env)\". Ctrl-C stops the server and ends its sandboxes.")
}

/// Removes what only a running server has. The run folder is empty by now, and stays if it is not.
fn remove_files(local: &Local) {
    if let Err(e) = std::fs::remove_file(local.server_file()) {
        tracing::debug!(error = %e, "the server file was already gone");
    }
    remove_run_dirs(local);
}
