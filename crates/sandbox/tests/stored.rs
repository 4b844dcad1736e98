//! Snapshots in a blob store: up after a pause, down on another node, and whatever the store does meanwhile.

#[path = "support/mod.rs"]
mod support;
#[path = "../../blockstore/tests/support/tampered.rs"]
mod tampered;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use belljar_blockstore::verify::verify;
use belljar_blockstore::{BlobStore, ChunkCache, DirStore};
use belljar_daemon::Scope;
use belljar_domain::{BuildId, ExecutionId, Kind, SandboxId};
use belljar_sandbox::{Archive, CreateError, CreateSandbox, KeepSandbox, Pace, Sandboxes};
use support::{PATIENCE, Rig};
use tampered::Tampered;

const SOON: Pace = Pace { first: Duration::from_millis(5), max: Duration::from_millis(40) };

fn order() -> KeepSandbox {
    KeepSandbox {
        snapshot_id: BuildId::random(),
        filesystem_only: false,
        require_healthy_guest: false,
    }
}

/// A store that nodes share.
struct Shared {
    folder: tempfile::TempDir,
}

impl Shared {
    fn new() -> Shared {
        Shared { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn store(&self) -> Arc<dyn BlobStore> {
        Arc::new(DirStore::open(self.folder.path()).expect("a store"))
    }

    fn refs(&self) -> usize {
        std::fs::read_dir(self.folder.path().join("refs/snapshots")).map_or(0, |snapshots| {
            let parts = |dir: std::io::Result<std::fs::DirEntry>| {
                std::fs::read_dir(dir.expect("an entry").path()).expect("list").count()
            };
            snapshots.map(parts).sum()
        })
    }

    /// Every object, the longest first.
    fn objects(&self) -> Vec<PathBuf> {
        let folders = std::fs::read_dir(self.folder.path().join("objects")).expect("list");
        let files = folders
            .flat_map(|folder| std::fs::read_dir(folder.expect("an entry").path()).expect("list"));
        let mut files: Vec<PathBuf> = files.map(|file| file.expect("an entry").path()).collect();
        files.sort_by_key(|file| std::cmp::Reverse(std::fs::metadata(file).expect("stat").len()));
        files
    }
}

fn archive(store: Arc<dyn BlobStore>) -> Option<Arc<Archive>> {
    let cache = Arc::new(ChunkCache::in_memory(store, 64 << 20));
    Some(Arc::new(Archive::new(cache, SOON)))
}

/// A node of the store.
async fn node(store: Arc<dyn BlobStore>) -> Rig {
    Rig { archive: archive(store), ..Rig::new(4).await }
}

async fn until(what: &str, is: impl Fn() -> bool) {
    let reached = async {
        while !is() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn paused(rig: &Rig, sandboxes: &Sandboxes, text: &[u8]) -> (SandboxId, BuildId) {
    let end_at = rig.clock.now().plus(Duration::from_secs(3600));
    let id = sandboxes.create(rig.request(end_at)).await.expect("create").sandbox_id;
    write(rig, &id, text);
    let kept = sandboxes.pause(&id, order()).await.expect("pause");
    (id, kept.snapshot_id.clone())
}

fn resume(rig: &Rig, id: &SandboxId, snapshot: &BuildId) -> CreateSandbox {
    let end_at = rig.clock.now().plus(Duration::from_secs(3600));
    CreateSandbox {
        sandbox_id: id.clone(),
        execution_id: ExecutionId::random(),
        build_id: snapshot.clone(),
        ..rig.request(end_at)
    }
}

fn write(rig: &Rig, id: &SandboxId, text: &[u8]) {
    rig.runtime.write_memory(&format!("test-{id}"), 8192, text).expect("it runs");
}

fn read(rig: &Rig, id: &SandboxId, len: usize) -> Vec<u8> {
    rig.runtime.read_memory(&format!("test-{id}"), 8192, len).expect("it runs")
}

fn layers(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("layers")).map_or(0, |layers| layers.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_node_paused_another_resumes() {
    let shared = Shared::new();
    let (a, scope) = (node(shared.store()).await, Scope::root("a"));
    let (on_a, _) = a.open(a.limits(), &scope).await;
    let (id, snapshot) = paused(&a, &on_a, b"precious").await;
    until("uploaded", || on_a.is_uploaded(&snapshot)).await;
    assert!(scope.close(PATIENCE).await);
    drop(on_a);
    let report = verify(&*shared.store(), |_, _| {}).expect("verified");
    assert_eq!((report.damage.len(), report.refs), (0, 3));

    // Another node, which has neither the snapshot nor its template.
    let (b, scope) = (node(shared.store()).await, Scope::root("b"));
    let (on_b, _) = b.open(b.limits(), &scope).await;
    let requests = [(); 3].map(|()| resume(&b, &id, &snapshot));
    let starts = requests.into_iter().map(|request| on_b.create(request));
    let started = futures::future::join_all(starts).await;
    assert_eq!(started.iter().filter(|start| start.is_ok()).count(), 1, "{started:?}");
    assert_eq!(read(&b, &id, 8), b"precious");
    assert_eq!(on_b.snapshots(None).len(), 1, "fetched once");
    assert!(on_b.is_uploaded(&snapshot), "it need not go up again");
    // It goes on there: paused again, that goes up and shares with what is there.
    write(&b, &id, b"more than precious");
    let next = on_b.pause(&id, order()).await.expect("pause").snapshot_id.clone();
    until("uploaded", || on_b.is_uploaded(&next)).await;
    on_b.delete_snapshot(&snapshot).await.expect("delete");
    until("removed from the store", || shared.refs() == 3).await;
    let gone = SandboxId::random();
    let missing = on_b.create(resume(&b, &gone, &snapshot)).await;
    assert!(matches!(missing, Err(CreateError::NoTemplate { .. })), "{missing:?}");
    on_b.create(resume(&b, &id, &next)).await.expect("resume");
    assert_eq!(read(&b, &id, 18), b"more than precious");
    on_b.kill(&id).await.expect("kill");
    on_b.delete_snapshot(&next).await.expect("delete");
    until("removed from the store", || shared.refs() == 0).await;
    until("and forgotten", || b.count("deleted-snapshots") == 0).await;
    assert!(scope.close(PATIENCE).await);
    b.assert_nothing_left();
    assert_eq!(
        (b.count("snapshots"), b.count("deleted-snapshots"), layers(b.dir.path())),
        (0, 0, 0)
    );

    // The first node comes back with what it had, and lets go of it.
    let scope = Scope::root("a");
    let (on_a, _) = a.open(a.limits(), &scope).await;
    assert!(on_a.is_uploaded(&snapshot), "the mark outlives the server");
    on_a.delete_snapshot(&snapshot).await.expect("delete");
    assert!(scope.close(PATIENCE).await);
    assert_eq!((a.count("snapshots"), layers(a.dir.path())), (0, 0));
    a.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_template_of_both_nodes_has_is_not_fetched() {
    let shared = Shared::new();
    let (a, scope) = (node(shared.store()).await, Scope::root("a"));
    let (on_a, _) = a.open(a.limits(), &scope).await;
    let (id, snapshot) = paused(&a, &on_a, b"precious").await;
    until("uploaded", || on_a.is_uploaded(&snapshot)).await;
    assert!(scope.close(PATIENCE).await);
    let (b, scope) = (node(shared.store()).await, Scope::root("b"));
    let template = |rig: &Rig| rig.dir.path().join("templates").join(a.build_id.as_str());
    std::fs::create_dir(template(&b)).expect("mkdir");
    for file in std::fs::read_dir(template(&a)).expect("list") {
        let file = file.expect("an entry");
        std::fs::copy(file.path(), template(&b).join(file.file_name())).expect("copy");
    }
    let (on_b, _) = b.open(b.limits(), &scope).await;
    on_b.create(resume(&b, &id, &snapshot)).await.expect("resume");
    assert_eq!(read(&b, &id, 8), b"precious");
    // Its disk is the template's, and of its memory one layer lies over the template's.
    assert_eq!(layers(b.dir.path()), 1);
    let below = format!("templates/{}/memory", a.build_id);
    let map = b.dir.path().join("snapshots").join(snapshot.as_str()).join("memory.map");
    let map = std::fs::read(map).expect("read");
    let names_it = map.windows(below.len()).any(|part| part == below.as_bytes());
    assert_eq!(names_it, on_b.templates().len() == 2 && has_data(&template(&b).join("memory")));
    on_b.kill(&id).await.expect("kill");
    on_b.delete_snapshot(&snapshot).await.expect("delete");
    assert!(scope.close(PATIENCE).await);
    b.assert_nothing_left();
    assert_eq!((b.count("snapshots"), layers(b.dir.path())), (0, 0));
}

/// Whether a file has anything but zeros.
fn has_data(file: &Path) -> bool {
    std::fs::read(file).expect("read").iter().any(|byte| *byte != 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_missing_chunk_is_named_and_never_started() {
    let shared = Shared::new();
    let (a, scope) = (node(shared.store()).await, Scope::root("a"));
    let (on_a, _) = a.open(a.limits(), &scope).await;
    let (id, snapshot) = paused(&a, &on_a, b"precious").await;
    until("uploaded", || on_a.is_uploaded(&snapshot)).await;
    assert!(scope.close(PATIENCE).await);
    let objects = shared.objects();
    assert!(objects.len() >= 3, "disk, memory, record: {objects:?}");
    for object in &objects {
        let name = object.file_name().and_then(|name| name.to_str()).expect("a name");
        let whole = std::fs::read(object).expect("read");
        let mut flipped = whole.clone();
        // Behind the magic, in the first frame.
        flipped[9] ^= 1;
        let cut = whole[..whole.len() - 1].to_vec();
        for damaged in [Some(flipped), Some(cut), None] {
            match &damaged {
                Some(bytes) => std::fs::write(object, bytes).expect("damage it"),
                None => std::fs::remove_file(object).expect("remove it"),
            }
            // A node that knows nothing of before.
            let (b, scope) = (node(shared.store()).await, Scope::root("b"));
            let (on_b, _) = b.open(b.limits(), &scope).await;
            let error = on_b.create(resume(&b, &id, &snapshot)).await.expect_err("damaged");
            let CreateError::Fetch { source, .. } = &error else { panic!("{error:?}") };
            let causes = std::iter::successors(
                Some(&**source as &(dyn std::error::Error + 'static)),
                |cause| cause.source(),
            );
            let text: Vec<String> = causes.map(ToString::to_string).collect();
            assert!(text.join(": ").contains(name), "{text:?} does not name {name}");
            assert_eq!(error.kind(), Kind::Internal);
            b.assert_nothing_left();
            assert_eq!((b.count("snapshots"), layers(b.dir.path())), (0, 0), "{text:?}");
            // Mended, the same node takes it.
            std::fs::write(object, &whole).expect("mend it");
            on_b.create(resume(&b, &id, &snapshot)).await.expect("resume");
            assert_eq!(read(&b, &id, 8), b"precious");
            assert!(scope.close(PATIENCE).await);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_flaky_slow_or_down_costs_no_pause_and_no_resume_here() {
    let shared = Shared::new();
    let tampered = Arc::new(Tampered::over(shared.store()));
    tampered.fail_every(9);
    let (a, scope) = (node(tampered.clone()).await, Scope::root("a"));
    let (on_a, _) = a.open(a.limits(), &scope).await;
    let (id, snapshot) = paused(&a, &on_a, b"precious").await;
    until("uploaded all the same", || on_a.is_uploaded(&snapshot)).await;
    assert!(tampered.failures.load(Ordering::SeqCst) > 0);
    // One that hangs: the pause is answered, and the resume during the upload works.
    tampered.fail_every(0);
    tampered.hang(true);
    on_a.create(resume(&a, &id, &snapshot)).await.expect("resume");
    write(&a, &id, b"later");
    let next = on_a.pause(&id, order()).await.expect("pause").snapshot_id.clone();
    until("the upload hangs", || tampered.hanging.load(Ordering::SeqCst) > 0).await;
    assert!(!on_a.is_uploaded(&next));
    on_a.create(resume(&a, &id, &next)).await.expect("resume during the upload");
    assert_eq!(read(&a, &id, 5), b"later");
    on_a.delete_snapshot(&snapshot).await.expect("delete");
    tampered.hang(false);
    until("uploaded in the end", || on_a.is_uploaded(&next)).await;
    until("the old one is gone", || shared.refs() == 3).await;
    // Down: what is on another node only cannot be had, and says so.
    let down = Arc::new(Tampered::over(shared.store()));
    down.fail_every(1);
    let (b, other) = (node(down.clone()).await, Scope::root("b"));
    let (on_b, _) = b.open(b.limits(), &other).await;
    let error = on_b.create(resume(&b, &id, &next)).await.expect_err("down");
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    down.fail_every(3);
    let mut tries = 0;
    while let Err(error) = on_b.create(resume(&b, &id, &next)).await {
        assert!(matches!(error.kind(), Kind::Unavailable), "{error:?}");
        tries += 1;
        assert!(tries < 200, "no try gets further than the one before");
    }
    assert!(tries > 0);
    assert_eq!(read(&b, &id, 5), b"later");
    on_b.kill(&id).await.expect("kill");
    on_a.kill(&id).await.expect("kill");
    assert!(scope.close(PATIENCE).await && other.close(PATIENCE).await);
    a.assert_nothing_left();
    b.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_at_any_call_of_an_upload_goes_on_with_the_next() {
    for dies_after in (0..).step_by(3) {
        let shared = Shared::new();
        let dying = Arc::new(Tampered::over(shared.store()));
        dying.die_after(dies_after);
        let (mut a, scope) = (node(dying.clone()).await, Scope::root("a"));
        let (on_a, _) = a.open(a.limits(), &scope).await;
        let (id, snapshot) = paused(&a, &on_a, b"precious").await;
        let (dead, up) = (|| dying.is_dead(), || on_a.is_uploaded(&snapshot));
        until("dead or done", || dead() || up()).await;
        let survived = !dying.is_dead();
        assert!(scope.close(PATIENCE).await);
        drop(on_a);

        a.archive = archive(shared.store());
        let scope = Scope::root("a");
        let (on_a, _) = a.open(a.limits(), &scope).await;
        until("uploaded", || on_a.is_uploaded(&snapshot)).await;
        let (b, other) = (node(shared.store()).await, Scope::root("b"));
        let (on_b, _) = b.open(b.limits(), &other).await;
        on_b.create(resume(&b, &id, &snapshot)).await.expect("resume");
        assert_eq!(read(&b, &id, 8), b"precious", "died after {dies_after} calls");
        on_a.delete_snapshot(&snapshot).await.expect("delete");
        until("removed from the store", || shared.refs() == 0).await;
        assert!(scope.close(PATIENCE).await && other.close(PATIENCE).await);
        b.assert_nothing_left();
        let report = verify(&*shared.store(), |_, _| {}).expect("verified");
        assert_eq!(report.damage, []);
        if survived {
            assert!(dies_after > 5, "an upload has more calls than {dies_after}");
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_while_the_store_was_down_goes_when_it_is_back() {
    let shared = Shared::new();
    let (mut a, scope) = (node(shared.store()).await, Scope::root("a"));
    let (on_a, _) = a.open(a.limits(), &scope).await;
    let (_, snapshot) = paused(&a, &on_a, b"precious").await;
    until("uploaded", || on_a.is_uploaded(&snapshot)).await;
    assert!(scope.close(PATIENCE).await);
    drop(on_a);
    let down = Arc::new(Tampered::over(shared.store()));
    down.fail_every(1);
    a.archive = archive(down.clone());
    let scope = Scope::root("a");
    let (on_a, _) = a.open(a.limits(), &scope).await;
    on_a.delete_snapshot(&snapshot).await.expect("the store's state is not the caller's problem");
    assert_eq!((a.count("snapshots"), shared.refs()), (0, 3));
    assert!(scope.close(PATIENCE).await);
    drop(on_a);
    a.archive = archive(shared.store());
    let scope = Scope::root("a");
    let (_on_a, _) = a.open(a.limits(), &scope).await;
    until("removed from the store", || shared.refs() == 0).await;
    until("and forgotten", || a.count("deleted-snapshots") == 0).await;
    assert!(scope.close(PATIENCE).await);
}
