//! What a stored snapshot is made of: version 1, written down in `docs/formats.md`.
//!
//! One image of the blob store holds a header, which names the images of disk and memory, and after it
//! the files of the snapshot's folder. The store checks every byte of it against the image's name.

use belljar_blockstore::{BLOCK_BYTES, ImageId};

const MAGIC: [u8; 8] = *b"bljsnap\n";
const VERSION: u32 = 1;
/// Files there may be, in the order in which they may be there.
pub(super) const FILES: [&str; 3] = ["snapshot.json", "state", "machine.json"];
const NAME_BYTES: usize = 32;
const FILE_BYTES: usize = NAME_BYTES + 8;
const TABLE_AT: usize = 80;
/// Longest file, in bytes: device state is some megabytes.
pub(super) const FILE_BYTES_MAX: u64 = 1 << 30;

/// The header of a stored snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) disk: ImageId,
    /// `None`: only the disk was kept.
    pub(super) memory: Option<ImageId>,
    /// Which file, by its place in [`FILES`], and how long it is, in bytes.
    pub(super) files: Vec<(usize, u64)>,
}

impl Header {
    /// Where each file begins, in the order of the header, and where the last one ends: in blocks.
    pub(super) fn places(&self) -> (Vec<u64>, u64) {
        let mut at = 1;
        let mut places = Vec::with_capacity(self.files.len());
        for (_, bytes) in &self.files {
            places.push(at);
            at += bytes.div_ceil(BLOCK_BYTES);
        }
        (places, at)
    }

    /// The first block of the image.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(crate::archive::BLOCK);
        block.extend_from_slice(&MAGIC);
        block.extend_from_slice(&VERSION.to_le_bytes());
        let count = u32::try_from(self.files.len()).expect("there are at most three");
        block.extend_from_slice(&count.to_le_bytes());
        block.extend_from_slice(&self.disk.0);
        block.extend_from_slice(&self.memory.map_or([0; 32], |memory| memory.0));
        for (file, bytes) in &self.files {
            let mut name = [0; NAME_BYTES];
            name[..FILES[*file].len()].copy_from_slice(FILES[*file].as_bytes());
            block.extend_from_slice(&name);
            block.extend_from_slice(&bytes.to_le_bytes());
        }
        block.resize(crate::archive::BLOCK, 0);
        block
    }

    /// Reads the first block of an image of `blocks` blocks.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub(super) fn decode(block: &[u8], blocks: u64) -> Result<Header, String> {
        if block.len() != crate::archive::BLOCK || block[..8] != MAGIC {
            return Err("it does not begin as a stored snapshot does".to_owned());
        }
        match u32_at(block, 8) {
            VERSION => {}
            other => return Err(format!("its version is {other}, known is {VERSION}")),
        }
        let count = usize::try_from(u32_at(block, 12)).unwrap_or(usize::MAX);
        if count > FILES.len() {
            return Err(format!("it has {count} files, at most {} may be", FILES.len()));
        }
        let mut files = Vec::with_capacity(count);
        for entry in block[TABLE_AT..].chunks_exact(FILE_BYTES).take(count) {
            files.push(file_of(entry, files.last().map(|(before, _)| *before))?);
        }
        if block[TABLE_AT + count * FILE_BYTES..].iter().any(|byte| *byte != 0) {
            return Err("its header has bytes set that mean nothing".to_owned());
        }
        let memory = Some(ImageId(hash_at(block, 48))).filter(|memory| memory.0 != [0; 32]);
        let header = Header { disk: ImageId(hash_at(block, 16)), memory, files };
        let expected = header.places().1;
        if expected != blocks {
            return Err(format!("it has {blocks} blocks, and should have {expected}"));
        }
        let wanted = if header.memory.is_some() { FILES.len() } else { 1 };
        if header.files.len() < wanted {
            return Err(format!("it has {count} files, and should have {wanted}"));
        }
        Ok(header)
    }
}

/// One entry of the table. Files come in one order, each once.
fn file_of(entry: &[u8], before: Option<usize>) -> Result<(usize, u64), String> {
    let (name, bytes) = entry.split_at(NAME_BYTES);
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    let file = FILES.iter().position(|file| {
        file.as_bytes() == &name[..length] && name[length..].iter().all(|byte| *byte == 0)
    });
    let file = file.filter(|file| before.map_or(*file == 0, |before| *file > before));
    let Some(file) = file else {
        let shown = String::from_utf8_lossy(&name[..length]).into_owned();
        return Err(format!("a file {shown:?} has no place in it"));
    };
    let bytes = u64::from_le_bytes(*bytes.first_chunk().expect("an entry is 40 bytes"));
    if bytes > FILE_BYTES_MAX {
        return Err(format!("{} has {bytes} bytes, at most {FILE_BYTES_MAX} may be", FILES[file]));
    }
    Ok((file, bytes))
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*block[at..].first_chunk().expect("a block is longer than its header"))
}

fn hash_at(block: &[u8], at: usize) -> [u8; 32] {
    *block[at..].first_chunk().expect("a block is longer than its header")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let memory = Some(ImageId([2; 32]));
        Header { disk: ImageId([1; 32]), memory, files: vec![(0, 700), (1, 0), (2, 8193)] }
    }

    #[test]
    fn a_header_reads_as_it_was_written() {
        let one = header();
        assert_eq!(one.places(), (vec![1, 2, 2], 5));
        assert_eq!(Header::decode(&one.encode(), 5), Ok(one));
        let disk_only = Header { memory: None, files: vec![(0, 4096)], ..header() };
        assert_eq!(Header::decode(&disk_only.encode(), 2), Ok(disk_only));
    }

    /// The bytes of version 1, which never change: magic, version, three files, two images, the table.
    #[test]
    fn version_1_is_these_bytes() {
        let hash = |of: u8| [of; 32].to_vec();
        let file = |name: &str, bytes: u64| {
            let mut entry = name.as_bytes().to_vec();
            entry.resize(32, 0);
            entry.extend(bytes.to_le_bytes());
            entry
        };
        let mut bytes = b"bljsnap\n\x01\0\0\0\x03\0\0\0".to_vec();
        bytes.extend([hash(1), hash(2)].concat());
        bytes.extend(file("snapshot.json", 700));
        bytes.extend([file("state", 0), file("machine.json", 8193)].concat());
        bytes.resize(4096, 0);
        assert_eq!(header().encode(), bytes);
    }

    #[test]
    fn what_is_none_is_refused_with_a_reason() {
        let good = header().encode();
        for (at, byte, says) in [
            (0, b'x', "does not begin"),
            (8, 2, "its version is 2"),
            (12, 4, "it has 4 files"),
            (12, 2, "bytes set that mean nothing"),
            (80, b'x', "has no place in it"),
            (80 + 31, b'x', "has no place in it"),
            (80 + 38, 1, "at most"),
            (80 + 33, 0xff, "should have"),
            (4095, 1, "bytes set that mean nothing"),
        ] {
            let mut bad = good.clone();
            bad[at] = byte;
            let what = Header::decode(&bad, 5).expect_err(says);
            assert!(what.contains(says), "expected {says:?}, got {what:?}");
        }
        assert!(Header::decode(&good, 6).is_err() && Header::decode(&good[..4095], 5).is_err());
        let twice = Header { files: vec![(0, 1), (0, 1)], ..header() };
        assert!(Header::decode(&twice.encode(), 3).is_err());
        let late = Header { files: vec![(1, 1), (2, 1)], memory: None, ..header() };
        assert!(Header::decode(&late.encode(), 3).is_err(), "without its record");
        let half = Header { files: vec![(0, 1)], ..header() };
        assert!(Header::decode(&half.encode(), 2).is_err(), "a memory without its state");
    }
}
