//! Making slots, closing one's egress, and taking slots apart. Blocking; every function is for a
//! thread of its own, because it changes its thread's network namespace.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::Path;

use tracing::warn;

use crate::config::Plan;
use crate::netlink::{
    Netlink, add_address, add_default_route, add_neighbour, add_veth, delete_group,
    no_ipv6_address, set_group, set_up,
};
use crate::rules::{CLOSED_GROUP, Loading, slot_rules};
use crate::step::{Step, StepFailed};
use crate::sys::{attach_tap, persist_tap};
use crate::{
    GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, GUEST_PREFIX_LEN, TAP, UPLINK, namespace,
};

/// `nft` processes that load rules while the next slots are assembled.
const LOADING_AT_ONCE: usize = 4;

/// Settings of a new namespace. The last one exists only while connection tracking is loaded,
/// which the pool's rules on the host see to.
const SETTINGS: [(&str, &str); 4] = [
    ("/proc/sys/net/ipv4/ip_forward", "1"),
    // Strict: a guest cannot send in a foreign name.
    ("/proc/sys/net/ipv4/conf/all/rp_filter", "1"),
    // Refusals go to one guest only and must reach it: without each, a program waits for minutes.
    ("/proc/sys/net/ipv4/icmp_ratelimit", "0"),
    // A connection that did not begin here is not taken up half way.
    ("/proc/sys/net/netfilter/nf_conntrack_tcp_loose", "0"),
];

/// Settings that keep IPv6 out, where the kernel has it.
const NO_IPV6: [&str; 2] =
    ["/proc/sys/net/ipv6/conf/all/disable_ipv6", "/proc/sys/net/ipv6/conf/default/disable_ipv6"];

/// What became of a slot that was to be made.
#[derive(Debug)]
pub(crate) enum Made {
    /// It waits for a guest.
    Ready,
    /// It was not made, and nothing of it is left.
    Failed(StepFailed),
    /// It was not made, and something of it is left.
    Lost(StepFailed),
}

/// Makes the slots `indexes`, telling `done` about each as soon as it is known.
pub(crate) fn make_batch(plan: &Plan, indexes: &[u32], mut done: impl FnMut(u32, Made)) {
    // Opened here and now: the socket stays in the host's namespace when the thread leaves it.
    let mut host = match Netlink::open() {
        Ok(host) => host,
        Err(e) => return indexes.iter().for_each(|&i| done(i, Made::Failed(e.clone()))),
    };
    let mut loading = VecDeque::new();
    let has_ended = |(_, rules): &(u32, Loading)| rules.has_ended();
    let finish = |host: &mut Netlink, index: u32, outcome: Result<(), StepFailed>| match outcome {
        Ok(()) => Made::Ready,
        Err(e) => match destroy_with(plan, host, &[index]).remove(0) {
            (_, Ok(())) => Made::Failed(e),
            (_, Err(left)) => {
                warn!(index, error = %left, "a half-made network slot is left");
                Made::Lost(e)
            }
        },
    };
    for &index in indexes {
        match assemble(plan, &mut host, index) {
            Ok(rules) => loading.push_back((index, rules)),
            Err(e) => done(index, finish(&mut host, index, Err(e))),
        }
        while loading.len() == LOADING_AT_ONCE || loading.front().is_some_and(has_ended) {
            let (index, rules) = loading.pop_front().expect("the condition saw it");
            done(index, finish(&mut host, index, rules.finish()));
        }
    }
    for (index, rules) in loading {
        done(index, finish(&mut host, index, rules.finish()));
    }
}

/// Makes everything of a slot but its packet rules, which are being loaded when this returns.
fn assemble(plan: &Plan, host: &mut Netlink, index: u32) -> Result<Loading, StepFailed> {
    let netns = namespace::make(&plan.netns(index))?;
    for (setting, value) in SETTINGS {
        fs::write(setting, value).step("configure a network namespace")?;
    }
    for setting in NO_IPV6 {
        match fs::write(setting, "1") {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).step("turn IPv6 off")?,
            _ => {}
        }
    }
    let rules = Loading::start(&slot_rules(plan, index))?;

    persist_tap(&attach_tap(TAP).step("make a tap")?).step("keep a tap")?;
    let veth = plan.veth(index);
    host.execute(vec![add_veth(&veth, UPLINK, &netns), no_ipv6_address(&veth)])?;
    let veth_index = host.link_index(&veth)?;
    host.execute(vec![
        add_address(veth_index, plan.host_side(index), 31),
        set_up(veth_index, None),
    ])?;

    let mut inside = Netlink::open()?;
    let uplink = inside.link_index(UPLINK)?;
    let tap = inside.link_index(TAP)?;
    inside.execute(vec![
        add_address(uplink, plan.slot_side(index), 31),
        set_up(uplink, None),
        add_default_route(plan.host_side(index)),
        set_up(tap, Some(GATEWAY_MAC)),
        add_address(tap, GATEWAY_IP, GUEST_PREFIX_LEN),
        add_neighbour(tap, GUEST_IP, GUEST_MAC),
    ])?;
    Ok(rules)
}

/// Lets the guest of the slot behind `netns` reach nothing.
pub(crate) fn close_egress(netns: &Path) -> Result<(), StepFailed> {
    namespace::enter(netns)?;
    Netlink::open()?.execute(vec![set_group(TAP, CLOSED_GROUP, false)])
}

/// Takes slots apart and says of each whether it is gone. Idempotent: what is not there is gone.
pub(crate) fn destroy_batch(plan: &Plan, indexes: &[u32]) -> Vec<(u32, Result<(), StepFailed>)> {
    match Netlink::open() {
        Ok(mut host) => destroy_with(plan, &mut host, indexes),
        Err(e) => indexes.iter().map(|&index| (index, Err(e.clone()))).collect(),
    }
}

/// `host` is a socket of the host's namespace; where the thread is does not matter.
fn destroy_with(
    plan: &Plan,
    host: &mut Netlink,
    indexes: &[u32],
) -> Vec<(u32, Result<(), StepFailed>)> {
    let group = plan.doomed_group();
    let grouped = indexes.iter().map(|&index| set_group(&plan.veth(index), group, true)).collect();
    // The pair goes by name and not with its namespace, so that it is gone when this returns, even
    // while a process still holds the namespace.
    let veths_gone = host.execute(grouped).and(host.execute(vec![delete_group(group)]));
    let destroyed = indexes.iter().map(|&index| {
        let netns_gone = namespace::remove(&plan.netns(index));
        (index, veths_gone.clone().and(netns_gone))
    });
    destroyed.collect()
}
