//! Names of images, and the rule by which an image becomes reachable while others are collected.
//!
//! A collector marks a blob, waits for a grace of at least [`GRACE_MIN`], looks again whether
//! anything reaches it, and only then deletes it. So [`publish`] looks for marks on everything the
//! image uses, and writes the ref within [`PUBLISH_WITHIN`], which is shorter: either the mark is
//! seen here, or the ref is seen by the collector's second look. `gc` has the other half.

use std::time::{Duration, Instant};

use belljar_domain::Kind;
use bytes::Bytes;

use crate::blobs::{BlobError, BlobKey, BlobStore};
use crate::gc::GRACE_MIN;

use super::Corrupt;
use super::layout::{ImageId, ObjectId, RefName, condemned_image, condemned_object, refs_folder};
use super::manifest::{ImageManifest, MANIFEST_BYTES_MAX};
use super::read_error::ReadError;

/// Between the look for marks and the writing of the ref.
const PUBLISH_WITHIN: Duration = Duration::from_secs(180);
const REF_BYTES_MAX: u64 = 4096;
const REF_HEAD: &str = "belljar ref 1";
/// Names tried for what is being deleted under its first one.
pub(super) const SALTS: u32 = 8;

/// Why a ref could not be read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RefError {
    /// There is no such ref.
    #[error("find image {name:?}: {store} has no ref of that name")]
    Unknown {
        /// The ref.
        name: String,
        /// The store.
        store: String,
    },
    /// The ref is damaged.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The store could not be asked.
    #[error("read the refs of the store")]
    Store(#[from] BlobError),
}

impl RefError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            RefError::Unknown { .. } => Kind::NotFound,
            RefError::Corrupt(_) => Kind::Internal,
            RefError::Store(e) => e.kind(),
        }
    }
}

/// Why an image was not published. What was uploaded for it will be collected.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Something it shares with others is about to be deleted: write the image again, which then
    /// does not share it.
    #[error("publish image as {name:?}: {thing} is being collected; write the image again")]
    Condemned {
        /// The ref.
        name: String,
        /// What is being collected.
        thing: String,
        /// The object, if it is one.
        object: Option<ObjectId>,
    },
    /// The store was too slow to know that nothing was deleted meanwhile: try again.
    #[error("publish image as {name:?}: it took {took_s} s, at most {} are safe", PUBLISH_WITHIN.as_secs())]
    TooSlow {
        /// The ref.
        name: String,
        /// How long it took.
        took_s: u64,
    },
    /// The store failed.
    #[error("publish image as {name:?}")]
    Store {
        /// The ref.
        name: String,
        /// Why.
        #[source]
        source: BlobError,
    },
}

impl PublishError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            PublishError::Condemned { .. } => Kind::Conflict,
            PublishError::TooSlow { .. } => Kind::Timeout,
            PublishError::Store { source, .. } => source.kind(),
        }
    }
}

/// Whether there is a blob of this name.
pub(super) fn is_there(store: &dyn BlobStore, key: &BlobKey) -> Result<bool, BlobError> {
    match store.stat(key) {
        Ok(_) => Ok(true),
        Err(e) if e.is_not_found() => Ok(false),
        Err(e) => Err(e),
    }
}

/// Writes a manifest whose objects are in the store, and then its ref, in place of what the ref named
/// before. The image is what comes back: its name differs from the manifest's given where a manifest
/// of that name is being collected.
///
/// # Errors
/// [`PublishError`]. The ref names what it named before; but after [`PublishError::Store`] of kind
/// [`Kind::Unavailable`] it may name the new image, which is whole, and after a
/// [`PublishError::TooSlow`] of [`GRACE_MIN`] and more it does, and the image must be written again.
pub fn publish(
    store: &dyn BlobStore,
    name: &RefName,
    manifest: ImageManifest,
) -> Result<ImageManifest, PublishError> {
    let failed = |source| PublishError::Store { name: name.to_string(), source };
    let begun = Instant::now();
    for object in manifest.objects() {
        let condemned = |state: &str| PublishError::Condemned {
            name: name.to_string(),
            thing: format!("object {} ({state})", object.id),
            object: Some(object.id),
        };
        // In this order: a collector deletes the object before its mark, so one that is gone
        // with its mark is missed by the second look.
        if is_there(store, &condemned_object(&object.id)).map_err(failed)? {
            return Err(condemned("marked"));
        }
        if !is_there(store, &object.id.key()).map_err(failed)? {
            return Err(condemned("gone"));
        }
    }
    let manifest = unmarked(store, name, manifest)?;
    store.put(&manifest.id().key(), manifest.to_bytes().into()).map_err(failed)?;
    in_time(name, begun, PUBLISH_WITHIN)?;
    let text = format!("{REF_HEAD}\n{}\n", manifest.id());
    store.put(&name.key(), Bytes::from(text)).map_err(failed)?;
    // The write itself has a deadline in every store but a folder whose disk hangs.
    in_time(name, begun, GRACE_MIN)?;
    Ok(manifest)
}

fn in_time(name: &RefName, begun: Instant, limit: Duration) -> Result<(), PublishError> {
    let took = begun.elapsed();
    if took > limit {
        return Err(PublishError::TooSlow { name: name.to_string(), took_s: took.as_secs() });
    }
    Ok(())
}

/// The manifest under the first of its names that no collector has marked.
fn unmarked(
    store: &dyn BlobStore,
    name: &RefName,
    mut manifest: ImageManifest,
) -> Result<ImageManifest, PublishError> {
    for salt in 1..=SALTS {
        let is_marked = is_there(store, &condemned_image(&manifest.id()))
            .map_err(|source| PublishError::Store { name: name.to_string(), source })?;
        if !is_marked {
            return Ok(manifest);
        }
        manifest = manifest.with_salt(salt);
    }
    let thing = format!("image {}", manifest.id());
    Err(PublishError::Condemned { name: name.to_string(), thing, object: None })
}

fn parse_ref(name: &RefName, bytes: &[u8]) -> Result<ImageId, Corrupt> {
    let corrupt = |what: &str| Corrupt { thing: format!("ref {name}"), what: what.to_owned() };
    let text = std::str::from_utf8(bytes).map_err(|_| corrupt("it is not text"))?;
    let rest = text.strip_prefix(REF_HEAD).and_then(|rest| rest.strip_prefix('\n'));
    let id = rest.and_then(|rest| rest.strip_suffix('\n'));
    let id = id.ok_or_else(|| corrupt("it does not read as a ref of version 1 does"))?;
    ImageId::parse(id).map_err(|_| corrupt("it names no image"))
}

/// The image a ref names.
///
/// # Errors
/// [`RefError`].
pub fn resolve(store: &dyn BlobStore, name: &RefName) -> Result<ImageId, RefError> {
    match store.get(&name.key(), REF_BYTES_MAX) {
        Ok(bytes) => Ok(parse_ref(name, &bytes)?),
        Err(e) if e.is_not_found() => {
            Err(RefError::Unknown { name: name.to_string(), store: store.name().to_owned() })
        }
        Err(e) => Err(e.into()),
    }
}

/// Every ref of the store and what it names, by name.
///
/// # Errors
/// [`RefError`]: of one that is damaged too, because whoever asks for all must not miss it.
pub fn refs(store: &dyn BlobStore) -> Result<Vec<(RefName, ImageId)>, RefError> {
    let mut found = Vec::new();
    for (key, _) in store.list(&refs_folder())? {
        let Some(name) = RefName::of_key(&key) else { continue };
        match resolve(store, &name) {
            Ok(image) => found.push((name, image)),
            // Removed since the listing.
            Err(RefError::Unknown { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes a ref; what only it reached is then for the collector. One that is not there is no error.
///
/// # Errors
/// [`RefError::Store`].
pub fn delete_ref(store: &dyn BlobStore, name: &RefName) -> Result<(), RefError> {
    Ok(store.delete(&name.key())?)
}

/// The manifest of an image, straight from the store.
///
/// # Errors
/// [`ReadError`].
pub fn read_manifest(store: &dyn BlobStore, id: ImageId) -> Result<ImageManifest, ReadError> {
    let bytes = store
        .get(&id.key(), MANIFEST_BYTES_MAX)
        .map_err(|e| ReadError::of(format!("image {id}"), e))?;
    Ok(ImageManifest::parse(id, &bytes)?)
}
