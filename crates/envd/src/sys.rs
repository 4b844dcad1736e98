//! System calls that have no safe wrapper among the dependencies. The only unsafe code of the crate.
#![expect(unsafe_code, reason = "raw system calls; each block states its proof")]
// JUSTIFICATION: child set-up between fork and exec, waiting for any child, interface ioctls and
// the kernel's random pool have no safe interface in rustix or std.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It returned this code, 0 to 255.
    Exited(i32),
    /// A signal ended it.
    Killed {
        /// The signal's number.
        signal: i32,
        /// Whether it left a core image.
        core_dumped: bool,
    },
}

/// Waits until any child of this process has ended and leaves it to be reaped.
/// `None` when there are no children at all.
pub(crate) fn wait_for_ended_child() -> io::Result<Option<u32>> {
    loop {
        // SAFETY: all-zero bytes are a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is a live siginfo_t; the flags neither reap nor touch other memory.
        let outcome =
            unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOWAIT) };
        if outcome == 0 {
            // SAFETY: waitid succeeded for WEXITED, so the SIGCHLD fields are the ones filled in.
            let pid = unsafe { info.si_pid() };
            return Ok(u32::try_from(pid).ok());
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
            error => return Err(error),
        }
    }
}

/// Whether this process has any child, ended or not.
pub(crate) fn has_children() -> bool {
    // SAFETY: all-zero bytes are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOWAIT | libc::WNOHANG;
    // SAFETY: `info` is a live siginfo_t; the flags neither reap nor touch other memory.
    unsafe { libc::waitid(libc::P_ALL, 0, &mut info, flags) == 0 }
}

/// Reaps a child that has ended. `None` when it has not, or is no child of ours (any more).
pub(crate) fn reap(pid: u32) -> Option<Ended> {
    let pid = libc::pid_t::try_from(pid).ok()?;
    let mut status = 0;
    // SAFETY: `status` is a live int, the only memory the call writes.
    let reaped = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
    if reaped != pid {
        return None;
    }
    if libc::WIFSIGNALED(status) {
        return Some(Ended::Killed {
            signal: libc::WTERMSIG(status),
            core_dumped: libc::WCOREDUMP(status),
        });
    }
    Some(Ended::Exited(libc::WEXITSTATUS(status)))
}

/// The user a child runs as.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// What a child does to itself between fork and exec, in this order: its control group, its own
/// session, the terminal on standard input, the score by which the kernel picks whom to kill when memory ends,
/// the user, the directory.
#[derive(Debug)]
pub(crate) struct ChildSetup {
    /// The `cgroup.procs` of the group to join; `None` stays in the daemon's.
    pub(crate) group: Option<Arc<OwnedFd>>,
    /// Standard input becomes the controlling terminal.
    pub(crate) terminal: bool,
    /// Decimal text for `/proc/self/oom_score_adj`.
    pub(crate) oom_score_adj: &'static str,
    /// Whom to become; `None` keeps the user.
    pub(crate) credentials: Option<Credentials>,
    /// Where to start.
    pub(crate) cwd: CString,
}

/// Has `command` apply `setup` in the child.
pub(crate) fn install_child_setup(command: &mut Command, setup: ChildSetup) {
    // SAFETY: `ChildSetup::apply` only makes system calls on data prepared before the fork; it
    // allocates nothing and takes no locks.
    unsafe {
        command.pre_exec(move || setup.apply());
    }
}

impl ChildSetup {
    fn apply(&self) -> io::Result<()> {
        self.join_group();
        // SAFETY: setsid takes no arguments.
        check(unsafe { libc::setsid() }.into())?;
        if self.terminal {
            // SAFETY: TIOCSCTTY takes an integer argument; descriptor 0 is the child's own.
            check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into())?;
        }
        self.set_oom_score();
        if let Some(user) = &self.credentials {
            // The C library's setuid family synchronises threads, which a forked child must not
            // do; the plain system calls act on the one thread there is.
            let groups = user.groups.as_ptr();
            // SAFETY: `groups` points at `len` ids that live in `self`.
            check(unsafe { libc::syscall(libc::SYS_setgroups, user.groups.len(), groups) })?;
            let (gid, uid) = (user.gid, user.uid);
            // SAFETY: setresgid takes three integers.
            check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
            // SAFETY: setresuid takes three integers.
            check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
        }
        // SAFETY: `cwd` is a NUL-terminated string that lives in `self`.
        check(unsafe { libc::chdir(self.cwd.as_ptr()) }.into())
    }

    /// Joins by the daemon's descriptor, which is allowed whoever the child becomes later.
    ///
    /// Best effort: root inside may have removed the group or handed its controllers on, and a
    /// process without its limits is more use to it than none.
    fn join_group(&self) {
        if let Some(group) = &self.group {
            // SAFETY: the descriptor is open as long as `group` lives; the text outlives the write.
            unsafe { libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1) };
        }
    }

    /// Best effort: a container may forbid it, and a process with the wrong score still runs.
    fn set_oom_score(&self) {
        // SAFETY: the path is a NUL-terminated literal.
        let fd = unsafe {
            libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC)
        };
        if fd >= 0 {
            // SAFETY: `fd` was just opened and is closed once; the text outlives the write.
            unsafe {
                libc::write(fd, self.oom_score_adj.as_ptr().cast(), self.oom_score_adj.len());
                libc::close(fd);
            }
        }
    }
}

fn check(outcome: libc::c_long) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the runtime watch a descriptor. Must be called where a runtime is entered.
pub(crate) fn watch_descriptor(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is valid for as long as it lives, and nothing replaces it in there.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// The host's number among peers of the socket device.
const HOST_CID: libc::c_uint = 2;
/// How many hosts may wait: there is one.
const BACKLOG: libc::c_int = 4;

/// Listens for the host on the machine's socket device, without blocking.
///
/// # Errors
/// As `socket(2)`, `bind(2)` and `listen(2)`: `EAFNOSUPPORT` where the kernel has no such sockets.
pub(crate) fn listen_for_host(port: u32) -> io::Result<OwnedFd> {
    let socket = host_socket(libc::SOCK_NONBLOCK)?;
    let address = host_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the structure and its length belong together, and outlive the call.
    unsafe {
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES).into())?;
        check(libc::listen(socket.as_raw_fd(), BACKLOG).into())?;
    }
    Ok(socket)
}

/// Takes a connection of such a socket, without blocking; one that is not the host's is closed.
///
/// # Errors
/// As `accept4(2)`; `ConnectionRefused` for another peer.
pub(crate) fn accept_host(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let mut peer = host_address(0, 0);
    let mut bytes = ADDRESS_BYTES;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes an address of at most `bytes`, which is its size.
    let fd = unsafe {
        libc::accept4(listener.as_raw_fd(), (&raw mut peer).cast(), &raw mut bytes, flags)
    };
    check(fd.into())?;
    // SAFETY: the call has just made it, and nobody else knows of it.
    let connection = unsafe { OwnedFd::from_raw_fd(fd) };
    if peer.svm_cid == HOST_CID {
        Ok(connection)
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Connects to a port of the host and hangs up. Blocks up to two seconds.
///
/// # Errors
/// As `connect(2)`.
pub(crate) fn knock_at_host(port: u32) -> io::Result<()> {
    let socket = host_socket(0)?;
    let address = host_address(HOST_CID, port);
    // SAFETY: the structure and its length belong together, and outlive the call.
    let outcome =
        unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) };
    check(outcome.into())
}

const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn host_address(cid: libc::c_uint, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero bytes are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

fn host_socket(flags: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags;
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    check(fd.into())?;
    // SAFETY: the call has just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Brings an IPv4 interface up, with an address and netmask when given.
pub(crate) fn interface_up(name: &str, address: Option<(Ipv4Addr, Ipv4Addr)>) -> io::Result<()> {
    let socket = control_socket()?;
    if let Some((address, mask)) = address {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        interface_ioctl(&socket, libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = socket_address(mask);
        interface_ioctl(&socket, libc::SIOCSIFNETMASK, &mut request)?;
    }
    let mut request = interface_request(name)?;
    interface_ioctl(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS succeeded, so `ifru_flags` is the member that was written.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::IFF_UP as libc::c_short;
    request.ifr_ifru.ifru_flags = flags | up;
    interface_ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Adds the default IPv4 route. An existing identical route is fine.
pub(crate) fn default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = control_socket()?;
    // SAFETY: all-zero bytes are a valid rtentry.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads one rtentry, which `route` is.
    match check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &route) }.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        outcome => outcome,
    }
}

fn control_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn interface_ioctl(
    socket: &OwnedFd,
    operation: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: every operation used here reads or writes exactly one ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), operation, request) }.into())
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero bytes are a valid sockaddr.
    let mut out: libc::sockaddr = unsafe { std::mem::zeroed() };
    out.sa_family = libc::AF_INET as libc::sa_family_t;
    // A sockaddr_in is family, port (2 bytes, zero here), address (4 bytes, network order).
    for (to, from) in out.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    out
}

/// Longest piece of randomness one call mixes in, in bytes.
pub(crate) const ENTROPY_MAX_BYTES: usize = 512;

/// Mixes randomness into the kernel's pool, credits it, and has every generator use it at once.
///
/// Two clones of one snapshot hold the same pool; without this they would produce the same
/// "random" numbers. Source of the two requests: `random(4)`.
pub(crate) fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        size_bytes: libc::c_int,
        bytes: [u8; ENTROPY_MAX_BYTES],
    }
    let length = bytes.len().min(ENTROPY_MAX_BYTES);
    let size_bytes = libc::c_int::try_from(length).expect("at most 512");
    let mut info =
        PoolInfo { entropy_bits: size_bytes * 8, size_bytes, bytes: [0; ENTROPY_MAX_BYTES] };
    info.bytes[..length].copy_from_slice(&bytes[..length]);
    let device = random_device()?;
    // SAFETY: RNDADDENTROPY reads the header and `size_bytes` bytes after it, all inside `info`.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &info) }.into())?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) }.into())
}

/// The kernel's random device, kept open: a clone adds its own randomness first thing, and
/// every system call it need not make brings it up sooner.
fn random_device() -> io::Result<&'static File> {
    static DEVICE: OnceLock<File> = OnceLock::new();
    match DEVICE.get() {
        Some(device) => Ok(device),
        None => {
            let device = File::options().write(true).open("/dev/urandom")?;
            Ok(DEVICE.get_or_init(|| device))
        }
    }
}

/// Stops all writing to the file system behind `directory`, flushed and consistent. `EBUSY`: it is
/// stopped already. Source of the requests: `linux/fs.h`.
pub(crate) fn freeze_file_system(directory: &OwnedFd) -> io::Result<()> {
    const FIFREEZE: libc::Ioctl = 0xc004_5877;
    // SAFETY: FIFREEZE ignores its argument.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FIFREEZE, 0) }.into())
}

/// Lets writing go on. `EINVAL`: it was not stopped.
pub(crate) fn thaw_file_system(directory: &OwnedFd) -> io::Result<()> {
    const FITHAW: libc::Ioctl = 0xc004_5878;
    // SAFETY: FITHAW ignores its argument.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FITHAW, 0) }.into())
}

/// Sends SIGTERM or SIGKILL to every process but this one. Only PID 1 may want that.
pub(crate) fn signal_everyone(signal: rustix::process::Signal) -> io::Result<()> {
    // SAFETY: kill takes two integers; -1 spares the caller itself.
    check(unsafe { libc::kill(-1, signal.as_raw()) }.into())
}
