//! An upgraded connection: bytes both ways until both sides are done.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf, copy_buf, split};
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::catalog::Route;
use crate::upstream::Link;

const BUFFER_BYTES: usize = 16 << 10;
/// How long each side has to change protocols after the 101 was sent.
const SWITCH_LIMIT: Duration = Duration::from_secs(10);

/// Joins client and guest once both have changed protocols.
///
/// Ends when both directions have ended or one has failed, when the route ends, or after the
/// drain time of a server that stops.
pub(crate) async fn run(link: &Arc<Link>, route: &Route, client: OnUpgrade, guest: OnUpgrade) {
    let drained = async {
        link.scope.cancelled().await;
        sleep(link.config.drain_timeout).await;
    };
    tokio::select! {
        outcome = join(client, guest, link.config.idle_timeout) => {
            if let Err(error) = outcome {
                debug!(sandbox = %route.id(), %error, "tunnel broke");
            }
        }
        () = route.ended() => {}
        () = drained => {}
    }
}

async fn join(client: OnUpgrade, guest: OnUpgrade, half_open_limit: Duration) -> io::Result<()> {
    let switched = timeout(SWITCH_LIMIT, async { tokio::try_join!(client, guest) }).await;
    let (client, guest) = match switched {
        Ok(both) => both.map_err(io::Error::other)?,
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    let (client_reader, client_writer) = split(TokioIo::new(client));
    let (guest_reader, guest_writer) = split(TokioIo::new(guest));
    let mut up = pin!(pump(client_reader, guest_writer));
    let mut down = pin!(pump(guest_reader, client_writer));
    // One direction may end long before the other, but not stay half open for ever.
    let rest = tokio::select! {
        ended = &mut up => { ended?; timeout(half_open_limit, down).await }
        ended = &mut down => { ended?; timeout(half_open_limit, up).await }
    };
    rest.unwrap_or(Ok(()))
}

async fn pump(
    from: ReadHalf<TokioIo<Upgraded>>,
    mut to: WriteHalf<TokioIo<Upgraded>>,
) -> io::Result<()> {
    let mut from = BufReader::with_capacity(BUFFER_BYTES, from);
    copy_buf(&mut from, &mut to).await?;
    to.shutdown().await
}
