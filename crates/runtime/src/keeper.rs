//! Who starts and reaps the machine processes: one thread that lives as long as they do.
//!
//! A child asks the kernel to be killed when its parent *thread* dies, so a thread of a pool must
//! not start it. The same thread reaps, and removes a machine's cgroup before it tells that the
//! machine is gone; so a machine that is merely dropped leaves nothing either, and none of it
//! needs an async runtime.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal,
    waitid,
};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, warn};

use crate::cgroup::{Cgroups, Group, Limits};
use crate::machine::{Identity, StartError};
use crate::sys::jail::Root;
use crate::sys::{self, ChildSetup};

/// Starts that may wait for the thread; more wait for a place.
const QUEUE: usize = 32;
/// A group can be busy for a moment after its last process was reaped.
const GROUP_RETRY: Duration = Duration::from_millis(10);
const GROUP_LIMIT: Duration = Duration::from_secs(2);

/// A process to start.
pub(crate) struct Launch {
    /// The machine's name, which is its cgroup's too.
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    /// Descriptors the process gets under the numbers they have now.
    pub(crate) inherit: Vec<OwnedFd>,
    pub(crate) netns: Option<OwnedFd>,
    /// Its file system; the program is looked for there.
    pub(crate) root: Option<Root>,
    pub(crate) identity: Option<Identity>,
    /// Standard output and error.
    pub(crate) log: File,
    pub(crate) cgroups: Arc<Cgroups>,
    pub(crate) limits: Limits,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exit {
    /// For the log.
    pub(crate) status: String,
    /// Why its cgroup is still there, if it is.
    pub(crate) leftover: Option<String>,
}

/// A running process. Dropping it kills it, and the keeper cleans up after it.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    /// The thread lives as long as its children, or they would die with it.
    _keeper: Arc<Keeper>,
}

/// Names a process without keeping it alive.
#[derive(Debug, Clone)]
pub(crate) struct ProcessHandle {
    pid: u32,
    pidfd: Arc<OwnedFd>,
}

impl ProcessHandle {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that is readable once it has ended.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn end_descriptor(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Whether it has not ended. While that is so its id means it.
    pub(crate) fn is_alive(&self) -> bool {
        let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut watched, Some(&now)) == Ok(0)
    }
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn handle(&self) -> ProcessHandle {
        ProcessHandle { pid: self.pid, pidfd: Arc::clone(&self.pidfd) }
    }

    /// Kills it, without waiting.
    pub(crate) fn kill(&self) {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            // Already gone is what was wanted.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => warn!(pid = self.pid, error = %e, "a machine process cannot be killed"),
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Waits until it is reaped and its cgroup is removed. Cancel-safe.
    pub(crate) async fn wait(&mut self) -> Exit {
        match self.exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().expect("waited until there is one"),
            Err(_) => Exit {
                status: "the thread that watches it ended".to_owned(),
                leftover: Some("nobody reaps its process".to_owned()),
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
        }
    }
}

struct Request {
    launch: Launch,
    keeper: Arc<Keeper>,
    reply: oneshot::Sender<Result<Process, StartError>>,
}

/// The door to the thread.
#[derive(Debug)]
pub(crate) struct Keeper {
    requests: Option<mpsc::Sender<Request>>,
    wake: Arc<OwnedFd>,
}

impl Keeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn start() -> io::Result<Arc<Keeper>> {
        let (requests, inbox) = mpsc::channel(QUEUE);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let rounds = Rounds { inbox, wake: Arc::clone(&wake), kept: Vec::new() };
        std::thread::Builder::new()
            .name("machine keeper".to_owned())
            .spawn(move || rounds.run())?;
        Ok(Arc::new(Keeper { requests: Some(requests), wake }))
    }

    /// Starts a process and puts it into its cgroup. When this is cancelled, a process that was
    /// started all the same is killed.
    ///
    /// # Errors
    /// [`StartError::Io`]; nothing of the process is left then.
    pub(crate) async fn launch(self: &Arc<Self>, launch: Launch) -> Result<Process, StartError> {
        let gone = || StartError::Io {
            step: "reach the thread that starts machines",
            source: io::ErrorKind::BrokenPipe.into(),
        };
        let (reply, answer) = oneshot::channel();
        let request = Request { launch, keeper: Arc::clone(self), reply };
        let requests = self.requests.as_ref().expect("taken only when dropped");
        requests.send(request).await.map_err(|_| gone())?;
        self.ring();
        answer.await.map_err(|_| gone())?
    }

    fn ring(&self) {
        // Full means that it rings already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.requests.take());
        self.ring();
    }
}

/// A child and what is to be done when it ends.
struct Kept {
    name: String,
    pidfd: Arc<OwnedFd>,
    group: Group,
    exit: watch::Sender<Option<Exit>>,
    /// Set once reaped, while the group is still busy: the status, and when to give up.
    reaped: Option<(String, Instant)>,
}

/// The thread's own state.
struct Rounds {
    inbox: mpsc::Receiver<Request>,
    wake: Arc<OwnedFd>,
    kept: Vec<Kept>,
}

impl Rounds {
    fn run(mut self) {
        loop {
            let open = self.take_requests();
            self.kept.retain_mut(|kept| !kept.finish());
            if !open && self.kept.is_empty() {
                return;
            }
            self.wait();
        }
    }

    /// Starts what is asked for; says whether more may come.
    fn take_requests(&mut self) -> bool {
        // Before the queue is read: a ring after this shows up in the next wait.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        loop {
            match self.inbox.try_recv() {
                Ok(Request { launch, keeper, reply }) => {
                    let started = start(launch).map(|(pid, kept)| {
                        let process = Process {
                            pid,
                            pidfd: Arc::clone(&kept.pidfd),
                            exit: kept.exit.subscribe(),
                            _keeper: keeper,
                        };
                        self.kept.push(kept);
                        process
                    });
                    // Nobody waits any more: the dropped process kills itself.
                    drop(reply.send(started));
                }
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Waits for a ring or the end of a child.
    fn wait(&self) {
        let retry = self.kept.iter().any(|kept| kept.reaped.is_some());
        let timeout =
            retry.then(|| Timespec { tv_sec: 0, tv_nsec: i64::from(GROUP_RETRY.subsec_nanos()) });
        let running = self.kept.iter().filter(|kept| kept.reaped.is_none());
        let mut watched: Vec<PollFd<'_>> = std::iter::once(&self.wake)
            .chain(running.map(|kept| &kept.pidfd))
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        // An interrupted wait is a round too early, and a round is harmless.
        let _ = poll(&mut watched, timeout.as_ref());
    }
}

impl Kept {
    /// Reaps the child if it has ended and removes its group; says whether all is done.
    fn finish(&mut self) -> bool {
        if self.reaped.is_none() {
            let Some(status) = reap(&self.pidfd, WaitIdOptions::NOHANG) else { return false };
            self.reaped = Some((status, Instant::now() + GROUP_LIMIT));
        }
        let Some((status, give_up)) = &self.reaped else { return false };
        let leftover = match self.group.remove() {
            Ok(()) => None,
            Err(_) if Instant::now() < *give_up => return false,
            Err(e) => Some(format!("its cgroup stays: {e}")),
        };
        debug!(machine = self.name, status, ?leftover, "machine process ended");
        self.exit.send_replace(Some(Exit { status: status.clone(), leftover }));
        true
    }
}

/// Reaps a child; `None` while it runs and `options` say not to wait.
fn reap(pidfd: &OwnedFd, options: WaitIdOptions) -> Option<String> {
    use std::os::fd::AsFd as _;
    match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | options) {
        Ok(None) | Err(rustix::io::Errno::INTR) => None,
        Ok(Some(status)) => Some(describe(&status)),
        Err(e) => Some(format!("with a status nobody knows: {e}")),
    }
}

fn describe(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".to_owned(),
    }
}

fn start(launch: Launch) -> Result<(u32, Kept), StartError> {
    let group = launch
        .cgroups
        .create(&launch.name, &launch.limits)
        .map_err(|source| StartError::Io { step: "make the machine's cgroup", source })?;
    let started = spawn(&launch).and_then(|(pid, pidfd)| {
        // After exec and not between fork and exec: the first move into a memory group after a
        // quiet time waits for every processor (18 ms measured), and here that passes while the
        // program is loaded. Nothing of the guest runs before its monitor is told to.
        group.attach(pid).map_err(|source| {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            while reap(&pidfd, WaitIdOptions::empty()).is_none() {}
            StartError::Io { step: "put the machine into its cgroup", source }
        })?;
        Ok((pid, pidfd))
    });
    match started {
        Ok((pid, pidfd)) => {
            let (exit, _) = watch::channel(None);
            let name = launch.name;
            Ok((pid, Kept { name, pidfd: Arc::new(pidfd), group, exit, reaped: None }))
        }
        Err(e) => {
            if let Err(left) = group.remove() {
                warn!(machine = launch.name, error = %left, "a cgroup stays after a failed start");
            }
            Err(e)
        }
    }
}

/// Starts the process itself.
fn spawn(launch: &Launch) -> Result<(u32, OwnedFd), StartError> {
    const STEP: &str = "start the machine process";
    let io = |source| StartError::Io { step: STEP, source };
    let mut command = Command::new(&launch.program);
    command
        .args(&launch.args)
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(launch.log.try_clone().map_err(io)?)
        .stderr(launch.log.try_clone().map_err(io)?);
    let setup = ChildSetup {
        netns: launch.netns.as_ref().map(|fd| fd.as_raw_fd()),
        root: launch.root.clone(),
        identity: launch.identity,
        inherit: launch.inherit.iter().map(|fd| fd.as_raw_fd()).collect(),
    };
    sys::confine(&mut command, setup);
    let child = command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            StartError::Missing { what: "the machine monitor", path: launch.program.clone() }
        }
        _ => io(source),
    })?;
    let pid = Pid::from_child(&child);
    // The child cannot be reaped by anybody else, so its id still means it.
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| {
        let mut child = child;
        drop(child.kill().and_then(|()| child.wait()));
        io(e.into())
    })?;
    Ok((pid.as_raw_nonzero().get().cast_unsigned(), pidfd))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(script: &str) -> Launch {
        Launch {
            name: "keeper-test".into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            inherit: Vec::new(),
            netns: None,
            root: None,
            identity: None,
            log: File::options().write(true).open("/dev/null").expect("every Linux has it"),
            cgroups: Arc::new(Cgroups::Unbounded { reason: "a test".into() }),
            limits: Limits { memory_bytes: 0, processes: 0, vcpus: 1 },
        }
    }

    #[tokio::test]
    async fn an_end_is_reaped_and_described() {
        let keeper = Keeper::start().expect("a thread");
        let mut process = keeper.launch(launch("exit 3")).await.expect("a shell");
        assert_eq!(process.wait().await.status, "exit status 3");
        assert!(!std::path::Path::new(&format!("/proc/{}", process.pid())).exists());
    }

    #[tokio::test]
    async fn a_dropped_process_dies_and_is_reaped() {
        let keeper = Keeper::start().expect("a thread");
        let process = keeper.launch(launch("exec sleep 1000")).await.expect("a shell");
        let mut exit = process.exit.clone();
        drop(keeper);
        drop(process);
        let ended = exit.wait_for(Option::is_some).await.expect("the thread reaps it first");
        assert_eq!(ended.clone().expect("waited for it").status, "signal 9");
    }

    #[tokio::test]
    async fn only_named_descriptors_reach_the_process() {
        use std::os::unix::fs::MetadataExt as _;
        let keeper = Keeper::start().expect("a thread");
        let (named, unnamed) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        // As a careless library would leave it.
        rustix::io::fcntl_setfd(&unnamed, rustix::io::FdFlags::empty()).expect("an open one");
        let link = |socket: &std::os::unix::net::UnixStream| {
            let file = File::from(OwnedFd::from(socket.try_clone().expect("an open one")));
            PathBuf::from(format!("socket:[{}]", file.metadata().expect("an open one").ino()))
        };
        let (wanted, unwanted) = (link(&named), link(&unnamed));
        let mut start = launch("exec sleep 1000");
        start.inherit.push(named.into());
        let process = keeper.launch(start).await.expect("a shell");
        let open: Vec<PathBuf> = std::fs::read_dir(format!("/proc/{}/fd", process.pid()))
            .expect("it runs")
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .collect();
        assert!(open.contains(&wanted) && !open.contains(&unwanted), "{open:?}");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let keeper = Keeper::start().expect("a thread");
        let missing = Launch { program: "/nonexistent/monitor".into(), ..launch("") };
        let error = keeper.launch(missing).await.expect_err("it is not there");
        assert!(matches!(error, StartError::Missing { .. }), "{error}");
    }
}
