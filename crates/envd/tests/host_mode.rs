//! The whole daemon over HTTP, in host mode: what SDKs send, byte for byte.

mod host_mode {
    pub(crate) mod client;
    mod connection;
    mod files;
    mod http;
    mod process;
    mod tree;
}
