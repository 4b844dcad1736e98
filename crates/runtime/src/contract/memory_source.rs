//! The suite for sources of a saved memory.

use crate::pages::PAGE_BYTES;
use crate::uffd::{MemoryRun, MemorySource};

/// Checks that `source` holds `expected`, and keeps what [`MemorySource`] promises.
///
/// # Panics
/// When it does not.
pub fn memory_source_suite(source: &dyn MemorySource, expected: &[u8]) {
    let size = source.size_bytes();
    assert_eq!(size, u64::try_from(expected.len()).expect("a slice"), "its size");
    assert!(size > 0 && size.is_multiple_of(PAGE_BYTES), "whole pages");
    // Every run, from its start and from each page inside it, within several limits.
    for limit in [PAGE_BYTES, 5 * PAGE_BYTES, size] {
        for offset in (0..size).step_by(4096) {
            let limit = limit.min(size - offset);
            let (bytes, zeros) = match source.run_at(offset, limit) {
                MemoryRun::Zeros(bytes) => (bytes, true),
                MemoryRun::Data(bytes) => (bytes, false),
            };
            assert!(bytes > 0 && bytes <= limit, "a run of {bytes} at {offset}, limit {limit}");
            assert!(bytes.is_multiple_of(PAGE_BYTES), "a run of {bytes} at {offset}");
            let content = part(expected, offset, bytes);
            assert!(!zeros || content.iter().all(|byte| *byte == 0), "zeros at {offset}");
        }
    }
    assert!(
        matches!(source.run_at(0, size), MemoryRun::Zeros(bytes) | MemoryRun::Data(bytes) if bytes > 0)
    );
    for (offset, bytes) in [(0, size), (0, PAGE_BYTES), (size - PAGE_BYTES, PAGE_BYTES)] {
        let mut found = vec![0xEE; usize::try_from(bytes).expect("small")];
        source.read_at(&mut found, offset).expect("read it");
        assert!(found == part(expected, offset, bytes), "{bytes} bytes at {offset}");
    }
    let mut beyond = vec![0; 2 * 4096];
    source.read_at(&mut beyond, size - PAGE_BYTES).expect_err("beyond its end");
}

fn part(expected: &[u8], offset: u64, bytes: u64) -> &[u8] {
    let index = |at: u64| usize::try_from(at).expect("inside a slice");
    &expected[index(offset)..index(offset + bytes)]
}
