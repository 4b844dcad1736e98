//! The control plane over real sockets: TCP to its clients, unix sockets to its nodes.

mod admin;
mod adoption;
mod contract;
mod document;
mod endpoints;
mod events;
mod faults;
mod foreign;
mod hostile;
mod idempotency;
mod identity;
mod limits;
mod list;
mod logs;
mod metrics;
mod nodes;
mod placement;
mod prometheus;
mod races;
mod rates;
mod support;
mod usage;
mod webhooks;
