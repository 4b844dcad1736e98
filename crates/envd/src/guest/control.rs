//! The host's control port: a virtio-serial port that carries `wire::guest` lines, or a connection
//! over the machine's socket device where it has no such port.
//!
//! A thread of its own waits on the port, so that an init message right after a restore is
//! answered whatever the rest of the daemon does. It waits for *edges*: a port whose host side is
//! closed reports a hang-up all the time, and its reads return 0, but each change (data, the host
//! coming back) wakes the waiter once. Logs for the host wake it by an alarm of theirs.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use belljar_domain::Secret;
use belljar_wire::ENVD_VERSION;
use belljar_wire::guest::{self, FromGuest, Init, PORT_NAME, ToGuest};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::time::Timespec;

use super::identity::{IdentityFiles, Names};
use super::lines::Lines;
use super::outbox::Outbox;
use super::{IDENTITY_DIR, knock, log_failure, reboot, set_clock};
use crate::children;
use crate::process::log_tap::LogTap;
use crate::state::{NewIdentity, State};
use crate::sys;

/// How often the port is looked for while the kernel still announces it, and for how long.
const SEARCH_PAUSE: Duration = Duration::from_millis(10);
const SEARCH_LIMIT: Duration = Duration::from_secs(30);

/// How long to leave a port alone that could not be used.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Longest wait for an edge; a lost one costs no more than that.
const EDGE_LIMIT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How long programs may take to end after SIGTERM, and after SIGKILL, in a shutdown.
const TERM_GRACE: Duration = Duration::from_millis(1000);
const KILL_GRACE: Duration = Duration::from_millis(500);

/// Starts the thread. Call it once the server listens: it says so to the host.
///
/// # Errors
/// When the thread cannot be made.
pub fn start(state: Arc<State>) -> io::Result<()> {
    std::thread::Builder::new()
        .name("control".to_owned())
        .stack_size(256 * 1024)
        .spawn(move || {
            let outcome = match find_port(Path::new("/sys/class/virtio-ports")) {
                Some(Found::Port) => serve_port(&state),
                Some(Found::SocketDevice) => serve_socket(&state),
                None => Ok(()),
            };
            log_failure("listen for the host", outcome);
            tracing::warn!("the machine has no control port");
        })
        .map(drop)
}

fn booted() -> FromGuest {
    FromGuest::Booted { envd_version: ENVD_VERSION.to_owned() }
}

/// Serves the port for as long as there is one.
fn serve_port(state: &State) -> io::Result<()> {
    let mut first = true;
    while let Some(path) = port_path(Path::new("/sys/class/virtio-ports")) {
        let outcome = Port::open(&path, &state.logs).and_then(|mut port| {
            if std::mem::take(&mut first) {
                port.outbox.say(&booted());
            }
            port.serve(state)
        });
        if let Err(error) = outcome {
            tracing::warn!(%error, "failed to use the control port; opening it again");
            pause(RETRY_PAUSE);
        }
    }
    Ok(())
}

/// Serves the host over the socket device, one connection after the other.
fn serve_socket(state: &State) -> io::Result<()> {
    let door = knock::Door::open()?;
    let mut first = true;
    loop {
        let mut port = Port::over(door.call_in()?, Transport::Socket, &state.logs)?;
        if std::mem::take(&mut first) {
            port.outbox.say(&booted());
        }
        // A connection ends with every run of the machine.
        if let Err(error) = port.serve(state) {
            tracing::debug!(%error, "the host's connection ended");
        }
    }
}

/// How the host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    /// A read of nothing means that the host is not there now.
    Serial,
    /// A read of nothing is the end.
    Socket,
}

/// What the machine has for the host.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Port,
    SocketDevice,
}

/// Waits for the port to appear: the kernel learns its name from the host some time after boot.
fn find_port(class: &Path) -> Option<Found> {
    let mut waited = Duration::ZERO;
    loop {
        if port_path(class).is_some() {
            return Some(Found::Port);
        }
        if knock::is_only_way(Path::new(knock::DRIVERS)) {
            return Some(Found::SocketDevice);
        }
        if waited >= SEARCH_LIMIT {
            return None;
        }
        pause(SEARCH_PAUSE);
        waited += SEARCH_PAUSE;
    }
}

/// The port's device, when it is there.
fn port_path(class: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(class).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            name.trim_end() == PORT_NAME
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .next()
}

#[expect(
    clippy::disallowed_methods,
    reason = "sysfs announces neither the port's name nor its return, so it is looked for"
)]
fn pause(length: Duration) {
    std::thread::sleep(length);
}

struct Port {
    device: OwnedFd,
    transport: Transport,
    edges: OwnedFd,
    lines: Lines,
    outbox: Outbox,
    identity: IdentityFiles,
}

impl Port {
    fn open(path: &Path, logs: &LogTap) -> io::Result<Port> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        Port::over(rustix::fs::open(path, flags, Mode::empty())?, Transport::Serial, logs)
    }

    /// Over a descriptor that does not block.
    fn over(device: OwnedFd, transport: Transport, logs: &LogTap) -> io::Result<Port> {
        let edges = epoll::create(CreateFlags::CLOEXEC)?;
        let both_ways = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&edges, &device, EventData::new_u64(0), both_ways)?;
        epoll::add(&edges, logs.alarm()?, EventData::new_u64(1), EventFlags::IN | EventFlags::ET)?;
        let identity = IdentityFiles::new(Path::new(IDENTITY_DIR));
        let (lines, outbox) = (Lines::default(), Outbox::default());
        Ok(Port { device, transport, edges, lines, outbox, identity })
    }

    /// Obeys the host until the port is gone.
    fn serve(&mut self, state: &State) -> io::Result<()> {
        loop {
            self.flush(&state.logs)?;
            let mut events = Vec::with_capacity(1);
            match epoll::wait(&self.edges, spare_capacity(&mut events), Some(&EDGE_LIMIT)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(more) = self.receive(&state.logs)? {
                self.lines.push(&more);
                while let Some(line) = self.lines.next() {
                    let Obeyed { answer, names } = obey(state, &line);
                    self.outbox.say(&answer);
                    let flushed = self.flush(&state.logs);
                    if let Some(names) = names {
                        log_failure("write the identity files", self.identity.write(names));
                        // Also when the port broke: requests wait for this.
                        state.set_settling(false);
                    }
                    flushed?;
                }
            }
        }
    }

    /// What has arrived; `None` when that was all.
    fn receive(&mut self, logs: &LogTap) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::with_capacity(16 * 1024);
        loop {
            return match rustix::io::read(&self.device, spare_capacity(&mut bytes)) {
                Ok(0) => {
                    // The host is not there: half a line of the last one means nothing to the next,
                    // and logs are for whoever listens.
                    self.lines.clear();
                    logs.clear();
                    match self.transport {
                        Transport::Serial => Ok(None),
                        Transport::Socket => Err(io::ErrorKind::UnexpectedEof.into()),
                    }
                }
                Ok(_) => Ok(Some(bytes)),
                Err(Errno::AGAIN) => Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Writes what the host takes now; the rest waits for the next edge.
    fn flush(&mut self, logs: &LogTap) -> io::Result<()> {
        Ok(self.outbox.flush(logs, |bytes| rustix::io::write(&self.device, bytes))?)
    }
}

/// What became of one line.
#[derive(Debug, PartialEq, Eq)]
struct Obeyed {
    answer: FromGuest,
    /// To be written once the answer is out; requests wait for that, the host need not.
    names: Option<Names>,
}

impl Obeyed {
    fn with(answer: FromGuest) -> Obeyed {
        Obeyed { answer, names: None }
    }
}

/// Does what one line says.
fn obey(state: &State, line: &[u8]) -> Obeyed {
    match guest::decode(line) {
        Ok(ToGuest::Init(init)) => {
            let nonce = init.nonce;
            match initialise(state, init) {
                Ok(names) => Obeyed {
                    answer: FromGuest::Ready { nonce, envd_version: ENVD_VERSION.to_owned() },
                    names: Some(names),
                },
                Err(error) => Obeyed::with(FromGuest::Failed { nonce, message: error.to_string() }),
            }
        }
        Ok(ToGuest::PrepareSnapshot { nonce }) => {
            rustix::fs::sync();
            state.logs.hold();
            Obeyed::with(FromGuest::Prepared { nonce })
        }
        Ok(ToGuest::Continue { nonce, time_unix_ns }) => {
            // Logs go on whether or not the clock can be set: the host hears of that.
            state.logs.release();
            let stepped = if time_unix_ns == 0 { Ok(()) } else { set_clock(time_unix_ns) };
            Obeyed::with(match stepped.map_err(InitError::Clock) {
                Ok(()) => FromGuest::Continued { nonce },
                Err(error) => FromGuest::Failed { nonce, message: error.to_string() },
            })
        }
        Ok(ToGuest::Shutdown) => {
            // What is frozen could neither be asked to end nor write what it must.
            state.thaw();
            shut_down();
            let message = "the machine could not be ended".to_owned();
            Obeyed::with(FromGuest::Failed { nonce: 0, message })
        }
        Err(error) => Obeyed::with(FromGuest::Failed { nonce: 0, message: error.to_string() }),
    }
}

/// Why an init message was not followed.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("set the clock: {0}")]
    Clock(io::Error),
    #[error("read the entropy as hex")]
    Hex,
    #[error("mix in entropy: {0}")]
    Entropy(io::Error),
}

/// Time and randomness come first: nothing may run under the new name with its sibling's.
fn initialise(state: &State, init: Init) -> Result<Names, InitError> {
    if init.time_unix_ns != 0 {
        set_clock(init.time_unix_ns).map_err(InitError::Clock)?;
    }
    if !init.entropy_hex.is_empty() {
        let entropy = hex::decode(&init.entropy_hex).map_err(|_| InitError::Hex)?;
        for piece in entropy.chunks(sys::ENTROPY_MAX_BYTES) {
            sys::add_entropy(piece).map_err(InitError::Entropy)?;
        }
    }
    // A snapshot taken between a freeze and its end holds a frozen guest.
    state.thaw();
    let names =
        Names { sandbox_id: init.sandbox_id.clone(), template_id: init.template_id.clone() };
    state.set_settling(true);
    state.become_sandbox(NewIdentity {
        new_run: true,
        sandbox_id: Some(init.sandbox_id),
        template_id: Some(init.template_id),
        access_token: init.access_token.filter(|token| !token.is_empty()).map(Secret::new),
        env_vars: init.env_vars,
        default_user: init.default_user,
        default_workdir: init.default_workdir,
    });
    state.logs.want(init.logs);
    Ok(names)
}

fn shut_down() {
    // Failing means that nobody is left to be told.
    let _ = sys::signal_everyone(Signal::TERM);
    if !children::wait_until_childless(TERM_GRACE) {
        let _ = sys::signal_everyone(Signal::KILL);
        children::wait_until_childless(KILL_GRACE);
    }
    reboot();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Settings, TokenCheck};

    #[test]
    fn an_init_line_is_applied_and_answered_with_its_nonce() {
        let state = State::new(Settings::on_host("root"));
        let init = Init {
            nonce: 42,
            sandbox_id: "iabc".to_owned(),
            template_id: "base".to_owned(),
            access_token: Some("secret".to_owned()),
            ..Init::default()
        };
        let obeyed = obey(&state, &guest::encode(&ToGuest::Init(init)));
        let envd_version = ENVD_VERSION.to_owned();
        let names = Names { sandbox_id: "iabc".to_owned(), template_id: "base".to_owned() };
        assert_eq!(
            obeyed,
            Obeyed { answer: FromGuest::Ready { nonce: 42, envd_version }, names: Some(names) }
        );
        assert_eq!(state.check_token(Some(b"secret")), TokenCheck::Right);
    }

    #[tokio::test]
    async fn requests_wait_until_the_names_are_written() {
        let state = State::new(Settings::on_host("root"));
        state.settled().await;
        obey(&state, &guest::encode(&ToGuest::Init(Init::default())));
        let mut waiting = std::pin::pin!(state.settled());
        assert!(futures::poll!(&mut waiting).is_pending());
        state.set_settling(false);
        waiting.await;
    }

    #[test]
    fn junk_and_bad_entropy_are_answered_as_failed() {
        let state = State::new(Settings::on_host("root"));
        assert!(matches!(obey(&state, b"{}\n").answer, FromGuest::Failed { nonce: 0, .. }));
        let init = Init { nonce: 9, entropy_hex: "zz".to_owned(), ..Init::default() };
        assert!(matches!(
            obey(&state, &guest::encode(&ToGuest::Init(init))).answer,
            FromGuest::Failed { nonce: 9, .. }
        ));
    }

    #[test]
    fn a_snapshot_is_prepared_by_flushing() {
        let state = State::new(Settings::on_host("root"));
        let line = guest::encode(&ToGuest::PrepareSnapshot { nonce: 3 });
        assert_eq!(obey(&state, &line), Obeyed::with(FromGuest::Prepared { nonce: 3 }));
    }

    #[test]
    fn a_guest_that_goes_on_is_who_it_was_and_has_its_logs() {
        let state = State::new(Settings::on_host("root"));
        let init = Init {
            nonce: 1,
            access_token: Some("secret".to_owned()),
            logs: true,
            ..Init::default()
        };
        obey(&state, &guest::encode(&ToGuest::Init(init)));
        state.set_settling(false);
        obey(&state, &guest::encode(&ToGuest::PrepareSnapshot { nonce: 2 }));
        assert!(state.logs.is_held() && state.logs.is_wanted());
        let line = guest::encode(&ToGuest::Continue { nonce: 3, time_unix_ns: 0 });
        assert_eq!(obey(&state, &line), Obeyed::with(FromGuest::Continued { nonce: 3 }));
        assert!(!state.logs.is_held() && state.logs.is_wanted());
        assert_eq!(state.check_token(Some(b"secret")), TokenCheck::Right);

        // As a clone of it is told who it is.
        obey(&state, &guest::encode(&ToGuest::PrepareSnapshot { nonce: 4 }));
        let epoch = state.logs.epoch();
        obey(&state, &guest::encode(&ToGuest::Init(Init { logs: true, ..Init::default() })));
        assert!(!state.logs.is_held() && state.logs.epoch() != epoch);
    }

    #[test]
    fn the_port_is_found_by_its_name() {
        let class = tempfile::tempdir().expect("a directory");
        for (port, name) in [("vport0p1", "other"), ("vport0p2", PORT_NAME)] {
            std::fs::create_dir(class.path().join(port)).expect("made");
            std::fs::write(class.path().join(port).join("name"), format!("{name}\n"))
                .expect("written");
        }
        assert_eq!(port_path(class.path()), Some(PathBuf::from("/dev/vport0p2")));
        assert_eq!(find_port(class.path()), Some(Found::Port));
    }
}
