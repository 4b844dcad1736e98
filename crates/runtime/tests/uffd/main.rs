//! The page server on real userfaultfds: in this process, which is machine monitor and server at once, and
//! in a child where the monitor dies or must.

mod bytes;
mod ends;
mod handshakes;
mod monitor;
mod saved;
mod sys;
