use proptest::prelude::*;

use super::*;

const MEMORY_BYTES: u64 = 64 * PAGE_BYTES;

fn recorded(pages: &[Range<u64>]) -> WorkingSet {
    let mut recorder = Recorder::new(MEMORY_BYTES, MEMORY_BYTES, None);
    for run in pages {
        recorder.add(run.clone());
    }
    recorder.recorded()
}

/// Writes `bytes` as a file and loads it.
fn load(bytes: &[u8]) -> Result<WorkingSet, LoadWorkingSetError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("set");
    std::fs::write(&path, bytes).expect("write the file");
    WorkingSet::load(&path, MEMORY_BYTES)
}

#[test]
fn the_order_is_kept_and_no_page_is_there_twice() {
    let set = recorded(&[16..20, 4..8, 8..10, 17..22, 4..5]);
    let runs: Vec<_> = set.runs().map(|run| run.start / 4096..run.end / 4096).collect();
    assert_eq!(runs, [16..20, 4..10, 20..22]);
    assert_eq!(set.bytes(), 12 * 4096);
}

#[test]
fn a_record_is_bounded_and_goes_on_from_a_known_one() {
    let known = recorded(&[0..2, 2..4]);
    let mut recorder = Recorder::new(MEMORY_BYTES, 6 * PAGE_BYTES, Some(&known));
    recorder.add(2..60);
    let set = recorder.recorded();
    assert_eq!(set.bytes(), 6 * PAGE_BYTES);
    assert_eq!((set.runs().count(), set.runs().next()), (1, Some(0..6 * PAGE_BYTES)));
    let memory_bytes = 3 * u64::try_from(RUNS_MAX).expect("small") * PAGE_BYTES;
    let mut recorder = Recorder::new(memory_bytes, memory_bytes, None);
    for page in 0..memory_bytes / PAGE_BYTES / 2 {
        recorder.add(2 * page..2 * page + 1);
    }
    assert_eq!(recorder.recorded().runs().count(), RUNS_MAX);
}

/// Format 1, byte by byte: it may not change.
#[test]
fn the_format_is_frozen() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("set");
    let set = recorded(&[5..6, 1..3]);
    set.save(&path).expect("save it");
    let bytes = std::fs::read(&path).expect("read it");
    let vector = "42454c4c4a534554010000000010000040000000000000000200000005000000\
                  010000000100000002000000";
    assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), vector);
    assert_eq!(WorkingSet::load(&path, MEMORY_BYTES).expect("load it"), set);
    recorded(&[]).save(&path).expect("in place of the other");
    assert_eq!(WorkingSet::load(&path, MEMORY_BYTES).expect("load it").bytes(), 0);
    assert_eq!(std::fs::read_dir(folder.path()).expect("list it").count(), 1);
}

#[test]
fn damage_is_refused_by_name() {
    let good = recorded(&[5..6, 1..3]).encode();
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let longer = [&good[..], &[0]].concat();
    for (bytes, says) in [
        (Vec::new(), "it is no working set"),
        (changed(0, b'X'), "it is no working set"),
        (good[..20].to_vec(), "it ends in its header"),
        (changed(8, 2), "read working set format 2"),
        (changed(13, 0x20), "have not 4096 bytes"),
        (changed(16, 65), "for a memory of 262144 bytes: it is of one of 266240"),
        (changed(23, 255), "for a memory of 262144 bytes"),
        (changed(27, 1), "its length is not"),
        (longer, "its length is not"),
        (good[..good.len() - 1].to_vec(), "its length is not"),
        (changed(32, 0), "a run is empty"),
        (changed(28, 64), "goes beyond the memory"),
        (changed(36, 5), "a page is there twice"),
    ] {
        let error = load(&bytes).expect_err(says);
        let text = error.problem.to_string();
        assert!(text.contains(says), "{text}: expected {says}");
    }
    let missing = WorkingSet::load(Path::new("/nonexistent/set"), 4096).expect_err("no file");
    assert!(matches!(missing.problem, WorkingSetProblem::Io(_)));
}

proptest! {
    #[test]
    fn what_was_recorded_is_loaded(runs in prop::collection::vec((0_u64..60, 1_u64..5), 0..40)) {
        let pages: Vec<_> = runs.iter().map(|(first, count)| *first..first + count).collect();
        let set = recorded(&pages);
        prop_assert_eq!(load(&set.encode()).expect("its own form"), set);
    }

    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..80), head in any::<bool>()) {
        let mut file = if head { recorded(&[0..1, 3..4]).encode()[..24].to_vec() } else { Vec::new() };
        file.extend(bytes);
        if let Ok(set) = load(&file) {
            prop_assert!(set.bytes() <= MEMORY_BYTES);
        }
    }
}
