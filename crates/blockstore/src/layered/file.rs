//! An image's map on disk, format 1. Written down in `docs/formats.md`; all numbers little-endian.
//!
//! A map may come from another machine, so each number is checked against a bound before it is
//! believed, and what cannot have been written by [`LayeredImage::save`] is refused.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::runs::{BLOCKS_MAX, RunMap, Source};
use super::{LAYERS_MAX, LayeredImage};
use crate::device::BLOCK_BYTES;
use crate::image::OpenError;
use crate::layers::{BadLayerName, LayerName, LayerStore};

const MAGIC: [u8; 8] = *b"BELLJMAP";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 36;
const RUN_BYTES: usize = 8;
const SUM_BYTES: usize = blake3::OUT_LEN;
/// Longest map: 32 million runs, a disk of 128 GiB of which every second block was written.
const FILE_MAX_BYTES: u64 = 256 << 20;

/// Why a map could not be saved. No file is left.
#[derive(Debug, thiserror::Error)]
#[error("save image map {}", path.display())]
pub struct SaveError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Why a map could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error("load image map {}", path.display())]
pub struct LoadError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub problem: MapProblem,
}

/// What is wrong with a map.
#[derive(Debug, thiserror::Error)]
pub enum MapProblem {
    /// The file could not be read.
    #[error("read the file")]
    Io(#[source] io::Error),
    /// It is longer than any map.
    #[error("take a map of {0} bytes, more than {FILE_MAX_BYTES}")]
    TooLong(u64),
    /// It ends too early, or goes on after its end.
    #[error("find {expected} bytes in it: it has {found}")]
    Length {
        /// How long its header says it is.
        expected: u64,
        /// How long it is.
        found: u64,
    },
    /// It does not begin as a map does.
    #[error("recognise it: it is no image map")]
    NotAMap,
    /// Another version of Belljar wrote it.
    #[error("read map format {0}: this version knows format {FORMAT}")]
    Format(u32),
    /// It was changed after it was written.
    #[error("verify it: its checksum does not match its content")]
    Checksum,
    /// Its parts contradict each other.
    #[error("make sense of it: {0}")]
    Malformed(&'static str),
    /// A layer's name may not be used.
    #[error(transparent)]
    Name(#[from] BadLayerName),
    /// A layer is missing or unreadable.
    #[error("use one of its layers")]
    Layer(#[source] OpenError),
    /// A layer was cut off.
    #[error("use layer {name} of {found} bytes: the image has {expected}")]
    LayerSize {
        /// The layer.
        name: LayerName,
        /// The image's size.
        expected: u64,
        /// The file's size.
        found: u64,
    },
}

impl LayeredImage {
    /// Writes the image's map to `path`, which must not exist, mode 0600, and syncs the file. The
    /// layers themselves are synced by [`LayeredImage::sync`], the folder by the caller.
    ///
    /// # Errors
    /// [`SaveError`]; `StorageFull` is kept as such in its source.
    pub fn save(&self, path: &Path) -> Result<(), SaveError> {
        let failed = |source| SaveError { path: path.to_owned(), source };
        let bytes = encode(&self.map, &self.names);
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > FILE_MAX_BYTES {
            let text = format!("its {} runs need more than {FILE_MAX_BYTES} bytes", self.map.len());
            return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, text)));
        }
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(|e| {
            // The error that matters is `e`.
            let _removed = std::fs::remove_file(path);
            failed(e)
        })
    }

    /// Loads the map at `path` and opens its layers in `store`.
    ///
    /// # Errors
    /// [`LoadError`]: which file, and what is wrong with it.
    pub fn load(path: &Path, store: &LayerStore) -> Result<LayeredImage, LoadError> {
        load(path, store).map_err(|problem| LoadError { path: path.to_owned(), problem })
    }

    /// The layers that the map at `path` names, whether they are there or not.
    ///
    /// # Errors
    /// [`LoadError`]: the map cannot be read.
    pub fn names_in(path: &Path) -> Result<Vec<LayerName>, LoadError> {
        let names = read(path).and_then(|bytes| Ok(decode(&bytes)?.1));
        names.map_err(|problem| LoadError { path: path.to_owned(), problem })
    }
}

fn load(path: &Path, store: &LayerStore) -> Result<LayeredImage, MapProblem> {
    let bytes = read(path)?;
    let (map, names) = decode(&bytes)?;
    let size_bytes = map.blocks() * BLOCK_BYTES;
    let mut layers = Vec::with_capacity(names.len());
    for name in names {
        let layer = store.layer(&name).map_err(MapProblem::Layer)?;
        if layer.size_bytes() < size_bytes {
            let found = layer.size_bytes();
            return Err(MapProblem::LayerSize { name, expected: size_bytes, found });
        }
        layers.push(layer);
    }
    Ok(LayeredImage::of(map, layers))
}

fn read(path: &Path) -> Result<Vec<u8>, MapProblem> {
    let file = File::open(path).map_err(MapProblem::Io)?;
    let len = file.metadata().map_err(MapProblem::Io)?.len();
    if len > FILE_MAX_BYTES {
        return Err(MapProblem::TooLong(len));
    }
    let mut bytes = Vec::new();
    // The bound holds for a file that grows, too.
    file.take(FILE_MAX_BYTES).read_to_end(&mut bytes).map_err(MapProblem::Io)?;
    Ok(bytes)
}

fn encode(map: &RunMap, names: &[LayerName]) -> Vec<u8> {
    const FEW: &str = "an image has at most LAYERS_MAX layers, with short names";
    let mut bytes = Vec::with_capacity(HEADER_BYTES + map.len() * RUN_BYTES + SUM_BYTES);
    let names_bytes: usize = names.iter().map(|name| 2 + name.as_str().len()).sum();
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(u32::try_from(BLOCK_BYTES).expect("4096").to_le_bytes());
    bytes.extend(map.blocks().to_le_bytes());
    bytes.extend(u32::try_from(names.len()).expect(FEW).to_le_bytes());
    bytes.extend(u32::try_from(names_bytes).expect(FEW).to_le_bytes());
    bytes.extend(u32::try_from(map.len()).expect("no more runs than blocks").to_le_bytes());
    for name in names {
        bytes.extend(u16::try_from(name.as_str().len()).expect(FEW).to_le_bytes());
        bytes.extend(name.as_str().bytes());
    }
    for (blocks, source) in map.all() {
        let count = u32::try_from(blocks.end - blocks.start).expect("at most BLOCKS_MAX");
        let source = match source {
            Source::Zero => 0,
            Source::Layer(layer) => u32::from(layer) + 1,
        };
        bytes.extend(count.to_le_bytes());
        bytes.extend(source.to_le_bytes());
    }
    let sum = blake3::hash(&bytes);
    bytes.extend(sum.as_bytes());
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The header's numbers, each within its bounds.
struct Header {
    blocks: u64,
    layers: usize,
    names_bytes: usize,
    runs: usize,
}

/// Checks what the header says before anything is made from it.
fn header(bytes: &[u8]) -> Result<Header, MapProblem> {
    let found = u64::try_from(bytes.len()).expect("a slice is shorter than 2^63 bytes");
    if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
        return Err(MapProblem::NotAMap);
    }
    let shortest = HEADER_BYTES + SUM_BYTES;
    if bytes.len() < shortest {
        let expected = u64::try_from(shortest).expect("a small number");
        return Err(MapProblem::Length { expected, found });
    }
    if u32_at(bytes, 8) != FORMAT {
        return Err(MapProblem::Format(u32_at(bytes, 8)));
    }
    let [layers, names_bytes, runs] = [24, 28, 32].map(|at| u32_at(bytes, at));
    let expected = u64::try_from(shortest).expect("a small number")
        + u64::from(names_bytes)
        + u64::from(runs) * u64::try_from(RUN_BYTES).expect("eight");
    if found != expected {
        return Err(MapProblem::Length { expected, found });
    }
    let (content, sum) = bytes.split_at(bytes.len() - SUM_BYTES);
    if blake3::hash(content).as_bytes()[..] != *sum {
        return Err(MapProblem::Checksum);
    }
    if u64::from(u32_at(bytes, 12)) != BLOCK_BYTES {
        return Err(MapProblem::Malformed("its blocks are not of 4096 bytes"));
    }
    let blocks = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
    if blocks == 0 || blocks > BLOCKS_MAX {
        return Err(MapProblem::Malformed("an image has 1 to 2^32 - 1 blocks"));
    }
    // Both fit: the file is in memory.
    let [layers, names_bytes, runs] =
        [layers, names_bytes, runs].map(|n| usize::try_from(n).expect("32 bits"));
    if layers > LAYERS_MAX {
        return Err(MapProblem::Malformed("it has more than 256 layers"));
    }
    Ok(Header { blocks, layers, names_bytes, runs })
}

fn decode(bytes: &[u8]) -> Result<(RunMap, Vec<LayerName>), MapProblem> {
    let header = header(bytes)?;
    let content = &bytes[HEADER_BYTES..bytes.len() - SUM_BYTES];
    let (names, runs) = content.split_at(header.names_bytes);
    let names = decode_names(names, header.layers)?;
    let mut map = RunMap::new();
    let mut last = None;
    for run in runs.chunks_exact(RUN_BYTES) {
        let (count, number) = (u32_at(run, 0), u32_at(run, 4));
        let source = match number.checked_sub(1) {
            None => Source::Zero,
            Some(layer) => match u16::try_from(layer) {
                Ok(layer) if usize::from(layer) < names.len() => Source::Layer(layer),
                _ => return Err(MapProblem::Malformed("a run names a layer that is not there")),
            },
        };
        if count == 0 || last == Some(source) {
            return Err(MapProblem::Malformed("a run is empty or goes on after its end"));
        }
        if map.blocks() + u64::from(count) > header.blocks {
            return Err(MapProblem::Malformed("its runs have more blocks than the image"));
        }
        map.push(u64::from(count), source);
        last = Some(source);
    }
    if map.blocks() != header.blocks || map.len() != header.runs {
        return Err(MapProblem::Malformed("its runs have fewer blocks than the image"));
    }
    Ok((map, names))
}

fn decode_names(mut bytes: &[u8], count: usize) -> Result<Vec<LayerName>, MapProblem> {
    const CUT: MapProblem = MapProblem::Malformed("its layer names do not fill their place");
    let mut names: Vec<LayerName> = Vec::with_capacity(count);
    for _ in 0..count {
        let (len, rest) = bytes.split_at_checked(2).ok_or(CUT)?;
        let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
        let (name, rest) = rest.split_at_checked(len).ok_or(CUT)?;
        let name = std::str::from_utf8(name)
            .map_err(|_| MapProblem::Malformed("a layer's name is no text"))?;
        let name = LayerName::new(name)?;
        if !name.is_for_maps() {
            return Err(MapProblem::Malformed(
                "it names a file that is no layer and no template's",
            ));
        }
        if names.contains(&name) {
            return Err(MapProblem::Malformed("it names a layer twice"));
        }
        names.push(name);
        bytes = rest;
    }
    if bytes.is_empty() { Ok(names) } else { Err(CUT) }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
