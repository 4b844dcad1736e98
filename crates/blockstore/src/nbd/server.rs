//! The socket, one thread that accepts and one a connection, and the end of all of them.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tracing::{debug, error, warn};

use super::transmission::serve;
use crate::device::BlockDevice;

/// How long a client may stay silent while it negotiates.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long [`NbdServer::close`] waits for a disk that does not answer.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);
/// How long the server waits before it accepts again after the process ran out of something.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Holds a request and the data of a typical guest write, so both come in one system call.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Clients at once; one more is hung up. A machine needs one, a copy tool four.
const CONNECTIONS_MAX: usize = 8;
/// The threads keep their buffers on the heap and call nothing deep.
const STACK_BYTES: usize = 256 << 10;
/// Longest path of a unix socket, without its final zero. Source: `sockaddr_un` of Linux.
const SOCKET_PATH_MAX_BYTES: usize = 107;

/// Who may connect, besides root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket's path does not fit into a socket address.
    #[error(
        "bind NBD socket {}: a socket's path has at most {SOCKET_PATH_MAX_BYTES} bytes",
        path.display()
    )]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// A system call failed. Nothing is left.
    #[error("{step} NBD socket {}", path.display())]
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

/// Why something of a server may be left.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// Threads wait for a disk that does not answer.
    #[error("end {threads} threads of NBD socket {} within {waited_ms} ms", path.display())]
    Stuck {
        /// The socket.
        path: PathBuf,
        /// How many threads are left.
        threads: usize,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The socket file is still there.
    #[error("remove NBD socket {}", path.display())]
    Unlink {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Serves one disk as the default export of a unix socket. Dropping it closes it.
pub struct NbdServer {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    device: Arc<dyn BlockDevice>,
    listener: UnixListener,
    state: Mutex<State>,
    /// Notified when a thread ends.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    unlinked: bool,
    running_threads: usize,
    next_connection: u64,
    /// What to shut down so that its thread wakes up.
    connections: BTreeMap<u64, UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl NbdServer {
    /// Makes the socket at `path`, which must not exist, and serves `device` on it. The socket has
    /// mode 0600 and belongs to `owner`, or to this process's user.
    ///
    /// Clients may connect as soon as this returns. Blocks for as long as a few system calls.
    ///
    /// # Errors
    /// [`BindError`]; nothing is left then.
    pub fn bind(
        path: &Path,
        device: Arc<dyn BlockDevice>,
        owner: Option<SocketOwner>,
    ) -> Result<NbdServer, BindError> {
        let listener = listen(path, owner)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            device,
            listener,
            state: Mutex::new(State::default()),
            ended: Condvar::new(),
        });
        let server = NbdServer { shared: shared.clone() };
        // On an error `server` is dropped, which removes the socket.
        shared.spawn("nbd-accept", |shared| shared.accept_all()).map_err(|source| {
            BindError::Io { step: "start the thread of", path: path.to_owned(), source }
        })?;
        Ok(server)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    /// Hangs up every client, ends every thread and removes the socket. Idempotent.
    ///
    /// Blocks until requests under way are done, at most 10 s: call it from a blocking thread.
    ///
    /// # Errors
    /// [`CloseError`] naming what is left; another call tries again.
    pub fn close(&self) -> Result<(), CloseError> {
        self.shared.close()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Err(e) = self.shared.close() {
            warn!(error = %e, "nbd server dropped but not closed");
        }
    }
}

/// Binds and listens. Between the two the socket gets its mode and owner: a client cannot connect
/// before `listen`, so there is no moment at which the wrong user could.
fn listen(path: &Path, owner: Option<SocketOwner>) -> Result<UnixListener, BindError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX_BYTES {
        return Err(BindError::PathTooLong { path: path.to_owned() });
    }
    let failed = |step| move |source| BindError::Io { step, path: path.to_owned(), source };
    let address = SocketAddrUnix::new(path).map_err(io::Error::from).map_err(failed("name"))?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(io::Error::from)
    .map_err(failed("make"))?;
    rustix::net::bind(&socket, &address).map_err(io::Error::from).map_err(failed("bind"))?;
    let opened = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| match owner {
            Some(owner) => chown(path, Some(owner.uid), Some(owner.gid)),
            None => Ok(()),
        })
        .and_then(|()| Ok(rustix::net::listen(&socket, 16)?));
    match opened {
        Ok(()) => Ok(UnixListener::from(socket)),
        Err(e) => {
            // The error that matters is `e`.
            let _removed = std::fs::remove_file(path);
            Err(failed("open")(e))
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code that can panic runs under this lock")
    }

    /// Runs `body` on a thread that [`Shared::close`] waits for.
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(&Arc<Shared>) + Send + 'static,
    ) -> io::Result<()> {
        let mut state = self.lock();
        let shared = self.clone();
        let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(
            move || {
                // Counts the thread out even if `body` panics.
                let _running = Running(&shared);
                body(&shared);
            },
        )?;
        state.running_threads += 1;
        // Threads that have ended need no join; without this the list grows with every client.
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.push(thread);
        Ok(())
    }

    fn accept_all(self: &Arc<Self>) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                // `close` shuts the listener down, which ends the wait with an error.
                Err(_) if self.lock().closing => return,
                Err(e) if is_transient(&e) => continue,
                Err(e) => {
                    warn!(socket = %self.path.display(), error = %e, "nbd server cannot accept");
                    self.wait_for_room();
                    continue;
                }
            };
            if let Err(e) = self.welcome(stream) {
                warn!(socket = %self.path.display(), error = %e, "nbd client refused");
            }
        }
    }

    /// Waits until a thread has ended, or a moment: this process is out of file descriptors or
    /// memory, and the end of a connection gives some back.
    fn wait_for_room(&self) {
        let state = self.lock();
        if !state.closing {
            let waited = self.ended.wait_timeout(state, ACCEPT_RETRY);
            drop(waited.expect("no code that can panic runs under this lock"));
        }
    }

    /// Registers a client and starts its thread.
    fn welcome(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let waker = stream.try_clone()?;
        let id = {
            let mut state = self.lock();
            if state.closing || state.connections.len() >= CONNECTIONS_MAX {
                return Err(io::Error::other("too many connections, or closing"));
            }
            let id = state.next_connection;
            state.next_connection += 1;
            state.connections.insert(id, waker);
            id
        };
        let started = self.spawn("nbd-connection", move |shared| {
            let _registered = Registered { shared, id };
            shared.talk(stream);
        });
        if started.is_err() {
            self.lock().connections.remove(&id);
        }
        started
    }

    fn talk(&self, stream: UnixStream) {
        let outcome =
            stream.set_read_timeout(Some(HANDSHAKE_DEADLINE)).map_err(Into::into).and_then(|()| {
                let mut duplex = Duplex(BufReader::with_capacity(READ_BUFFER_BYTES, stream));
                serve(&mut duplex, &*self.device, |duplex| {
                    duplex.0.get_ref().set_read_timeout(None)
                })
            });
        match outcome {
            Ok(()) => {}
            Err(_) if self.lock().closing => {}
            Err(e) => {
                let cause = std::error::Error::source(&e).map(ToString::to_string);
                debug!(socket = %self.path.display(), error = %e, cause, "nbd connection ended");
            }
        }
    }

    fn close(&self) -> Result<(), CloseError> {
        let mut state = self.lock();
        state.closing = true;
        // Both calls fail only on sockets that are already shut down.
        let _already = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        for stream in state.connections.values() {
            let _already = stream.shutdown(Shutdown::Both);
        }
        if !state.unlinked {
            match std::fs::remove_file(&self.path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(CloseError::Unlink { path: self.path.clone(), source: e });
                }
                _ => state.unlinked = true,
            }
        }
        let (mut state, _) = self
            .ended
            .wait_timeout_while(state, CLOSE_DEADLINE, |state| state.running_threads > 0)
            .expect("no code that can panic runs under this lock");
        if state.running_threads > 0 {
            return Err(CloseError::Stuck {
                path: self.path.clone(),
                threads: state.running_threads,
                waited_ms: u64::try_from(CLOSE_DEADLINE.as_millis()).unwrap_or(u64::MAX),
            });
        }
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        for thread in threads {
            if thread.join().is_err() {
                error!(socket = %self.path.display(), "a thread of the nbd server panicked");
            }
        }
        Ok(())
    }
}

/// The client went away between connecting and being accepted, or a signal came.
fn is_transient(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted)
}

struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.lock().running_threads -= 1;
        self.0.ended.notify_all();
    }
}

struct Registered<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.shared.lock().connections.remove(&self.id);
    }
}

/// Reads through a buffer, writes straight to the socket.
struct Duplex(BufReader<UnixStream>);

impl Read for Duplex {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Duplex {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
