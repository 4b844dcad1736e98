//! What a pool holds on the host besides its slots: its tag, its rules, forwarding; and what an
//! earlier process left there.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nameindex;
use tracing::info;

use crate::config::{NETNS_DIR, OpenError, Plan};
use crate::make::destroy_batch;
use crate::rules::{host_rules, load, no_host_rules};
use crate::step::{Step, StepFailed};

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// A tag, taken for this process.
///
/// An abstract socket, because it leaves no file, ends with the process however it dies, and lives
/// in the namespace that the pool's devices live in.
#[derive(Debug)]
pub(crate) struct TagLock {
    _socket: UnixListener,
}

impl TagLock {
    /// Takes a tag that nobody holds.
    pub(crate) fn take(tag: &str) -> Result<TagLock, OpenError> {
        let address = SocketAddr::from_abstract_name(format!("belljar-network-{tag}"));
        match address.and_then(|address| UnixListener::bind_addr(&address)) {
            Ok(socket) => Ok(TagLock { _socket: socket }),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                Err(OpenError::InUse { tag: tag.to_owned() })
            }
            Err(e) => Err(OpenError::Host { step: "take the pool's tag", reason: e.to_string() }),
        }
    }
}

impl From<StepFailed> for OpenError {
    fn from(StepFailed { step, reason }: StepFailed) -> OpenError {
        OpenError::Host { step, reason }
    }
}

/// Makes the host ready for slots. Says how many an earlier process had left; they are gone.
///
/// Blocking, for a thread in the host's namespace, and for the holder of the tag.
pub(crate) fn prepare(plan: &Plan) -> Result<u32, OpenError> {
    fs::create_dir_all(NETNS_DIR).step("make the folder of namespaces")?;
    let reclaimed = reclaim(plan)?;
    range_is_free(plan)?;
    load(&host_rules(plan))?;
    // Last: the rules are there before anything is forwarded.
    if fs::read_to_string(FORWARDING).step("read whether the host forwards")?.trim() == "0" {
        fs::write(FORWARDING, "1").step("turn forwarding on")?;
        info!("net.ipv4.ip_forward was 0 and is 1 now: sandboxes need it");
    }
    Ok(reclaimed)
}

/// Removes what [`prepare`] made and only slots need. Blocking. Idempotent.
pub(crate) fn clear(plan: &Plan) -> Result<(), StepFailed> {
    load(&no_host_rules(plan))
}

fn reclaim(plan: &Plan) -> Result<u32, StepFailed> {
    let mut left = BTreeSet::new();
    for entry in fs::read_dir(NETNS_DIR).step("list namespaces")? {
        let name = entry.step("list namespaces")?.file_name();
        left.extend(name.to_str().and_then(|name| plan.index_of(name)));
    }
    for interface in &if_nameindex().step("list network devices")? {
        left.extend(interface.name().to_str().ok().and_then(|name| plan.index_of(name)));
    }
    let left: Vec<u32> = left.into_iter().collect();
    for (_, gone) in destroy_batch(plan, &left) {
        gone?;
    }
    Ok(u32::try_from(left.len()).unwrap_or(u32::MAX))
}

/// Refuses a range that an interface of the host has an address in: routes would collide.
fn range_is_free(plan: &Plan) -> Result<(), OpenError> {
    let cidr = plan.config().cidr;
    for interface in getifaddrs().step("list the host's addresses")? {
        let Some(address) = interface.address.as_ref().and_then(|a| a.as_sockaddr_in()) else {
            continue;
        };
        if cidr.contains(address.ip()) {
            return Err(OpenError::RangeTaken {
                cidr,
                interface: interface.interface_name,
                address: address.ip(),
            });
        }
    }
    Ok(())
}
