//! The control plane over real sockets: TCP to its clients, a unix socket to its node.

mod document;
mod endpoints;
mod faults;
mod hostile;
mod logs;
mod metrics;
mod rates;
mod support;
