//! `belljar up`: control, proxy and node in one process.
//!
//! Start order: lock → listeners → isolation → network → sandboxes (reclaim) → node → proxy →
//! control. Stop order is the reverse: no new calls, then sandboxes, then slots, then the lock.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use belljar_control::{ApiKey, Database, Store};
use belljar_daemon::{OnError, Scope};
use belljar_network::{FakeSlots, OpenError, SlotPool, Slots, SlotsConfig};
use belljar_proxy::MemoryCatalog;
use belljar_runtime::Runtime;
use belljar_runtime::fake::FakeRuntime;
use belljar_runtime::qemu::{Acceleration, QemuConfig, QemuRuntime};
use belljar_sandbox::template::reclaim_drafts;
use belljar_sandbox::{Deps, Sandboxes};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{RuntimeChoice, Up};
use crate::catalog::Announcer;
use crate::lock;
use crate::output;
use crate::preset::{Local, SlotRange};
use crate::server_file::{Server, write_private};

/// How long sandboxes get to end when the server stops; more of them than a host holds end in this.
const SANDBOXES_GRACE: Duration = Duration::from_secs(60);
/// How long open requests get.
const REQUESTS_GRACE: Duration = Duration::from_secs(5);

/// The isolation in use and one sentence why.
pub(crate) struct Isolation {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) reason: String,
}

#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    api_url: &'a str,
    sandbox_url: &'a str,
    api_key: &'a str,
    tier: &'a str,
    tier_reason: &'a str,
    templates: Vec<String>,
    reclaimed_sandboxes: usize,
    /// Part of the name of everything this server makes on the host.
    host_tag: &'a str,
    pid: u32,
}

pub(crate) async fn run(local: Local, options: Up, as_json: bool) -> Result<ExitCode> {
    let mut stop = StopSignals::new()?;
    let _lock = lock::take(&local.lock_file())?;
    let api = listen(options.bind, options.api_port, "--api-port").await?;
    let proxy = listen(options.bind, options.proxy_port, "--proxy-port").await?;
    let root = Scope::root("server");
    let host = Host::open(&local, &options, &root).await?;
    let outcome = serve(&local, &options, &host, (api, proxy), &root, &mut stop, as_json).await;
    let clean = tokio::select! {
        clean = host.close() => clean,
        // Machines die with this process, and the next start reclaims what they leave.
        () = stop.next() => bail!("stopped at once by another signal"),
    };
    remove_files(&local);
    outcome?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn serve(
    local: &Local,
    options: &Up,
    host: &Host,
    (api, proxy): (TcpListener, TcpListener),
    root: &Scope,
    stop: &mut StopSignals,
    as_json: bool,
) -> Result<()> {
    let services = root.child("services");
    let node = root.child("node");
    start_node(local, host, &node).await?;
    let catalog = Arc::new(MemoryCatalog::new());
    let api_url = format!("http://{}", shown(api.local_addr()?));
    let sandbox_url = format!("http://{}", shown(proxy.local_addr()?));
    start_proxy(catalog.clone(), proxy, &services);
    let api_key = start_control(local, options, catalog, api, &services).await?;
    let server = Server {
        pid: std::process::id(),
        api_url,
        sandbox_url,
        tier: host.isolation.runtime.tier().as_str().to_owned(),
    };
    server.write(local)?;
    announce(&server, &api_key, host, as_json)?;
    tokio::select! {
        () = stop.next() => {}
        () = services.cancelled() => {}
        () = node.cancelled() => {}
    }
    let failed = services.is_cancelled() || node.is_cancelled();
    let in_order = async {
        services.close(REQUESTS_GRACE).await;
        host.sandboxes.close(SANDBOXES_GRACE).await;
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

/// What this host offers sandboxes, and what earlier runs left.
struct Host {
    tag: String,
    isolation: Isolation,
    slots: Arc<dyn Slots>,
    sandboxes: Sandboxes,
    reclaimed: Vec<String>,
}

impl Host {
    async fn open(local: &Local, options: &Up, root: &Scope) -> Result<Host> {
        let templates = local.templates_dir();
        std::fs::create_dir_all(&templates)
            .with_context(|| format!("failed to make {}", templates.display()))?;
        reclaim_drafts(&templates).context("failed to remove what a killed build left")?;
        let isolation = isolate(options.runtime).await?;
        let (slots, range) = open_slots(local, options, root).await?;
        let deps = Deps { runtime: isolation.runtime.clone(), slots: slots.clone() };
        let settings = local.sandbox_settings(options.sandboxes_max, range);
        let opened = Sandboxes::open(settings, deps, root.child("sandboxes")).await;
        let (sandboxes, reclaimed) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                slots.close().await.context("failed to give the network slots back")?;
                return Err(anyhow!(e).context("failed to open this host's sandboxes"));
            }
        };
        let (tag, reclaimed) = (local.host_tag.clone(), reclaimed.sandboxes);
        Ok(Host { tag, isolation, slots, sandboxes, reclaimed })
    }

    /// Ends every sandbox and gives the slots back. Says whether nothing is left.
    async fn close(&self) -> bool {
        let ended = self.sandboxes.close(SANDBOXES_GRACE).await;
        let given_back = self.slots.close().await;
        if let Err(e) = &given_back {
            tracing::error!(error = %e, "network slots were not given back whole");
        }
        ended && given_back.is_ok()
    }
}

/// Picks the isolation driver. Also used when a template is built, so both agree.
pub(crate) async fn isolate(choice: RuntimeChoice) -> Result<Isolation> {
    let config = match choice {
        RuntimeChoice::Auto => QemuConfig::default(),
        RuntimeChoice::Emulated => {
            QemuConfig { acceleration: Acceleration::Emulated, ..QemuConfig::default() }
        }
        RuntimeChoice::Fake => {
            return Ok(Isolation {
                runtime: Arc::new(FakeRuntime::new()),
                reason: "asked for by --runtime fake: nothing is isolated".to_owned(),
            });
        }
    };
    let (runtime, reason) = QemuRuntime::detect(config)
        .await
        .context("failed to find a way to run machines; `belljar doctor` says what is missing")?;
    let reason = format!("{}; limits by {}", reason.sentence, runtime.limited_by());
    Ok(Isolation { runtime: Arc::new(runtime), reason })
}

async fn open_slots(
    local: &Local,
    options: &Up,
    root: &Scope,
) -> Result<(Arc<dyn Slots>, SlotRange)> {
    if options.runtime == RuntimeChoice::Fake {
        let slots = FakeSlots::new(u32::from(options.sandboxes_max));
        return Ok((Arc::new(slots), local.first_range()));
    }
    if !local.is_root {
        return Err(anyhow!(
            "network namespaces and taps need root: run with sudo, or try `--runtime fake`, \
             which isolates nothing"
        ));
    }
    let (pool, range) = open_slot_pool(local, u32::from(options.sandboxes_max), root).await?;
    Ok((Arc::new(pool), range))
}

/// Opens the real slot pool on the first address range this host does not use. Also used when a
/// template is built.
pub(crate) async fn open_slot_pool(
    local: &Local,
    capacity: u32,
    root: &Scope,
) -> Result<(SlotPool, SlotRange)> {
    const FAILED: &str =
        "failed to set up sandbox networking; `belljar doctor` says what is missing";
    let mut taken = None;
    for range in local.first_range().all() {
        let config =
            SlotsConfig { cidr: range.cidr(), capacity, ..SlotsConfig::new(&local.host_tag) };
        match SlotPool::open(config, root).await {
            Ok(pool) => return Ok((pool, range)),
            Err(e @ OpenError::RangeTaken { .. }) => taken = Some(e),
            Err(e) => return Err(anyhow!(e).context(FAILED)),
        }
    }
    Err(match taken {
        Some(e) => anyhow!(e).context("failed to find a free range among 10.64.0.0/10"),
        None => anyhow!(FAILED),
    })
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

async fn start_node(local: &Local, host: &Host, scope: &Scope) -> Result<()> {
    let config = belljar_node::Config {
        node_id: local.host_tag.clone(),
        socket: local.node_socket(),
        tier: host.isolation.runtime.tier(),
        tier_reason: host.isolation.reason.clone(),
        reclaimed_sandboxes: u32::try_from(host.reclaimed.len()).unwrap_or(u32::MAX),
    };
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let (sandboxes, inner) = (host.sandboxes.clone(), scope.clone());
    scope.spawn_shielded("node", OnError::FailScope, async move {
        let signal = move || {
            let _starter_gone = ready.send(()).is_err();
        };
        belljar_node::serve(config, sandboxes, inner, signal).await
    });
    is_ready.await.context("the node stopped while it started; its log line says why")
}

fn start_proxy(catalog: Arc<MemoryCatalog>, listener: TcpListener, scope: &Scope) {
    let inner = scope.clone();
    let deps = belljar_proxy::Deps { routes: catalog };
    scope.spawn_shielded("proxy", OnError::FailScope, async move {
        belljar_proxy::serve(belljar_proxy::Config::default(), deps, listener, inner).await
    });
}

/// Starts control; answers the API key to use.
async fn start_control(
    local: &Local,
    options: &Up,
    catalog: Arc<MemoryCatalog>,
    listener: TcpListener,
    scope: &Scope,
) -> Result<String> {
    let database = options.database.clone().unwrap_or_else(|| Database::Sqlite(local.database()));
    let store = Store::connect(&database).await.context("failed to open the database")?;
    let api_key = team_key(local, &store).await?;
    let config = belljar_control::Config {
        max_sandbox_length: Duration::from_secs(u64::from(options.timeout_hours_max) * 3600),
        max_concurrent_sandboxes: u32::from(options.sandboxes_max),
        ..belljar_control::Config::default()
    };
    let deps = belljar_control::Deps {
        node_socket: local.node_socket(),
        routes: Arc::new(Announcer(catalog)),
        store: store.clone(),
    };
    let inner = scope.clone();
    scope.spawn_shielded("control", OnError::FailScope, async move {
        let outcome = belljar_control::serve(config, deps, listener, inner).await;
        store.close().await;
        outcome
    });
    Ok(api_key)
}

/// The default team's key: the one in the key file, which is made on the first start.
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
    let key = kept.unwrap_or_else(ApiKey::random);
    write_private(&path, &format!("{}\n", key.expose()))?;
    if !store.has_key(&key).await.context("failed to look the API key up")? {
        store.add_key(&team.id, &key).await.context("failed to store the API key")?;
    }
    Ok(key.expose())
}

fn announce(server: &Server, api_key: &str, host: &Host, as_json: bool) -> Result<()> {
    let templates: Vec<String> =
        host.sandboxes.templates().iter().flat_map(|t| t.meta.aliases.clone()).collect();
    if as_json {
        return output::json(&Ready {
            event: "ready",
            api_url: &server.api_url,
            sandbox_url: &server.sandbox_url,
            api_key,
            tier: &server.tier,
            tier_reason: &host.isolation.reason,
            templates,
            reclaimed_sandboxes: host.reclaimed.len(),
            host_tag: &host.tag,
            pid: server.pid,
        });
    }
    output::line(&format!(
        "Belljar is up. Isolation: {} ({}).",
        server.tier, host.isolation.reason
    ))?;
    if !host.reclaimed.is_empty() {
        let ids = host.reclaimed.join(", ");
        output::line(&format!("Removed what an earlier run left of these sandboxes: {ids}."))?;
    }
    for old in host.sandboxes.unusable_templates() {
        output::line(&format!(
            "Template {} was saved under another QEMU or tier and cannot be used: build it again \
             with `belljar template build` (or `cargo xtask setup`).",
            old.meta.aliases.join(", ")
        ))?;
    }
    if templates.is_empty() {
        output::line("No template is built yet: `belljar template build --help` says how.")?;
    } else {
        output::line(&format!("Templates: {}.", templates.join(", ")))?;
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
    for dir in local.run_dirs() {
        if let Err(e) = std::fs::remove_dir(dir) {
            tracing::debug!(dir = %dir.display(), error = %e, "the run folder stays");
        }
    }
}

/// SIGINT and SIGTERM: the first asks to stop, the second stops waiting for it.
pub(crate) struct StopSignals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl StopSignals {
    pub(crate) fn new() -> Result<StopSignals> {
        Ok(StopSignals {
            interrupt: signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?,
        })
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
