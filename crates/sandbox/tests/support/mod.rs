//! A host of fake machines on loopback addresses, with a template and a clock that is set by hand.

#![allow(dead_code, reason = "each program of tests uses its part of it")]

use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::Scope;
use belljar_daemon::clock::{self, Clock};
use belljar_domain::{BuildId, ExecutionId, MiB, SandboxId, TemplateId, Tier, UnixMillis, Vcpus};
use belljar_network::FakeSlots;
use belljar_runtime::fake::{FakeRuntime, Faults};
use belljar_runtime::{BootMemory, BootSource, MachineSpec, Runtime as _};
use belljar_sandbox::admission::Limits;
use belljar_sandbox::metrics::Figures;
use belljar_sandbox::template::{TemplateDraft, TemplateMeta};
use belljar_sandbox::{
    Archive, CreateSandbox, Deps, MetricsFrom, OpenError, Reclaimed, Sandboxes, Settings, Warm,
};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) runtime: Arc<FakeRuntime>,
    pub(crate) slots: Arc<FakeSlots>,
    pub(crate) faults: Arc<Faults>,
    pub(crate) clock: Clock,
    pub(crate) template_id: TemplateId,
    pub(crate) build_id: BuildId,
    pub(crate) ready_deadline: Duration,
    pub(crate) warm: Vec<Warm>,
    /// Where snapshots are kept besides, once a test sets one.
    pub(crate) archive: Option<Arc<Archive>>,
}

impl Rig {
    /// A host with one template: 2 processors, 16 MiB of memory, 1 MiB of disk.
    pub(crate) async fn new(slots: u32) -> Rig {
        let faults = Arc::new(Faults::new());
        let rig = Rig {
            dir: tempfile::tempdir().expect("temporary folder"),
            runtime: Arc::new(FakeRuntime::with_faults(faults.clone())),
            slots: Arc::new(FakeSlots::new(slots)),
            faults,
            clock: Clock::by_hand(clock::now()),
            template_id: TemplateId::random(),
            build_id: BuildId::random(),
            ready_deadline: PATIENCE,
            warm: Vec::new(),
            archive: None,
        };
        rig.save_template().await;
        rig
    }

    async fn save_template(&self) {
        let templates = self.dir.path().join("templates");
        std::fs::create_dir(&templates).expect("mkdir");
        let kernel = self.dir.path().join("vmlinux");
        std::fs::write(&kernel, "kernel").expect("write");
        let draft = TemplateDraft::create(&templates, &self.build_id).expect("draft");
        std::fs::write(draft.rootfs(), vec![7; 1 << 20]).expect("write");
        draft.put_kernel(&kernel, &[]).expect("put the kernel");
        let spec = MachineSpec {
            name: "template".to_owned(),
            vcpus: Vcpus(2),
            memory: MiB(16),
            root_disk: Vec::new(),
            network: None,
            run_dir: draft.dir().to_owned(),
            identity: None,
        };
        let artifacts = draft.dir().to_owned();
        let memory = BootMemory::Saveable { artifacts };
        let source = BootSource { kernel, cmdline: Vec::new(), memory };
        let mut machine = self.runtime.boot(spec, source).await.expect("boot");
        machine.save().await.expect("save");
        machine.kill().await.expect("kill");
        draft
            .publish(&TemplateMeta {
                template_id: self.template_id.clone(),
                build_id: self.build_id.clone(),
                aliases: vec!["base".to_owned()],
                vcpus: Vcpus(2),
                memory: MiB(16),
                disk: MiB(1),
                envd_version: "0.0.0-fake".to_owned(),
                tier: Tier::Fake,
                fingerprint: self.runtime.fingerprint(),
                created_at: UnixMillis(0),
                source_key: "key".to_owned(),
            })
            .expect("publish");
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            vcpus: u64::MAX,
            memory_mib: u64::MAX,
            disk_reserve_mib: 0,
            sandboxes_max: 20_000,
            starting_max: 64,
            starting_wait_max: PATIENCE,
        }
    }

    pub(crate) async fn open(&self, limits: Limits, scope: &Scope) -> (Sandboxes, Reclaimed) {
        self.try_open(limits, scope).await.expect("open")
    }

    pub(crate) async fn try_open(
        &self,
        limits: Limits,
        scope: &Scope,
    ) -> Result<(Sandboxes, Reclaimed), OpenError> {
        let folder = |name: &str| self.dir.path().join(name);
        let settings = Settings {
            host_tag: "test".to_owned(),
            ledger_dir: folder("ledger"),
            untold_dir: folder("untold"),
            run_dir: folder("run"),
            overlay_dir: folder("overlays"),
            data_dir: self.dir.path().to_owned(),
            boot_deadline: self.ready_deadline,
            machine_uid_base: None,
            limits,
            warm: self.warm.clone(),
            metrics: MetricsFrom::Made(Figures::default()),
            ready_deadline: self.ready_deadline,
            teardown_step_deadline: PATIENCE,
        };
        let clock = self.clock.clone();
        let deps = Deps {
            runtime: self.runtime.clone(),
            slots: self.slots.clone(),
            clock,
            archive: self.archive.clone(),
        };
        Sandboxes::open(settings, deps, scope.clone()).await
    }

    pub(crate) fn request(&self, end_at: UnixMillis) -> CreateSandbox {
        CreateSandbox {
            sandbox_id: SandboxId::random(),
            execution_id: ExecutionId::random(),
            template_id: self.template_id.clone(),
            build_id: self.build_id.clone(),
            end_at,
            auto_pause: None,
            cold_boot: false,
            envd_access_token: None,
            env_vars: std::collections::BTreeMap::new(),
            allow_internet_access: true,
            terms: "whose it is".into(),
        }
    }

    /// Files in a folder of this host.
    pub(crate) fn count(&self, folder: &str) -> usize {
        std::fs::read_dir(self.dir.path().join(folder)).expect("list").count()
    }

    /// Nothing but the template may be left.
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.slots.leased(), []);
        assert_eq!(self.runtime.live_machines(), 0);
        let left = ["ledger", "run", "overlays"].map(|folder| self.count(folder));
        assert_eq!(left, [0, 0, 0]);
    }
}
