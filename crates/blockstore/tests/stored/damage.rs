//! Whatever happens to the bytes in a store: it is found and named, and nothing else is served.

use std::path::PathBuf;
use std::sync::Arc;

use belljar_blockstore::objects::{ObjectId, ReadError, resolve};
use belljar_blockstore::verify::verify;
use belljar_blockstore::{BlobStore, ImageManifest};
use belljar_domain::Kind;
use bytes::Bytes;

use crate::rig::{Rig, Tampered, content, name, read};

/// An image of two objects, with frames of both kinds.
fn image() -> (Rig, ImageManifest, Vec<u8>) {
    let rig = Rig::new();
    let seeds: Vec<u32> = (1..17).collect();
    let manifest = rig.write("image", &seeds).manifest;
    assert_eq!(manifest.objects().len(), 2);
    (rig, manifest, content(&seeds))
}

fn path(rig: &Rig, object: &ObjectId) -> PathBuf {
    rig.folder.path().join(object.key().as_str())
}

/// Reads the image over a store where `object` has the content `bytes`. True if that was found in a
/// read; else what was read is right, and a look over the whole store finds it.
fn is_found(
    rig: &Rig,
    manifest: &ImageManifest,
    object: &ObjectId,
    whole: &[u8],
    bytes: &[u8],
) -> bool {
    let path = path(rig, object);
    let good = std::fs::read(&path).expect("the object");
    std::fs::write(&path, bytes).expect("damaged");
    let result = rig.read(manifest);
    let report = verify(&*rig.store, |_, _| {}).expect("verified");
    std::fs::write(&path, good).expect("repaired");
    assert_eq!(report.damage.len(), 1, "{report:?}");
    assert_eq!(report.damage[0].thing, format!("object {object}"));
    assert_eq!(report.damage[0].refs, [name("image")]);
    match result {
        Ok(read) => {
            assert!(read == whole, "wrong bytes were served");
            false
        }
        Err(ReadError::Corrupt(e)) => {
            assert_eq!(e.thing, format!("object {object}"));
            true
        }
        Err(e) => panic!("{e:?}"),
    }
}

#[test]
fn every_flipped_bit_of_an_object_is_found() {
    let (rig, manifest, whole) = image();
    let object = manifest.objects()[0].id;
    let good = std::fs::read(path(&rig, &object)).expect("the object");
    // Everything but most of the frames, where one byte is like the next.
    let tail = good.len() - 1000..good.len();
    let mut found = 0;
    for at in (0..8).chain((8..good.len()).step_by(977)).chain(tail.step_by(7)) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        found += u32::from(is_found(&rig, &manifest, &object, &whole, &bad));
    }
    // A reader of blocks does not look at the magic bytes and the block hashes.
    assert!(found > 30, "{found}");
}

#[test]
fn an_object_that_is_cut_or_grows_is_found() {
    let (rig, manifest, whole) = image();
    let object = manifest.objects()[1].id;
    let good = std::fs::read(path(&rig, &object)).expect("the object");
    for length in [0, 1, 8, 71, 72, 73, 4096, good.len() / 2, good.len() - 73, good.len() - 1] {
        assert!(is_found(&rig, &manifest, &object, &whole, &good[..length]), "{length}");
    }
    let longer = [&good[..], &[0]].concat();
    is_found(&rig, &manifest, &object, &whole, &longer);
}

#[test]
fn a_manifest_that_lies_about_its_objects_reads_nothing_even_from_memory() {
    let (rig, manifest, whole) = image();
    let cache = Arc::new(belljar_blockstore::ChunkCache::in_memory(rig.store.clone(), 1 << 20));
    let open = |id| belljar_blockstore::ImageReader::open(Arc::clone(&cache), id);
    let mut bytes = vec![0; whole.len()];
    open(manifest.id()).expect("open").read_at(&mut bytes, 0).expect("read");
    // Objects begin at byte 72 and say at 44 of them how many blocks a frame has: 4 of these.
    let mut body = manifest.to_bytes();
    body.truncate(body.len() - 32);
    body[72 + 44] = 5;
    let id = belljar_blockstore::ImageId(*blake3::hash(&body).as_bytes());
    body.extend_from_slice(&id.0);
    rig.store.put(&id.key(), Bytes::from(body)).expect("a lie");
    let lie = open(id).expect("it reads as a manifest");
    let e = lie.read_at(&mut bytes, 0).expect_err("a lie");
    assert!(e.to_string().contains(&format!("object {}", manifest.objects()[0].id)), "{e}");
}

#[test]
fn an_object_in_place_of_another_is_found() {
    let (rig, manifest, whole) = image();
    let [one, two] = [0, 1].map(|object: usize| manifest.objects()[object].id);
    let other = std::fs::read(path(&rig, &two)).expect("the object");
    assert!(is_found(&rig, &manifest, &one, &whole, &other));
}

#[test]
fn what_is_missing_is_named() {
    let (rig, manifest, _) = image();
    let object = manifest.objects()[1].id;
    std::fs::remove_file(path(&rig, &object)).expect("removed");
    let e = rig.read(&manifest).expect_err("missing");
    assert!(matches!(&e, ReadError::Missing { thing, .. } if *thing == format!("object {object}")));
    let report = verify(&*rig.store, |_, _| {}).expect("verified");
    assert_eq!(report.damage[0].what, "it is not there");
    std::fs::remove_file(rig.folder.path().join(manifest.id().key().as_str())).expect("removed");
    let e = rig.read(&manifest).expect_err("missing");
    assert!(
        matches!(&e, ReadError::Missing { thing, .. } if *thing == format!("image {}", manifest.id()))
    );
    let report = verify(&*rig.store, |_, _| {}).expect("verified");
    assert_eq!(report.damage[0].thing, format!("image {}", manifest.id()));
}

#[test]
fn a_damaged_manifest_or_ref_is_named() {
    let (rig, manifest, _) = image();
    let key = manifest.id().key();
    for at in [0, 30, 80, manifest.to_bytes().len() - 1] {
        let mut bad = manifest.to_bytes();
        bad[at] ^= 0x10;
        rig.store.put(&key, Bytes::from(bad)).expect("damaged");
        let e = rig.read(&manifest).expect_err("damaged");
        assert!(e.to_string().contains(&format!("image {}", manifest.id())), "{e}");
        assert_eq!(verify(&*rig.store, |_, _| {}).expect("verified").damage.len(), 1);
    }
    let ref_file = rig.folder.path().join("refs/image");
    let good = std::fs::read_to_string(&ref_file).expect("the ref");
    for bad in ["", "belljar ref 1\n", "belljar ref 2\nx\n", good.trim_end(), &good.to_uppercase()]
    {
        std::fs::write(&ref_file, bad).expect("damaged");
        let e = resolve(&*rig.store, &name("image")).expect_err("damaged");
        assert!(e.to_string().contains("ref image"), "{e}");
        let report = verify(&*rig.store, |_, _| {}).expect("verified");
        assert_eq!(report.damage[0].thing, "ref image");
    }
}

#[test]
fn a_store_that_fails_now_and_then_costs_tries_and_no_bytes() {
    let (rig, manifest, whole) = image();
    for every in 2..7 {
        let store: Arc<dyn BlobStore> = Arc::new(Tampered::new(&rig.store).failing_every(every));
        let mut failures = 0;
        let cache = Arc::new(belljar_blockstore::ChunkCache::in_memory(store, 1 << 20));
        let reader = loop {
            match belljar_blockstore::ImageReader::open(Arc::clone(&cache), manifest.id()) {
                Ok(reader) => break reader,
                Err(e) => {
                    assert_eq!(e.kind(), Kind::Unavailable, "{e:?}");
                    failures += 1;
                }
            }
        };
        let mut bytes = vec![0; whole.len()];
        while let Err(e) = reader.read_at(&mut bytes, 0) {
            assert_eq!(e.kind(), Kind::Unavailable, "{e:?}");
            failures += 1;
            assert!(failures < 50, "no try gets further than the one before");
        }
        assert!(bytes == whole);
        assert!(failures > 0 || every > 5, "every {every}");
    }
    let dead: Arc<dyn BlobStore> = Arc::new(Tampered::new(&rig.store).dying_after(0));
    assert_eq!(read(&dead, &manifest).expect_err("down").kind(), Kind::Unavailable);
    assert!(verify(&*dead, |_, _| {}).is_err(), "a store that is down is not damaged");
}
