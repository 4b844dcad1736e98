//! A small blocking netlink client: batches of requests in one system call, one answer each.
//!
//! It is blocking because it works on threads that are inside a slot's namespace, where a socket
//! belongs to the namespace it was opened in, whatever its thread does afterwards.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::step::{Step, StepFailed};

/// How long the kernel may take to answer. It answers before the sending call returns, so this
/// only guards against an answer that was lost.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Requests sent at once. Their answers must fit the socket's receive buffer: by default 208 KiB,
/// and an answer takes less than 1 KiB of it.
const BATCH: usize = 64;

/// One change, and what to make of a refusal.
pub(crate) struct Request {
    what: &'static str,
    message: RouteNetlinkMessage,
    flags: u16,
    /// Refusals that mean the change is not needed.
    fine: &'static [Errno],
}

/// A socket to the kernel's network configuration, in the namespace it was opened in.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace.
    pub(crate) fn open() -> Result<Netlink, StepFailed> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            // Answers then do not repeat the request.
            socket.set_cap_ack(true)?;
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_DEADLINE))?;
            Ok(socket)
        };
        Ok(Netlink { socket: open().step("open a netlink socket")?, sequence: 0 })
    }

    /// Carries out every request in order, also after one was refused, and reports the first
    /// refusal.
    pub(crate) fn execute(&mut self, requests: Vec<Request>) -> Result<(), StepFailed> {
        let mut outcome = Ok(());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let batch: Vec<Request> = requests.by_ref().take(BATCH).collect();
            let refused = self.execute_batch(batch);
            outcome = outcome.and(refused);
        }
        outcome
    }

    fn execute_batch(&mut self, batch: Vec<Request>) -> Result<(), StepFailed> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut expected = Vec::with_capacity(batch.len());
        for Request { what, message, flags, fine } in batch {
            self.append(&mut bytes, message, flags | NLM_F_ACK);
            expected.push((what, fine));
        }
        self.send(&bytes)?;
        let mut outcome = Ok(());
        let mut open = expected.len();
        while open > 0 {
            for (sequence, payload) in self.receive()? {
                let place = sequence.wrapping_sub(first) as usize;
                let (Some((what, fine)), NetlinkPayload::Error(answer)) =
                    (expected.get(place), payload)
                else {
                    continue;
                };
                open -= 1;
                let errno = Errno::from_raw(answer.raw_code().saturating_abs());
                if answer.code.is_some() && !fine.contains(&errno) {
                    outcome = outcome.and(Err(errno).step(what));
                }
            }
        }
        outcome
    }

    /// The kernel's number of the device `name`.
    pub(crate) fn link_index(&mut self, name: &str) -> Result<u32, StepFailed> {
        const STEP: &str = "look up a network device";
        let mut bytes = Vec::new();
        let message = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build());
        let sequence = self.append(&mut bytes, message, 0);
        self.send(&bytes)?;
        loop {
            for (answered, payload) in self.receive()? {
                match payload {
                    _ if answered != sequence => {}
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                        return Ok(link.header.index);
                    }
                    NetlinkPayload::Error(answer) => return Err(answer.to_io()).step(STEP),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
        self.sequence
    }

    fn send(&self, bytes: &[u8]) -> Result<(), StepFailed> {
        let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0);
        sent.map(drop).step("send to the kernel's network configuration")
    }

    /// The messages of one datagram, each with the number of the request it answers.
    fn receive(&self) -> Result<Vec<(u32, NetlinkPayload<RouteNetlinkMessage>)>, StepFailed> {
        const STEP: &str = "hear from the kernel's network configuration";
        let mut buffer = [0; 16 << 10];
        let flags = rustix::net::RecvFlags::empty();
        let (length, _) =
            retry_on_intr(|| rustix::net::recv(self.socket.as_fd(), &mut buffer[..], flags))
                .step(STEP)?;
        let mut rest = &buffer[..length];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let length = NetlinkBuffer::new_checked(rest).step(STEP)?.length() as usize;
            let message = NetlinkMessage::deserialize(&rest[..length]).step(STEP)?;
            messages.push((message.header.sequence_number, message.payload));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(messages)
    }
}

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// Makes a veth pair: `name` here, `peer` in the namespace behind `peer_netns`. Both are down.
pub(crate) fn add_veth(name: &str, peer: &str, peer_netns: &impl AsRawFd) -> Request {
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(peer)
        .setns_by_fd(peer_netns.as_raw_fd())
        .build();
    let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    Request {
        what: "make a veth pair",
        message: RouteNetlinkMessage::NewLink(message),
        flags: CREATE,
        fine: &[],
    }
}

/// Keeps the kernel from giving the device an IPv6 address when it comes up.
pub(crate) fn no_ipv6_address(name: &str) -> Request {
    let inet6 = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let message = LinkUnspec::new_with_name(name)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![inet6]))
        .build();
    Request {
        what: "keep IPv6 off a device",
        message: RouteNetlinkMessage::SetLink(message),
        flags: 0,
        // A kernel without IPv6.
        fine: &[Errno::EAFNOSUPPORT],
    }
}

/// Brings a device up, with the hardware address given, if one is.
pub(crate) fn set_up(index: u32, mac: Option<[u8; 6]>) -> Request {
    let mut link = LinkUnspec::new_with_index(index).up();
    if let Some(mac) = mac {
        link = link.address(mac.to_vec());
    }
    Request {
        what: "bring a device up",
        message: RouteNetlinkMessage::SetLink(link.build()),
        flags: 0,
        fine: &[],
    }
}

/// Gives a device an address.
pub(crate) fn add_address(index: u32, address: Ipv4Addr, prefix_bits: u8) -> Request {
    let message =
        AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, prefix_bits).build();
    Request {
        what: "give a device its address",
        message: RouteNetlinkMessage::NewAddress(message),
        flags: CREATE,
        fine: &[],
    }
}

/// Sends everything that has no nearer route through `gateway`.
pub(crate) fn add_default_route(gateway: Ipv4Addr) -> Request {
    let message = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
    Request {
        what: "add the default route",
        message: RouteNetlinkMessage::NewRoute(message),
        flags: CREATE,
        fine: &[],
    }
}

/// Notes the hardware address of a neighbour for good, so that nobody ever asks for it.
pub(crate) fn add_neighbour(index: u32, address: Ipv4Addr, mac: [u8; 6]) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::from(IpAddr::V4(address))),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    Request {
        what: "note the guest's hardware address",
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: CREATE,
        fine: &[],
    }
}

/// Puts a device into a group. `absent_is_fine`: one that is not there needs no group.
pub(crate) fn set_group(name: &str, group: u32, absent_is_fine: bool) -> Request {
    let message = LinkUnspec::new_with_name(name).link_group(group).build();
    Request {
        what: "put a device into a group",
        message: RouteNetlinkMessage::SetLink(message),
        flags: 0,
        fine: if absent_is_fine { &[Errno::ENODEV] } else { &[] },
    }
}

/// Deletes every device of a group at once. Deleting one takes the kernel about 20 ms, most of it
/// waiting for readers; a group waits once. No devices in the group is fine.
pub(crate) fn delete_group(group: u32) -> Request {
    let message = LinkMessageBuilder::<LinkUnspec>::new().link_group(group).build();
    Request {
        what: "delete devices",
        message: RouteNetlinkMessage::DelLink(message),
        flags: 0,
        fine: &[Errno::ENODEV],
    }
}
