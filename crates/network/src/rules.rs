//! The packet rules, and loading them with `nft`.
//!
//! Two layers, so that either one alone keeps a sandbox in:
//!
//! * **In the slot's namespace** (a guest cannot touch it): new connections in come from the host
//!   only; new connections out go to public addresses, or nowhere under
//!   [`EgressPolicy::None`](crate::EgressPolicy::None). Refused ones get an ICMP answer, so that a
//!   program fails at once instead of waiting for minutes.
//! * **On the host**, one table a pool: nothing a sandbox sends reaches an address of the host, and
//!   nothing but the host itself opens connections to a sandbox: no other sandbox, and no machine
//!   of the local network that routes through this host.
//!
//! Leftovers of a slot's earlier life (a retransmission from the host, an answer the host's own NAT
//! still maps) cannot enter a new guest: only packets from the host's side address are mapped to
//! the guest, and a TCP connection begins with a SYN (`nf_conntrack_tcp_loose` is 0).
//!
//! The switch between the policies is the device group of the tap: 0, where devices are born, is
//! open, [`CLOSED_GROUP`] is closed. Moving a device to a group is one netlink request of some
//! microseconds; loading another rule would cost an `nft` process.

use std::fmt::{Display, Write as _};
use std::io::{self, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::config::Plan;
use crate::step::{Step, StepFailed};
use crate::{GATEWAY_IP, GUEST_IP};

/// The device group of a tap whose guest may reach nothing.
pub(crate) const CLOSED_GROUP: u32 = 1;

/// How long `nft` may take; it takes some 10 ms.
const DEADLINE: Duration = Duration::from_secs(10);

const STEP: &str = "load packet rules";

/// Connections a guest may have open at once. The host tracks all guests' connections in one table
/// (262,144 entries by default), which one guest must not fill.
const MAX_CONNECTIONS: u32 = 8192;

fn join<T: Display>(items: impl Iterator<Item = T>) -> String {
    let mut text = String::new();
    for item in items {
        let separator = if text.is_empty() { "" } else { ", " };
        write!(text, "{separator}{item}").expect("writing to a String never fails");
    }
    text
}

/// The rules of a slot's namespace.
pub(crate) fn slot_rules(plan: &Plan, index: u32) -> String {
    let host_side = plan.host_side(index);
    let slot_side = plan.slot_side(index);
    let denied = join(plan.denied());
    let exceptions = &plan.config().allowed_private;
    let allowed = if exceptions.is_empty() {
        String::new()
    } else {
        format!("iifgroup 0 ip saddr {GUEST_IP} ip daddr {{ {} }} accept", join(exceptions.iter()))
    };
    format!(
        r#"table ip belljar {{
  set denied {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {denied} }} }}
  chain to_guest {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "uplink" ip saddr {host_side} ip daddr {slot_side} dnat to {GUEST_IP}
  }}
  chain from_guest {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "uplink" snat to {slot_side}
    oifname "tap0" snat to {GATEWAY_IP}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    ct state established,related accept
    iifname "uplink" oifname "tap0" ct status dnat accept
    iifname "tap0" oifname "uplink" jump egress
  }}
  chain egress {{
    ct count over {MAX_CONNECTIONS} reject with icmp type admin-prohibited
    {allowed}
    iifgroup 0 ip saddr {GUEST_IP} ip daddr != @denied accept
    reject with icmp type admin-prohibited
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    iifname "tap0" ip daddr {GATEWAY_IP} icmp type echo-request accept
  }}
}}
"#
    )
}

/// The pool's rules on the host; they replace those an earlier process left.
pub(crate) fn host_rules(plan: &Plan) -> String {
    let table = plan.table();
    let veths = format!("{}*", plan.veth_prefix());
    let cidr = plan.config().cidr;
    format!(
        r#"table inet {table} {{}}
delete table inet {table}
table inet {table} {{
  chain input {{
    type filter hook input priority filter - 10; policy accept;
    iifname "{veths}" ct state established,related accept
    iifname "{veths}" drop
  }}
  chain forward {{
    type filter hook forward priority filter - 10; policy accept;
    iifname "{veths}" ip saddr != {cidr} drop
    iifname "{veths}" meta nfproto ipv6 drop
    oifname "{veths}" ct state established,related accept
    oifname "{veths}" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {cidr} oifname != "{veths}" masquerade
  }}
}}
"#
    )
}

/// Removes the pool's rules from the host. Idempotent.
pub(crate) fn no_host_rules(plan: &Plan) -> String {
    let table = plan.table();
    format!("table inet {table} {{}}\ndelete table inet {table}\n")
}

/// An `nft` process that loads rules into the namespace it was started in.
pub(crate) struct Loading {
    child: Child,
    started: Instant,
}

impl Loading {
    /// Starts `nft` in the calling thread's namespace. All rules take effect at once, or none.
    pub(crate) fn start(rules: &str) -> Result<Loading, StepFailed> {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .step("start nft")?;
        let mut stdin = child.stdin.take().expect("it was asked for a line above");
        let written = stdin.write_all(rules.as_bytes());
        drop(stdin);
        let loading = Loading { child, started: Instant::now() };
        match written {
            // It died before it read everything; its own words say why.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.step("write to nft")?,
        }
        Ok(loading)
    }

    /// Whether it has ended, so that [`Loading::finish`] does not wait.
    pub(crate) fn has_ended(&self) -> bool {
        self.wait_at_most(Duration::ZERO).unwrap_or(true)
    }

    fn wait_at_most(&self, time: Duration) -> Result<bool, StepFailed> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.expect("the kernel's process numbers are positive and fit");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).step(STEP)?;
        let timeout = Timespec::try_from(time).expect("some seconds fit");
        let mut end = [PollFd::new(&pidfd, PollFlags::IN)];
        let ended = retry_on_intr(|| poll(&mut end, Some(&timeout))).step(STEP)?;
        Ok(ended > 0)
    }

    /// Waits for it.
    pub(crate) fn finish(mut self) -> Result<(), StepFailed> {
        if !self.wait_at_most(DEADLINE.saturating_sub(self.started.elapsed()))? {
            return Err(format!("nft gave no answer within {} ms", DEADLINE.as_millis()))
                .step(STEP);
        }
        let status = self.child.wait().step(STEP)?;
        if status.success() {
            return Ok(());
        }
        let mut words = String::new();
        if let Some(stderr) = self.child.stderr.take() {
            // Whatever could be read is better than nothing.
            let _partial = stderr.take(4096).read_to_string(&mut words).is_err();
        }
        Err(format!("nft: {status}: {}", words.trim())).step(STEP)
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        // Both do nothing to a child that has been waited for.
        let _gone = self.child.kill().is_err();
        let _reaped = self.child.wait().is_err();
    }
}

/// Loads rules into the calling thread's namespace.
pub(crate) fn load(rules: &str) -> Result<(), StepFailed> {
    Loading::start(rules)?.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SlotsConfig;

    #[test]
    fn slot_rules_name_this_slot_only() {
        let plan = Plan::new(SlotsConfig::new("t")).expect("good");
        let rules = slot_rules(&plan, 3);
        assert!(rules.contains("ip saddr 10.96.0.6 ip daddr 10.96.0.7 dnat to 169.254.0.21"));
        assert!(!rules.contains("ip daddr {"), "no exceptions were configured");
        for block in ["10.0.0.0/8", "169.254.0.0/16", "10.96.0.0/16"] {
            assert!(rules.contains(block), "{block}");
        }
    }

    #[test]
    fn exceptions_come_before_the_denial() {
        let allowed_private = vec!["192.168.1.53".parse().expect("a block")];
        let config = SlotsConfig { allowed_private, ..SlotsConfig::new("t") };
        let rules = slot_rules(&Plan::new(config).expect("good"), 0);
        let exception = rules.find("ip daddr { 192.168.1.53/32 } accept").expect("it is there");
        assert!(exception < rules.find("!= @denied").expect("it is there"));
    }
}
