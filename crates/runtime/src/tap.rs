//! A network slot's tap: opened, or given to a user, inside its namespace on a thread made for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

use crate::machine::{NetworkAttachment, StartError};
use crate::sys;

/// A slot's devices, open.
pub(crate) struct Uplink {
    pub(crate) tap: OwnedFd,
    /// The namespace; `None` is the one this process is in.
    pub(crate) netns: Option<OwnedFd>,
}

/// Opens the namespace and the tap of a slot.
///
/// # Errors
/// [`StartError::Missing`] for the namespace, [`StartError::Io`] for the rest.
pub(crate) async fn open(network: &NetworkAttachment) -> Result<Uplink, StartError> {
    let (netns, tap) = in_namespace(network, "open the tap", sys::open_tap).await?;
    Ok(Uplink { tap, netns })
}

/// Lets a user's process attach to the tap of a slot by itself, and opens the namespace for it.
///
/// # Errors
/// As [`open`].
pub(crate) async fn hand_over(
    network: &NetworkAttachment,
    uid: u32,
) -> Result<Option<OwnedFd>, StartError> {
    let give = move |tap: &str| sys::give_tap(tap, uid);
    let (netns, ()) = in_namespace(network, "give the tap to the machine's user", give).await?;
    Ok(netns)
}

async fn in_namespace<T: Send + 'static>(
    network: &NetworkAttachment,
    step: &'static str,
    work: impl FnOnce(&str) -> io::Result<T> + Send + 'static,
) -> Result<(Option<OwnedFd>, T), StartError> {
    let (reply, answer) = oneshot::channel();
    let (netns, tap) = (network.netns.clone(), network.tap.clone());
    let inside = move || {
        let netns = netns.map(enter).transpose()?;
        let made = work(&tap).map_err(|source| StartError::Io { step, source })?;
        Ok((netns, made))
    };
    // Its own thread: one of a pool would stay in the namespace and do others' work there.
    std::thread::Builder::new()
        .name("tap opener".to_owned())
        .spawn(move || drop(reply.send(inside())))
        .map_err(|source| StartError::Io { step: "start a thread", source })?;
    answer
        .await
        .map_err(|_| StartError::Io { step, source: io::Error::other("its thread ended early") })?
}

fn enter(path: PathBuf) -> Result<OwnedFd, StartError> {
    let file = File::open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => StartError::Missing { what: "network namespace", path },
        _ => StartError::Io { step: "open the network namespace", source },
    })?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| StartError::Io { step: "enter the network namespace", source: e.into() })?;
    Ok(OwnedFd::from(file))
}
