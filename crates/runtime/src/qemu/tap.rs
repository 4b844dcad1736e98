//! Opening a network slot's tap: inside its namespace, on a thread made for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

use crate::machine::{NetworkAttachment, StartError};
use crate::sys;

/// A slot's devices, open.
pub(super) struct Uplink {
    pub(super) tap: OwnedFd,
    /// The namespace; `None` is the one this process is in.
    pub(super) netns: Option<OwnedFd>,
}

/// Opens the namespace and the tap of a slot.
///
/// # Errors
/// [`StartError::Missing`] for the namespace, [`StartError::Io`] for the rest.
pub(super) async fn open(network: &NetworkAttachment) -> Result<Uplink, StartError> {
    let (reply, answer) = oneshot::channel();
    let (netns, tap) = (network.netns.clone(), network.tap.clone());
    // Its own thread: one of a pool would stay in the namespace and do others' work there.
    std::thread::Builder::new()
        .name("tap opener".to_owned())
        .spawn(move || drop(reply.send(open_here(netns, &tap))))
        .map_err(|source| StartError::Io { step: "start a thread", source })?;
    answer.await.map_err(|_| StartError::Io {
        step: "open the tap",
        source: io::Error::other("its thread ended early"),
    })?
}

fn open_here(netns: Option<PathBuf>, tap: &str) -> Result<Uplink, StartError> {
    let netns = match netns {
        None => None,
        Some(path) => {
            let file = File::open(&path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => StartError::Missing { what: "network namespace", path },
                _ => StartError::Io { step: "open the network namespace", source },
            })?;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(
                |e| StartError::Io { step: "enter the network namespace", source: e.into() },
            )?;
            Some(OwnedFd::from(file))
        }
    };
    let tap =
        sys::open_tap(tap).map_err(|source| StartError::Io { step: "open the tap", source })?;
    Ok(Uplink { tap, netns })
}
