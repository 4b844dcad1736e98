//! The server against clients other people wrote: `nbdinfo`, `nbdcopy`, `qemu-io`, `qemu-img`.
//! No root needed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_blockstore::{
    BlockDevice, LayerName, LayerStore, LayeredImage, NbdServer, Overlay, RawImage,
};

const MIB: usize = 1 << 20;

fn have(programs: &[&str]) -> bool {
    for program in programs {
        if Command::new(program).arg("--version").output().is_err() {
            belljar_testkit::skip(&format!("{program} is not installed"));
            return false;
        }
    }
    true
}

struct Rig {
    dir: tempfile::TempDir,
    server: NbdServer,
}

impl Rig {
    fn serve(dir: tempfile::TempDir, device: Arc<dyn BlockDevice>) -> Rig {
        let server =
            NbdServer::bind(&dir.path().join("nbd"), device, None).expect("the server starts");
        Rig { dir, server }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.server.path().display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.close().expect("the server closes");
        self.server.close().expect("closing twice is fine");
        assert!(!self.server.path().exists());
    }
}

/// Bytes that differ everywhere, with zeros in the middle third.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take(len / 8)
    .flatten()
    .collect();
    bytes[len / 3..2 * len / 3].fill(0);
    bytes
}

fn overlay_rig(content: &[u8]) -> (Rig, Arc<Overlay>) {
    let dir = tempfile::tempdir().expect("temp folder");
    fs::write(dir.path().join("base"), content).expect("write");
    let store = LayerStore::open(dir.path()).expect("a folder");
    let name = LayerName::new("base").expect("a name");
    let base = Arc::new(LayeredImage::raw(&store, &name).expect("open"));
    let overlay = Arc::new(Overlay::create(base, &dir.path().join("overlay")).expect("create"));
    (Rig::serve(dir, overlay.clone()), overlay)
}

fn raw_rig(content: &[u8]) -> Rig {
    let dir = tempfile::tempdir().expect("temp folder");
    fs::write(dir.path().join("disk"), content).expect("write");
    let raw = Arc::new(RawImage::open(&dir.path().join("disk")).expect("open"));
    Rig::serve(dir, raw)
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().expect("the program runs");
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn qemu_io(rig: &Rig, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    let uri = rig.uri();
    args.push(&uri);
    let output = run("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout);
    // qemu-io reports a failed check in words only.
    assert!(!text.contains("failed") && !text.contains("error"), "{commands:?}: {text}");
}

#[test]
fn nbdinfo_reads_the_export() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let rig = raw_rig(&pattern(8 * MIB));
    let output = run("nbdinfo", &[&rig.uri()]);
    let text = String::from_utf8_lossy(&output.stdout);
    for line in [
        "protocol: newstyle-fixed",
        "export-size: 8388608",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "can_fua: true",
        "can_flush: true",
        "is_read_only: false",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(line), "no `{line}` in: {text}");
    }
    let list = run("nbdinfo", &["--list", &rig.uri()]);
    assert!(String::from_utf8_lossy(&list.stdout).contains("export=\"\""));
    let other = format!("nbd+unix:///other?socket={}", rig.server.path().display());
    let refused = Command::new("nbdinfo").arg(&other).output().expect("nbdinfo runs");
    assert!(!refused.status.success(), "an unknown export was served");
}

#[test]
fn nbdcopy_moves_a_disk_both_ways() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let content = pattern(48 * MIB);
    let (rig, overlay) = overlay_rig(&content);
    let out = rig.path("out");
    run("nbdcopy", &[&rig.uri(), &out.to_string_lossy()]);
    assert!(fs::read(&out).expect("read") == content, "the copy out differs");
    assert_eq!(overlay.stats().written_blocks, 0);

    let changed: Vec<u8> = content.iter().map(|b| b.wrapping_add(1)).collect();
    let source = rig.path("in");
    fs::write(&source, &changed).expect("write");
    run("nbdcopy", &["--flush", &source.to_string_lossy(), &rig.uri()]);
    let mut whole = vec![0; changed.len()];
    overlay.read_at(&mut whole, 0).expect("read");
    assert!(whole == changed, "the copy in differs");
    assert!(fs::read(rig.path("base")).expect("read") == content, "the base was changed");
}

#[test]
fn qemu_io_writes_discards_and_zeroes() {
    if !have(&["qemu-io"]) {
        return;
    }
    let (rig, overlay) = overlay_rig(&pattern(8 * MIB));
    qemu_io(
        &rig,
        &[
            "write -P 0x11 0 64k",
            "write -P 0x22 5000 3000",
            "write -f -P 0x33 1M 2M",
            "read -P 0x11 0 5000",
            "read -P 0x22 5000 3000",
            "read -P 0x11 8000 57536",
            "read -P 0x33 1M 2M",
            "discard 1M 1M",
            "read -P 0 1M 1M",
            "read -P 0x33 2M 1M",
            "write -z 2M 64k",
            "write -z -u 2112k 64k",
            "read -P 0 2M 128k",
            "read -P 0x33 2176k 4k",
            "flush",
        ],
    );
    let stats = overlay.stats();
    assert_eq!(stats.zero_blocks, 256 + 16, "a discarded block is not stored");
    // Zeroes without leave to unmap are stored.
    assert_eq!(stats.written_blocks, 16 + 512 - 256 - 16);

    let raw = raw_rig(&pattern(8 * MIB));
    let before = fs::metadata(raw.path("disk")).expect("stat").blocks();
    qemu_io(
        &raw,
        &["write -P 0x44 0 1M", "discard 0 4M", "read -P 0 0 4M", "aio_write 5M 1M", "aio_flush"],
    );
    let after = fs::metadata(raw.path("disk")).expect("stat").blocks();
    assert!(after < before, "{before} sectors before the discard, {after} after it");
}

#[test]
fn closing_hangs_up_on_clients() {
    use std::io::Read as _;
    let rig = raw_rig(&pattern(MIB));
    let mut client = std::os::unix::net::UnixStream::connect(rig.server.path()).expect("connect");
    let mut hello = [0; 18];
    client.read_exact(&mut hello).expect("the server speaks first");
    assert_eq!(rig.server.connections(), 1);
    let started = Instant::now();
    rig.server.close().expect("close");
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(client.read(&mut hello).expect("end of file"), 0);
    assert!(std::os::unix::net::UnixStream::connect(rig.server.path()).is_err());
}

#[test]
fn one_client_too_many_is_hung_up() {
    use std::io::Read as _;
    let dir = tempfile::tempdir().expect("temp folder");
    fs::write(dir.path().join("disk"), pattern(MIB)).expect("write");
    let raw = Arc::new(RawImage::open(&dir.path().join("disk")).expect("open"));
    let server = NbdServer::bind(&dir.path().join("nbd"), raw, None).expect("bind");
    let connect = || std::os::unix::net::UnixStream::connect(server.path()).expect("connect");
    let mut hello = [0; 18];
    let mut served: Vec<_> = std::iter::repeat_with(connect).take(8).collect();
    for client in &mut served {
        client.read_exact(&mut hello).expect("served");
    }
    assert_eq!(connect().read(&mut hello).expect("end of file"), 0);
    server.close().expect("close");
}

#[test]
fn the_socket_belongs_to_its_owner_and_never_replaces_a_file() {
    use belljar_blockstore::SocketOwner;
    let dir = tempfile::tempdir().expect("temp folder");
    fs::write(dir.path().join("disk"), pattern(MIB)).expect("write");
    let raw = Arc::new(RawImage::open(&dir.path().join("disk")).expect("open"));
    let socket = dir.path().join("nbd");
    let own = fs::metadata(dir.path()).expect("stat");
    let owner = if own.uid() == 0 {
        SocketOwner { uid: 12_345, gid: 12_346 }
    } else {
        SocketOwner { uid: own.uid(), gid: own.gid() }
    };
    let server = NbdServer::bind(&socket, raw.clone(), Some(owner)).expect("bind");
    let stat = fs::metadata(&socket).expect("stat");
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o777), (owner.uid, owner.gid, 0o600));
    assert!(NbdServer::bind(&socket, raw.clone(), None).is_err());
    assert!(socket.exists(), "a failed bind removed another server's socket");
    server.close().expect("close");
    let long = dir.path().join("x".repeat(120));
    assert!(NbdServer::bind(&long, raw, None).is_err());
}
