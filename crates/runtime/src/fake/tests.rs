//! The fake passes the contract, and its faults do what they say.

use super::*;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use belljar_domain::{MiB, Vcpus};
use belljar_wire::guest::{FromGuest, Init};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::contract::{self, Harness, KeptPages};
use crate::control::{ControlError, GuestControl};
use crate::machine::{DiskExport, NetworkAttachment, PauseError, SaveError};
use crate::pages::SnapshotTarget;

const LIMIT: Duration = Duration::from_secs(5);

struct FakeHarness {
    runtime: Arc<FakeRuntime>,
    folder: tempfile::TempDir,
}

impl FakeHarness {
    fn new(faults: &Arc<Faults>) -> FakeHarness {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("kernel"), b"kernel").expect("write a kernel");
        FakeHarness { runtime: Arc::new(FakeRuntime::with_faults(Arc::clone(faults))), folder }
    }

    fn subfolder(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).expect("make a folder");
        path
    }

    fn source(&self, memory: BootMemory) -> BootSource {
        BootSource { kernel: self.kernel(), cmdline: Vec::new(), memory }
    }

    /// Boots a machine and waits for its guest.
    async fn booted(
        &self,
        spec: MachineSpec,
    ) -> (Box<dyn Machine>, GuestControl, Result<String, ControlError>) {
        let artifacts = self.subfolder(&format!("{}-artifacts", spec.name));
        let source = self.source(BootMemory::Saveable { artifacts });
        let mut machine = self.runtime.boot(spec, source).await.expect("the fake boots");
        let mut control = GuestControl::new(machine.take_control().expect("taken once"));
        let booted = control.booted(Duration::from_millis(100)).await;
        (machine, control, booted)
    }
}

#[async_trait]
impl Harness for FakeHarness {
    fn runtime(&self) -> Arc<dyn Runtime> {
        self.runtime.clone()
    }

    fn kernel(&self) -> PathBuf {
        self.folder.path().join("kernel")
    }

    async fn folder(&self, name: &str) -> PathBuf {
        self.subfolder(name)
    }

    async fn fork(&self, name: &str, frozen: &MachineSpec) -> MachineSpec {
        self.spec(name, Some(frozen)).await
    }

    async fn scribble(&self, spec: &MachineSpec, _: &mut GuestControl, seed: u64) -> Option<u64> {
        // Over the end of a page, and on pages that are not neighbours.
        for offset in [5000, 300_000] {
            let bytes = [seed.to_le_bytes(); 1024].concat();
            self.runtime.write_memory(&spec.name, offset, &bytes).expect("it is inside");
        }
        Some(seed)
    }

    async fn recall(&self, spec: &MachineSpec, _: &mut GuestControl) -> Option<u64> {
        let mut found = Vec::new();
        for offset in [5000, 300_000] {
            let bytes = self.runtime.read_memory(&spec.name, offset, 8192).expect("it is inside");
            let (words, _) = bytes.as_chunks::<8>();
            found.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
        }
        found.dedup();
        assert_eq!(found.len(), 1, "parts of the memory are of different times: {found:?}");
        Some(found[0])
    }

    async fn spec(&self, name: &str, _saved: Option<&MachineSpec>) -> MachineSpec {
        let run_dir = self.subfolder(&format!("{name}-run"));
        MachineSpec {
            name: name.to_owned(),
            vcpus: Vcpus(1),
            memory: MiB(1),
            root_disk: vec![DiskExport::RawFile(run_dir.join("disk"))],
            network: None,
            run_dir,
            identity: None,
        }
    }

    fn patience(&self) -> Duration {
        LIMIT
    }
}

#[tokio::test]
async fn the_fake_passes_the_contract() {
    let log = belljar_testkit::LogOracle::install();
    let harness = FakeHarness::new(&Arc::new(Faults::new()));
    contract::run(&harness).await;
    assert_eq!(harness.runtime.live_machines(), 0);
    log.assert_quiet(&[]);
}

#[tokio::test]
async fn a_broken_start_leaves_nothing() {
    let faults = Arc::new(Faults::new());
    let harness = FakeHarness::new(&faults);
    for (fault, is_it) in [(Fault::Fail, "Refused"), (Fault::Crash, "Died")] {
        faults.once(Step::Boot, fault);
        let spec = harness.spec("broken", None).await;
        let source = harness.source(BootMemory::Private);
        let error = harness.runtime.boot(spec, source).await.err().expect("an injected fault");
        assert!(format!("{error:?}").starts_with(is_it), "{error:?}");
    }
    faults.always(Step::Boot, Fault::Hang);
    let spec = harness.spec("broken", None).await;
    let boot = harness.runtime.boot(spec, harness.source(BootMemory::Private));
    assert!(tokio::time::timeout(Duration::from_millis(20), boot).await.is_err());
    assert_eq!(harness.runtime.live_machines(), 0);
    assert_eq!(faults.reached(Step::Boot), 3);
}

#[tokio::test]
async fn a_broken_guest_fails_hangs_or_takes_its_machine_along() {
    let faults = Arc::new(Faults::new());
    let harness = FakeHarness::new(&faults);
    faults.once(Step::GuestBoot, Fault::Hang);
    let (mut machine, mut control, booted) =
        harness.booted(harness.spec("broken", None).await).await;
    assert!(matches!(booted, Err(ControlError::TimedOut { .. })));
    faults.once(Step::GuestInit, Fault::Fail);
    let failed = control.init(Init::default(), LIMIT).await;
    assert!(matches!(failed, Err(ControlError::Failed { .. })));
    faults.once(Step::GuestInit, Fault::Crash);
    let gone = control.init(Init::default(), LIMIT).await;
    assert!(matches!(gone, Err(ControlError::Closed)));
    assert!(matches!(machine.exited().await, ExitCause::Crashed { .. }));
    assert!(matches!(machine.freeze().await, Err(PauseError::Gone)));
    faults.once(Step::Kill, Fault::Fail);
    machine.kill().await.expect_err("an injected fault");
    assert_eq!(harness.runtime.live_machines(), 0);
}

#[tokio::test]
async fn a_broken_snapshot_leaves_nothing() {
    let faults = Arc::new(Faults::new());
    let harness = FakeHarness::new(&faults);
    let spec = harness.spec("snapshot", None).await;
    let source = harness.source(BootMemory::Private);
    let mut machine = harness.runtime.boot(spec, source).await.expect("the fake boots");
    let mut control = GuestControl::new(machine.take_control().expect("taken once"));
    faults.once(Step::GuestContinue, Fault::Fail);
    let failed = control.continue_after_snapshot(LIMIT).await;
    assert!(matches!(failed, Err(ControlError::Failed { .. })));
    machine.freeze().await.expect("freeze a machine");
    let folder = harness.subfolder("snapshot");
    let mut take = async || {
        let target = SnapshotTarget { folder: folder.clone(), pages: Box::<KeptPages>::default() };
        let took = tokio::time::timeout(Duration::from_millis(50), machine.snapshot(target)).await;
        let left = fs::read_dir(&folder).expect("it is there").count();
        (took.map(|took| took.map(drop)), left)
    };
    faults.once(Step::Snapshot, Fault::Fail);
    assert!(matches!(take().await, (Ok(Err(SaveError::Refused { .. })), 0)));
    faults.once(Step::Snapshot, Fault::Hang);
    assert!(matches!(take().await, (Err(_), 0)));
    faults.once(Step::Snapshot, Fault::Crash);
    assert!(matches!(take().await, (Ok(Err(SaveError::Gone)), 0)));
    assert!(matches!(take().await, (Ok(Err(SaveError::Gone)), 0)));
    assert_eq!(faults.reached(Step::Snapshot), 3);
    machine.kill().await.expect("nothing is left");
}

#[tokio::test]
async fn a_guest_that_is_asked_for_logs_sends_them_after_it_is_ready() {
    let harness = FakeHarness::new(&Arc::new(Faults::new()));
    let (mut machine, mut control, booted) = harness.booted(harness.spec("logs", None).await).await;
    booted.expect("the fake boots");
    control.init(Init { nonce: 1, ..Init::default() }, LIMIT).await.expect("ready");
    let init = Init { nonce: 2, sandbox_id: "isandbox".into(), logs: true, ..Init::default() };
    control.init(init, LIMIT).await.expect("ready");
    let FromGuest::Log { lines } = control.receive().await.expect("a message") else {
        panic!("no logs");
    };
    assert_eq!(lines[0].text, "the fake guest is isandbox");
    machine.kill().await.expect("nothing is left");
}

#[tokio::test]
async fn the_guest_answers_http_as_who_it_is_told_to_be() {
    let harness = FakeHarness::new(&Arc::new(Faults::new()));
    let network = NetworkAttachment {
        netns: None,
        tap: "none".into(),
        guest_mac: [2, 0, 0, 0, 0, 1],
        host_ip: Ipv4Addr::new(127, 91, 7, 33),
    };
    let mut spec = harness.spec("http", None).await;
    spec.network = Some(network.clone());
    let (mut machine, mut control, booted) = harness.booted(spec).await;
    booted.expect("the fake boots");
    let identity = Init {
        sandbox_id: "isandbox".into(),
        access_token: Some("secret".into()),
        ..Init::default()
    };
    control.init(identity, LIMIT).await.expect("the fake is ready");
    let ask = async |request: &str| {
        let address = (network.host_ip, HTTP_PORT);
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        stream.shutdown().await.expect("one request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");
        answer
    };
    let health = ask("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(health.starts_with("HTTP/1.1 204"), "{health}");
    let refused = ask("GET /other HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    let post = "POST /a HTTP/1.1\r\nX-Access-Token: secret\r\nContent-Length: 3\r\n\r\nabc";
    let answer = ask(post).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("isandbox"), "{answer}");
    machine.kill().await.expect("nothing is left");
}
