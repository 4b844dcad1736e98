//! A rig of real packets: threads that live in network namespaces, guests whose card is spliced to
//! a slot's tap, and a stretch of "internet" behind the host.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use belljar_network::{
    GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, GUEST_PREFIX_LEN, Slot, attach_tap,
};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, pipe_with};

/// The port every server of the rig listens on.
pub(crate) const PORT: u16 = 8080;

/// How long a connection that must not come about is waited for.
const PATIENCE: Duration = Duration::from_millis(1500);

/// What this machine lacks for these tests, if anything.
pub(crate) fn lacks() -> Option<&'static str> {
    let runs = |program: &str| Command::new(program).arg("-V").output().is_ok();
    if !rustix::process::geteuid().is_root() {
        Some("needs root")
    } else if File::options().read(true).write(true).open("/dev/net/tun").is_err() {
        Some("needs /dev/net/tun")
    } else if !runs("nft") {
        Some("needs the program nft")
    } else if !runs("ip") {
        Some("needs the program ip")
    } else {
        None
    }
}

/// Runs `ip` with these words in the calling thread's namespace.
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().expect("ip runs");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What a program prints.
fn output(program: &str, words: &str) -> String {
    let output = Command::new(program).args(words.split(' ')).output().expect("it runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that lives in a network namespace and runs what it is handed. A new namespace ends
/// with it.
pub(crate) struct Ns {
    jobs: Option<mpsc::SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Ns {
    pub(crate) fn new() -> Ns {
        Ns::start(|| unshare(CloneFlags::CLONE_NEWNET).expect("root may unshare"))
    }

    pub(crate) fn enter(path: &Path) -> Ns {
        let namespace = File::open(path).expect("the namespace is there");
        Ns::start(move || setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter"))
    }

    fn start(first: impl FnOnce() + Send + 'static) -> Ns {
        let (jobs, queue) = mpsc::sync_channel::<Job>(1);
        let thread = std::thread::spawn(move || {
            first();
            queue.into_iter().for_each(|job| job());
        });
        Ns { jobs: Some(jobs), thread: Some(thread) }
    }

    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || drop(answer.send(job())));
        self.jobs.as_ref().expect("it runs").send(job).expect("the thread lives");
        answered.recv().expect("the job does not panic")
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
        assert!(!panicked || std::thread::panicking());
    }
}

/// A thread that ends when its pipe is closed.
struct Worker {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Calls `work` whenever `ready` can be read.
    fn start(ready: impl AsFdOwned, mut work: impl FnMut() + Send + 'static) -> Worker {
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).expect("pipes are there");
        let thread = std::thread::spawn(move || {
            loop {
                let mut both =
                    [PollFd::new(&ready, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
                retry_on_intr(|| poll(&mut both, None)).expect("polling works");
                if !both[1].revents().is_empty() {
                    return;
                }
                work();
            }
        });
        Worker { stop: Some(stop), thread: Some(thread) }
    }
}

trait AsFdOwned: std::os::fd::AsFd + Send + 'static {}
impl<T: std::os::fd::AsFd + Send + 'static> AsFdOwned for T {}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stop.take());
        let panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
        assert!(!panicked || std::thread::panicking());
    }
}

/// A TCP server that tells every caller the address it sees it under.
pub(crate) struct Server {
    _worker: Worker,
}

impl Server {
    /// Listens on every address of the calling thread's namespace.
    pub(crate) fn start(port: u16) -> Server {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("the port is free");
        let polled = listener.try_clone().expect("descriptors are there");
        let worker = Worker::start(polled, move || {
            if let Ok((mut stream, peer)) = listener.accept() {
                // A caller that left early is its own business.
                let _left = write!(stream, "{}", peer.ip()).is_err();
            }
        });
        Server { _worker: worker }
    }
}

/// Calls a [`Server`] from the calling thread's namespace: the address it sees.
pub(crate) fn call(ip: Ipv4Addr, port: u16) -> io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((ip, port)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut seen = String::new();
    stream.read_to_string(&mut seen)?;
    seen.parse().map_err(io::Error::other)
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|b| format!("{b:02x}")).join(":")
}

/// A machine with a Linux network stack, attached to a slot's tap the way a VMM is.
pub(crate) struct Guest {
    pub ns: Ns,
    _splices: [Worker; 2],
}

impl Guest {
    /// Like a guest restored from a snapshot, it knows its gateway's hardware address.
    pub(crate) fn attach(slot: &Slot) -> Guest {
        let netns = slot.netns.as_deref().expect("the real pool has namespaces");
        let tap = slot.tap.clone();
        let outer = Ns::enter(netns).run(move || attach_tap(&tap).expect("the tap is free"));
        let ns = Ns::new();
        let inner = ns.run(|| {
            let card = attach_tap("eth0").expect("root may make taps");
            ip(&format!("link set eth0 address {}", mac(GUEST_MAC)));
            ip("link set lo up");
            ip("link set eth0 up");
            ip(&format!("addr add {GUEST_IP}/{GUEST_PREFIX_LEN} dev eth0"));
            ip(&format!("route add default via {GATEWAY_IP}"));
            ip(&format!("neigh add {GATEWAY_IP} lladdr {} dev eth0", mac(GATEWAY_MAC)));
            card
        });
        let splices = [splice(&outer, &inner), splice(&inner, &outer)];
        Guest { ns, _splices: splices }
    }

    pub(crate) fn serve(&self) -> Server {
        self.ns.run(|| Server::start(PORT))
    }

    pub(crate) fn call(&self, ip: Ipv4Addr, port: u16) -> io::Result<IpAddr> {
        self.ns.run(move || call(ip, port))
    }
}

/// Carries frames from one tap to the other.
fn splice(from: &OwnedFd, to: &OwnedFd) -> Worker {
    let [polled, from] = [(); 2].map(|()| from.try_clone().expect("descriptors are there"));
    let to = to.try_clone().expect("descriptors are there");
    let mut frame = [0; 65536];
    Worker::start(polled, move || {
        if let Ok(length) = rustix::io::read(&from, &mut frame[..]) {
            // A device that is down loses frames, as cards do.
            let _lost = rustix::io::write(&to, &frame[..length]).is_err();
        }
    })
}

/// A network behind the host: what sandboxes call the internet, and a few addresses they may not
/// reach there. One at a time on a host.
pub(crate) struct Internet {
    pub ns: Ns,
    _server: Server,
}

impl Internet {
    /// A public address (of a block reserved for documentation) with a server behind it.
    pub(crate) const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
    /// The host's own address on that network, which looks public too.
    pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
    /// The router on that network.
    pub(crate) const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    /// With servers behind `others`, too.
    pub(crate) fn start(others: &[Ipv4Addr]) -> Internet {
        let ns = Ns::new();
        let process = std::process::id();
        let behind: Vec<Ipv4Addr> = others.iter().copied().chain([Self::PUBLIC]).collect();
        let addresses = behind.clone();
        let server = ns.run(move || {
            ip(&format!("link add inet type veth peer name bjtest-inet netns {process}"));
            ip("link set lo up");
            ip(&format!("addr add {}/24 dev inet", Self::ROUTER));
            ip("link set inet up");
            for address in addresses {
                ip(&format!("addr add {address}/32 dev lo"));
            }
            Server::start(PORT)
        });
        ip(&format!("addr add {}/24 dev bjtest-inet", Self::HOST));
        ip("link set bjtest-inet up");
        for address in behind {
            ip(&format!("route add {address}/32 via {}", Self::ROUTER));
        }
        Internet { ns, _server: server }
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        ip("link del bjtest-inet");
    }
}

/// Everything on the host that carries the tag.
pub(crate) fn traces(tag: &str) -> Vec<String> {
    let links = output("ip", "-o link");
    let tables = output("nft", "list tables");
    let names = output("ls", "/run/netns");
    let of_tag = |line: &&str| {
        line.contains(&format!("bj{tag}-"))
            || line.contains(&format!("belljar-{tag}-"))
            || line.ends_with(&format!("belljar_{tag}"))
    };
    [links, tables, names]
        .iter()
        .flat_map(|text| text.lines().filter(of_tag).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}
