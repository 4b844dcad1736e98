//! One frame: a few blocks that are compressed and checked together.

use crate::device::BLOCK_BYTES;

use super::index::FrameEntry;
use super::layout::hash_of;

/// Most blocks of a frame: 256 KiB, above which reading one block costs too much.
pub const FRAME_BLOCKS_MAX: u32 = 64;

/// How the bytes of a frame are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are: compressing did not shrink them.
    Raw,
    /// One zstd frame (RFC 8878).
    Zstd,
}

impl Codec {
    pub(super) fn number(self) -> u8 {
        match self {
            Codec::Raw => 0,
            Codec::Zstd => 1,
        }
    }

    pub(super) fn of_number(number: u8) -> Option<Codec> {
        match number {
            0 => Some(Codec::Raw),
            1 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// Compresses frames, one after the other, with one set of buffers.
pub(super) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
}

impl Compressor {
    /// `level` is zstd's, 1 to 19.
    pub(super) fn new(level: i32) -> std::io::Result<Compressor> {
        Ok(Compressor { zstd: zstd::bulk::Compressor::new(level)? })
    }

    /// Appends the stored form of `raw` to `to`.
    pub(super) fn append(&mut self, raw: &[u8], to: &mut Vec<u8>) -> FrameEntry {
        let start = to.len();
        // One byte less than the raw form: what does not fit does not shrink.
        to.resize(start + raw.len().saturating_sub(1), 0);
        let codec = match self.zstd.compress_to_buffer(raw, &mut to[start..]) {
            Ok(length) => {
                to.truncate(start + length);
                Codec::Zstd
            }
            Err(_does_not_fit) => {
                to.truncate(start);
                to.extend_from_slice(raw);
                Codec::Raw
            }
        };
        let stored = &to[start..];
        let stored_bytes = u32::try_from(stored.len()).expect("a frame is at most 256 KiB");
        FrameEntry { stored_bytes, codec, hash: hash_of(stored) }
    }
}

/// Whether `stored` are the bytes `entry` was made of.
pub(crate) fn is_whole(entry: &FrameEntry, stored: &[u8]) -> bool {
    hash_of(stored) == entry.hash
}

/// The blocks of a frame whose stored bytes have been checked. At most `blocks` blocks are ever
/// made of it, whatever the bytes say.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn decode(entry: &FrameEntry, stored: &[u8], blocks: u32) -> Result<Vec<u8>, String> {
    let raw_bytes = crate::device::index(u64::from(blocks) * BLOCK_BYTES);
    match entry.codec {
        Codec::Raw if stored.len() == raw_bytes => Ok(stored.to_vec()),
        Codec::Raw => Err(format!("{} raw bytes, expected {raw_bytes}", stored.len())),
        Codec::Zstd => {
            let mut raw = vec![0; raw_bytes];
            match zstd::bulk::decompress_to_buffer(stored, &mut raw[..]) {
                Ok(length) if length == raw_bytes => Ok(raw),
                Ok(length) => Err(format!("{length} bytes after decompression, not {raw_bytes}")),
                Err(e) => Err(format!("it does not decompress: {e}")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry_of(raw: &[u8]) -> (FrameEntry, Vec<u8>) {
        let mut stored = Vec::new();
        let entry = Compressor::new(1).expect("a compressor").append(raw, &mut stored);
        (entry, stored)
    }

    #[test]
    fn what_does_not_shrink_is_stored_as_it_is() {
        let noise: Vec<u8> = blake3::Hasher::new().finalize_xof().bytes_of(8192);
        let (entry, stored) = entry_of(&noise);
        assert_eq!((entry.codec, stored.len()), (Codec::Raw, 8192));
        assert_eq!(decode(&entry, &stored, 2).expect("whole"), noise);
        let (entry, stored) = entry_of(&[7; 8192]);
        assert_eq!(entry.codec, Codec::Zstd);
        assert!(stored.len() < 100);
        assert_eq!(decode(&entry, &stored, 2).expect("whole"), [7; 8192]);
    }

    trait BytesOf {
        fn bytes_of(self, count: usize) -> Vec<u8>;
    }

    impl BytesOf for blake3::OutputReader {
        fn bytes_of(mut self, count: usize) -> Vec<u8> {
            let mut bytes = vec![0; count];
            self.fill(&mut bytes);
            bytes
        }
    }

    #[test]
    fn a_frame_of_another_size_is_refused_without_growing() {
        // 64 MiB of zeros in a few kilobytes: the classic bomb.
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).expect("compresses");
        let entry = FrameEntry {
            stored_bytes: u32::try_from(bomb.len()).expect("small"),
            codec: Codec::Zstd,
            hash: hash_of(&bomb),
        };
        assert!(decode(&entry, &bomb, 1).expect_err("too long").contains("decompress"));
        let (entry, stored) = entry_of(&[7; 4096]);
        assert!(decode(&entry, &stored, 2).expect_err("too short").contains("not 8192"));
        assert!(decode(&entry, &stored[1..], 1).is_err());
        let raw = FrameEntry { codec: Codec::Raw, ..entry };
        assert!(decode(&raw, &[0; 4095], 1).is_err());
    }
}
