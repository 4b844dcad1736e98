//! Looking a whole store over: is everything there and what it should be, and what does it hold.

use std::collections::{BTreeMap, BTreeSet};

use crate::blobs::{BlobError, BlobStore};
use crate::device::{BLOCK_BYTES, index};
use crate::objects::{
    Corrupt, ImageId, ImageManifest, OBJECT_MAGIC, ObjectId, ObjectIndex, ObjectUse, ReadError,
    RefError, RefName, condemned_folder, find_object, frame_decode, hash_of, image_of_key,
    is_frame_whole, manifests_folder, object_of_key, objects_folder, read_manifest, refs_folder,
    resolve,
};

/// Something that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which ref, image or object.
    pub thing: String,
    /// What is wrong with it.
    pub what: String,
    /// Refs that need it.
    pub refs: Vec<RefName>,
}

/// What a look over a store found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Refs.
    pub refs: u64,
    /// Images that refs name.
    pub images: u64,
    /// Objects looked at: all there are.
    pub objects: u64,
    /// Bytes of them, all read and hashed.
    pub object_bytes: u64,
    /// Blocks of them, all decompressed and hashed.
    pub blocks: u64,
    /// What is wrong, by thing.
    pub damage: Vec<Damage>,
}

/// What a store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Refs.
    pub refs: u64,
    /// Images that refs name.
    pub images: u64,
    /// Their sizes together, in bytes.
    pub image_bytes: u64,
    /// Their bytes that are not zeros by their maps.
    pub mapped_bytes: u64,
    /// Objects they use.
    pub objects: u64,
    /// Content of those objects, in bytes before compression.
    pub unique_bytes: u64,
    /// Those objects as they are stored, in bytes.
    pub stored_bytes: u64,
    /// Manifests of the images, in bytes.
    pub manifest_bytes: u64,
    /// Objects that no ref reaches.
    pub unreachable_objects: u64,
    /// Bytes of them.
    pub unreachable_bytes: u64,
    /// Marks for the next collection.
    pub condemned: u64,
}

impl StoreStats {
    /// How many times content of the images is named for each time it is stored. 0 in an empty store.
    pub fn dedup_ratio(&self) -> f64 {
        ratio(self.mapped_bytes, self.unique_bytes)
    }

    /// Content for each stored byte. 0 in an empty store.
    pub fn compression_ratio(&self) -> f64 {
        ratio(self.unique_bytes, self.stored_bytes)
    }
}

fn ratio(of: u64, to: u64) -> f64 {
    if to == 0 { 0.0 } else { of as f64 / to as f64 }
}

/// Images that refs name, each with its refs.
type Images = BTreeMap<ImageId, Vec<RefName>>;

/// Reads everything there is in a store, and checks all that can be checked. `progress` is told of
/// each object: how many were looked at, and how many there are.
///
/// Blobs that a collection deletes meanwhile may be reported as missing; they are named by no ref.
///
/// # Errors
/// When the store cannot be asked. What is damaged or missing is no error but in the report.
pub fn verify(
    store: &dyn BlobStore,
    mut progress: impl FnMut(u64, u64),
) -> Result<VerifyReport, BlobError> {
    let mut report = VerifyReport::default();
    let images = named_images(store, &mut report)?;
    let mut needed: BTreeMap<ObjectId, (ObjectUse, BTreeSet<RefName>)> = BTreeMap::new();
    for (image, names) in &images {
        report.images += 1;
        let Some(manifest) = checked(read_manifest(store, *image), names, &mut report)? else {
            continue;
        };
        for object in manifest.objects() {
            let (_, users) = needed.entry(object.id).or_insert((*object, BTreeSet::new()));
            users.extend(names.iter().cloned());
        }
    }
    let mut objects: BTreeMap<ObjectId, Option<u64>> =
        needed.keys().map(|id| (*id, None)).collect();
    for (key, stat) in store.list(&objects_folder())? {
        if let Some(id) = object_of_key(&key) {
            objects.insert(id, Some(stat.bytes));
        }
    }
    let total = objects.len() as u64;
    for (id, listed_bytes) in objects {
        report.objects += 1;
        progress(report.objects, total);
        let (needed_as, names) = match needed.get(&id) {
            Some((object, names)) => (Some(object), names.iter().cloned().collect()),
            None => (None, Vec::new()),
        };
        let looked_at = verify_object(store, id, listed_bytes, needed_as);
        if let Some(found) = checked(looked_at, &names, &mut report)? {
            report.object_bytes += found.bytes;
            report.blocks += u64::from(found.blocks);
        }
    }
    Ok(report)
}

/// What was read, or a line of the report.
fn checked<T>(
    read: Result<T, ReadError>,
    names: &[RefName],
    report: &mut VerifyReport,
) -> Result<Option<T>, BlobError> {
    let (thing, what) = match read {
        Ok(value) => return Ok(Some(value)),
        Err(ReadError::Corrupt(Corrupt { thing, what })) => (thing, what),
        Err(ReadError::Missing { thing, .. }) => (thing, "it is not there".to_owned()),
        Err(ReadError::Store { source, .. }) => return Err(source),
        Err(e @ (ReadError::OutOfRange { .. } | ReadError::File { .. })) => {
            unreachable!("no range and no file was given: {e}")
        }
    };
    report.damage.push(Damage { thing, what, refs: names.to_vec() });
    Ok(None)
}

fn named_images(store: &dyn BlobStore, report: &mut VerifyReport) -> Result<Images, BlobError> {
    let mut images = Images::new();
    for (key, _) in store.list(&refs_folder())? {
        let Some(name) = RefName::of_key(&key) else { continue };
        report.refs += 1;
        match resolve(store, &name) {
            Ok(image) => images.entry(image).or_default().push(name),
            Err(RefError::Corrupt(Corrupt { thing, what })) => {
                report.damage.push(Damage { thing, what, refs: vec![name] });
            }
            // Removed since the listing.
            Err(RefError::Unknown { .. }) => report.refs -= 1,
            Err(RefError::Store(e)) => return Err(e),
        }
    }
    Ok(images)
}

/// Reads a whole object and checks every byte, also what a reader of one frame never looks at.
fn verify_object(
    store: &dyn BlobStore,
    id: ObjectId,
    listed_bytes: Option<u64>,
    needed_as: Option<&ObjectUse>,
) -> Result<ObjectUse, ReadError> {
    let thing = format!("object {id}");
    let corrupt = |what: String| Corrupt { thing: thing.clone(), what };
    let failed = |e| ReadError::of(thing.clone(), e);
    let bytes = match listed_bytes {
        Some(bytes) => bytes,
        None => store.stat(&id.key()).map_err(failed)?.bytes,
    };
    let found = find_object(store, id, bytes)?;
    if needed_as.is_some_and(|needed| *needed != found) {
        let what = "its size and counts are not those in the manifests that use it".to_owned();
        return Err(corrupt(what).into());
    }
    let body = store.get(&id.key(), bytes).map_err(failed)?;
    if body.len() as u64 != bytes || bytes < found.shape().index_bytes() {
        return Err(corrupt(format!("it has {} bytes, listed were {bytes}", body.len())).into());
    }
    let index_at = index(bytes - found.shape().index_bytes());
    let object = ObjectIndex::parse(id, &body[index_at..], bytes)?;
    if body[..OBJECT_MAGIC.len()] != OBJECT_MAGIC {
        return Err(corrupt("it does not begin as an object does".to_owned()).into());
    }
    let place = object.hashes_range();
    let hashes = &body[index(place.start)..index(place.end)];
    if !object.are_hashes_whole(hashes) {
        return Err(corrupt("its block hashes do not have the hash in its index".to_owned()).into());
    }
    verify_blocks(&object, &body, hashes).map_err(corrupt)?;
    Ok(found)
}

fn verify_blocks(object: &ObjectIndex, body: &[u8], hashes: &[u8]) -> Result<(), String> {
    let mut hashes = hashes.chunks_exact(32);
    for (frame, entry) in (0..).zip(object.frames()) {
        let place = object.frame_range(frame);
        let stored = &body[index(place.start)..index(place.end)];
        if !is_frame_whole(entry, stored) {
            return Err(format!("frame {frame}: its bytes do not have the hash in the index"));
        }
        let raw = frame_decode(entry, stored, object.shape().blocks_of(frame))
            .map_err(|what| format!("frame {frame}: {what}"))?;
        for block in raw.chunks_exact(index(BLOCK_BYTES)) {
            // A block under another's hash would be shared in place of it.
            if hashes.next() != Some(&hash_of(block)[..]) {
                return Err(format!(
                    "frame {frame}: a block does not have the hash it is listed by"
                ));
            }
        }
    }
    Ok(())
}

/// Counts what a store holds. Reads refs and manifests, and no objects.
///
/// # Errors
/// When the store cannot be asked, or a ref or manifest is damaged or missing.
pub fn store_stats(store: &dyn BlobStore) -> Result<StoreStats, StatsError> {
    let mut stats = StoreStats::default();
    let mut used: BTreeMap<ObjectId, ObjectUse> = BTreeMap::new();
    let mut images: BTreeSet<ImageId> = BTreeSet::new();
    for (_, image) in crate::objects::refs(store)? {
        stats.refs += 1;
        if !images.insert(image) {
            continue;
        }
        let manifest: ImageManifest = read_manifest(store, image)?;
        stats.images += 1;
        stats.image_bytes += manifest.size_bytes();
        stats.mapped_bytes += manifest.mapped_blocks() * BLOCK_BYTES;
        used.extend(manifest.objects().iter().map(|object| (object.id, *object)));
    }
    for (key, stat) in store.list(&manifests_folder())? {
        if image_of_key(&key).is_some_and(|image| images.contains(&image)) {
            stats.manifest_bytes += stat.bytes;
        }
    }
    for object in used.values() {
        stats.objects += 1;
        stats.unique_bytes += u64::from(object.blocks) * BLOCK_BYTES;
        stats.stored_bytes += object.bytes;
    }
    for (key, stat) in store.list(&objects_folder())? {
        if object_of_key(&key).is_some_and(|id| !used.contains_key(&id)) {
            stats.unreachable_objects += 1;
            stats.unreachable_bytes += stat.bytes;
        }
    }
    stats.condemned = store.list(&condemned_folder())?.len() as u64;
    Ok(stats)
}

/// Why a store could not be counted.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// A ref could not be read.
    #[error("count what the refs of the store name")]
    Refs(#[from] RefError),
    /// A manifest could not be read.
    #[error("count what an image uses; `belljar blob verify` looks at everything")]
    Manifest(#[from] ReadError),
    /// The store could not be asked.
    #[error("list the store")]
    Store(#[from] BlobError),
}
