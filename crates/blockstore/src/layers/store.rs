//! The folder of layers: opening, making and sweeping them.
//!
//! What keeps a layer's file: a record on disk that names it, or a [`Layer`] handle of this process.
//! A handle is registered before its file is made and while it is opened, under one lock with the
//! sweep, so there is no moment at which a file in use could be taken for garbage.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::layer::Layer;
use super::name::{BadLayerName, FOLDER, LayerName};
use crate::image::{OpenError, open};

/// Random bytes of a sealed layer's name: no two on any machine are the same.
const NAME_BYTES: usize = 16;

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("open the layers of data folder {}", root.display())]
pub struct OpenStoreError {
    /// The data folder.
    pub root: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Why a sweep stopped. What it had removed stays removed; another sweep goes on.
#[derive(Debug, thiserror::Error)]
#[error("{step} {} while sweeping layers", path.display())]
pub struct SweepError {
    /// The step, as a verb.
    pub step: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Layers removed.
    pub removed: u64,
    /// Bytes on disk that they took.
    pub freed_bytes: u64,
    /// Layers that stay, because something names or holds them.
    pub kept: u64,
}

/// The layers below one data folder. Clones are handles of the same store; two stores opened over one
/// folder do not know of each other's layers, so a process opens one.
#[derive(Clone)]
pub struct LayerStore {
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Layers with a living handle; an entry goes with its last handle.
    held: HashMap<LayerName, Weak<Layer>>,
    /// Sweeps under way.
    sweeps: usize,
    /// Layers whose last handle went while a sweep was under way: a record that names them may have
    /// been written after the sweep had looked.
    let_go: HashSet<LayerName>,
}

impl LayerStore {
    /// The store below the data folder `root`. Sealed layers lie in its folder `layers`, which is made
    /// with the first of them.
    ///
    /// # Errors
    /// [`OpenStoreError`] if `root` is no folder.
    pub fn open(root: &Path) -> Result<LayerStore, OpenStoreError> {
        let failed = |source| OpenStoreError { root: root.to_owned(), source };
        if !fs::metadata(root).map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        let shared = Shared { root: root.to_owned(), state: Mutex::new(State::default()) };
        Ok(LayerStore { shared: Arc::new(shared) })
    }

    /// The name of the file `path`, which lies below the data folder.
    ///
    /// # Errors
    /// [`BadLayerName`] if it lies elsewhere or cannot be written as a name.
    pub fn name_of(&self, path: &Path) -> Result<LayerName, BadLayerName> {
        LayerName::of_path(&self.shared.root, path)
    }

    /// The layer called `name`. All handles of one layer share one open file.
    ///
    /// # Errors
    /// [`OpenError`] naming the file.
    pub fn layer(&self, name: &LayerName) -> Result<Arc<Layer>, OpenError> {
        let mut state = self.shared.lock();
        if let Some(layer) = state.held.get(name).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let path = self.shared.root.join(name.as_str());
        let (file, size_bytes) = open(&path, false)?;
        // Whoever wrote a record that names it had it synced before.
        let layer = self.handle(name.clone(), path, Arc::new(file), size_bytes, true);
        state.held.insert(name.clone(), Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Removes every sealed layer that is not in `reachable` and that no handle of this process holds.
    /// Layers elsewhere (templates) and files that have no layer's name are never touched.
    ///
    /// Right when no record that names layers can be written between finding out what is reachable
    /// and this call, as at start; otherwise use [`LayerStore::sweep_with`].
    ///
    /// # Errors
    /// [`SweepError`].
    pub fn sweep(&self, reachable: &HashSet<LayerName>) -> Result<Swept, SweepError> {
        self.sweep_unreached(reachable)
    }

    /// As [`LayerStore::sweep`], with `collect` finding out what is reachable. Records may be
    /// written meanwhile: a layer that was held at any moment since this call began stays.
    ///
    /// # Errors
    /// Those of `collect`, which remove nothing, and [`SweepError`].
    pub fn sweep_with<E: From<SweepError>>(
        &self,
        collect: impl FnOnce() -> Result<HashSet<LayerName>, E>,
    ) -> Result<Swept, E> {
        let sweep = Sweep::begin(&self.shared);
        let swept = self.sweep_unreached(&collect()?);
        drop(sweep);
        Ok(swept?)
    }

    fn sweep_unreached(&self, reachable: &HashSet<LayerName>) -> Result<Swept, SweepError> {
        let folder = self.folder();
        let failed = |step, path: &Path| {
            let path = path.to_owned();
            move |source| SweepError { step, path, source }
        };
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Swept::default()),
            entries => entries.map_err(failed("list", &folder))?,
        };
        let mut swept = Swept::default();
        for entry in entries {
            let entry = entry.map_err(failed("list", &folder))?;
            let Some(name) = sealed_name(&entry.file_name().to_string_lossy()) else { continue };
            let path = entry.path();
            // One turn of the lock a file: removing a big one takes a while.
            let state = self.shared.lock();
            let held = state.held.get(&name).is_some_and(|layer| layer.strong_count() > 0);
            if held || reachable.contains(&name) || state.let_go.contains(&name) {
                swept.kept += 1;
                continue;
            }
            let bytes = fs::symlink_metadata(&path).map_or(0, |stat| stat.blocks() * 512);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            drop(state);
            swept.removed += 1;
            swept.freed_bytes += bytes;
        }
        Ok(swept)
    }

    fn folder(&self) -> PathBuf {
        self.shared.root.join(FOLDER)
    }

    /// A new, empty layer of `size_bytes`, writable until it is finished.
    pub(crate) fn draft(&self, size_bytes: u64) -> io::Result<Draft> {
        let (name, path) = self.new_place()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        // Held from before its file exists: a sweep never sees it ownerless.
        let mut state = self.shared.lock();
        let file = options.open(&path)?;
        let layer = self.handle(name.clone(), path, Arc::new(file), size_bytes, false);
        state.held.insert(name, Arc::downgrade(&layer));
        drop(state);
        let draft = Draft { layer: Some(layer) };
        draft.file().set_len(size_bytes)?;
        Ok(draft)
    }

    /// Takes over `file`, which lies at `from` in the same file system and is `size_bytes` long: moves
    /// it in. Nobody may write it any more. On an error it is still at `from`.
    pub(crate) fn adopt(
        &self,
        file: Arc<File>,
        from: &Path,
        size_bytes: u64,
    ) -> io::Result<Arc<Layer>> {
        let (name, path) = self.new_place()?;
        let mut state = self.shared.lock();
        fs::rename(from, &path)?;
        let layer = self.handle(name.clone(), path, file, size_bytes, false);
        state.held.insert(name, Arc::downgrade(&layer));
        Ok(layer)
    }

    fn handle(
        &self,
        name: LayerName,
        path: PathBuf,
        file: Arc<File>,
        size_bytes: u64,
        synced: bool,
    ) -> Arc<Layer> {
        Arc::new(Layer {
            name,
            path,
            size_bytes,
            file,
            synced: AtomicBool::new(synced),
            data: OnceLock::new(),
            store: self.shared.clone(),
        })
    }

    /// A name nobody has, and where its file goes.
    fn new_place(&self) -> io::Result<(LayerName, PathBuf)> {
        let folder = self.folder();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let mut random = [0; NAME_BYTES];
        let mut filled = 0;
        while filled < NAME_BYTES {
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::rand::getrandom(&mut random[filled..], flags)?;
        }
        let file = hex::encode(random);
        let name = sealed_name(&file).expect("32 hexadecimal digits are a layer's name");
        Ok((name, folder.join(file)))
    }
}

/// The name of the sealed layer whose file is called `file`; `None` if no layer is called so.
fn sealed_name(file: &str) -> Option<LayerName> {
    let hex = file.len() == 2 * NAME_BYTES
        && file.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if hex { LayerName::new(&format!("{FOLDER}/{file}")).ok() } else { None }
}

impl Shared {
    /// No handle may be dropped under this lock: that takes it again.
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the tables is one call; they are whole after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last handle of a layer is going.
    pub(super) fn let_go(&self, name: &LayerName) {
        let mut state = self.lock();
        // Somebody may have opened it again meanwhile.
        if state.held.get(name).is_some_and(|layer| layer.strong_count() == 0) {
            state.held.remove(name);
        }
        if state.sweeps > 0 {
            state.let_go.insert(name.clone());
        }
    }
}

/// A sweep under way; ends when dropped.
struct Sweep<'a>(&'a Shared);

impl<'a> Sweep<'a> {
    fn begin(shared: &'a Shared) -> Sweep<'a> {
        shared.lock().sweeps += 1;
        Sweep(shared)
    }
}

impl Drop for Sweep<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.sweeps -= 1;
        if state.sweeps == 0 {
            state.let_go.clear();
        }
    }
}

/// A layer that is being written. Its file goes when it is dropped unfinished.
pub(crate) struct Draft {
    layer: Option<Arc<Layer>>,
}

impl Draft {
    pub(crate) fn file(&self) -> &File {
        self.layer.as_ref().expect("only `finish` takes it, with the draft").file()
    }

    /// Its file leaves the store and goes to `path`, over what may be there. On an error it is removed.
    pub(crate) fn move_to(mut self, path: &Path) -> io::Result<Arc<File>> {
        let layer = self.layer.as_ref().expect("only `finish` takes it, with the draft");
        fs::rename(layer.path(), path)?;
        let file = layer.file.clone();
        self.layer = None;
        Ok(file)
    }

    /// Nobody writes it any more.
    pub(crate) fn finish(mut self) -> Arc<Layer> {
        self.layer.take().expect("only `finish` takes it, with the draft")
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(layer) = self.layer.take() {
            // A file that cannot be removed is swept later.
            let _removed = fs::remove_file(layer.path());
        }
    }
}
