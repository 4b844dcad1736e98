//! Everything unreachable goes, nothing reachable does: also when killed, and beside writers.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use belljar_blockstore::blobs::BlobKey;
use belljar_blockstore::gc::{GRACE_MIN, GcError, GcReport, collect, store_now};
use belljar_blockstore::objects::{WriteError, delete_ref, publish, refs};
use belljar_blockstore::verify::{store_stats, verify};
use belljar_blockstore::{BlobStore, BlockIndex, ImageManifest};
use belljar_domain::{Kind, UnixMillis};
use bytes::Bytes;

use crate::rig::{Rig, Tampered, content, index, name, open, read, write};

const GRACE: Duration = GRACE_MIN;

/// The store's time, `graces` later.
fn later(store: &dyn BlobStore, graces: u32) -> UnixMillis {
    store_now(store).expect("the time").plus((GRACE + Duration::from_secs(5)) * graces)
}

fn collect_at(store: &dyn BlobStore, graces: u32) -> GcReport {
    collect(store, GRACE, later(store, graces)).expect("collected")
}

fn keys(store: &dyn BlobStore, folder: &str) -> BTreeSet<String> {
    let folder = BlobKey::new(folder).expect("a key");
    let listed = store.list(&folder).expect("listed");
    listed.into_iter().map(|(key, _)| key.as_str().to_owned()).collect()
}

/// The store holds what its refs reach, and nothing else.
fn assert_exact(store: &Arc<dyn BlobStore>, images: &[(&ImageManifest, &[u32])]) {
    let mut objects = BTreeSet::new();
    let mut manifests = BTreeSet::new();
    for (image, seeds) in images {
        assert!(read(store, image).expect("reachable") == content(seeds));
        manifests.insert(image.id().key().as_str().to_owned());
        objects.extend(image.objects().iter().map(|each| each.id.key().as_str().to_owned()));
    }
    assert_eq!(keys(&**store, "manifests"), manifests);
    assert_eq!(keys(&**store, "objects"), objects);
    assert_eq!(keys(&**store, "condemned"), BTreeSet::new());
    assert_eq!(keys(&**store, "collector").len(), 1, "the clock; the turn was given back");
    assert!(verify(&**store, |_, _| {}).expect("verified").damage.is_empty());
}

/// Three images that share objects; the refs of two are gone.
fn littered() -> (Rig, ImageManifest, Vec<u32>) {
    let rig = Rig::new();
    let base: Vec<u32> = (1..40).collect();
    let mut kept = base.clone();
    (kept[2], kept[20]) = (100, 102);
    let mut lost = base.clone();
    (lost[5], lost[30]) = (200, 203);
    let first = rig.write("base", &base).manifest;
    let kept_image = write(&rig.index, "kept", Some(&first), &kept).expect("written").manifest;
    write(&rig.index, "lost", Some(&first), &lost).expect("written");
    rig.write("alone", &(300..330).collect::<Vec<u32>>());
    for gone in ["base", "lost", "alone"] {
        delete_ref(&*rig.store, &name(gone)).expect("deleted");
    }
    (rig, kept_image, kept)
}

#[test]
fn what_nothing_reaches_goes_after_two_graces_and_the_rest_stays() {
    let (rig, image, seeds) = littered();
    let store = &*rig.store;
    let before = (keys(store, "objects"), keys(store, "manifests"));
    let young = collect_at(store, 0);
    assert_eq!((young.condemned, young.objects_deleted), (0, 0));
    assert!(young.young >= 7, "{young:?}");
    let marked = collect_at(store, 1);
    assert_eq!((marked.young, marked.condemned), (0, young.young));
    let waiting = collect(store, GRACE, later(store, 0)).expect("collected");
    assert_eq!((waiting.waiting, waiting.objects_deleted), (young.young, 0));
    assert_eq!((keys(store, "objects"), keys(store, "manifests")), before);
    let swept = collect_at(store, 2);
    assert_eq!(swept.objects_deleted + swept.images_deleted, young.young);
    assert_eq!((swept.images_deleted, swept.refs, swept.images_reachable), (3, 1, 1));
    assert!(swept.bytes_deleted > 30 * 2048);
    assert_exact(&rig.store, &[(&image, &seeds)]);
    let stats = store_stats(store).expect("counted");
    assert_eq!((stats.unreachable_objects, stats.condemned), (0, 0));
    let idle = collect_at(store, 3);
    assert_eq!((idle.condemned, idle.objects_deleted, idle.young), (0, 0, 0));
    delete_ref(store, &name("kept")).expect("deleted");
    collect_at(store, 4);
    collect_at(store, 6);
    assert_exact(&rig.store, &[]);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

#[test]
fn a_collection_killed_at_any_change_is_finished_by_the_next() {
    let (rig, image, seeds) = littered();
    for graces in [1, 2] {
        if graces == 2 {
            collect_at(&*rig.store, 1);
        }
        for dies_after in 0.. {
            let folder = tempfile::tempdir().expect("a temporary folder");
            copy(rig.folder.path(), folder.path());
            let store = open(folder.path());
            let now = later(&*store, graces);
            let dying = Tampered::new(&store).dying_after(dies_after);
            let is_whole = collect(&dying, GRACE, now).is_ok();
            assert!(read(&store, &image).expect("reachable") == content(&seeds));
            if !is_whole && dies_after > 0 {
                let early = collect(&*store, GRACE, later(&*store, 0));
                assert!(matches!(early, Err(GcError::Busy { .. })), "its turn is not over");
            }
            // An hour and more later, so that the turn is taken over.
            for graces in [8, 16, 24] {
                collect_at(&*store, graces);
            }
            assert_exact(&store, &[(&image, &seeds)]);
            if is_whole {
                assert!(dies_after > 5, "the test reached nothing");
                break;
            }
        }
    }
}

/// A process that learns everything now, before anything is marked.
fn knowing(store: &Arc<dyn BlobStore>) -> Arc<BlockIndex> {
    let known = index(store);
    known.learn_all().expect("learned");
    known
}

#[test]
fn a_writer_that_shares_what_is_being_collected_is_told_and_can_write_again() {
    let (rig, _, _) = littered();
    let store = &rig.store;
    let writer = knowing(store);
    collect_at(&**store, 1);
    let seeds: Vec<u32> = (300..330).collect();
    let mut tries = 0;
    let image = loop {
        tries += 1;
        match write(&writer, "again", None, &seeds) {
            Ok(written) => break written.manifest,
            Err(e) => {
                assert!(matches!(e, WriteError::Publish(_)) && e.kind() == Kind::Conflict, "{e:?}");
                assert!(e.to_string().contains("being collected"), "{e}");
            }
        }
    };
    // One for each object it would have shared.
    assert_eq!(tries, 4);
    let index_of =
        |image: &ImageManifest| image.objects().iter().map(|each| each.id).collect::<Vec<_>>();
    collect_at(&**store, 2);
    collect_at(&**store, 4);
    assert!(read(store, &image).expect("reachable") == content(&seeds), "{:?}", index_of(&image));
    // A process that begins now does not share what is marked, and needs no second try.
    let fresh = index(store);
    fresh.learn_all().expect("learned");
    write(&fresh, "fresh", None, &(400..430).collect::<Vec<_>>()).expect("written");
}

#[test]
fn a_collection_at_any_call_of_a_writer_loses_nothing_that_was_published() {
    let seeds: Vec<u32> = (300..330).chain(500..505).collect();
    let mut published = 0;
    for call in 1.. {
        let (rig, image, kept) = littered();
        let tampered = Arc::new(Tampered::new(&rig.store));
        let store: Arc<dyn BlobStore> = Arc::clone(&tampered) as _;
        // It learned everything before anything was marked; and the marks are a grace old when it
        // begins to write, so that the collection in its middle deletes.
        let stale = knowing(&store);
        collect_at(&*rig.store, 1);
        let behind = Arc::clone(&rig.store);
        let at = later(&*behind, 3);
        let before = tampered.calls();
        tampered.before_call(before + call, move || {
            let report = collect(&*behind, GRACE, at).expect("collected");
            assert!(report.objects_deleted > 0);
        });
        for _ in 0..8 {
            match write(&stale, "new", None, &seeds) {
                Ok(written) => {
                    assert!(
                        read(&rig.store, &written.manifest).expect("published") == content(&seeds)
                    );
                    published += 1;
                    break;
                }
                Err(e) => assert_eq!(e.kind(), Kind::Conflict, "call {call}: {e:?}"),
            }
        }
        assert!(read(&rig.store, &image).expect("reachable") == content(&kept));
        assert!(verify(&*rig.store, |_, _| {}).expect("verified").damage.is_empty());
        let used = refs(&*rig.store).expect("refs").len();
        assert_eq!(used, 2, "call {call}: the writer got there in the end");
        if before + call > tampered.calls() {
            assert!(call > 10, "the test reached nothing");
            break;
        }
    }
    assert!(published > 10, "{published}");
}

#[test]
fn the_same_content_again_takes_another_name_while_the_old_is_collected() {
    let rig = Rig::new();
    let seeds: Vec<u32> = (1..30).collect();
    let old = rig.write("one", &seeds).manifest;
    delete_ref(&*rig.store, &name("one")).expect("deleted");
    collect_at(&*rig.store, 1);
    let new = write(&index(&rig.store), "two", None, &seeds).expect("written").manifest;
    assert!(new.objects().iter().all(|each| !old.objects().contains(each)));
    // A manifest that is marked while its objects are not.
    let marked = rig.write("three", &[0, 0]).manifest;
    let mark = BlobKey::new(format!("condemned/image-{}", marked.id())).expect("a key");
    rig.store.create(&mark, Bytes::new()).expect("marked");
    let other = publish(&*rig.store, &name("four"), marked.clone()).expect("published");
    assert_ne!(other.id(), marked.id());
    delete_ref(&*rig.store, &name("three")).expect("deleted");
    collect_at(&*rig.store, 2);
    collect_at(&*rig.store, 4);
    assert_exact(&rig.store, &[(&new, &seeds), (&other, &[0, 0])]);
}

#[test]
fn a_mark_on_what_is_reached_is_taken_back() {
    let rig = Rig::new();
    let image = rig.write("one", &[1, 2, 3]).manifest;
    let object = image.objects()[0].id;
    let mark = BlobKey::new(format!("condemned/object-{object}")).expect("a key");
    rig.store.create(&mark, Bytes::new()).expect("marked");
    let report = collect_at(&*rig.store, 3);
    assert_eq!((report.spared, report.objects_deleted), (1, 0));
    assert_exact(&rig.store, &[(&image, &[1, 2, 3])]);
}

#[test]
fn nothing_is_deleted_while_anything_is_unclear() {
    let (rig, image, _) = littered();
    let store = &*rig.store;
    collect_at(store, 1);
    let before = keys(store, "objects");
    let e = collect(store, GRACE - Duration::from_secs(1), later(store, 9)).expect_err("too short");
    assert!(matches!(e, GcError::Grace { .. }) && e.kind() == Kind::Invalid, "{e}");
    let turn = BlobKey::new("collector/turn").expect("a key");
    store.create(&turn, Bytes::new()).expect("another collection");
    let e = collect(store, GRACE, later(store, 2)).expect_err("busy");
    assert!(matches!(e, GcError::Busy { .. }) && e.kind() == Kind::Conflict, "{e}");
    store.delete(&turn).expect("given back");
    let good = image.to_bytes();
    store.put(&image.id().key(), Bytes::from(good[1..].to_vec())).expect("damaged");
    let e = collect(store, GRACE, later(store, 2)).expect_err("damaged");
    assert!(matches!(&e, GcError::Manifest { name, .. } if name == "kept"), "{e}");
    store.delete(&image.id().key()).expect("removed");
    let e = collect(store, GRACE, later(store, 2)).expect_err("missing");
    assert!(e.to_string().contains("kept"), "{e}");
    store.put(&image.id().key(), Bytes::from(good)).expect("repaired");
    store.put(&BlobKey::new("refs/bad").expect("a key"), Bytes::new()).expect("damaged");
    assert!(matches!(collect(store, GRACE, later(store, 2)), Err(GcError::Refs(_))));
    assert_eq!(keys(store, "objects"), before);
    store.delete(&BlobKey::new("refs/bad").expect("a key")).expect("removed");
    assert!(collect_at(store, 2).objects_deleted > 0, "an error gives the turn back");
}
