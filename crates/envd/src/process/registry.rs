//! Every process this daemon started: found by id or tag until 30 s after its end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use belljar_wire::rpc::process::{ProcessConfig, ProcessInfo};
use rustix::process::Signal;
use tokio::io::Interest;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::channel::Channel;
use super::input::Input;
use super::output::{End, Hub, PIPE_BYTES, Source};
use super::start::{self, Ends, Program, StartError, Started};
use crate::children::{self, Ended, Reach};
use crate::state::State;
use crate::task;

/// How long a finished process is still known.
///
/// Source: `contract/e2b-wire.md` section 2.3.
const KEPT_AFTER_END: Duration = Duration::from_secs(30);

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) tag: Option<String>,
    pub(super) config: ProcessConfig,
    pub(super) hub: Arc<Hub>,
    /// `None` when its standard input is the null device.
    pub(super) input: Option<Input>,
    /// `None` when it has pipes.
    pub(super) terminal: Option<Arc<Channel>>,
    /// Cancelled when it is gone. Its end is announced once its output was taken.
    exited: CancellationToken,
}

/// What of a start request is remembered.
#[derive(Debug)]
pub(super) struct Label {
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
}

/// All of them.
pub struct Registry {
    pub(super) state: Arc<State>,
    processes: Mutex<HashMap<u32, Arc<Process>>>,
}

impl Registry {
    /// An empty one.
    pub fn new(state: Arc<State>) -> Registry {
        Registry { state, processes: Mutex::default() }
    }

    /// Starts a program, which is killed at `deadline`, and subscribes to it before its first
    /// output. Blocks; must be called where a runtime is entered.
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub(super) fn start(
        self: &Arc<Self>,
        program: Program,
        label: Label,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Process>, super::output::Subscription), StartError> {
        let Started { pid, ended, ends } =
            start::start(program, self.state.settings().workload.as_deref())?;
        let attached = attach(&self.state.tasks, ends).inspect_err(|_| {
            children::signal(pid, Signal::KILL, Reach::Group);
        });
        let Attached { sources, input, terminal } = attached.map_err(StartError::Streams)?;
        let Label { config, tag } = label;
        let (hub, exited) = (Arc::new(Hub::default()), CancellationToken::new());
        let process = Arc::new(Process { pid, tag, config, hub, input, terminal, exited });
        let subscription = process.hub.subscribe();
        self.lock().insert(pid, Arc::clone(&process));
        let run = follow(Arc::clone(self), Arc::clone(&process), sources, ended, deadline);
        self.state.tasks.spawn(run);
        Ok((process, subscription))
    }

    /// A process by id, also one that ended lately.
    pub(super) fn by_pid(&self, pid: u32) -> Option<Arc<Process>> {
        self.lock().get(&pid).cloned()
    }

    /// A process by tag; a running one before one that ended.
    pub(super) fn by_tag(&self, tag: &str) -> Option<Arc<Process>> {
        let processes = self.lock();
        let tagged = || processes.values().filter(|process| process.tag.as_deref() == Some(tag));
        tagged().find(|process| !process.has_exited()).or_else(|| tagged().next()).cloned()
    }

    /// The running ones.
    pub(super) fn list(&self) -> Vec<ProcessInfo> {
        let processes = self.lock();
        let running = processes.values().filter(|process| !process.has_exited());
        let info = |process: &Arc<Process>| ProcessInfo {
            config: Some(process.config.clone()).into(),
            pid: process.pid,
            tag: process.tag.clone(),
            ..ProcessInfo::default()
        };
        running.map(info).collect()
    }

    /// Kills every process that still runs, with what it left in its group.
    pub(crate) fn kill_all(&self) {
        for pid in self.lock().keys() {
            children::signal(*pid, Signal::KILL, Reach::Group);
        }
    }

    fn forget(&self, process: &Arc<Process>) {
        let mut processes = self.lock();
        // The id may belong to another process by now.
        if processes.get(&process.pid).is_some_and(|known| Arc::ptr_eq(known, process)) {
            processes.remove(&process.pid);
        }
    }

    /// Each change under the lock is one insert or remove, so a panic of a holder leaves it whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Process>>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Process {
    /// Whether it is gone.
    pub(super) fn has_exited(&self) -> bool {
        self.exited.is_cancelled()
    }

    /// Waits until it is gone, at most `limit`. Cancel-safe.
    pub(super) async fn wait_for_exit(&self, limit: Duration) {
        // Who asked goes on either way.
        let _ = tokio::time::timeout(limit, self.exited.cancelled()).await;
    }

    /// Sends a signal. SIGKILL goes to the whole group: a shell cannot take its jobs along.
    /// Says whether the process was still there.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        let reach = if signal == Signal::KILL { Reach::Group } else { Reach::Process };
        children::signal(self.pid, signal, reach)
    }
}

struct Attached {
    sources: Vec<(Arc<Channel>, Source)>,
    input: Option<Input>,
    terminal: Option<Arc<Channel>>,
}

fn attach(tasks: &task::Group, ends: Ends) -> std::io::Result<Attached> {
    match ends {
        Ends::Pipes { stdin, stdout, stderr } => {
            let stdout = Arc::new(Channel::new(stdout, Interest::READABLE)?);
            let stderr = Arc::new(Channel::new(stderr, Interest::READABLE)?);
            stdout.widen(PIPE_BYTES);
            let stdin = stdin.map(|fd| Channel::new(fd, Interest::WRITABLE)).transpose()?;
            Ok(Attached {
                sources: vec![(stdout, Source::Stdout), (stderr, Source::Stderr)],
                input: stdin.map(|stdin| Input::new(tasks, Arc::new(stdin))),
                terminal: None,
            })
        }
        Ends::Terminal(fd) => {
            let both = Interest::READABLE | Interest::WRITABLE;
            let terminal = Arc::new(Channel::new(fd, both)?);
            Ok(Attached {
                sources: vec![(Arc::clone(&terminal), Source::Terminal)],
                input: Some(Input::new(tasks, Arc::clone(&terminal))),
                terminal: Some(terminal),
            })
        }
    }
}

/// Carries a process's output, waits for its end and announces it, and forgets it later.
///
/// The end is announced once the process is gone and what it wrote was taken, whatever it left in
/// the background: see [`super::output`].
async fn follow(
    registry: Arc<Registry>,
    process: Arc<Process>,
    sources: Vec<(Arc<Channel>, Source)>,
    mut ended: oneshot::Receiver<Ended>,
    deadline: Option<Instant>,
) {
    let (behind, mut caught_up) = mpsc::channel::<()>(1);
    let log = registry.state.logs.process(process.pid, &process.config);
    for (channel, source) in sources {
        let (hub, exited) = (Arc::clone(&process.hub), process.exited.clone());
        let (behind, log) = (behind.clone(), log.stream(source));
        registry.state.tasks.spawn(async move {
            hub.pump(&channel, source, &exited, behind, log).await;
        });
    }
    drop(behind);
    let ended = match deadline {
        None => ended.await.ok(),
        Some(at) => match tokio::time::timeout_at(at.into(), &mut ended).await {
            Ok(ended) => ended.ok(),
            Err(_) => {
                process.signal(Signal::KILL);
                ended.await.ok()
            }
        },
    };
    process.exited.cancel();
    // Nothing is ever sent: this is `None` once every pump has dropped its sender.
    let _ = caught_up.recv().await;
    let end = End::new(ended);
    log.ended(&end);
    process.hub.finish(end).await;
    tokio::time::sleep(KEPT_AFTER_END).await;
    registry.forget(&process);
}
