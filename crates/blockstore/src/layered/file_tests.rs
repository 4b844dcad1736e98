use super::*;
use crate::layers::Layer;
use proptest::prelude::*;
use std::sync::Arc;

const SIZE: u64 = 8 * BLOCK_BYTES;

/// A data folder with two layers, a template's disk, and an image of them.
fn rig() -> (tempfile::TempDir, LayerStore, LayeredImage) {
    let dir = tempfile::tempdir().expect("temp folder");
    let store = LayerStore::open(dir.path()).expect("a folder");
    let template = dir.path().join("templates/b");
    std::fs::create_dir_all(&template).expect("mkdir");
    std::fs::write(template.join("rootfs.ext4"), vec![7; 8 * 4096]).expect("write");
    let base = store.layer(&LayerName::new("templates/b/rootfs.ext4").expect("a name"));
    let layers: Vec<Arc<Layer>> = vec![
        base.expect("the template is there"),
        store.draft(SIZE).expect("draft").finish(),
        store.draft(SIZE).expect("draft").finish(),
    ];
    let mut map = RunMap::new();
    for (count, source) in [
        (1, Source::Layer(1)),
        (2, Source::Zero),
        (3, Source::Layer(0)),
        (1, Source::Zero),
        (1, Source::Layer(2)),
    ] {
        map.push(count, source);
    }
    (dir, store, LayeredImage::of(map, layers))
}

fn decoded(bytes: &[u8]) -> String {
    match decode(bytes) {
        Ok(_) => "accepted".to_owned(),
        Err(e) => e.to_string(),
    }
}

/// The map with a checksum that is right for it, as a hostile writer would make it.
fn sealed(mut content: Vec<u8>) -> Vec<u8> {
    let sum = blake3::hash(&content);
    content.extend(sum.as_bytes());
    content
}

fn content(names: &[&str], blocks: u64, runs: &[(u32, u32)]) -> Vec<u8> {
    let names: Vec<u8> = names
        .iter()
        .flat_map(|name| {
            let len = u16::try_from(name.len()).expect("short").to_le_bytes();
            [&len[..], name.as_bytes()].concat()
        })
        .collect();
    let count = |n: usize| u32::try_from(n).expect("few").to_le_bytes();
    let mut bytes = [&b"BELLJMAP"[..], &1_u32.to_le_bytes(), &4096_u32.to_le_bytes()].concat();
    bytes.extend(blocks.to_le_bytes());
    bytes.extend(count(names.iter().filter(|b| **b == b'/').count()));
    bytes.extend(count(names.len()));
    bytes.extend(count(runs.len()));
    bytes.extend(names);
    for (count, source) in runs {
        bytes.extend(count.to_le_bytes());
        bytes.extend(source.to_le_bytes());
    }
    bytes
}

#[test]
fn a_saved_map_is_loaded_again() {
    let (dir, store, image) = rig();
    let path = dir.path().join("disk.map");
    image.save(&path).expect("save");
    let back = LayeredImage::load(&path, &store).expect("load");
    assert_eq!((&back.map, &back.names), (&image.map, &image.names));
    let e = image.save(&path).expect_err("it is there");
    assert_eq!(e.source.kind(), io::ErrorKind::AlreadyExists);
    LayeredImage::load(&path, &store).expect("the one that was there is whole");
}

/// The bytes of format 1, as `docs/formats.md` says. They never change.
#[test]
fn format_1_is_frozen() {
    let mut map = RunMap::new();
    map.push(2, Source::Zero);
    map.push(1, Source::Layer(0));
    let name = LayerName::new("layers/00112233445566778899aabbccddeeff").expect("a name");
    let bytes = encode(&map, &[name]);
    let hex = "42454c4c4a4d415001000000001000000300000000000000010000002900000002000000\
               27006c61796572732f3030313132323333343435353636373738383939616162626363646465656666\
               02000000000000000100000001000000";
    assert_eq!(hex::encode(&bytes[..bytes.len() - SUM_BYTES]), hex);
    let sum = "b24b4160c0c1ba3710fd947791383779db4cb0c6a156a1607a43c80a44333412";
    assert_eq!(hex::encode(&bytes[bytes.len() - SUM_BYTES..]), sum);
}

#[test]
fn every_cut_and_every_changed_bit_is_refused() {
    let (_dir, _store, image) = rig();
    let bytes = encode(&image.map, &image.names);
    decode(&bytes).expect("whole");
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err(), "cut to {len} bytes");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(decode(&changed).is_err(), "bit {bit} of byte {at}");
        }
    }
    assert!(decode(&[&bytes[..], &[0]].concat()).is_err(), "a byte more");
}

#[test]
fn hostile_maps_are_refused_by_what_is_wrong() {
    let good = ["layers/a", "layers/b"];
    let runs = [(3, 0), (2, 1), (3, 2)];
    assert_eq!(decoded(&sealed(content(&good, 8, &runs))), "accepted");
    for (bytes, text) in [
        (content(&good, 9, &runs), "fewer blocks"),
        (content(&good, 7, &runs), "more blocks"),
        (content(&good, 0, &[]), "1 to 2^32"),
        (content(&good, 1 << 32, &runs), "1 to 2^32"),
        (content(&good, u64::MAX, &[(u32::MAX, 0), (u32::MAX, 1)]), "1 to 2^32"),
        (content(&good, 8, &[(8, 3)]), "not there"),
        (content(&good, 8, &[(8, u32::MAX)]), "not there"),
        (content(&good, 8, &[(0, 0), (8, 1)]), "empty"),
        (content(&good, 8, &[(4, 1), (4, 1)]), "goes on"),
        (content(&["layers/a", "layers/a"], 8, &[(8, 1)]), "twice"),
        (content(&["layers/../x"], 8, &[(8, 1)]), "plain path"),
        (content(&["/layers"], 8, &[(8, 1)]), "plain path"),
        (content(&["control/keys.db"], 8, &[(8, 1)]), "no layer and no template"),
        (content(&["layers/a\u{301}"], 8, &[(8, 1)]), "ASCII"),
        (content(&["a/"; 300], 8, &[(8, 0)]), "more than 256 layers"),
    ] {
        let problem = decoded(&sealed(bytes));
        assert!(problem.contains(text), "expected `{text}`, got `{problem}`");
    }
    let mut newer = content(&good, 8, &runs);
    newer[8] = 2;
    assert!(decoded(&sealed(newer)).contains("format 2"));
    let mut long = content(&good, 8, &runs);
    long[32..36].fill(0xff);
    assert!(decoded(&sealed(long)).contains("it has"));
    assert!(decoded(b"#!/bin/sh").contains("no image map"));
}

#[test]
fn what_a_map_needs_is_named_when_it_is_not_there() {
    let (dir, store, image) = rig();
    let path = dir.path().join("disk.map");
    image.save(&path).expect("save");
    let lost = image.names[1].clone();
    drop(image);
    let file = dir.path().join(lost.as_str());

    let cut = std::fs::OpenOptions::new().write(true).open(&file).expect("open");
    cut.set_len(SIZE - BLOCK_BYTES).expect("cut");
    let e = LayeredImage::load(&path, &store).expect_err("a layer was cut");
    assert!(matches!(e.problem, MapProblem::LayerSize { name, .. } if name == lost));

    std::fs::remove_file(&file).expect("remove");
    let e = LayeredImage::load(&path, &store).expect_err("a layer is gone");
    let MapProblem::Layer(e) = e.problem else { panic!("{e}") };
    assert!(e.to_string().contains(lost.as_str()), "{e}");

    let absent = dir.path().join("absent.map");
    let e = LayeredImage::load(&absent, &store).expect_err("no such file");
    assert!(e.to_string().contains("absent.map") && matches!(e.problem, MapProblem::Io(_)));

    let huge = std::fs::File::create(dir.path().join("huge.map")).expect("create");
    huge.set_len(FILE_MAX_BYTES + 1).expect("grow");
    let e = LayeredImage::load(&dir.path().join("huge.map"), &store).expect_err("too long");
    assert!(matches!(e.problem, MapProblem::TooLong(_)));
}

proptest! {
    /// Whatever the bytes, they are refused or are the one way to write what was read.
    #[test]
    fn any_bytes_are_refused_or_canonical(
        blocks in 0..20_u64,
        runs in proptest::collection::vec((0..9_u32, 0..4_u32), 0..6),
        at in 0..200_usize, byte in any::<u8>(), change in any::<bool>(),
    ) {
        let mut bytes = content(&["layers/a", "templates/b/memory"], blocks, &runs);
        if change && at < bytes.len() {
            bytes[at] = byte;
        }
        let bytes = sealed(bytes);
        if let Ok((map, names)) = decode(&bytes) {
            prop_assert_eq!(encode(&map, &names), bytes);
        }
    }
}
