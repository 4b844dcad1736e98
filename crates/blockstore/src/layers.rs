//! The files that images are made of, and who still needs them.
//!
//! A layer is a raw sparse file that nobody changes any more: a template's disk or memory, or what
//! one run of a sandbox wrote, sealed. Data lies at its own offset of the disk, so a layer needs no
//! index of its own: which of its blocks count is said by the maps that name it.
//!
//! - `name`: what a layer is called in a map.
//! - `layer`: one open layer.
//! - `store`: the folder, the layers that are open, the sweep.

mod layer;
mod name;
mod store;

pub use layer::Layer;
pub use name::{BadLayerName, LayerName};
pub use store::{LayerStore, OpenStoreError, SweepError, Swept};

pub(crate) use store::Draft;
