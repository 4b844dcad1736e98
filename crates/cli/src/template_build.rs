//! `belljar template rootfs` and `belljar template build`: the offline half of templates.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use belljar_builder::{BuildConfig, Deps, Event, RootfsConfig, rootfs as rootfs_image, source_key};
use belljar_daemon::{OnError, Scope};
use belljar_domain::{MiB, TemplateId, Vcpus};
use belljar_network::{FakeSlots, Slots};
use belljar_runtime::Identity;
use belljar_sandbox::template::{Template, load_all, reclaim_drafts};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::{Rootfs, RuntimeChoice, TemplateBuild};
use crate::host::{isolate, open_slot_pool};
use crate::lock;
use crate::output;
use crate::preset::{Local, SlotRange};
use crate::stop::StopSignals;

/// The guest's name server until egress rules name another. Source: contract section 1.2.
const GUEST_DNS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(8, 8, 8, 8);
/// Slots of the pool a build opens for its one machine.
const BUILD_SLOTS: u32 = 4;
/// How long what a build started may take to end.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Built {
    template_id: String,
    build_id: String,
    name: String,
    /// Whether an equal template was there already.
    cached: bool,
    seconds: f64,
}

#[derive(Serialize)]
struct Assembled {
    image: PathBuf,
    disk_mib: u32,
    packages_cached: bool,
    seconds: f64,
}

pub(crate) async fn rootfs(options: Rootfs, as_json: bool) -> Result<ExitCode> {
    let started = Instant::now();
    let config = RootfsConfig {
        envd: options.envd,
        output: options.output,
        cache_dir: options.cache,
        disk: MiB(options.disk_mib),
        etc_apt: PathBuf::from("/etc/apt"),
    };
    let scope = Scope::root("rootfs");
    cancel_on_signal(&scope)?;
    let steps = Steps::start(as_json);
    let made = rootfs_image::assemble(&config, &scope, &|event| steps.show(event)).await;
    steps.finish();
    scope.close(GRACE).await;
    let made = made.context("failed to make the root file system")?;
    let outcome = Assembled {
        image: made.image,
        disk_mib: made.disk.0,
        packages_cached: made.packages_cached,
        seconds: started.elapsed().as_secs_f64(),
    };
    if as_json {
        output::json(&outcome)?;
    } else {
        let (path, took) = (outcome.image.display(), outcome.seconds);
        output::line(&format!("{path}: {} MiB disk, made in {took:.1} s", outcome.disk_mib))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn build(
    local: &Local,
    options: TemplateBuild,
    as_json: bool,
) -> Result<ExitCode> {
    let started = Instant::now();
    check_name(&options.name)?;
    let _lock = lock::take(&local.lock_file())?;
    let templates_dir = local.templates_dir();
    std::fs::create_dir_all(&templates_dir)
        .with_context(|| format!("failed to make {}", templates_dir.display()))?;
    reclaim_drafts(&templates_dir).context("failed to remove what a killed build left")?;
    let steps = Steps::start(as_json);
    let outcome = build_unless_equal(local, &options, &steps).await;
    steps.finish();
    let (template, cached) = outcome?;
    let built = Built {
        template_id: template.meta.template_id.to_string(),
        build_id: template.meta.build_id.to_string(),
        name: options.name,
        cached,
        seconds: started.elapsed().as_secs_f64(),
    };
    if as_json {
        output::json(&built)?;
    } else if cached {
        output::line(&format!("{}: build {} is up to date", built.name, built.build_id))?;
    } else {
        let (name, build, took) = (&built.name, &built.build_id, built.seconds);
        output::line(&format!("{name}: build {build} made in {took:.1} s"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn check_name(name: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    if name.is_empty() || name.len() > 128 || !name.bytes().all(allowed) {
        bail!("`{name}` is no template name: use 1 to 128 of a-z, 0-9, `-` and `_`");
    }
    Ok(())
}

/// Builds, unless a template of this name and of equal inputs is there. Says which.
async fn build_unless_equal(
    local: &Local,
    options: &TemplateBuild,
    steps: &Steps,
) -> Result<(Template, bool)> {
    let isolation = isolate(options.runtime, &options.firecracker).await?;
    let (kernel, rootfs) = (options.kernel.clone(), options.rootfs.clone());
    let (vcpus, memory) = (Vcpus(options.cpus), MiB(options.memory_mib));
    let fingerprint = isolation.runtime.fingerprint();
    let key = tokio::task::spawn_blocking(move || {
        source_key(&kernel, &rootfs, vcpus, memory, &fingerprint)
    })
    .await
    .context("failed to wait for the digest of the inputs")?
    .context("failed to read what the template is built from")?;
    let earlier: Vec<Template> = load_all(&local.templates_dir())
        .context("failed to read the templates already there")?
        .into_iter()
        .filter(|t| t.meta.aliases.contains(&options.name))
        .collect();
    if let Some(equal) = earlier.iter().find(|t| t.meta.source_key == key)
        && !options.force
    {
        return Ok((equal.clone(), true));
    }
    let template_id =
        earlier.first().map_or_else(TemplateId::random, |t| t.meta.template_id.clone());
    let scope = Scope::root("template build");
    cancel_on_signal(&scope)?;
    let (slots, range) = open_slots(local, options.runtime, &scope).await?;
    let run_dir = local.run_dir.join("build");
    if run_dir.exists() {
        // A build that was killed left it; its machine died with it.
        std::fs::remove_dir_all(&run_dir)
            .with_context(|| format!("failed to remove {}", run_dir.display()))?;
    }
    std::fs::create_dir_all(&run_dir)
        .with_context(|| format!("failed to make {}", run_dir.display()))?;
    let config = BuildConfig {
        templates_dir: local.templates_dir(),
        run_dir: run_dir.clone(),
        name_prefix: local.host_tag.clone(),
        kernel: options.kernel.clone(),
        rootfs: options.rootfs.clone(),
        template_id,
        aliases: vec![options.name.clone()],
        vcpus,
        memory,
        dns: GUEST_DNS,
        identity: local.machine_uid_base(range).map(|id| Identity { uid: id, gid: id }),
        source_key: key,
        warm_up: options.runtime != RuntimeChoice::Fake,
    };
    let deps = Deps { runtime: isolation.runtime, slots: slots.clone() };
    let built = belljar_builder::build(&config, &deps, &scope, &|event| steps.show(event)).await;
    let closed = slots.close().await;
    scope.close(GRACE).await;
    std::fs::remove_dir_all(&run_dir)
        .with_context(|| format!("failed to remove {}", run_dir.display()))?;
    for dir in local.run_dirs() {
        // Another server's folder may keep the outer one.
        let _kept = std::fs::remove_dir(dir).is_err();
    }
    let template = built.with_context(|| format!("failed to build template {}", options.name))?;
    closed.context("failed to give the build's network slots back")?;
    for old in earlier {
        // No server runs on this folder, so no sandbox uses the old build.
        std::fs::remove_dir_all(&old.dir)
            .with_context(|| format!("failed to remove the old build in {}", old.dir.display()))?;
    }
    Ok((template, false))
}

async fn open_slots(
    local: &Local,
    runtime: RuntimeChoice,
    scope: &Scope,
) -> Result<(Arc<dyn Slots>, SlotRange)> {
    match runtime {
        RuntimeChoice::Fake => Ok((Arc::new(FakeSlots::new(BUILD_SLOTS)), local.first_range())),
        RuntimeChoice::Auto | RuntimeChoice::Emulated | RuntimeChoice::Firecracker => {
            let (pool, range) = open_slot_pool(local, (BUILD_SLOTS, BUILD_SLOTS), scope).await?;
            Ok((Arc::new(pool), range))
        }
    }
}

/// Has SIGINT and SIGTERM cancel the scope, so that a build gives back what it holds.
fn cancel_on_signal(scope: &Scope) -> Result<()> {
    let mut stop = StopSignals::new()?;
    let cancelled = scope.clone();
    scope.spawn("signals", OnError::Log, async move {
        stop.next().await;
        cancelled.cancel();
        Ok::<(), std::convert::Infallible>(())
    });
    Ok(())
}

/// Shows the step under way: a spinner on a terminal, a line elsewhere, nothing beside JSON.
struct Steps {
    bar: ProgressBar,
    plain: bool,
}

impl Steps {
    fn start(as_json: bool) -> Steps {
        use std::io::IsTerminal as _;
        let plain = !as_json && !std::io::stderr().is_terminal();
        let bar = if as_json || plain { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .expect("the template is a constant");
        bar.set_style(style);
        bar.enable_steady_tick(Duration::from_millis(120));
        Steps { bar, plain }
    }

    fn show(&self, event: Event) {
        let text = match event {
            Event::Step(step) => step.to_owned(),
            Event::Detail(line) => line,
        };
        if self.plain {
            use std::io::Write as _;
            // Progress is a courtesy: a closed standard error must not fail a build.
            let _closed = writeln!(std::io::stderr(), "  {text}").is_err();
        }
        self.bar.set_message(text);
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
