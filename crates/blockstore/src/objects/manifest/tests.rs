use super::*;

fn object(id: u8, blocks: u32) -> ObjectUse {
    let shape = Shape { blocks, frame_blocks: 4 };
    ObjectUse { id: ObjectId([id; 32]), bytes: shape.bytes_max(), blocks, frame_blocks: 4 }
}

const fn run(first: u32, count: u32, object: u32, at: u32) -> Run {
    Run { first, count, object, at }
}

fn manifest(objects: &[ObjectUse], runs: &[Run]) -> ImageManifest {
    ImageManifest::new(64 * BLOCK_BYTES, Some(ImageId([9; 32])), objects, runs.to_vec())
        .expect("a manifest")
}

type Forgery = Box<dyn FnOnce(&mut Vec<u8>)>;

/// The manifest's bytes after `change`, under the name that fits them: what a hostile writer makes.
fn forged(manifest: &ImageManifest, change: impl FnOnce(&mut Vec<u8>)) -> (ImageId, Vec<u8>) {
    let mut body = manifest.body();
    change(&mut body);
    let id = ImageId(hash_of(&body));
    body.extend_from_slice(&id.0);
    (id, body)
}

#[test]
fn a_manifest_reads_as_it_was_written() {
    let written = manifest(&[object(2, 8), object(1, 8)], &[run(0, 4, 0, 0), run(9, 2, 1, 6)]);
    let read = ImageManifest::parse(written.id(), &written.to_bytes()).expect("whole");
    assert_eq!(read, written);
    assert_eq!(read.parent(), Some(ImageId([9; 32])));
    let ids: Vec<_> = read.objects().iter().map(|object| object.id.0[0]).collect();
    assert_eq!(ids, [1, 2], "sorted by id");
    assert_eq!(read.runs(), [run(0, 4, 1, 0), run(9, 2, 0, 6)]);
}

#[test]
fn one_map_has_one_name() {
    let (a, b, c) = (object(1, 8), object(2, 8), object(3, 8));
    let one = manifest(&[a, b], &[run(0, 4, 0, 0), run(9, 2, 1, 6)]);
    let two = manifest(
        &[c, b, a, b],
        &[run(0, 2, 2, 0), run(2, 2, 2, 2), run(9, 1, 1, 6), run(10, 1, 3, 7)],
    );
    assert_eq!(one, two);
    let salted = one.clone().with_salt(1);
    assert_ne!(salted.id(), one.id());
    assert_eq!(ImageManifest::parse(salted.id(), &salted.to_bytes()), Ok(salted));
}

#[test]
fn any_changed_byte_is_found() {
    let written = manifest(&[object(1, 8)], &[run(0, 4, 0, 0)]);
    let bytes = written.to_bytes();
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let e = ImageManifest::parse(written.id(), &bad).expect_err("changed");
        assert_eq!(e.thing, format!("image {}", written.id()));
        assert!(ImageManifest::parse(written.id(), &bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn what_breaks_the_format_is_refused_under_its_own_name_too() {
    let good = manifest(&[object(1, 8), object(2, 8)], &[run(0, 4, 0, 0), run(4, 4, 1, 0)]);
    let put = |at: usize, value: u32| {
        move |body: &mut Vec<u8>| body[at..at + 4].copy_from_slice(&value.to_le_bytes())
    };
    let runs = HEAD_BYTES + 2 * OBJECT_BYTES;
    let forgeries: Vec<(&str, Forgery)> = vec![
        ("begin as a manifest", Box::new(put(0, 0))),
        ("version 2", Box::new(put(8, 2))),
        ("blocks of 512", Box::new(put(12, 512))),
        ("its size of 262145", Box::new(put(16, 262_145))),
        ("its size", Box::new(put(20, 4097))),
        ("does not hold 4294967295 objects", Box::new(put(24, u32::MAX))),
        ("4294967295 runs", Box::new(put(28, u32::MAX))),
        ("does not hold", Box::new(put(68, 1))),
        ("not sorted", Box::new(put(HEAD_BYTES, u32::MAX))),
        ("cannot have", Box::new(put(HEAD_BYTES + 36, 1))),
        ("0 blocks", Box::new(put(HEAD_BYTES + 40, 0))),
        ("16385 blocks", Box::new(put(HEAD_BYTES + 40, 16_385))),
        ("65 blocks a frame", Box::new(put(HEAD_BYTES + 44, 65))),
        ("run 0", Box::new(put(runs + 4, 0))),
        ("run 1", Box::new(put(runs, 1))),
        ("run 1", Box::new(put(runs + 16, 3))),
        ("run 1", Box::new(put(runs + 16 + 4, 100))),
        ("run 1", Box::new(put(runs + 16 + 4, u32::MAX))),
        ("run 0", Box::new(put(runs + 8, 2))),
        ("run 0", Box::new(put(runs + 12, 5))),
        ("run 0", Box::new(put(runs + 12, u32::MAX))),
        ("does not hold", Box::new(|body| body.push(0))),
        ("only", Box::new(|body| body.truncate(HEAD_BYTES - 1))),
    ];
    for (says, forge) in forgeries {
        let (id, bytes) = forged(&good, forge);
        let e = ImageManifest::parse(id, &bytes).expect_err(says);
        assert!(e.what.contains(says), "expected {says:?}, got {:?}", e.what);
    }
}

#[test]
fn images_differ_where_their_blocks_lie_elsewhere() {
    let (a, b) = (object(1, 8), object(2, 8));
    let base = manifest(&[a], &[run(0, 8, 0, 0)]);
    let child =
        manifest(&[a, b], &[run(0, 2, 0, 0), run(2, 1, 1, 0), run(3, 3, 0, 3), run(20, 1, 1, 1)]);
    assert_eq!(base.differing(&child), [2..3, 6..8, 20..21]);
    assert_eq!(child.differing(&base), [2..3, 6..8, 20..21]);
    assert_eq!(base.differing(&base), []);
    let moved = manifest(&[a], &[run(0, 4, 0, 4)]);
    let all: Vec<Range<u64>> = std::iter::once(0..8).collect();
    assert_eq!(base.differing(&moved), all);
}
