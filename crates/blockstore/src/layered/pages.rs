//! What of an image does not come from its lowest layer.
//!
//! A restored machine maps the lowest layer's file privately and shares its clean pages with every
//! clone; what lies in other layers is installed over that.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::LayeredImage;
use crate::clone::Extent;
use crate::device::{BLOCK_BYTES, index};
use crate::layers::Layer;

/// Longest piece given to a reader at once, in bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// Where the bytes of a run are.
#[derive(Debug, Clone)]
pub enum PageContent {
    /// They are zeros.
    Zero,
    /// In this layer's file, at the run's own offset.
    Layer(Arc<Layer>),
}

/// Bytes of an image; offset and length are multiples of [`BLOCK_BYTES`].
#[derive(Debug, Clone)]
pub struct PageRun {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Its bytes.
    pub content: PageContent,
}

impl LayeredImage {
    /// The file of the lowest layer, which may be mapped as the image's base: it is as long as the
    /// image. `None` for an image of zeros.
    pub fn base_file(&self) -> Option<&Path> {
        self.layers.first().map(|layer| layer.path())
    }

    /// Whether the bytes at `offset` are zeros that no layer has, and for how many bytes up to `limit`
    /// that is so. A run may end before the next begins: two layers have one each. No I/O.
    ///
    /// # Panics
    /// Unless `offset` and `limit` are whole blocks inside the image, `limit` not 0.
    pub fn zeros_at(&self, offset: u64, limit: u64) -> (bool, u64) {
        let blocks = offset / BLOCK_BYTES..(offset + limit) / BLOCK_BYTES;
        assert!(blocks.start < blocks.end && blocks.end <= self.map.blocks(), "inside the image");
        let (run, source) = self.map.within(blocks).next().expect("a map has all blocks");
        (source.layer().is_none(), (run.end - run.start) * BLOCK_BYTES)
    }

    /// The runs that must be laid over a base to have the image's content, in order.
    ///
    /// With `over_layer0` the base is the file of the lowest layer ([`LayeredImage::base_file`]):
    /// what lies in it is left out, and zeros are given only where that file has data. Without, the
    /// base is zeros, and all that is not zeros is given.
    ///
    /// # Errors
    /// I/O errors of looking for the lowest layer's holes.
    pub fn runs_beyond(&self, over_layer0: bool) -> io::Result<Vec<PageRun>> {
        let base = if over_layer0 { self.layers.first() } else { None };
        let below = base.map_or(Ok(&[][..]), |layer| layer.data())?;
        let mut runs = Vec::new();
        for (blocks, source) in self.map.all() {
            let (start, end) = (blocks.start * BLOCK_BYTES, blocks.end * BLOCK_BYTES);
            match source.layer() {
                Some(0) if base.is_some() => {}
                Some(layer) => {
                    let content = PageContent::Layer(self.layers[layer].clone());
                    runs.push(PageRun { offset: start, len: end - start, content });
                }
                None => runs.extend(data_within(below, start, end).map(|data| PageRun {
                    offset: data.start,
                    len: data.end - data.start,
                    content: PageContent::Zero,
                })),
            }
        }
        Ok(runs)
    }

    /// Gives `each` the bytes of [`LayeredImage::runs_beyond`] with their offsets, in order, in pieces
    /// of at most 1 MiB.
    ///
    /// # Errors
    /// I/O errors of the layers, which name them, and those of `each`, at which it stops.
    pub fn read_beyond(
        &self,
        over_layer0: bool,
        each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buf = Vec::new();
        for run in self.runs_beyond(over_layer0)? {
            let end = run.offset + run.len;
            let mut at = run.offset;
            while at < end {
                let len = (end - at).min(PIECE_BYTES);
                buf.resize(index(len), 0);
                match &run.content {
                    PageContent::Zero => buf.fill(0),
                    PageContent::Layer(layer) => layer.read_at(&mut buf, at)?,
                }
                each(at, &buf)?;
                at += len;
            }
        }
        Ok(())
    }
}

/// The parts of `start..end` in which `data` has something, widened to whole blocks.
fn data_within(data: &[Extent], start: u64, end: u64) -> impl Iterator<Item = Extent> {
    let first = data.partition_point(|extent| extent.end <= start);
    let mut done = start;
    data[first..].iter().take_while(move |extent| extent.start < end).filter_map(move |extent| {
        let from = (extent.start - extent.start % BLOCK_BYTES).max(done);
        let to = extent.end.next_multiple_of(BLOCK_BYTES).min(end);
        done = to.max(done);
        (from < to).then_some(Extent { start: from, end: to })
    })
}
