//! Memory that is installed as a machine asks for it: a page server on a userfaultfd, in Firecracker's form.
//!
//! A machine monitor that restores with a memory of type `Uffd` connects to a unix socket and sends one
//! message: its regions of guest memory as JSON, and the userfaultfd that guards them. From then on
//! each touch of a page that is not there is a message on that descriptor, and the machine waits until
//! the page was installed. A machine whose memory is a file on this host needs none of this: the
//! file is mapped, and its clean pages are shared.
//!
//! - `source`: where the content comes from.
//! - `handshake`, `layout`: the message, all of it hostile.
//! - `guest_memory`: what each page is, and how it is installed without ever being wrong.
//! - `serve`: faults, the windows around them, and the working set ahead of them.
//! - `working_set`: what was asked for first, on disk.
//! - `server`: the socket, the threads and their end.
//!
//! Everything here blocks and owns its threads: call it from a blocking thread.

mod bits;
mod error;
mod guest_memory;
mod halt;
mod handshake;
mod layout;
mod serve;
mod server;
mod source;
mod stats;
mod working_set;

pub use error::{BindPagesError, ClosePagesError, HandshakeError, PageServeError};
pub use layout::LayoutProblem;
pub use server::{OnFailure, PageServer, PageServerLimits, PageServerSpec};
pub use source::{FileMemory, MemoryRun, MemorySource, OpenMemoryError};
pub use stats::PageServerStats;
pub use working_set::{LoadWorkingSetError, SaveWorkingSetError, WorkingSet, WorkingSetProblem};
