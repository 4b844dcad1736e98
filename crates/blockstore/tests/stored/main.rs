//! Images in a blob store, from end to end: written, shared, read, damaged, cached, collected.

mod caching;
mod collecting;
mod damage;
mod layers;
mod rig;
mod round_trips;
mod vectors;
