//! Webhooks: telling a team's own server what happens to its sandboxes.
//!
//! An event and its deliveries are written with the state change they tell of, so that none is
//! lost; the courier sends them later, so that no receiver holds anything up. At least once: a
//! receiver may see a delivery twice when a server dies between its answer and the note of it.

mod attempt;
mod courier;
mod guard;
mod prune;
mod send;
mod signature;
pub(crate) mod terms;

pub(crate) use attempt::{After, Next};
pub(crate) use courier::Courier;
pub(crate) use prune::run as prune;
