//! Exchanges as Firecracker's description has them, played by a server that checks each request to the
//! byte; and servers that do what none should.

use super::*;
use serde_json::json;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const LIMIT: Duration = Duration::from_secs(20);

/// What a server does with one connection.
enum Played {
    /// Expects a request of this method, path and body, and says this.
    Answer(&'static str, &'static str, Value, Vec<u8>),
    /// Reads, says this, and closes.
    Say(Vec<u8>),
    /// Reads, and says nothing until the other side has gone.
    Hang,
}

struct Player {
    _folder: tempfile::TempDir,
    thread: JoinHandle<()>,
    api: Api,
}

impl Player {
    fn start(exchanges: Vec<Played>) -> Player {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("api");
        let listener = UnixListener::bind(&path).expect("a socket");
        let thread = std::thread::spawn(move || {
            for exchange in exchanges {
                play(exchange, &listener);
            }
        });
        let api = Api::open(&path).expect("a socket");
        Player { _folder: folder, thread, api }
    }

    /// Every exchange has happened.
    fn end(self) {
        self.thread.join().expect("the requests were as described");
    }
}

fn play(exchange: Played, listener: &UnixListener) {
    let (mut stream, _) = listener.accept().expect("a connection");
    let (head, body) = request(&mut stream);
    match exchange {
        Played::Answer(method, path, wanted, answer) => {
            let line = head.lines().next().expect("a request line");
            assert_eq!(line, format!("{method} {path} HTTP/1.1"));
            let wanted = if wanted.is_null() { String::new() } else { wanted.to_string() };
            assert_eq!(body, wanted, "{method} {path}");
            let typed = head.to_ascii_lowercase().contains("content-type: application/json");
            assert_eq!(typed, !wanted.is_empty(), "{head}");
            stream.write_all(&answer).expect("it listens");
        }
        // Whoever is done with an odd answer does not take the rest.
        Played::Say(bytes) => drop(stream.write_all(&bytes)),
        Played::Hang => assert_eq!(stream.read(&mut [0]).expect("its end"), 0),
    }
}

fn request(stream: &mut std::os::unix::net::UnixStream) -> (String, String) {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).expect("a head");
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).expect("text");
    let length = head.lines().find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok()
    });
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).expect("a body");
    (head, String::from_utf8(body).expect("text"))
}

/// As Firecracker spells its answers.
fn answer(status: &str, body: &str) -> Vec<u8> {
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
    };
    format!("HTTP/1.1 {status}\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{length}\r\n{body}")
        .into_bytes()
}

fn id(text: &str) -> Id {
    Id::new(text).expect("a name")
}

/// A call that says something, and what it is on the wire.
type Told = (Call, &'static str, &'static str, Value);

/// A rate, and what it is on the wire.
fn rate() -> (RateLimiter, Value) {
    let rate = RateLimiter {
        bandwidth: Some(TokenBucket { size: 1000, refill_time: 100, one_time_burst: Some(5000) }),
        ops: None,
    };
    let bucket =
        json!({ "bandwidth": { "size": 1000, "refill_time": 100, "one_time_burst": 5000 } });
    (rate, bucket)
}

/// What it boots, and on what.
fn told_of_the_machine() -> Vec<Told> {
    let machine =
        MachineConfig { vcpu_count: 2, mem_size_mib: 512, smt: false, track_dirty_pages: true };
    let machine_json =
        json!({ "vcpu_count": 2, "mem_size_mib": 512, "smt": false, "track_dirty_pages": true });
    let template = json!({ "cpuid_modifiers": [], "msr_modifiers": [] });
    vec![
        (
            Call::BootSource(BootSource {
                kernel_image_path: "/kernel".into(),
                boot_args: Some("quiet".into()),
                initrd_path: Some("/initrd".into()),
            }),
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": "/kernel", "boot_args": "quiet", "initrd_path": "/initrd" }),
        ),
        (Call::Machine(machine.clone()), "PUT", "/machine-config", machine_json.clone()),
        (Call::ChangeMachine(machine), "PATCH", "/machine-config", machine_json),
        (Call::Cpu(template.clone()), "PUT", "/cpu-config", template),
        (
            Call::MmdsConfig(MmdsConfig {
                version: MmdsVersion::V2,
                network_interfaces: vec![id("eth0")],
                ipv4_address: Some(std::net::Ipv4Addr::new(169, 254, 169, 254)),
            }),
            "PUT",
            "/mmds/config",
            json!({
                "version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.169.254",
            }),
        ),
        (Call::Mmds(json!({ "a": 1 })), "PUT", "/mmds", json!({ "a": 1 })),
        (Call::ChangeMmds(json!({ "b": null })), "PATCH", "/mmds", json!({ "b": null })),
    ]
}

/// Where its bytes go.
fn told_of_disks_and_cards() -> Vec<Told> {
    let (rate, bucket) = rate();
    vec![
        (
            Call::Drive(Drive {
                drive_id: id("root"),
                path_on_host: "/disk".into(),
                is_root_device: true,
                is_read_only: false,
                cache_type: "Writeback",
                rate_limiter: Some(rate),
            }),
            "PUT",
            "/drives/root",
            json!({
                "drive_id": "root", "path_on_host": "/disk", "is_root_device": true,
                "is_read_only": false, "cache_type": "Writeback", "rate_limiter": bucket,
            }),
        ),
        (
            Call::ChangeDrive(DriveUpdate {
                drive_id: id("root"),
                path_on_host: Some("/other".into()),
                rate_limiter: None,
            }),
            "PATCH",
            "/drives/root",
            json!({ "drive_id": "root", "path_on_host": "/other" }),
        ),
        (
            Call::Network(NetworkInterface {
                iface_id: id("eth0"),
                host_dev_name: "tap0".into(),
                guest_mac: Some("02:00:00:00:00:01".into()),
                rx_rate_limiter: None,
                tx_rate_limiter: Some(rate),
            }),
            "PUT",
            "/network-interfaces/eth0",
            json!({
                "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01",
                "tx_rate_limiter": bucket,
            }),
        ),
        (
            Call::ChangeNetwork(NetworkInterfaceUpdate {
                iface_id: id("eth0"),
                rx_rate_limiter: Some(rate),
                tx_rate_limiter: None,
            }),
            "PATCH",
            "/network-interfaces/eth0",
            json!({ "iface_id": "eth0", "rx_rate_limiter": bucket }),
        ),
    ]
}

/// Everything else that is plugged in.
fn told_of_small_devices() -> Vec<Told> {
    let (rate, bucket) = rate();
    vec![
        (
            Call::Vsock(Vsock { guest_cid: 3, uds_path: "/run/vsock".into() }),
            "PUT",
            "/vsock",
            json!({ "guest_cid": 3, "uds_path": "/run/vsock" }),
        ),
        (Call::Entropy(None), "PUT", "/entropy", json!({})),
        (Call::Entropy(Some(rate)), "PUT", "/entropy", json!({ "rate_limiter": bucket })),
        (
            Call::Balloon(Balloon {
                amount_mib: 0,
                deflate_on_oom: true,
                stats_polling_interval_s: 5,
            }),
            "PUT",
            "/balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 5 }),
        ),
        (
            Call::ChangeBalloon(BalloonUpdate { amount_mib: 48 }),
            "PATCH",
            "/balloon",
            json!({ "amount_mib": 48 }),
        ),
        (
            Call::ChangeBalloonStatistics(BalloonStatisticsUpdate { stats_polling_interval_s: 1 }),
            "PATCH",
            "/balloon/statistics",
            json!({ "stats_polling_interval_s": 1 }),
        ),
    ]
}

/// What it does, and where that is told.
fn told_to_act() -> Vec<Told> {
    vec![
        (
            Call::Logger(Logger {
                log_path: "/out/log".into(),
                level: "Info",
                show_level: true,
                show_log_origin: false,
            }),
            "PUT",
            "/logger",
            json!({
                "log_path": "/out/log", "level": "Info", "show_level": true, "show_log_origin": false,
            }),
        ),
        (
            Call::Metrics(Metrics { metrics_path: "/out/figures".into() }),
            "PUT",
            "/metrics",
            json!({ "metrics_path": "/out/figures" }),
        ),
        (
            Call::Act(Action::InstanceStart),
            "PUT",
            "/actions",
            json!({ "action_type": "InstanceStart" }),
        ),
        (
            Call::Act(Action::FlushMetrics),
            "PUT",
            "/actions",
            json!({ "action_type": "FlushMetrics" }),
        ),
        (
            Call::Act(Action::SendCtrlAltDel),
            "PUT",
            "/actions",
            json!({ "action_type": "SendCtrlAltDel" }),
        ),
    ]
}

/// Standing still, and coming back.
fn told_of_snapshots() -> Vec<Told> {
    let load = |overrides: Vec<NetworkOverride>| SnapshotLoad {
        snapshot_path: "/state".into(),
        mem_backend: MemoryBackend::Uffd("/run/memory".into()),
        track_dirty_pages: false,
        resume_vm: true,
        network_overrides: overrides,
    };
    let other = NetworkOverride { iface_id: id("eth0"), host_dev_name: "tap7".into() };
    vec![
        (Call::Run(RunState::Paused), "PATCH", "/vm", json!({ "state": "Paused" })),
        (Call::Run(RunState::Resumed), "PATCH", "/vm", json!({ "state": "Resumed" })),
        (
            Call::CreateSnapshot(SnapshotCreate {
                snapshot_path: "/out/state".into(),
                mem_file_path: "/out/memory".into(),
                snapshot_type: SnapshotKind::Diff,
            }),
            "PUT",
            "/snapshot/create",
            json!({
                "snapshot_path": "/out/state", "mem_file_path": "/out/memory", "snapshot_type": "Diff",
            }),
        ),
        (
            Call::LoadSnapshot(load(Vec::new()), Dialect::Since113),
            "PUT",
            "/snapshot/load",
            json!({
                "snapshot_path": "/state", "resume_vm": true, "track_dirty_pages": false,
                "mem_backend": { "backend_type": "Uffd", "backend_path": "/run/memory" },
            }),
        ),
        (
            Call::LoadSnapshot(load(vec![other]), Dialect::Before113),
            "PUT",
            "/snapshot/load",
            json!({
                "snapshot_path": "/state", "resume_vm": true, "enable_diff_snapshots": false,
                "mem_backend": { "backend_type": "Uffd", "backend_path": "/run/memory" },
                "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap7" }],
            }),
        ),
    ]
}

#[tokio::test]
async fn every_call_is_on_the_wire_as_described() {
    let calls: Vec<Told> = [
        told_of_the_machine(),
        told_of_disks_and_cards(),
        told_of_small_devices(),
        told_to_act(),
        told_of_snapshots(),
    ]
    .concat();
    assert_eq!(calls.len(), 27);
    let script = calls.iter().map(|(_, method, path, body)| {
        Played::Answer(method, path, body.clone(), answer("204 No Content", ""))
    });
    let player = Player::start(script.collect());
    for (call, ..) in &calls {
        player.api.tell(call, LIMIT).await.expect("it is as described");
    }
    player.end();
}

#[tokio::test]
async fn every_question_has_its_answer() {
    let ok = |path, text: &str| Played::Answer("GET", path, Value::Null, answer("200 OK", text));
    let player = Player::start(vec![
        ok(
            "/",
            r#"{"id":"m1","state":"Not started","vmm_version":"1.17.0","app_name":"Firecracker"}"#,
        ),
        ok("/version", r#"{"firecracker_version":"1.17.0"}"#),
        ok(
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":true,"huge_pages":"None"}"#,
        ),
        ok("/balloon", r#"{"amount_mib":8,"deflate_on_oom":false,"stats_polling_interval_s":1}"#),
        ok(
            "/balloon/statistics",
            r#"{"target_pages":1,"actual_pages":1,"target_mib":8,"actual_mib":7,"free_memory":4096}"#,
        ),
        ok("/mmds", r#"{"a":[1]}"#),
        ok("/vm/config", r#"{"drives":[],"machine-config":{}}"#),
    ]);
    let api = &player.api;
    let info: InstanceInfo = api.ask(&Call::Describe, LIMIT).await.expect("an answer");
    assert_eq!((info.id.as_str(), info.state), ("m1", InstanceState::NotStarted));
    let version: Version = api.ask(&Call::AskVersion, LIMIT).await.expect("an answer");
    assert_eq!(version.firecracker_version, "1.17.0");
    let machine: MachineConfig = api.ask(&Call::AskMachine, LIMIT).await.expect("an answer");
    assert!(machine.track_dirty_pages && machine.mem_size_mib == 128);
    let balloon: Balloon = api.ask(&Call::AskBalloon, LIMIT).await.expect("an answer");
    assert_eq!(balloon.amount_mib, 8);
    let figures: BalloonStatistics =
        api.ask(&Call::AskBalloonStatistics, LIMIT).await.expect("an answer");
    assert_eq!(
        (figures.actual_mib, figures.free_memory, figures.total_memory),
        (7, Some(4096), None)
    );
    let stored: Value = api.ask(&Call::AskMmds, LIMIT).await.expect("an answer");
    assert_eq!(stored, json!({ "a": [1] }));
    let config: Value = api.ask(&Call::AskConfig, LIMIT).await.expect("an answer");
    assert!(config["drives"].is_array());
    player.end();
}

#[tokio::test]
async fn a_refusal_says_why() {
    let fault = r#"{"fault_message":"The requested operation is not supported before starting the microVM."}"#;
    let long = format!(r#"{{"fault_message":"{}"}}"#, "é\\n ".repeat(FAULT_MAX_BYTES));
    let player = Player::start(vec![
        Played::Say(answer("400 Bad Request", fault)),
        Played::Say(answer("400 Bad Request", &long)),
        Played::Say(answer("500 Internal Server Error", "no JSON")),
        Played::Say(answer("200 OK", "{}")),
        Played::Say(answer("204 No Content", "")),
        Played::Say(answer("200 OK", r#"{"id":1}"#)),
    ]);
    let api = &player.api;
    let pause = Call::Run(RunState::Paused);
    let error = api.tell(&pause, LIMIT).await.expect_err("refused");
    let said = "call PATCH /vm: Firecracker answered `The requested operation is not supported before \
                starting the microVM.`";
    assert_eq!(error.to_string(), said);
    let error = api.tell(&pause, LIMIT).await.expect_err("refused");
    let ApiError::Refused { fault, .. } = error else { panic!("{error}") };
    assert!(fault.len() <= FAULT_MAX_BYTES && fault.starts_with("é é") && !fault.contains('\n'));
    let error = api.tell(&pause, LIMIT).await.expect_err("refused").to_string();
    assert!(error.contains("status 500: no JSON"), "{error}");
    let error = api.tell(&pause, LIMIT).await.expect_err("another status");
    assert!(matches!(error, ApiError::Unexpected { .. }), "{error}");
    for _ in 0..2 {
        let error = api.ask::<InstanceInfo>(&Call::Describe, LIMIT).await.expect_err("no info");
        assert!(matches!(error, ApiError::Unexpected { .. }), "{error}");
    }
    player.end();
}

#[tokio::test]
async fn whoever_hangs_lies_or_leaves_is_told_apart_in_bounded_time_and_memory() {
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(64 << 10)).into_bytes();
    let body = vec![b' '; ANSWER_MAX_BYTES + 1];
    let mut huge =
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    huge.extend(body);
    let cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"id\"".to_vec();
    let player = Player::start(vec![
        Played::Say(b"garbage\r\n\r\n".to_vec()),
        Played::Say(Vec::new()),
        Played::Say(cut),
        Played::Say(endless),
        Played::Say(huge),
        Played::Hang,
    ]);
    let api = &player.api;
    for odd in ["garbage", "nothing", "half an answer", "a head without end", "too much"] {
        let error = api.ask::<Value>(&Call::Describe, LIMIT).await.expect_err(odd);
        assert!(matches!(error, ApiError::Gone { .. }), "{odd}: {error}");
    }
    let short = Duration::from_millis(50);
    let error = api.ask::<Value>(&Call::Describe, short).await.expect_err("silence");
    assert!(matches!(error, ApiError::TimedOut { waited_ms: 50, .. }), "{error}");
    player.end();
}

#[tokio::test]
async fn only_the_socket_that_was_there_is_called() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("api");
    let missing = Api::open(&path).expect_err("nothing there");
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    let listener = UnixListener::bind(&path).expect("a socket");
    let api = Api::open(&path).expect("a socket");
    // As a process would that wants its host to call another.
    std::fs::remove_file(&path).expect("it is ours");
    let other = folder.path().join("other");
    let _other = UnixListener::bind(&other).expect("a socket");
    std::os::unix::fs::symlink(&other, &path).expect("a link");
    assert_eq!(Api::open(&path).expect_err("a link").kind(), io::ErrorKind::InvalidInput);
    let thread = std::thread::spawn(move || {
        let answer = answer("204 No Content", "");
        play(Played::Answer("PUT", "/entropy", json!({}), answer), &listener);
    });
    api.tell(&Call::Entropy(None), LIMIT).await.expect("the first one answers");
    thread.join().expect("it was called");
}

#[test]
fn names_of_devices_are_no_paths() {
    for bad in ["", "a/b", "..", "é", &"x".repeat(65)] {
        assert_eq!(Id::new(bad).expect_err("no name").text, bad);
    }
    assert_eq!(id("root_1").to_string(), "root_1");
}
