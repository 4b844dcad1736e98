//! One raw file with an image's content, for what can only take a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::ioctl_ficlone;

use super::LayeredImage;
use crate::clone::{CloneMethod, Extent, copy_extent};
use crate::device::BLOCK_BYTES;
use crate::image::make_zero;

/// Why an image could not be written as one file. No file is left.
#[derive(Debug, thiserror::Error)]
#[error("write an image as the raw file {}", to.display())]
pub struct MaterialiseError {
    /// The file.
    pub to: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl LayeredImage {
    /// Writes the image as one raw sparse file `to`, which must not exist, mode 0600, not synced.
    ///
    /// Where the file system can share blocks, the file starts as a share of the layer that most
    /// of the image lies in, and only the rest is copied.
    ///
    /// # Errors
    /// [`MaterialiseError`].
    pub fn materialise(&self, to: &Path) -> Result<CloneMethod, MaterialiseError> {
        let failed = |source| MaterialiseError { to: to.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(to).map_err(failed)?;
        self.fill(&file).map_err(|e| {
            // The error that matters is `e`; a file that cannot be removed shows up by its name.
            let _removed = std::fs::remove_file(to);
            failed(e)
        })
    }

    fn fill(&self, file: &File) -> io::Result<CloneMethod> {
        let used = self.map.used_blocks(self.layers.len());
        let largest = (0..self.layers.len()).max_by_key(|layer| used[*layer]);
        let shared =
            largest.filter(|layer| ioctl_ficlone(file, self.layers[*layer].file()).is_ok());
        file.set_len(self.size_bytes())?;
        for (blocks, source) in self.map.all() {
            let (start, end) = (blocks.start * BLOCK_BYTES, blocks.end * BLOCK_BYTES);
            match source.layer() {
                Some(layer) if Some(layer) == shared => {}
                Some(layer) => {
                    copy_extent(self.layers[layer].file(), file, Extent { start, end })?;
                }
                // A shared layer may hold what has become zeros since.
                None if shared.is_some() => make_zero(file, start, end - start)?,
                None => {}
            }
        }
        Ok(if shared.is_some() { CloneMethod::Reflink } else { CloneMethod::Sparse })
    }
}
