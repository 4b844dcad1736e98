//! Real slots on this host: real packets, real leaks. Needs root, `/dev/net/tun`, `nft` and `ip`.

mod support;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use belljar_daemon::Scope;
use belljar_network::{
    EgressPolicy, GATEWAY_IP, GUEST_IP, LeaseError, OpenError, Slot, SlotPool, Slots, SlotsConfig,
    contract,
};
use futures::future::try_join_all;
use support::{Guest, Internet, PORT, Server, call, lacks, traces};

/// Each test has its own tag and range, so they run side by side.
fn config(tag: &str, second_octet: u8) -> SlotsConfig {
    let cidr = format!("10.{second_octet}.0.0/24").parse().expect("a block");
    SlotsConfig { cidr, capacity: 16, ready_low: 1, ready_high: 2, ..SlotsConfig::new(tag) }
}

struct Rig {
    scope: Scope,
    pool: SlotPool,
    tag: String,
}

impl Rig {
    async fn open(config: SlotsConfig) -> Rig {
        let scope = Scope::root("network test");
        let tag = config.tag.clone();
        let pool = SlotPool::open(config, &scope).await.expect("the host has what it takes");
        Rig { scope, pool, tag }
    }

    async fn lease(&self, policy: EgressPolicy) -> Slot {
        self.pool.lease(policy).await.expect("a slot is free")
    }

    async fn close(self, slots: impl IntoIterator<Item = Slot>) {
        for slot in slots {
            self.pool.release(slot).await.expect("nothing of it is left");
        }
        self.pool.close().await.expect("nothing is left");
        assert_eq!(traces(&self.tag), [""; 0]);
        assert!(self.scope.close(Duration::from_secs(10)).await);
    }
}

/// Calls again when a signal of the test's process got in the way.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn refused<T: std::fmt::Debug>(what: &str, outcome: &io::Result<T>) {
    assert!(outcome.is_err(), "{what} answered: {outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_keeps_the_contract() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let scope = Scope::root("network test");
    contract::check(async |capacity| {
        let config = SlotsConfig { capacity, ..config("ct", 201) };
        SlotPool::open(config, &scope).await.expect("the one before is closed")
    })
    .await;
    assert_eq!(traces("ct"), [""; 0]);
    assert!(scope.close(Duration::from_secs(10)).await);
}

const LAN_OPEN: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 7);
const BEHIND: [Ipv4Addr; 5] = [
    LAN_OPEN,
    Ipv4Addr::new(192, 168, 78, 7),
    Ipv4Addr::new(10, 77, 77, 7),
    Ipv4Addr::new(100, 64, 77, 7),
    Ipv4Addr::new(172, 16, 77, 7),
];

#[tokio::test(flavor = "multi_thread")]
async fn packets_go_where_they_may_and_nowhere_else() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let internet = Internet::start(&BEHIND);
    let host_server = Server::start(18080);
    let allowed_private = vec!["192.168.77.0/24".parse().expect("a block")];
    let rig = Rig::open(SlotsConfig { allowed_private, ..config("pk", 202) }).await;

    let open = rig.lease(EgressPolicy::Internet).await;
    let closed = rig.lease(EgressPolicy::None).await;
    let (open_guest, closed_guest) = (Guest::attach(&open), Guest::attach(&closed));
    let (open_server, closed_server) = (open_guest.serve(), closed_guest.serve());

    host_reaches_guests(&[(&open, &open_guest), (&closed, &closed_guest)]);
    guest_reaches_the_internet(&open_guest);
    guest_does_not_reach_the_host(&open_guest, &open);
    guest_does_not_reach_the_host(&closed_guest, &closed);
    guest_does_not_reach_private_addresses(&open_guest, &closed);
    closed_guest_reaches_nothing(&closed_guest, &open);
    neighbours_do_not_reach_guests(&internet, &[&open, &closed]);

    drop((open_server, closed_server, open_guest, closed_guest, host_server, internet));
    rig.close([open, closed]).await;
}

fn host_reaches_guests(guests: &[(&Slot, &Guest)]) {
    for (slot, guest) in guests {
        let start = Instant::now();
        let seen = call(slot.host_ip, PORT).expect("the host reaches every port of a guest");
        println!("first connection host to guest: {:?}", start.elapsed());
        assert_eq!(seen, GATEWAY_IP);
        udp_works(slot.host_ip, guest);
    }
}

fn udp_works(host_ip: Ipv4Addr, guest: &Guest) {
    let patience = Some(Duration::from_secs(2));
    let echo = guest.ns.run(|| UdpSocket::bind((GUEST_IP, 5353)).expect("the port is free"));
    echo.set_read_timeout(patience).expect("it is not zero");
    let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("ports are free");
    client.set_read_timeout(patience).expect("it is not zero");
    client.send_to(b"ping", (host_ip, 5353)).expect("it is routed");
    let mut buffer = [0; 16];
    let (length, from) =
        uninterrupted(|| echo.recv_from(&mut buffer)).expect("the datagram arrives");
    assert_eq!((&buffer[..length], from.ip()), (&b"ping"[..], GATEWAY_IP.into()));
    echo.send_to(b"pong", from).expect("it is routed");
    let (length, from) =
        uninterrupted(|| client.recv_from(&mut buffer)).expect("the answer arrives");
    assert_eq!((&buffer[..length], from), (&b"pong"[..], SocketAddr::from((host_ip, 5353))));
}

fn guest_reaches_the_internet(guest: &Guest) {
    let seen = guest.call(Internet::PUBLIC, PORT).expect("public addresses are open");
    assert_eq!(seen, Internet::HOST, "behind the host's address");
    guest.call(Internet::ROUTER, PORT).expect("public addresses are open");
    guest.call(LAN_OPEN, PORT).expect("the configuration opens it");
}

fn guest_does_not_reach_the_host(guest: &Guest, slot: &Slot) {
    let mut addresses: Vec<Ipv4Addr> = nix::ifaddrs::getifaddrs()
        .expect("the host has addresses")
        // Those of slots of tests that run beside this one come and go.
        .filter(|interface| {
            let name = interface.interface_name.as_str();
            !name.starts_with("bj") || name.starts_with("bjpk-") || name == "bjtest-inet"
        })
        .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
        .collect();
    assert!(addresses.contains(&Internet::HOST));
    assert!(addresses.contains(&Ipv4Addr::LOCALHOST));
    assert!(addresses.iter().any(|a| a.to_bits() + 1 == slot.host_ip.to_bits()));
    addresses.dedup();
    for address in addresses {
        call(address, 18080).expect("the host itself reaches its server");
        refused(&format!("{address} of the host"), &guest.call(address, 18080));
    }
    // What listens in the namespace would be the host's, too. Nothing does; nothing is asked.
    refused("the gateway", &guest.call(GATEWAY_IP, PORT));
}

fn guest_does_not_reach_private_addresses(guest: &Guest, other: &Slot) {
    for address in BEHIND {
        call(address, PORT).expect("the host itself reaches it");
        if address != LAN_OPEN {
            refused("a private address", &guest.call(address, PORT));
        }
    }
    refused("metadata", &guest.call(Ipv4Addr::new(169, 254, 169, 254), 80));
    refused("another guest", &guest.call(other.host_ip, PORT));
}

fn closed_guest_reaches_nothing(guest: &Guest, other: &Slot) {
    let start = Instant::now();
    for address in BEHIND.into_iter().chain([Internet::PUBLIC, Internet::ROUTER, other.host_ip]) {
        refused("an address", &guest.call(address, PORT));
    }
    println!("a refusal takes {:?}", start.elapsed() / (BEHIND.len() as u32 + 3));
}

/// A machine of the local network may use this host as its router; that must not lead to guests.
fn neighbours_do_not_reach_guests(internet: &Internet, slots: &[&Slot]) {
    for slot in slots {
        let host_ip = slot.host_ip;
        let answer = internet.ns.run(move || {
            support::ip(&format!("route add {host_ip}/32 via {}", Internet::HOST));
            call(host_ip, PORT)
        });
        refused("a guest, from the local network,", &answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recycled_slot_knows_nothing_of_old_connections() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let rig = Rig::open(SlotsConfig { capacity: 1, ..config("rc", 203) }).await;
    let slot = rig.lease(EgressPolicy::Internet).await;
    let guest = Guest::attach(&slot);
    let listener = guest.ns.run(|| std::net::TcpListener::bind((GUEST_IP, PORT)).expect("free"));
    let mut old = TcpStream::connect((slot.host_ip, PORT)).expect("the host reaches guests");
    let (accepted, _) = listener.accept().expect("the connection is there");
    let address = slot.host_ip;
    drop((guest, listener, accepted));
    rig.pool.release(slot).await.expect("nothing of it is left");

    let slot = rig.lease(EgressPolicy::Internet).await;
    assert_eq!(slot.host_ip, address, "the only one there is");
    let guest = Guest::attach(&slot);
    let server = guest.serve();
    call(slot.host_ip, PORT).expect("the new guest is reachable");
    old.set_read_timeout(Some(Duration::from_millis(1500))).expect("it is not zero");
    old.write_all(b"a secret of the old sandbox").expect("the socket takes it");
    // A guest that saw the segment would have answered with a reset.
    let answer = uninterrupted(|| old.read(&mut [0; 16])).map_err(|e| e.kind());
    assert_eq!(answer, Err(io::ErrorKind::WouldBlock));
    drop((old, server, guest));
    rig.close([slot]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_leases_at_once_and_leases_that_leave() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let rig =
        Rig::open(SlotsConfig { capacity: 60, ready_low: 4, ready_high: 12, ..config("fy", 204) })
            .await;
    let first = rig.lease(EgressPolicy::Internet).await;
    let start = Instant::now();
    let leases = (0..50).map(|_| rig.pool.lease(EgressPolicy::Internet));
    let mut leased = try_join_all(leases).await.expect("fifty are free");
    println!("50 leases at once: {:?}, {:?} each", start.elapsed(), start.elapsed() / 50);
    leased.push(first);
    let mut indexes: Vec<u32> = leased.iter().map(|slot| slot.index).collect();
    indexes.sort_unstable();
    indexes.dedup();
    assert_eq!(indexes.len(), 51);

    // Leases whose callers leave before they are answered keep nothing.
    for policy in [EgressPolicy::Internet, EgressPolicy::None, EgressPolicy::None] {
        let leaving = tokio::time::timeout(Duration::ZERO, rig.pool.lease(policy));
        if let Ok(Ok(slot)) = leaving.await {
            leased.push(slot);
        }
    }
    let start = Instant::now();
    let releases = leased.into_iter().map(|slot| rig.pool.release(slot));
    let released = try_join_all(releases).await.expect("nothing of them is left");
    println!("{} releases at once: {:?}", released.len(), start.elapsed());
    rig.close([]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_slot_is_leased_at_once() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let high = 12;
    let opening = Instant::now();
    let rig = Rig::open(SlotsConfig { ready_low: 1, ready_high: high, ..config("rd", 205) }).await;
    println!("opening the pool: {:?}", opening.elapsed());
    let mut leased = Vec::new();
    let mut waits = Vec::new();
    for n in 0..high {
        let policy = if n % 4 == 3 { EgressPolicy::None } else { EgressPolicy::Internet };
        let start = Instant::now();
        leased.push(rig.lease(policy).await);
        waits.push((policy, start.elapsed()));
    }
    println!("one lease after the other, from an empty pool: {waits:?}");
    let start = Instant::now();
    rig.pool.release(leased.pop().expect("there are some")).await.expect("nothing is left");
    println!("one release: {:?}", start.elapsed());
    rig.close(leased).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_pool_is_reclaimed_and_a_living_one_is_not() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let rig = Rig::open(config("cr", 206)).await;
    let left = [rig.lease(EgressPolicy::Internet).await, rig.lease(EgressPolicy::None).await];
    let stolen = SlotPool::open(config("cr", 206), &rig.scope).await;
    assert!(matches!(stolen, Err(OpenError::InUse { .. })), "{stolen:?}");

    // A crash: nothing is given back. Tasks of the scope must end, for the tag is theirs, too.
    let Rig { scope, pool, tag } = rig;
    assert!(scope.close(Duration::from_secs(10)).await);
    drop(pool);
    assert!(traces(&tag).len() > left.len(), "{:?}", traces(&tag));

    let rig = Rig::open(config("cr", 206)).await;
    assert!(rig.pool.reclaimed() >= 2, "{}", rig.pool.reclaimed());
    let slot = rig.lease(EgressPolicy::Internet).await;
    rig.close([slot]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_the_host_uses_is_refused() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let scope = Scope::root("network test");
    let holder = Rig::open(config("ra", 207)).await;
    let slot = holder.lease(EgressPolicy::Internet).await;
    let outcome = SlotPool::open(config("rb", 207), &scope).await;
    assert!(matches!(outcome, Err(OpenError::RangeTaken { .. })), "{outcome:?}");
    assert_eq!(traces("rb"), [""; 0]);
    holder.close([slot]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_cannot_be_made_says_why_and_leaves_nothing() {
    if let Some(reason) = lacks() {
        return belljar_testkit::skip(reason);
    }
    let rig = Rig::open(SlotsConfig { capacity: 1, ready_low: 0, ..config("fl", 208) }).await;
    // Somebody else's device has the name of the slot's.
    support::ip("link add bjfl-0 type veth peer name bjtest-fl");
    let failed = rig.pool.lease(EgressPolicy::Internet).await;
    let Err(LeaseError::Setup { index: 0, step, reason }) = failed else {
        panic!("the name is taken, yet lease says {failed:?}");
    };
    assert_eq!(step, "make a veth pair", "{reason}");
    // What carried a name of the pool was cleaned up with the attempt, so the next one works.
    let slot = rig.lease(EgressPolicy::Internet).await;
    rig.close([slot]).await;
}
