//! A whole build on the fake driver and fake slots: it works, and whatever breaks leaves nothing.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use belljar_builder::{BuildConfig, BuildError, Deps, Event, build, source_key};
use belljar_daemon::Scope;
use belljar_domain::{MiB, TemplateId, Tier, Vcpus};
use belljar_network::FakeSlots;
use belljar_runtime::Runtime as _;
use belljar_runtime::fake::{FakeRuntime, Fault, Faults, Step};
use belljar_sandbox::template::{Template, load_all};

struct Rig {
    dir: tempfile::TempDir,
    scope: Scope,
    runtime: Arc<FakeRuntime>,
    slots: Arc<FakeSlots>,
    faults: Arc<Faults>,
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().expect("temp folder");
        for folder in ["templates", "run"] {
            std::fs::create_dir(dir.path().join(folder)).expect("mkdir");
        }
        std::fs::write(dir.path().join("vmlinux"), "kernel").expect("write");
        std::fs::write(dir.path().join("rootfs"), vec![3; 2 << 20]).expect("write");
        let faults = Arc::new(Faults::new());
        Rig {
            dir,
            scope: Scope::root("test"),
            runtime: Arc::new(FakeRuntime::with_faults(faults.clone())),
            slots: Arc::new(FakeSlots::new(2)),
            faults,
        }
    }

    fn config(&self) -> BuildConfig {
        BuildConfig {
            templates_dir: self.dir.path().join("templates"),
            run_dir: self.dir.path().join("run"),
            name_prefix: "test".to_owned(),
            kernel: self.dir.path().join("vmlinux"),
            rootfs: self.dir.path().join("rootfs"),
            template_id: TemplateId::random(),
            aliases: vec!["base".to_owned()],
            vcpus: Vcpus(1),
            memory: MiB(16),
            dns: [8, 8, 8, 8].into(),
            identity: None,
            source_key: "key".to_owned(),
            warm_up: false,
        }
    }

    async fn build(&self, config: &BuildConfig) -> Result<Template, BuildError> {
        let deps = Deps { runtime: self.runtime.clone(), slots: self.slots.clone() };
        build(config, &deps, &self.scope, &|_| {}).await
    }

    /// Everything but a published template must be gone.
    async fn assert_nothing_left(self, templates: usize) {
        let count =
            |folder: &str| std::fs::read_dir(self.dir.path().join(folder)).expect("list").count();
        assert_eq!(count("templates"), templates);
        assert_eq!(count("run"), 0);
        assert_eq!(self.slots.leased(), []);
        assert_eq!(self.runtime.live_machines(), 0);
        assert!(self.scope.close(Duration::from_secs(10)).await, "tasks are left");
    }
}

#[tokio::test]
async fn a_build_makes_a_template() {
    let rig = Rig::new();
    let config = rig.config();
    let steps = Mutex::new(Vec::new());
    let deps = Deps { runtime: rig.runtime.clone(), slots: rig.slots.clone() };
    let on = |event: Event| steps.lock().expect("no panic holds it").push(event);
    let template = build(&config, &deps, &rig.scope, &on).await.expect("build");
    assert_eq!(load_all(&config.templates_dir).expect("load"), std::slice::from_ref(&template));
    let meta = &template.meta;
    assert_eq!((meta.disk, meta.memory, meta.vcpus), (MiB(2), MiB(16), Vcpus(1)));
    assert_eq!((meta.tier, &meta.fingerprint), (Tier::Fake, &rig.runtime.fingerprint()));
    assert_eq!(meta.aliases, ["base"]);
    assert!(!meta.envd_version.is_empty());
    assert_eq!(
        std::fs::read(template.rootfs()).expect("read"),
        std::fs::read(&config.rootfs).expect("read")
    );
    let writable = |path: &Path| !std::fs::metadata(path).expect("stat").permissions().readonly();
    for name in ["rootfs.ext4", "memory", "state", "machine.json"] {
        assert!(!writable(&template.dir.join(name)), "{name} can be written");
    }
    let heard = steps.into_inner().expect("no panic holds it");
    assert!(heard.contains(&Event::Step("boot the machine")), "{heard:?}");
    rig.assert_nothing_left(1).await;
}

#[tokio::test]
async fn whatever_breaks_leaves_nothing() {
    for (step, fault) in [
        (Step::Boot, Fault::Fail),
        (Step::Boot, Fault::Crash),
        (Step::GuestBoot, Fault::Crash),
        (Step::GuestInit, Fault::Fail),
        (Step::GuestInit, Fault::Crash),
        (Step::GuestHttp, Fault::Fail),
        (Step::GuestHttp, Fault::Crash),
        (Step::GuestPrepare, Fault::Fail),
        (Step::GuestPrepare, Fault::Crash),
        (Step::Save, Fault::Fail),
        (Step::Save, Fault::Crash),
        (Step::Kill, Fault::Fail),
    ] {
        let rig = Rig::new();
        rig.faults.once(step, fault);
        let outcome = rig.build(&rig.config()).await;
        assert!(outcome.is_err(), "{step:?} {fault:?} went unnoticed");
        assert_eq!(rig.faults.reached(step), 1, "{step:?}");
        rig.assert_nothing_left(0).await;
    }
}

#[tokio::test]
async fn inputs_that_cannot_be_leave_nothing() {
    let rig = Rig::new();
    rig.slots.fail_leases(1);
    assert!(matches!(rig.build(&rig.config()).await, Err(BuildError::Network(_))));
    let mut config = rig.config();
    config.kernel = rig.dir.path().join("absent");
    assert!(matches!(rig.build(&config).await, Err(BuildError::Template(_))));
    config.rootfs = rig.dir.path().join("absent");
    assert!(matches!(rig.build(&config).await, Err(BuildError::Io { .. })));
    config.rootfs = rig.dir.path().join("vmlinux");
    assert!(matches!(rig.build(&config).await, Err(BuildError::DiskSize { size_bytes: 6, .. })));
    config = rig.config();
    config.aliases = vec!["Not An Alias".to_owned()];
    assert!(matches!(rig.build(&config).await, Err(BuildError::Template(_))));
    rig.assert_nothing_left(0).await;
}

#[tokio::test]
async fn a_cancelled_build_leaves_nothing() {
    for step in [Step::GuestBoot, Step::GuestInit, Step::GuestPrepare, Step::Save] {
        let rig = Rig::new();
        rig.faults.once(step, Fault::Hang);
        let config = rig.config();
        let cancel_when_stuck = async {
            while rig.faults.reached(step) == 0 {
                tokio::task::yield_now().await;
            }
            rig.scope.cancel();
        };
        let (outcome, ()) = tokio::join!(rig.build(&config), cancel_when_stuck);
        assert!(matches!(outcome, Err(BuildError::Cancelled)), "{step:?}: {outcome:?}");
        rig.assert_nothing_left(0).await;
    }
}

#[test]
fn the_source_key_follows_every_input() {
    let rig = Rig::new();
    let (kernel, rootfs) = (rig.config().kernel, rig.config().rootfs);
    let key = |vcpus, memory, fingerprint: &str| {
        source_key(&kernel, &rootfs, Vcpus(vcpus), MiB(memory), fingerprint).expect("key")
    };
    let first = key(1, 512, "a");
    assert_eq!(first, key(1, 512, "a"));
    assert_ne!(first, key(2, 512, "a"));
    assert_ne!(first, key(1, 513, "a"));
    assert_ne!(first, key(1, 512, "b"));
    std::fs::write(&kernel, "other").expect("write");
    let second = key(1, 512, "a");
    assert_ne!(first, second);
    std::fs::write(&rootfs, vec![4; 2 << 20]).expect("write");
    assert_ne!(second, key(1, 512, "a"));
}
