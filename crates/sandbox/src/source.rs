//! What a sandbox can be started from: a template build or a snapshot. The boot path tells them
//! apart by what they have, not by what they are.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use belljar_blockstore::{LayerName, LayerStore, LayeredImage};
use belljar_domain::{BuildId, MiB, TemplateId, Vcpus};
use belljar_runtime::{PageSource, SavedMachine, SavedMemory};
use tokio::sync::OnceCell;

use crate::boot::CreateError;
use crate::registry::Inner;
use crate::snapshot::{SnapshotFiles, SnapshotMeta};
use crate::template::Template;

/// Something sandboxes can be started from.
pub(crate) struct Source {
    /// What it is asked for by.
    pub(crate) build_id: BuildId,
    pub(crate) template_id: TemplateId,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: Arc<str>,
    /// What its root disk holds.
    pub(crate) root_disk: Arc<LayeredImage>,
    /// The template build whose kernel a machine boots that is started without its memory.
    pub(crate) kernel_build: BuildId,
    /// `None`: only its disk was kept.
    pub(crate) saved: Option<Saved>,
    /// Set where it is a snapshot.
    pub(crate) snapshot: Option<Arc<SnapshotMeta>>,
}

/// A machine that was saved with its memory.
pub(crate) struct Saved {
    /// Where its driver put what it needs to restore it.
    folder: PathBuf,
    /// What its memory holds.
    pub(crate) image: Arc<LayeredImage>,
    /// The file clones map: that of the first layer; `None` where everything is in later ones.
    base: Option<PathBuf>,
    /// The same in one file, for sources that many start from.
    one_file: Option<OneFile>,
}

struct OneFile {
    path: PathBuf,
    made: OnceCell<()>,
}

impl Source {
    /// A template build of this host.
    ///
    /// # Errors
    /// Its disk or its memory cannot be opened.
    pub(crate) fn of_template(
        template: &Template,
        layers: &LayerStore,
    ) -> Result<Source, belljar_blockstore::OpenError> {
        let meta = &template.meta;
        let open = |file: &str| {
            let name = format!("templates/{}/{file}", meta.build_id);
            let name = LayerName::new(&name).expect("a build id is a plain file name");
            Ok(Arc::new(LayeredImage::raw(layers, &name)?))
        };
        let base = template.dir.join("memory");
        Ok(Source {
            build_id: meta.build_id.clone(),
            template_id: meta.template_id.clone(),
            vcpus: meta.vcpus,
            memory: meta.memory,
            disk: meta.disk,
            envd_version: Arc::from(meta.envd_version.as_str()),
            root_disk: open("rootfs.ext4")?,
            kernel_build: meta.build_id.clone(),
            saved: Some(Saved {
                folder: template.dir.clone(),
                image: open("memory")?,
                base: Some(base),
                one_file: None,
            }),
            snapshot: None,
        })
    }

    /// A snapshot of this host, made of these images; `memory` is `None` where only the disk was kept.
    pub(crate) fn of_snapshot(
        meta: Arc<SnapshotMeta>,
        files: &SnapshotFiles,
        (root_disk, memory): (Arc<LayeredImage>, Option<Arc<LayeredImage>>),
    ) -> Source {
        let saved = memory.map(|image| Saved {
            folder: files.dir.clone(),
            base: image.base_file().map(Path::to_owned),
            image,
            // A paused sandbox goes on once; it takes its own pages with it.
            one_file: (!meta.paused)
                .then(|| OneFile { path: files.memory.clone(), made: OnceCell::new() }),
        });
        Source {
            build_id: meta.snapshot_id.clone(),
            template_id: meta.template_id.clone(),
            vcpus: meta.vcpus,
            memory: meta.memory,
            disk: meta.disk,
            envd_version: Arc::from(meta.envd_version.as_str()),
            root_disk,
            kernel_build: meta.kernel_build_id.clone(),
            saved,
            snapshot: Some(meta),
        }
    }

    /// Layers it is made of.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &LayerName> {
        let memory = self.saved.iter().flat_map(|saved| saved.image.layers());
        self.root_disk.layers().iter().chain(memory)
    }
}

impl Inner {
    /// What `build_id` is on this host.
    ///
    /// # Errors
    /// [`CreateError::NoTemplate`] and [`CreateError::Incompatible`].
    pub(crate) fn source(&self, build_id: &BuildId) -> Result<Arc<Source>, CreateError> {
        if let Some(ready) = self.templates.get(build_id) {
            return Ok(ready.source.clone());
        }
        let incompatible = || CreateError::Incompatible { build_id: build_id.clone() };
        if let Some(snapshot) = self.shelf.get(build_id) {
            return self.shelf.fits(&snapshot).then_some(snapshot).ok_or_else(incompatible);
        }
        if self.unusable.iter().any(|template| template.meta.build_id == *build_id) {
            return Err(incompatible());
        }
        Err(CreateError::NoTemplate { build_id: build_id.clone() })
    }

    /// As [`Inner::source`]; what is not here is looked for in the blob store.
    pub(crate) async fn source_or_fetch(
        &self,
        build_id: &BuildId,
    ) -> Result<Arc<Source>, CreateError> {
        match (self.source(build_id), &self.fetches) {
            (Err(CreateError::NoTemplate { .. }), Some(fetches)) => {
                fetches.fetch(build_id, &self.shelf, &self.scope).await?;
                self.source(build_id)
            }
            (source, _) => source,
        }
    }
}

impl Saved {
    /// What the driver is told to restore.
    ///
    /// Clones of one snapshot share its memory: all of it is put into one file when the first of
    /// them starts, once, which costs what is written in it and not its size.
    ///
    /// # Errors
    /// That file cannot be made.
    pub(crate) async fn machine(&self) -> io::Result<SavedMachine> {
        let folder = self.folder.clone();
        let memory = match &self.one_file {
            Some(one_file) => {
                one_file.made.get_or_try_init(|| one_file.make(&self.image)).await?;
                SavedMemory { base: Some(one_file.path.clone()), pages: None }
            }
            None => SavedMemory { base: self.base.clone(), pages: self.own_pages() },
        };
        Ok(SavedMachine { folder, memory })
    }

    /// Pages that are not in the file clones map.
    fn own_pages(&self) -> Option<Arc<dyn PageSource>> {
        let only_base = self.base.is_some() && self.image.layers().len() == 1;
        (!only_base).then(|| Arc::new(OwnPages(self.image.clone())) as Arc<dyn PageSource>)
    }
}

impl OneFile {
    async fn make(&self, image: &Arc<LayeredImage>) -> io::Result<()> {
        let (image, path) = (image.clone(), self.path.clone());
        let make = move || {
            let unfinished = path.with_extension("tmp");
            // One that a failure left. What is not there need not go.
            drop(std::fs::remove_file(&unfinished));
            image.materialise(&unfinished).map_err(io::Error::other)?;
            // Machines have users of their own, and are handed its descriptor. Nobody else can pass
            // the folder of snapshots.
            std::fs::set_permissions(&unfinished, Permissions::from_mode(0o444))?;
            std::fs::rename(&unfinished, &path)
        };
        tokio::task::spawn_blocking(make).await.map_err(io::Error::other)?
    }
}

/// The pages of a memory that its first layer does not have.
struct OwnPages(Arc<LayeredImage>);

impl PageSource for OwnPages {
    fn read_runs(&self, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        self.0.read_beyond(true, each)
    }
}
