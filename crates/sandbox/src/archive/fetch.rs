//! Taking a snapshot of another host out of the store.

use std::collections::HashMap;
use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use belljar_blockstore::objects::{ReadError, RefError, resolve};
use belljar_blockstore::{
    BLOCK_BYTES, FetchImageError, ImageId, ImageReader, LayeredImage, SaveError,
};
use belljar_domain::{BuildId, Kind};
use tracing::info;

use super::record::{FILES, Header};
use super::{Archive, BLOCK, RECORD, name};
use crate::record::RecordError;
use crate::shelf::Shelf;
use crate::snapshot::{self, SnapshotDraft, SnapshotMeta};
use crate::source::Source;

/// What of this host a snapshot may have come from.
pub(crate) type Templates = HashMap<BuildId, Arc<Source>>;

/// Bytes read of a file at once.
const PIECE_BYTES: u64 = 1 << 20;

/// Why a stored snapshot could not be taken over. Nothing of it is left here, and nothing unchecked was used.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Its name in the store could not be looked up.
    #[error("find snapshot {snapshot_id} in the store")]
    Find {
        /// Which.
        snapshot_id: BuildId,
        /// Why.
        #[source]
        source: RefError,
    },
    /// A part of it is missing or damaged in the store, or the store does not answer.
    #[error("fetch snapshot {snapshot_id} from the store")]
    Read {
        /// Which.
        snapshot_id: BuildId,
        /// Which object or image, and what is wrong.
        #[source]
        source: ReadError,
    },
    /// Its disk or memory could not be fetched.
    #[error("fetch the disk and memory of snapshot {snapshot_id} from the store")]
    Image {
        /// Which.
        snapshot_id: BuildId,
        /// Which object or image, and what is wrong.
        #[source]
        source: FetchImageError,
    },
    /// Its bytes are as they were written, and are no snapshot this program reads.
    #[error("use stored snapshot {snapshot_id} (image {image}): {what}")]
    Malformed {
        /// Which.
        snapshot_id: BuildId,
        /// The image of its record.
        image: ImageId,
        /// What is wrong.
        what: String,
    },
    /// It was saved under another driver, version or tier.
    #[error("restore stored snapshot {snapshot_id} on this node: it was saved by {saved_by:?}")]
    Incompatible {
        /// Which.
        snapshot_id: BuildId,
        /// The fingerprint of its driver.
        saved_by: String,
    },
    /// A file of it could not be written here.
    #[error("keep snapshot {snapshot_id} on this node: {step}")]
    Here {
        /// Which.
        snapshot_id: BuildId,
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl FetchError {
    /// What a caller should do.
    pub fn kind(&self) -> Kind {
        if self.is_disk_full() {
            return Kind::Quota;
        }
        match self {
            FetchError::Find { source, .. } => source.kind(),
            FetchError::Read { source, .. }
            | FetchError::Image { source: FetchImageError::Read(source), .. } => source.kind(),
            FetchError::Incompatible { .. } => Kind::NotFound,
            FetchError::Image { .. } | FetchError::Malformed { .. } | FetchError::Here { .. } => {
                Kind::Internal
            }
        }
    }

    /// Whether another host's driver saved it, which this one's cannot restore.
    pub fn is_incompatible(&self) -> bool {
        matches!(self, FetchError::Incompatible { .. })
    }

    fn is_disk_full(&self) -> bool {
        match self {
            FetchError::Image { source, .. } => source.is_disk_full(),
            FetchError::Here { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

impl Archive {
    /// Makes a snapshot of the store one of this host. False when the store does not have it.
    ///
    /// # Errors
    /// [`FetchError`].
    pub(crate) fn fetch(
        &self,
        id: &BuildId,
        shelf: &Shelf,
        templates: &Templates,
    ) -> Result<bool, FetchError> {
        let fetched = self.try_fetch(id, shelf, templates);
        if fetched.is_err() {
            // One of its two layers may have been made.
            shelf.sweep();
        }
        fetched
    }

    fn try_fetch(
        &self,
        id: &BuildId,
        shelf: &Shelf,
        templates: &Templates,
    ) -> Result<bool, FetchError> {
        let image = match resolve(self.store(), &name(id, RECORD)) {
            Ok(image) => image,
            Err(RefError::Unknown { .. }) => return Ok(false),
            Err(source) => return Err(FetchError::Find { snapshot_id: id.clone(), source }),
        };
        let fetch = Fetch { archive: self, id, image, shelf };
        let (reader, header) = fetch.header()?;
        let draft = shelf.draft(id).map_err(|e| fetch.record_failed(e))?;
        let meta = fetch.files(&reader, &header, draft.files().dir.as_path())?;
        let template = templates.get(&meta.kernel_build_id);
        let below = template.map(|template| &*template.root_disk);
        let disk = fetch.image(header.disk, &draft.files().disk_map, below)?;
        let below = template.and_then(|template| Some(&*template.saved.as_ref()?.image));
        let memory_map = &draft.files().memory_map;
        let memory = header.memory.map(|image| fetch.image(image, memory_map, below));
        let memory = memory.transpose()?;
        fetch.publish(draft, meta, (disk, memory))?;
        Ok(true)
    }
}

/// One snapshot on its way down.
struct Fetch<'a> {
    archive: &'a Archive,
    id: &'a BuildId,
    image: ImageId,
    shelf: &'a Shelf,
}

impl Fetch<'_> {
    fn read_failed(&self, source: ReadError) -> FetchError {
        FetchError::Read { snapshot_id: self.id.clone(), source }
    }

    fn malformed(&self, what: String) -> FetchError {
        FetchError::Malformed { snapshot_id: self.id.clone(), image: self.image, what }
    }

    fn here(&self, step: &'static str) -> impl FnOnce(io::Error) -> FetchError + use<> {
        let snapshot_id = self.id.clone();
        move |source| FetchError::Here { snapshot_id, step, source }
    }

    fn record_failed(&self, e: RecordError) -> FetchError {
        match e {
            RecordError::Io { step, source, .. } => self.here(step)(source),
            other => self.malformed(other.to_string()),
        }
    }

    fn reader(&self, image: ImageId) -> Result<ImageReader, FetchError> {
        let cache = Arc::clone(&self.archive.cache);
        ImageReader::open(cache, image).map_err(|e| self.read_failed(e))
    }

    fn header(&self) -> Result<(ImageReader, Header), FetchError> {
        let reader = self.reader(self.image)?;
        let mut block = vec![0; BLOCK];
        reader.read_at(&mut block, 0).map_err(|e| self.read_failed(e))?;
        let header = Header::decode(&block, reader.size_bytes() / BLOCK_BYTES);
        Ok((reader, header.map_err(|what| self.malformed(what))?))
    }

    /// Writes the files of the folder but its record, which is answered.
    fn files(
        &self,
        reader: &ImageReader,
        header: &Header,
        folder: &Path,
    ) -> Result<SnapshotMeta, FetchError> {
        let mut meta = None;
        for ((file, bytes), place) in header.files.iter().zip(header.places().0) {
            let start = place * BLOCK_BYTES;
            if *file == 0 {
                meta = Some(self.meta(reader, start, *bytes, folder)?);
                continue;
            }
            let failed = || self.here("write what its driver saved");
            let path = folder.join(FILES[*file]);
            let mut options = OpenOptions::new();
            let mut to =
                options.write(true).create_new(true).mode(0o600).open(&path).map_err(failed())?;
            for at in (0..*bytes).step_by(usize_of(PIECE_BYTES)) {
                let mut piece = vec![0; usize_of((bytes - at).min(PIECE_BYTES))];
                reader.read_at(&mut piece, start + at).map_err(|e| self.read_failed(e))?;
                to.write_all(&piece).map_err(failed())?;
            }
            // As a driver leaves them: machines have users of their own, which read it.
            to.set_permissions(Permissions::from_mode(0o444)).map_err(failed())?;
        }
        let meta = meta.ok_or_else(|| self.malformed("it has no record".to_owned()))?;
        let is_same = |part: bool, saved: Option<ImageId>| part == saved.is_none();
        if !is_same(meta.filesystem_only, header.memory) {
            return Err(self.malformed("its record and its images do not agree".to_owned()));
        }
        if header.memory.is_some() && meta.fingerprint != self.shelf.fingerprint() {
            let saved_by = meta.fingerprint;
            return Err(FetchError::Incompatible { snapshot_id: self.id.clone(), saved_by });
        }
        Ok(meta)
    }

    fn meta(
        &self,
        reader: &ImageReader,
        start: u64,
        bytes: u64,
        folder: &Path,
    ) -> Result<SnapshotMeta, FetchError> {
        if bytes > snapshot::RECORD_MAX_BYTES {
            return Err(self.malformed(format!("its record has {bytes} bytes")));
        }
        let mut text = vec![0; usize_of(bytes)];
        reader.read_at(&mut text, start).map_err(|e| self.read_failed(e))?;
        let path = folder.join(FILES[0]);
        let meta = snapshot::parse(&path, &text).map_err(|e| self.record_failed(e))?;
        if meta.snapshot_id != *self.id {
            return Err(self.malformed(format!("it is the record of {}", meta.snapshot_id)));
        }
        Ok(meta)
    }

    /// Fetches what `template` does not have of an image into a layer of this host, with its map at `map`.
    fn image(
        &self,
        image: ImageId,
        map: &Path,
        template: Option<&LayeredImage>,
    ) -> Result<Arc<LayeredImage>, FetchError> {
        let reader = self.reader(image)?;
        let fetched = LayeredImage::fetch(&reader, self.shelf.layers(), template);
        let fetched =
            fetched.map_err(|source| FetchError::Image { snapshot_id: self.id.clone(), source })?;
        const STEP: &str = "put its disk and memory on stable storage";
        fetched.sync().map_err(self.here(STEP))?;
        fetched.save(map).map_err(|e: SaveError| self.here(STEP)(e.source))?;
        Ok(Arc::new(fetched))
    }

    fn publish(
        &self,
        draft: SnapshotDraft,
        meta: SnapshotMeta,
        images: (Arc<LayeredImage>, Option<Arc<LayeredImage>>),
    ) -> Result<(), FetchError> {
        let files = draft.publish(&meta).map_err(|e| self.record_failed(e))?;
        self.shelf.put_stored(&Arc::new(meta), &files, images);
        info!(snapshot_id = %self.id, store = self.archive.store_name(), "fetched a snapshot");
        Ok(())
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this program runs on 64-bit machines")
}
