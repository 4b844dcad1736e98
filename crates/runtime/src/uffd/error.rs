//! What can go wrong, by operation.

use std::io;
use std::path::PathBuf;

use super::layout::LayoutProblem;

/// Why a page server did not start. Nothing is left.
#[derive(Debug, thiserror::Error)]
pub enum BindPagesError {
    /// The socket's path does not fit into a socket address.
    #[error("bind page socket {}: a socket's path has at most 107 bytes", path.display())]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// The working set is of another memory.
    #[error("use a working set of {found} bytes of memory for one of {expected}")]
    OtherMemory {
        /// The memory's size in bytes.
        expected: u64,
        /// The working set's, in bytes.
        found: u64,
    },
    /// A system call failed.
    #[error("{step} page socket {}", path.display())]
    Io {
        /// The step, as a verb.
        step: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a machine cannot be given its memory any more. It must end.
#[derive(Debug, thiserror::Error)]
pub enum PageServeError {
    /// The machine monitor never got as far as handing over its memory.
    #[error("take over the memory of a machine")]
    Handshake(#[source] HandshakeError),
    /// The source did not give good bytes.
    #[error("read {bytes} bytes of memory at {offset}")]
    Source {
        /// Where in the saved memory.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel did not take a page.
    #[error("install {bytes} bytes of memory at {address:#x}")]
    Install {
        /// Where in the monitor's process.
        address: u64,
        /// How many.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine waits for a page that is not of its memory.
    #[error("find {address:#x} in the regions that the machine monitor has told")]
    Elsewhere {
        /// The address in the monitor's process.
        address: u64,
    },
    /// The kernel told something that nobody asked for.
    #[error("make sense of event {event:#x} of the machine's userfaultfd")]
    Event {
        /// Its number.
        event: u8,
    },
    /// More threads wait for pages than any machine has.
    #[error("remember more than {limit} waiting page faults")]
    TooManyFaults {
        /// How many are remembered.
        limit: usize,
    },
    /// A system call failed.
    #[error("{step}")]
    Io {
        /// The step, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A bug of ours.
    #[error("go on after a panic of a page server's thread")]
    Panicked,
}

/// Why a machine monitor's first message was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The socket failed.
    #[error("receive its message")]
    Io(#[source] io::Error),
    /// It hung up.
    #[error("receive its whole message: it hung up after {received} bytes")]
    HungUp {
        /// How much it had sent.
        received: usize,
    },
    /// It was silent.
    #[error("receive its whole message within {waited_ms} ms: {received} bytes came")]
    TooLate {
        /// How much it had sent.
        received: usize,
        /// How long was waited.
        waited_ms: u64,
    },
    /// It did not stop.
    #[error("take a message of more than {limit_bytes} bytes")]
    TooLong {
        /// The longest.
        limit_bytes: usize,
    },
    /// It must send one descriptor.
    #[error("take {0} descriptors: one userfaultfd belongs to the message")]
    Descriptors(usize),
    /// The descriptor is of something else.
    #[error("use a descriptor of {found} as a userfaultfd")]
    NotAUserfault {
        /// What it is, as the kernel says.
        found: String,
    },
    /// Its regions make no sense.
    #[error("believe its regions")]
    Layout(#[source] LayoutProblem),
}

/// Why something of a page server may be left.
#[derive(Debug, thiserror::Error)]
pub enum ClosePagesError {
    /// Its threads wait for a source that does not answer.
    #[error("end the threads of page socket {} within {waited_ms} ms", path.display())]
    Stuck {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The socket file is still there.
    #[error("remove page socket {}", path.display())]
    Unlink {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
