//! Collecting what no ref reaches, beside writers in other processes.
//!
//! ```text
//!   one collection:  take the turn ─► read marks ─► read refs and manifests (what is reachable)
//!                    ─► for marks of at least the grace: reachable? remove the mark : delete, then
//!                       remove the mark
//!                    ─► for blobs of at least the grace that nothing reaches: mark
//! ```
//!
//! So nothing is deleted by the collection that first finds it unreachable, and a writer has two chances: a
//! blob younger than the grace is not marked, and a mark younger than the grace deletes nothing. Why this is
//! safe with a writer that begins to share a blob just now: let it look for marks at `t` and write its ref at
//! `u`, less than the grace later (`publish` keeps to that). If the collection that would delete
//! the blob began to read refs after `u`, it sees the ref. If before, then `t` is less than a grace before that,
//! and the mark, older than the grace, was there at `t`: the writer has seen it and does not share.
//! Only one collection runs at a time, because another one could remove the mark in between.
//!
//! Ages are told by the store's clock alone. Killed at any point, the next collection goes on: a blob
//! is deleted before its mark, manifests before objects.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use belljar_domain::{Kind, UnixMillis};
use bytes::Bytes;

use crate::blobs::{BlobError, BlobKey, BlobStat, BlobStore, Created};
use crate::objects::{
    ImageId, ObjectId, ReadError, RefError, condemned_folder, condemned_image, condemned_object,
    image_of_key, manifests_folder, object_of_key, objects_folder, read_manifest, refs,
};

/// Shortest grace: longer than a writer takes from its look for marks to its ref, with room for one that
/// hangs in its last request.
pub const GRACE_MIN: Duration = Duration::from_secs(600);
/// Grace unless told otherwise: a day's uploads may stop and go on.
pub const GRACE_DEFAULT: Duration = Duration::from_secs(6 * 3600);
/// How long a collection may work; what is left is for the next one.
const WORK_MAX: Duration = Duration::from_secs(45 * 60);
/// Age at which a turn was left by a collection that died. Longer than [`WORK_MAX`] and one request.
const TURN_STALE: Duration = Duration::from_secs(3600);

/// Why nothing more was collected. What was deleted was rightly deleted.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// Another collection is under way, or was killed less than an hour ago.
    #[error(
        "collect garbage in {store}: another collection began {age_s} s ago; wait for it, or, if it was \
         killed, until an hour has passed"
    )]
    Busy {
        /// The store.
        store: String,
        /// How long ago it began.
        age_s: u64,
    },
    /// The grace is shorter than what is safe.
    #[error("collect garbage with a grace of {grace_s} s: at least {} are safe", GRACE_MIN.as_secs())]
    Grace {
        /// What was asked for.
        grace_s: u64,
    },
    /// The refs could not be read. While it is unknown what they reach, nothing is deleted.
    #[error("find out what is reachable")]
    Refs(#[from] RefError),
    /// A manifest that a ref names could not be read. While it is unknown what it reaches, nothing is deleted.
    #[error("find out what ref {name} reaches; restore the image or remove the ref")]
    Manifest {
        /// The ref.
        name: String,
        /// Why.
        #[source]
        source: Box<ReadError>,
    },
    /// The store failed.
    #[error("collect garbage")]
    Store(#[from] BlobError),
}

impl GcError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            GcError::Busy { .. } => Kind::Conflict,
            GcError::Grace { .. } => Kind::Invalid,
            GcError::Refs(e) => e.kind(),
            GcError::Manifest { source, .. } => source.kind(),
            GcError::Store(e) => e.kind(),
        }
    }
}

/// What a collection found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GcReport {
    /// Refs.
    pub refs: u64,
    /// Manifests that refs name.
    pub images_reachable: u64,
    /// Objects that those use.
    pub objects_reachable: u64,
    /// Manifests deleted.
    pub images_deleted: u64,
    /// Objects deleted.
    pub objects_deleted: u64,
    /// Bytes of what was deleted.
    pub bytes_deleted: u64,
    /// Marks set now: deleted by a collection after the grace.
    pub condemned: u64,
    /// Marks that wait for the grace to pass.
    pub waiting: u64,
    /// Marks removed because a ref reaches the blob again.
    pub spared: u64,
    /// Blobs nothing reaches that are too young to be marked.
    pub young: u64,
    /// Whether time ran out before everything was looked at.
    pub unfinished: bool,
}

/// The time by the store's own clock.
///
/// # Errors
/// [`BlobError`].
pub fn store_now(store: &dyn BlobStore) -> Result<UnixMillis, BlobError> {
    let key = own_key("collector/clock");
    store.put(&key, Bytes::from_static(b"belljar\n"))?;
    Ok(store.stat(&key)?.modified)
}

fn own_key(text: &str) -> BlobKey {
    BlobKey::new(text).expect("a constant key")
}

/// Runs one collection. `now` is [`store_now`], or later where a test lets time pass.
///
/// # Errors
/// [`GcError`].
pub fn collect(
    store: &dyn BlobStore,
    grace: Duration,
    now: UnixMillis,
) -> Result<GcReport, GcError> {
    if grace < GRACE_MIN {
        return Err(GcError::Grace { grace_s: grace.as_secs() });
    }
    take_turn(store, now)?;
    let begun = Instant::now();
    let mut collection = Collection { store, grace, now, begun, report: GcReport::default() };
    let result = collection.run();
    // Also after an error: only a collector that was killed leaves its turn.
    let given_back = store.delete(&turn_key());
    result?;
    given_back?;
    Ok(collection.report)
}

fn turn_key() -> BlobKey {
    own_key("collector/turn")
}

fn take_turn(store: &dyn BlobStore, now: UnixMillis) -> Result<(), GcError> {
    let key = turn_key();
    for _ in 0..2 {
        if store.create(&key, Bytes::from_static(b"belljar\n"))? == Created::Yes {
            return Ok(());
        }
        let age = match store.stat(&key) {
            Ok(stat) => now.since(stat.modified),
            // Given back just now.
            Err(e) if e.is_not_found() => continue,
            Err(e) => return Err(e.into()),
        };
        if age < TURN_STALE {
            return Err(GcError::Busy { store: store.name().to_owned(), age_s: age.as_secs() });
        }
        tracing::warn!(age_s = age.as_secs(), "the turn of a collection that died is taken over");
        store.delete(&key)?;
    }
    Err(GcError::Busy { store: store.name().to_owned(), age_s: 0 })
}

/// What refs reach.
#[derive(Default)]
struct Reachable {
    images: HashSet<ImageId>,
    objects: HashSet<ObjectId>,
}

/// Something that can be collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Garbage {
    // In the order they are deleted: a manifest whose objects are gone must not be there.
    Image(ImageId),
    Object(ObjectId),
}

impl Garbage {
    fn of_mark(key: &BlobKey) -> Option<Garbage> {
        let name = key.last_part();
        if let Some(id) = name.strip_prefix("image-") {
            return ImageId::parse(id).ok().map(Garbage::Image);
        }
        ObjectId::parse(name.strip_prefix("object-")?).ok().map(Garbage::Object)
    }

    fn of_blob(key: &BlobKey) -> Option<Garbage> {
        image_of_key(key).map(Garbage::Image).or_else(|| object_of_key(key).map(Garbage::Object))
    }

    fn mark(self) -> BlobKey {
        match self {
            Garbage::Image(id) => condemned_image(&id),
            Garbage::Object(id) => condemned_object(&id),
        }
    }

    fn blob(self) -> BlobKey {
        match self {
            Garbage::Image(id) => id.key(),
            Garbage::Object(id) => id.key(),
        }
    }
}

impl Reachable {
    fn has(&self, thing: Garbage) -> bool {
        match thing {
            Garbage::Image(id) => self.images.contains(&id),
            Garbage::Object(id) => self.objects.contains(&id),
        }
    }
}

struct Collection<'a> {
    store: &'a dyn BlobStore,
    grace: Duration,
    now: UnixMillis,
    begun: Instant,
    report: GcReport,
}

impl Collection<'_> {
    fn run(&mut self) -> Result<(), GcError> {
        // Marks before refs: the proof above needs every mark acted on to be older than the refs read.
        let mut marks: Vec<(Garbage, BlobStat)> = self
            .store
            .list(&condemned_folder())?
            .into_iter()
            .filter_map(|(key, stat)| Some((Garbage::of_mark(&key)?, stat)))
            .collect();
        marks.sort_unstable_by_key(|(thing, _)| *thing);
        let reachable = self.reachable()?;
        for (thing, mark) in &marks {
            self.sweep(*thing, mark, &reachable)?;
        }
        let marked: HashSet<BlobKey> = marks.iter().map(|(thing, _)| thing.mark()).collect();
        for folder in [manifests_folder(), objects_folder()] {
            for (key, stat) in self.store.list(&folder)? {
                self.condemn(&key, &stat, &reachable, &marked)?;
            }
        }
        Ok(())
    }

    fn reachable(&mut self) -> Result<Reachable, GcError> {
        let mut reachable = Reachable::default();
        for (name, image) in refs(self.store)? {
            self.report.refs += 1;
            if !reachable.images.insert(image) {
                continue;
            }
            let manifest = read_manifest(self.store, image)
                .map_err(|e| GcError::Manifest { name: name.to_string(), source: Box::new(e) })?;
            reachable.objects.extend(manifest.objects().iter().map(|object| object.id));
        }
        self.report.images_reachable = reachable.images.len() as u64;
        self.report.objects_reachable = reachable.objects.len() as u64;
        Ok(reachable)
    }

    fn is_out_of_time(&mut self) -> bool {
        if self.begun.elapsed() > WORK_MAX {
            self.report.unfinished = true;
        }
        self.report.unfinished
    }

    fn sweep(
        &mut self,
        thing: Garbage,
        mark: &BlobStat,
        reachable: &Reachable,
    ) -> Result<(), GcError> {
        if self.is_out_of_time() {
            return Ok(());
        }
        if reachable.has(thing) {
            self.store.delete(&thing.mark())?;
            self.report.spared += 1;
            return Ok(());
        }
        if self.now.since(mark.modified) < self.grace {
            self.report.waiting += 1;
            return Ok(());
        }
        match self.store.stat(&thing.blob()) {
            Ok(stat) => {
                self.store.delete(&thing.blob())?;
                self.report.bytes_deleted += stat.bytes;
                match thing {
                    Garbage::Image(_) => self.report.images_deleted += 1,
                    Garbage::Object(_) => self.report.objects_deleted += 1,
                }
            }
            // A collection that was killed has deleted it, and not its mark.
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e.into()),
        }
        self.store.delete(&thing.mark())?;
        Ok(())
    }

    fn condemn(
        &mut self,
        key: &BlobKey,
        stat: &BlobStat,
        reachable: &Reachable,
        marked: &HashSet<BlobKey>,
    ) -> Result<(), GcError> {
        let Some(thing) = Garbage::of_blob(key) else { return Ok(()) };
        if reachable.has(thing) || marked.contains(&thing.mark()) || self.is_out_of_time() {
            return Ok(());
        }
        if self.now.since(stat.modified) < self.grace {
            self.report.young += 1;
            return Ok(());
        }
        // Created, never replaced: the age of a mark is what the grace is counted from.
        self.store.create(&thing.mark(), Bytes::from_static(b"belljar\n"))?;
        self.report.condemned += 1;
        Ok(())
    }
}
