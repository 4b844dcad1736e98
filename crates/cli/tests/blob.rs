//! `belljar blob`: what it says and how it exits, on a folder.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use belljar_blockstore::objects::{PackOptions, delete_ref};
use belljar_blockstore::{BlobStore, BlockIndex, ChunkCache, DirStore, ImageWriter, RefName};
use serde_json::Value;

fn belljar(data: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belljar"));
    command.arg("--data-dir").arg(data).args(arguments).env_remove("BELLJAR_BLOBS");
    command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    command.output().expect("it runs")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// An image of 20 blocks, and one of other 20 that nothing names any more.
fn fill(folder: &Path) -> Arc<dyn BlobStore> {
    let store: Arc<dyn BlobStore> = Arc::new(DirStore::open(folder).expect("a store"));
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(&store), 1 << 20));
    let index = Arc::new(BlockIndex::new(cache));
    for (called, first) in [("base", 1), ("gone", 100)] {
        let name = RefName::new(called).expect("a name");
        let options = PackOptions::default();
        let mut writer =
            ImageWriter::new(Arc::clone(&index), None, 40 * 4096, options).expect("a writer");
        for block in 0..20u8 {
            writer.block(u64::from(block), &[first + block; 4096]).expect("written");
        }
        writer.finish(&name).expect("published");
    }
    delete_ref(&*store, &RefName::new("gone").expect("a name")).expect("deleted");
    store
}

#[test]
fn a_store_is_counted_collected_and_verified() {
    let data = tempfile::tempdir().expect("a temporary folder");
    fill(&data.path().join("blobs"));
    let output = belljar(data.path(), &["--json", "blob", "stats"]);
    let stats = json(&output);
    assert!(output.status.success());
    assert_eq!((&stats["refs"], &stats["images"]), (&1.into(), &1.into()));
    assert_eq!(stats["mappedBytes"], 20 * 4096);
    assert_eq!(stats["unreachableObjects"], 1);
    let output = belljar(data.path(), &["blob", "stats"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 refs"), "{output:?}");
    let output = belljar(data.path(), &["--json", "blob", "gc", "--grace-minutes", "10"]);
    let report = json(&output);
    assert!(output.status.success());
    assert_eq!((&report["young"], &report["condemned"]), (&2.into(), &0.into()));
    let output = belljar(data.path(), &["blob", "gc", "--grace-minutes", "9"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let output = belljar(data.path(), &["blob", "verify"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("everything is there and whole"));
}

#[test]
fn damage_is_listed_and_has_an_exit_code_of_its_own() {
    let data = tempfile::tempdir().expect("a temporary folder");
    let folder = data.path().join("elsewhere");
    let store = fill(&folder);
    let objects = belljar_blockstore::blobs::BlobKey::new("objects").expect("a key");
    for (key, _) in store.list(&objects).expect("listed") {
        let path = folder.join(key.as_str());
        let mut bytes = std::fs::read(&path).expect("an object");
        bytes[20] ^= 1;
        std::fs::write(path, bytes).expect("damaged");
    }
    let place = folder.to_str().expect("a text");
    let output = belljar(data.path(), &["--json", "blob", "verify", "--blobs", place]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let damage = json(&output)["damage"].as_array().expect("a list").clone();
    assert_eq!(damage.len(), 2);
    assert!(damage.iter().any(|each| each["refs"] == serde_json::json!(["base"])), "{damage:?}");
    let output = belljar(data.path(), &["blob", "verify", "--blobs", place]);
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("needed by base") && text.contains("no ref needs it"), "{text}");
}

#[test]
fn a_store_that_is_not_there_is_named() {
    let data = tempfile::tempdir().expect("a temporary folder");
    let output = belljar(data.path(), &["blob", "verify"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("there is no blob store in") && text.contains("--blobs"), "{text}");
    let output = belljar(data.path(), &["blob", "verify", "--blobs", "s3://"]);
    assert_eq!(output.status.code(), Some(2));
    let output = belljar(data.path(), &["blob", "--help"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("3 `verify` found damage"), "{text}");
}
