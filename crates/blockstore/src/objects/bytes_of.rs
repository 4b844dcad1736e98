//! Little-endian fields of fixed offsets.

/// The number at `at` of `bytes`.
///
/// # Panics
/// When it does not lie inside: callers have checked the length of what they parse.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes[at..].first_chunk().expect("the caller has checked the length");
    u32::from_le_bytes(*field)
}

/// As [`u32_at`].
///
/// # Panics
/// As [`u32_at`].
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes[at..].first_chunk().expect("the caller has checked the length");
    u64::from_le_bytes(*field)
}

/// The hash at `at` of `bytes`.
///
/// # Panics
/// As [`u32_at`].
pub(super) fn hash_at(bytes: &[u8], at: usize) -> [u8; 32] {
    *bytes[at..].first_chunk().expect("the caller has checked the length")
}

/// A count or an offset of a format whose limits fit a machine word.
pub(super) fn usize_of(value: u32) -> usize {
    usize::try_from(value).expect("this program runs on 64-bit machines")
}
