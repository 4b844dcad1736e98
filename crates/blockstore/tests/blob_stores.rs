//! One contract for every blob store, on a directory and on a real S3 server.

#[path = "support/s3.rs"]
mod s3;
#[expect(dead_code, reason = "here it is left alone")]
#[path = "support/tampered.rs"]
mod tampered;

use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;

use belljar_blockstore::blobs::{
    BLOB_BYTES_MAX, BlobError, BlobFault, BlobKey, BlobStore, CREATE_BYTES_MAX, Created, DirStore,
    S3Store,
};
use belljar_domain::{Kind, Secret};
use bytes::Bytes;
use s3::S3Server;

fn key(text: &str) -> BlobKey {
    BlobKey::new(text).expect("a key")
}

fn assert_missing(result: Result<impl std::fmt::Debug, BlobError>, name: &str) {
    let e = result.expect_err("it is not there");
    assert!(e.is_not_found() && e.kind() == Kind::NotFound, "{e:?}");
    assert_eq!(e.key, name);
}

/// `store` must be empty.
fn contract(store: &dyn BlobStore) {
    whole_blobs(store);
    ranges(store);
    conditions(store);
    listing(store);
    big_bodies(store);
    limits(store);
    many_at_once(store);
}

fn whole_blobs(store: &dyn BlobStore) {
    let a = key("objects/ab/a.b-c_1");
    assert_missing(store.get(&a, 100), a.as_str());
    assert_missing(store.stat(&a), a.as_str());
    store.put(&a, Bytes::from_static(b"one")).expect("put");
    assert_eq!(store.get(&a, 3).expect("get"), "one");
    let stat = store.stat(&a).expect("stat");
    assert_eq!(stat.bytes, 3);
    let now = belljar_daemon::clock::now().0;
    assert!((now - stat.modified.0).abs() < 120_000, "{stat:?} at {now}");
    store.put(&a, Bytes::from_static(b"twotwo")).expect("put again");
    assert_eq!(store.get(&a, 100).expect("get"), "twotwo");
    let e = store.get(&a, 5).expect_err("longer than asked for");
    assert!(matches!(e.fault, BlobFault::Corrupt { .. }), "{e:?}");
    store.delete(&a).expect("delete");
    store.delete(&a).expect("delete what is gone");
    assert_missing(store.get(&a, 100), a.as_str());
    let empty = key("objects/empty");
    store.put(&empty, Bytes::new()).expect("put nothing");
    assert_eq!(store.get(&empty, 0).expect("get nothing").len(), 0);
    store.delete(&empty).expect("delete");
}

fn ranges(store: &dyn BlobStore) {
    let a = key("objects/ranges");
    assert_missing(store.get_range(&a, 0..1), a.as_str());
    store.put(&a, Bytes::from_static(b"0123456789")).expect("put");
    assert_eq!(store.get_range(&a, 0..10).expect("all"), "0123456789");
    assert_eq!(store.get_range(&a, 3..5).expect("some"), "34");
    assert_eq!(store.get_range(&a, 9..10).expect("the last"), "9");
    for beyond in [5..11, 10..11, 20..30] {
        let e = store.get_range(&a, beyond.clone()).expect_err("beyond the end");
        assert!(matches!(e.fault, BlobFault::Corrupt { .. }), "{beyond:?}: {e:?}");
    }
    store.delete(&a).expect("delete");
}

fn conditions(store: &dyn BlobStore) {
    let a = key("condemned/a");
    assert_eq!(store.create(&a, Bytes::from_static(b"one")).expect("create"), Created::Yes);
    let before = store.stat(&a).expect("stat");
    let again = store.create(&a, Bytes::from_static(b"two"));
    assert_eq!(again.expect("create again"), Created::WasThere);
    assert_eq!(store.get(&a, 100).expect("get"), "one");
    assert_eq!(store.stat(&a).expect("stat"), before);
    store.delete(&a).expect("delete");
    assert_eq!(store.create(&a, Bytes::from_static(b"two")).expect("create"), Created::Yes);
    store.delete(&a).expect("delete");
}

fn listing(store: &dyn BlobStore) {
    let folder = key("refs");
    assert_eq!(store.list(&folder).expect("list nothing"), []);
    let mut expected: Vec<String> = (0..5).map(|n| format!("refs/{n}/{n}")).collect();
    expected.extend(["refs/a".to_owned(), "refs/b.c".to_owned()]);
    for name in &expected {
        store.put(&key(name), Bytes::from(name.clone())).expect("put");
    }
    // Neither of these is in the folder.
    store.put(&key("refs2/a"), Bytes::new()).expect("put");
    store.put(&key("other"), Bytes::new()).expect("put");
    let mut found: Vec<String> = Vec::new();
    for (key, stat) in store.list(&folder).expect("list") {
        let alone = store.stat(&key).expect("stat");
        assert_eq!(stat.bytes, alone.bytes, "{key}");
        assert!((stat.modified.0 - alone.modified.0).abs() <= 1000, "{key}: {stat:?}, {alone:?}");
        found.push(key.as_str().to_owned());
    }
    found.sort();
    assert_eq!(found, expected);
    for name in expected.iter().map(String::as_str).chain(["refs2/a", "other"]) {
        store.delete(&key(name)).expect("delete");
    }
    assert_eq!(store.list(&folder).expect("list"), []);
}

fn big_bodies(store: &dyn BlobStore) {
    let mut body = vec![0; 20 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut body);
    let body = Bytes::from(body);
    let a = key("objects/big");
    store.put(&a, body.clone()).expect("put");
    assert_eq!(store.stat(&a).expect("stat").bytes, 20 << 20);
    assert!(store.get(&a, 20 << 20).expect("get") == body);
    let range = (8 << 20) - 5..(8 << 20) + 5;
    let expected = body.slice(range.clone());
    let range =
        u64::try_from(range.start).expect("small")..u64::try_from(range.end).expect("small");
    assert_eq!(store.get_range(&a, range).expect("across parts"), expected);
    store.delete(&a).expect("delete");
}

fn limits(store: &dyn BlobStore) {
    let length = |bytes: u64| usize::try_from(bytes).expect("small");
    let a = key("objects/long");
    let long = Bytes::from(vec![0; length(CREATE_BYTES_MAX) + 1]);
    let e = store.create(&a, long).expect_err("too long");
    assert!(matches!(e.fault, BlobFault::TooLong { .. }), "{e:?}");
    let longer = Bytes::from(vec![0; length(BLOB_BYTES_MAX) + 1]);
    let e = store.put(&a, longer).expect_err("too long");
    assert!(matches!(e.fault, BlobFault::TooLong { .. }), "{e:?}");
    let e = store.get_range(&a, 0..BLOB_BYTES_MAX + 1).expect_err("too long");
    assert!(matches!(e.fault, BlobFault::TooLong { .. }), "{e:?}");
    assert_missing(store.stat(&a), a.as_str());
}

fn many_at_once(store: &dyn BlobStore) {
    std::thread::scope(|threads| {
        for thread in 0..4 {
            threads.spawn(move || {
                for n in 0..8 {
                    let own = key(&format!("objects/{thread}/{n}"));
                    store.put(&own, Bytes::from(format!("{thread} {n}"))).expect("put");
                    let shared = key("objects/shared");
                    store.put(&shared, Bytes::from(vec![thread; 10_000])).expect("put");
                    let read = store.get(&shared, 10_000).expect("get");
                    assert!(read.iter().all(|byte| *byte == read[0]) && read.len() == 10_000);
                    assert_eq!(store.get(&own, 9).expect("get"), format!("{thread} {n}"));
                }
            });
        }
    });
    assert_eq!(store.list(&key("objects")).expect("list").len(), 33);
}

#[test]
fn a_directory_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    contract(&DirStore::open(&folder.path().join("made/for/it")).expect("a store"));
}

/// What tests make fail elsewhere is a store like any other as long as they do not.
#[test]
fn a_store_that_can_be_tampered_with_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let inner = std::sync::Arc::new(DirStore::open(folder.path()).expect("open"));
    contract(&tampered::Tampered::over(inner));
}

#[test]
fn a_bucket_keeps_the_contract() {
    let server = S3Server::start();
    contract(&server.store(""));
}

#[test]
fn a_folder_of_a_bucket_keeps_the_contract() {
    let server = S3Server::start();
    let other = server.store("some");
    other.put(&key("objects/theirs"), Bytes::from_static(b"x")).expect("put");
    let store = server.store("some/where/");
    assert_eq!(store.name(), "s3://images/some/where");
    contract(&store);
    assert_eq!(other.get(&key("objects/theirs"), 1).expect("get"), "x");
}

#[test]
fn of_many_who_create_one_makes_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = DirStore::open(folder.path()).expect("a store");
    let made = std::thread::scope(|threads| {
        let creators: Vec<_> = (0..8)
            .map(|n| {
                let store = &store;
                threads.spawn(move || store.create(&key("turn"), Bytes::from(format!("{n}"))))
            })
            .collect();
        let results = creators.into_iter().map(|each| each.join().expect("no panic"));
        results.filter(|result| matches!(result, Ok(Created::Yes))).count()
    });
    assert_eq!(made, 1);
}

#[test]
fn a_directory_leaves_nothing_unfinished_and_removes_what_a_crash_left() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let unfinished = folder.path().join(".unfinished");
    let count = |path: &Path| std::fs::read_dir(path).expect("a folder").count();
    let store = DirStore::open(folder.path()).expect("a store");
    store.put(&key("a"), Bytes::from_static(b"x")).expect("put");
    store.create(&key("a"), Bytes::from_static(b"x")).expect("create");
    assert_eq!(count(&unfinished), 0);
    let (old, young) = (unfinished.join("old"), unfinished.join("young"));
    std::fs::write(&young, "x").expect("write");
    let file = std::fs::File::create(&old).expect("create");
    let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    file.set_modified(long_ago).expect("set the time");
    DirStore::open(folder.path()).expect("a store");
    assert!(young.exists() && !old.exists());
    let e = DirStore::open(&young.join("below")).expect_err("a file is no folder");
    assert!(matches!(e.fault, BlobFault::Unavailable(_)), "{e:?}");
}

#[test]
fn a_wrong_key_is_denied_and_its_secret_is_never_shown() {
    let server = S3Server::start();
    let mut options = server.options("");
    let credentials = options.credentials.as_mut().expect("some");
    credentials.secret = Secret::new("wrong-secret".to_owned());
    let store = S3Store::open(&options).expect("a store");
    let e = store.put(&key("a"), Bytes::from_static(b"x")).expect_err("denied");
    assert!(matches!(e.fault, BlobFault::Denied(_)), "{e:?}");
    assert!(!format!("{e:?} {options:?} {store:?}").contains("wrong-secret"));
}

#[test]
fn a_server_that_is_away_or_breaks_off_is_unavailable_in_bounded_time() {
    let server = S3Server::start();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut options = server.options("");
    options.endpoint = Some(format!("http://{}", listener.local_addr().expect("an address")));
    let breaking = std::thread::spawn(move || {
        // Two tries of one call: each is read from and then dropped without an answer.
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().expect("a connection");
            let _read = socket.read(&mut [0; 64]).expect("a request");
        }
    });
    let store = S3Store::open(&options).expect("a store");
    let e = store.get(&key("a"), 10).expect_err("broken off");
    assert!(matches!(e.fault, BlobFault::Unavailable(_)), "{e:?}");
    breaking.join().expect("no panic");
    // Now nobody listens on that port any more.
    let e = store.list(&key("objects")).expect_err("away");
    assert!(matches!(e.fault, BlobFault::Unavailable(_)) && e.kind() == Kind::Unavailable, "{e:?}");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let server = S3Server::start();
    let mut options = server.options("a//b");
    let e = S3Store::open(&options).expect_err("an empty part");
    assert!(e.to_string().contains("check bucket, prefix"), "{e}");
    options = server.options("");
    for endpoint in ["no address", "127.0.0.1:9000", "ftp://127.0.0.1", ""] {
        options.endpoint = Some(endpoint.to_owned());
        let e = S3Store::open(&options).expect_err("no address");
        assert!(e.to_string().contains(&format!("{endpoint:?}")), "{e}");
    }
}
