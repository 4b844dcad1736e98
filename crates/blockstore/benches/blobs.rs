//! Writing and reading images against a plain copy of the same file, in one run:
//! `cargo xtask bench blobs`.
//!
//! The image is 256 MiB: a quarter holes, a quarter noise, half text-like. Copies, writes and reads
//! take turns; figures are medians of five rounds, the page cache is warm, and what is written is
//! synced, by the copy as by the store.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use belljar_blockstore::objects::PackOptions;
use belljar_blockstore::verify::store_stats;
use belljar_blockstore::{
    BlobStore, BlockIndex, CacheLimits, ChunkCache, DirStore, ImageManifest, ImageReader,
    ImageWriter, RefName,
};

const IMAGE_BYTES: u64 = 256 << 20;
const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const ROUNDS: usize = 5;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn noise(number: u64, buf: &mut [u8]) {
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(buf);
}

/// A MiB in four is a hole, one is noise, and two are words of a small vocabulary.
fn make_image(file: &File) -> Outcome<()> {
    file.set_len(IMAGE_BYTES)?;
    let mut buf = vec![0; usize::try_from(MIB)?];
    let mut words = vec![0; 4096];
    noise(u64::MAX, &mut words);
    for number in 0..IMAGE_BYTES / MIB {
        match number % 4 {
            0 => continue,
            1 => noise(number, &mut buf),
            _ => {
                noise(number, &mut buf);
                for word in buf.chunks_exact_mut(8) {
                    // Which word, by noise; words repeat, their order does not.
                    let at = usize::from(word[0]) * 8;
                    word.copy_from_slice(&words[at..at + 8]);
                }
            }
        }
        file.write_all_at(&buf, number * MIB)?;
    }
    Ok(())
}

fn timed<T>(times: &mut Vec<f64>, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let begun = Instant::now();
    let done = work()?;
    times.push(begun.elapsed().as_secs_f64());
    Ok(done)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn write_image(store: &Arc<dyn BlobStore>, source: &File) -> Outcome<ImageManifest> {
    let cache = ChunkCache::in_memory(Arc::clone(store), 64 << 20);
    let index = Arc::new(BlockIndex::new(Arc::new(cache)));
    let mut writer = ImageWriter::new(index, None, IMAGE_BYTES, PackOptions::default())?;
    writer.file(source)?;
    Ok(writer.finish(&RefName::new("base")?)?.manifest)
}

/// Every byte that is no hole, through reads of 1 MiB and synced.
fn copy_plain(source: &File, to: &Path) -> Outcome<()> {
    let copy = File::create(to)?;
    copy.set_len(IMAGE_BYTES)?;
    let mut buf = vec![0; usize::try_from(MIB)?];
    for number in (0..IMAGE_BYTES / MIB).filter(|number| number % 4 != 0) {
        source.read_exact_at(&mut buf, number * MIB)?;
        copy.write_all_at(&buf, number * MIB)?;
    }
    Ok(copy.sync_all()?)
}

/// Two children of one base, each with a MiB of its own and a MiB both have.
fn sharing(store: &Arc<dyn BlobStore>, base: &ImageManifest) -> Outcome<(f64, u64)> {
    let cache = Arc::new(ChunkCache::in_memory(Arc::clone(store), 64 << 20));
    let index = Arc::new(BlockIndex::new(cache));
    let mut new_blocks = 0;
    for child in 1..3 {
        let base = Some(Arc::new(base.clone()));
        let mut writer =
            ImageWriter::new(Arc::clone(&index), base, IMAGE_BYTES, PackOptions::default())?;
        let mut block = [0; BLOCK];
        for number in (0..512).map(|change| change * 100) {
            noise(
                if number < 25_600 { number + child * MIB } else { number + (1 << 40) },
                &mut block,
            );
            writer.block(number, &block)?;
        }
        let written = writer.finish(&RefName::new(&format!("child-{child}"))?)?;
        new_blocks += written.stats.new_blocks;
    }
    Ok((store_stats(&**store)?.dedup_ratio(), new_blocks))
}

fn main() -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let source = tempfile::tempfile_in(folder.path())?;
    make_image(&source)?;
    let data_mb = (IMAGE_BYTES / 4 * 3) as f64 / 1e6;
    let copy = folder.path().join("copy");
    let (mut plain, mut writes, mut cold, mut warm) = (vec![], vec![], vec![], vec![]);
    for round in 0..ROUNDS {
        timed(&mut plain, || copy_plain(&source, &copy))?;
        let root = folder.path().join(format!("store-{round}"));
        let store: Arc<dyn BlobStore> = Arc::new(DirStore::open(&root)?);
        let image = timed(&mut writes, || write_image(&store, &source))?;
        let chunks = folder.path().join(format!("cache-{round}"));
        let cache = ChunkCache::open(Arc::clone(&store), &chunks, CacheLimits::default())?;
        let reader = ImageReader::open(Arc::new(cache), image.id())?;
        for times in [&mut cold, &mut warm] {
            let to = File::create(&copy)?;
            timed(times, || {
                reader.materialise(&to)?;
                Ok(to.sync_all()?)
            })?;
        }
        if round + 1 == ROUNDS {
            let stats = store_stats(&*store)?;
            println!(
                "stored: {:.1} MiB for {:.1} MiB that are no holes, compressed {:.2} to 1",
                stats.stored_bytes as f64 / MIB as f64,
                stats.mapped_bytes as f64 / MIB as f64,
                stats.compression_ratio()
            );
            let (ratio, new_blocks) = sharing(&store, &image)?;
            println!(
                "base and two children, 512 changed blocks each: {new_blocks} new blocks, \
                dedup ratio {ratio:.2}"
            );
        }
        std::fs::remove_dir_all(&root)?;
        std::fs::remove_dir_all(&chunks)?;
    }
    let plain = median(&mut plain);
    println!("plain copy: {:.0} MB/s", data_mb / plain);
    for (what, mut times) in [
        ("write an image", writes),
        ("read it all, nothing cached", cold),
        ("read it all, from the disk cache", warm),
    ] {
        let time = median(&mut times);
        println!("{what}: {:.0} MB/s, {:.2} of a plain copy's speed", data_mb / time, plain / time);
    }
    Ok(())
}
