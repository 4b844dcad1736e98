//! The whole daemon over HTTP, in host mode: what SDKs send, byte for byte.

mod host_mode {
    pub(crate) mod client;
    mod compose;
    mod connection;
    mod edges;
    mod files;
    mod freeze;
    mod hostile;
    mod http;
    mod load;
    mod process;
    mod rights;
    mod tree;
    mod tunnel;
    mod watch;
}
