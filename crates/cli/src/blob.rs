//! `belljar blob verify|gc|stats`: looking after the store of images.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use belljar_blockstore::blobs::{S3Credentials, S3Options, S3Patience};
use belljar_blockstore::gc::{self, GcReport};
use belljar_blockstore::verify::{self, StoreStats, VerifyReport};
use belljar_blockstore::{BlobStore, CacheLimits, ChunkCache, DirStore, S3Store};
use belljar_domain::Secret;
use belljar_sandbox::{Archive, Pace};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::args::{Blob, BlobCommand, BlobPlace};
use crate::output;
use crate::preset::Local;

/// `verify` found damage.
const DAMAGED: u8 = 3;
/// What a host keeps of the store on its own disk: indexes of objects, and pieces of what it fetched.
const CACHE_BYTES: u64 = 4 << 30;

/// Who asks a bucket, and where it is: the variables every S3 program reads.
pub(crate) struct AwsEnv {
    pub(crate) key_id: Option<String>,
    pub(crate) secret: Option<Secret<String>>,
    pub(crate) session_token: Option<Secret<String>>,
    pub(crate) region: Option<String>,
    pub(crate) endpoint: Option<String>,
}

pub(crate) async fn run(
    local: &Local,
    options: Blob,
    aws: AwsEnv,
    as_json: bool,
) -> Result<ExitCode> {
    let place = options.blobs.unwrap_or_else(|| BlobPlace::Dir(local.blobs_dir()));
    // Stores block, and must not be used on a thread that drives tasks.
    let work = move || {
        if let BlobPlace::Dir(folder) = &place
            && !folder.is_dir()
        {
            // Made by whoever writes first; a wrong name must not look like an empty store.
            bail!("there is no blob store in {}: name one with --blobs", folder.display());
        }
        let store = open(place, aws)?;
        match options.command {
            BlobCommand::Verify => verify_store(&*store, as_json),
            BlobCommand::Gc { grace_minutes } => collect(&*store, grace_minutes, as_json),
            BlobCommand::Stats => stats(&*store, as_json),
        }
    };
    tokio::task::spawn_blocking(work).await.context("failed to look after the blob store")?
}

/// What a host keeps its snapshots in, besides its disk: the store at `place`, read through a cache in the data
/// folder.
pub(crate) fn archive(local: &Local, place: BlobPlace, aws: AwsEnv) -> Result<Arc<Archive>> {
    let place = match place {
        // Its name is in marks on disk, and must not depend on where the server was started.
        BlobPlace::Dir(folder) => BlobPlace::Dir(
            std::path::absolute(folder).context("failed to resolve the path given with --blobs")?,
        ),
        bucket => bucket,
    };
    let store = open(place, aws)?;
    let limits = CacheLimits { disk_bytes: CACHE_BYTES, ..CacheLimits::default() };
    let cache = ChunkCache::open(store, &local.chunk_cache_dir(), limits)
        .context("failed to open the cache of the blob store")?;
    Ok(Arc::new(Archive::new(Arc::new(cache), Pace::default())))
}

/// Opens the store at `place`; a folder is made if it is not there.
fn open(place: BlobPlace, aws: AwsEnv) -> Result<Arc<dyn BlobStore>> {
    let (bucket, prefix) = match place {
        BlobPlace::Dir(folder) => {
            let store = DirStore::open(&folder).context("failed to open the blob store")?;
            return Ok(Arc::new(store));
        }
        BlobPlace::S3 { bucket, prefix } => (bucket, prefix),
    };
    let credentials = match (aws.key_id, aws.secret) {
        (Some(key_id), Some(secret)) => {
            Some(S3Credentials { key_id, secret, session_token: aws.session_token })
        }
        (None, None) => None,
        (Some(_), None) => bail!("AWS_ACCESS_KEY_ID is set, and AWS_SECRET_ACCESS_KEY is not"),
        (None, Some(_)) => bail!("AWS_SECRET_ACCESS_KEY is set, and AWS_ACCESS_KEY_ID is not"),
    };
    let options = S3Options {
        bucket,
        prefix,
        region: aws.region,
        endpoint: aws.endpoint,
        credentials,
        patience: S3Patience::default(),
    };
    Ok(Arc::new(S3Store::open(&options).context("failed to open the blob store")?))
}

fn verify_store(store: &dyn BlobStore, as_json: bool) -> Result<ExitCode> {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos} of {len} objects") {
        bar.set_style(style);
    }
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let report = verify::verify(store, progress).context("failed to verify the blob store")?;
    bar.finish_and_clear();
    let VerifyReport { refs, images, objects, object_bytes, blocks, damage } = &report;
    if as_json {
        let damage: Vec<_> = damage
            .iter()
            .map(|each| {
                let refs: Vec<_> = each.refs.iter().map(ToString::to_string).collect();
                json!({ "thing": each.thing, "what": each.what, "refs": refs })
            })
            .collect();
        output::json(&json!({
            "store": store.name(), "refs": refs, "images": images, "objects": objects,
            "objectBytes": object_bytes, "blocks": blocks, "damage": damage,
        }))?;
    } else {
        let mib = mib(*object_bytes);
        output::line(&format!(
            "{}: {refs} refs, {images} images, {objects} objects with {blocks} blocks in {mib}",
            store.name()
        ))?;
        for each in damage {
            let refs: Vec<_> = each.refs.iter().map(ToString::to_string).collect();
            let needed = match refs.as_slice() {
                [] => "no ref needs it".to_owned(),
                refs => format!("needed by {}", refs.join(", ")),
            };
            output::line(&format!("damaged: {}: {}; {needed}", each.thing, each.what))?;
        }
        if damage.is_empty() {
            output::line("everything is there and whole")?;
        }
    }
    Ok(if damage.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

fn collect(store: &dyn BlobStore, grace_minutes: u32, as_json: bool) -> Result<ExitCode> {
    let grace = Duration::from_secs(u64::from(grace_minutes) * 60);
    let report = gc::store_now(store)
        .map_err(gc::GcError::from)
        .and_then(|now| gc::collect(store, grace, now))
        .context("failed to collect")?;
    let GcReport { refs, images_reachable, objects_reachable, images_deleted, .. } = report;
    let GcReport { objects_deleted, bytes_deleted, condemned, waiting, .. } = report;
    let GcReport { spared, young, unfinished, .. } = report;
    if as_json {
        output::json(&json!({
            "store": store.name(), "refs": refs, "imagesReachable": images_reachable,
            "objectsReachable": objects_reachable, "imagesDeleted": images_deleted,
            "objectsDeleted": objects_deleted, "bytesDeleted": bytes_deleted,
            "condemned": condemned, "waiting": waiting, "spared": spared, "young": young,
            "unfinished": unfinished,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!(
        "{}: {refs} refs reach {images_reachable} images and {objects_reachable} objects",
        store.name()
    ))?;
    output::line(&format!(
        "deleted {images_deleted} images and {objects_deleted} objects, {}",
        mib(bytes_deleted)
    ))?;
    output::line(&format!(
        "marked {condemned} for a collection in {grace_minutes} minutes or later; {waiting} wait for \
         theirs, {young} are too young to be marked, {spared} are in use again"
    ))?;
    if unfinished {
        output::line("time ran out: run it again for the rest")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn stats(store: &dyn BlobStore, as_json: bool) -> Result<ExitCode> {
    let stats = verify::store_stats(store).context("failed to count the blob store")?;
    if as_json {
        let StoreStats { refs, images, image_bytes, mapped_bytes, objects, .. } = stats;
        let StoreStats { unique_bytes, stored_bytes, manifest_bytes, .. } = stats;
        let StoreStats { unreachable_objects, unreachable_bytes, condemned, .. } = stats;
        output::json(&json!({
            "store": store.name(), "refs": refs, "images": images, "imageBytes": image_bytes,
            "mappedBytes": mapped_bytes, "objects": objects, "uniqueBytes": unique_bytes,
            "storedBytes": stored_bytes, "manifestBytes": manifest_bytes,
            "unreachableObjects": unreachable_objects, "unreachableBytes": unreachable_bytes,
            "condemned": condemned, "dedupRatio": stats.dedup_ratio(),
            "compressionRatio": stats.compression_ratio(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let row =
        |what: &str, count: u64, bytes: u64| vec![what.to_owned(), count.to_string(), mib(bytes)];
    let rows = vec![
        row("images, as machines see them", stats.images, stats.image_bytes),
        row("of that not zeros", stats.images, stats.mapped_bytes),
        row("objects, content", stats.objects, stats.unique_bytes),
        row("objects, as stored", stats.objects, stats.stored_bytes),
        row("manifests", stats.images, stats.manifest_bytes),
        row("objects no ref reaches", stats.unreachable_objects, stats.unreachable_bytes),
    ];
    output::table(&["WHAT", "COUNT", "SIZE"], rows, "")?;
    output::line(&format!(
        "{} refs; content is named {:.2} times for each time it is stored, and compressed {:.2} to 1; {} \
         marks for the next collection",
        stats.refs,
        stats.dedup_ratio(),
        stats.compression_ratio(),
        stats.condemned
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Bytes for people.
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
