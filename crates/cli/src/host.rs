//! This host as a place for sandboxes: isolation, network slots, the sandboxes themselves, and the
//! node RPC that offers them. Both `belljar up` and `belljar node` open one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use belljar_daemon::clock::Clock;
use belljar_daemon::{OnError, Scope};
use belljar_network::{FakeSlots, OpenError, SlotPool, Slots, SlotsConfig};
use belljar_runtime::fake::FakeRuntime;
use belljar_runtime::firecracker::try_kvm;
use belljar_runtime::qemu::{Acceleration, QemuConfig, QemuRuntime};
use belljar_runtime::{FirecrackerConfig, FirecrackerRuntime, Runtime};
use belljar_sandbox::template::reclaim_drafts;
use belljar_sandbox::{Deps, Sandboxes};

use crate::args::{FirecrackerOptions, HostOptions, RuntimeChoice, plan_warm};
use crate::blob::{self, AwsEnv};
use crate::output;
use crate::preset::{Local, SlotRange};

/// How long sandboxes get to end when the server stops; more of them than a host holds end in this.
pub(crate) const SANDBOXES_GRACE: Duration = Duration::from_secs(60);

/// The isolation in use and one sentence why.
pub(crate) struct Isolation {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) reason: String,
}

/// What this host offers sandboxes, and what earlier runs left.
pub(crate) struct Host {
    /// Part of the name of everything made here.
    pub(crate) tag: String,
    pub(crate) isolation: Isolation,
    slots: Arc<dyn Slots>,
    pub(crate) sandboxes: Sandboxes,
    /// Sandboxes an earlier run left and this one removed.
    pub(crate) reclaimed: Vec<String>,
}

impl Host {
    pub(crate) async fn open(
        local: &Local,
        options: &HostOptions,
        aws: AwsEnv,
        root: &Scope,
    ) -> Result<Host> {
        let warm = plan_warm(&options.warm, options.sandboxes_max)?;
        let templates = local.templates_dir();
        std::fs::create_dir_all(&templates)
            .with_context(|| format!("failed to make {}", templates.display()))?;
        reclaim_drafts(&templates).context("failed to remove what a killed build left")?;
        let isolation = isolate(options.runtime, &options.firecracker).await?;
        let archive = match options.blobs.clone() {
            Some(place) => {
                let local = local.clone();
                let open = move || blob::archive(&local, place, aws);
                let opened = tokio::task::spawn_blocking(open).await;
                Some(opened.context("failed to open the blob store")??)
            }
            None => None,
        };
        let (slots, range) = open_slots(local, options, root).await?;
        let clock = Clock::of_host(root).context("failed to watch the wall clock")?;
        let deps =
            Deps { runtime: isolation.runtime.clone(), slots: slots.clone(), clock, archive };
        let settings = local.sandbox_settings(options, warm, range);
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
    pub(crate) async fn close(&self) -> bool {
        let ended = self.sandboxes.close(SANDBOXES_GRACE).await;
        let given_back = self.slots.close().await;
        if let Err(e) = &given_back {
            tracing::error!(error = %e, "network slots were not given back whole");
        }
        ended && given_back.is_ok()
    }

    /// Serves the node RPC on `socket` in `scope`; returns once it answers.
    pub(crate) async fn start_node(&self, socket: PathBuf, scope: &Scope) -> Result<()> {
        let config = belljar_node::Config {
            commit: option_env!("BELLJAR_COMMIT").unwrap_or_default().to_owned(),
            node_id: self.tag.clone(),
            socket,
            tier: self.isolation.runtime.tier(),
            tier_reason: self.isolation.reason.clone(),
            reclaimed_sandboxes: u32::try_from(self.reclaimed.len()).unwrap_or(u32::MAX),
        };
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let (sandboxes, inner) = (self.sandboxes.clone(), scope.clone());
        scope.spawn_shielded("node", OnError::FailScope, async move {
            let signal = move || {
                let _starter_gone = ready.send(()).is_err();
            };
            belljar_node::serve(config, sandboxes, inner, signal).await
        });
        is_ready.await.context("the node stopped while it started; its log line says why")
    }

    /// The names of every template that can be started here.
    pub(crate) fn template_names(&self) -> Vec<String> {
        self.sandboxes.templates().iter().flat_map(|t| t.meta.aliases.clone()).collect()
    }

    /// Tells a person what was found here.
    pub(crate) fn announce(&self) -> Result<()> {
        if !self.reclaimed.is_empty() {
            let ids = self.reclaimed.join(", ");
            output::line(&format!("Removed what an earlier run left of these sandboxes: {ids}."))?;
        }
        for old in self.sandboxes.unusable_templates() {
            output::line(&format!(
                "Template {} was saved under another QEMU or tier and cannot be used: build it \
                 again with `belljar template build` (or `cargo xtask setup`).",
                old.meta.aliases.join(", ")
            ))?;
        }
        let templates = self.template_names();
        if templates.is_empty() {
            return output::line(
                "No template is built yet: `belljar template build --help` says how.",
            );
        }
        output::line(&format!("Templates: {}.", templates.join(", ")))
    }
}

/// Picks the isolation driver. Also used when a template is built, so both agree.
pub(crate) async fn isolate(
    choice: RuntimeChoice,
    firecracker: &FirecrackerOptions,
) -> Result<Isolation> {
    let config = match choice {
        RuntimeChoice::Firecracker => return isolate_by_firecracker(firecracker).await,
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

async fn isolate_by_firecracker(options: &FirecrackerOptions) -> Result<Isolation> {
    const FAILED: &str = "failed to find a way to run Firecracker; `belljar doctor` says what is \
                          missing";
    if options.programs.is_empty() {
        return Err(anyhow!(
            "`--runtime firecracker` needs a program: name one with --firecracker PATH or \
             BELLJAR_FIRECRACKER"
        ));
    }
    let config = firecracker_config(options);
    let runtime = FirecrackerRuntime::detect(config).await.context(FAILED)?;
    let kvm = try_kvm().await.context(FAILED)?;
    let (versions, limits) = (runtime.versions().join(", "), runtime.limited_by());
    let reason = format!("{kvm}; Firecracker {versions}; limits by {limits}");
    Ok(Isolation { runtime: Arc::new(runtime), reason })
}

/// What the driver is told.
pub(crate) fn firecracker_config(options: &FirecrackerOptions) -> FirecrackerConfig {
    FirecrackerConfig {
        cpu_template: options.cpu_template.clone(),
        ..FirecrackerConfig::new(options.programs.clone())
    }
}

async fn open_slots(
    local: &Local,
    options: &HostOptions,
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
    let capacity = u32::from(options.sandboxes_max);
    let ready = u32::from(options.slots_ready).min(capacity);
    let (pool, range) = open_slot_pool(local, (capacity, ready), root).await?;
    Ok((Arc::new(pool), range))
}

/// Opens the real slot pool, of so many and so many of them ready, on the first address range this host
/// does not use. Also used when a template is built.
pub(crate) async fn open_slot_pool(
    local: &Local,
    (capacity, ready_high): (u32, u32),
    root: &Scope,
) -> Result<(SlotPool, SlotRange)> {
    const FAILED: &str =
        "failed to set up sandbox networking; `belljar doctor` says what is missing";
    let mut taken = None;
    for range in local.first_range().all() {
        let config = SlotsConfig {
            cidr: range.cidr(),
            capacity,
            ready_low: ready_high.div_ceil(3),
            ready_high,
            ..SlotsConfig::new(&local.host_tag)
        };
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

/// Removes the folders of the run. They are empty by now, and stay if they are not.
pub(crate) fn remove_run_dirs(local: &Local) {
    for dir in local.run_dirs() {
        if let Err(e) = std::fs::remove_dir(dir) {
            tracing::debug!(dir = %dir.display(), error = %e, "the run folder stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn firecracker_needs_a_program_that_is_one() {
        let options = |programs| FirecrackerOptions { programs, cpu_template: None };
        let said = async |programs| {
            let isolated = isolate(RuntimeChoice::Firecracker, &options(programs)).await;
            format!("{:#}", isolated.err().expect("no Firecracker was named"))
        };
        let none = said(Vec::new()).await;
        assert!(none.contains("--firecracker") && none.contains("BELLJAR_FIRECRACKER"), "{none}");
        let missing = said(vec!["/nonexistent/firecracker".into()]).await;
        assert!(missing.contains("/nonexistent") || missing.contains("root"), "{missing}");
    }
}
