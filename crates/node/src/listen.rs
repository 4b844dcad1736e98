//! The node's unix socket: HTTP/1.1 and h2c, one task a connection.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use connectrpc::ConnectRpcService;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;

/// How long to wait before accepting again when one connection could not be taken.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the node's socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file already there is no socket, or cannot be replaced.
    #[error("replace {}", path.display())]
    Replace {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("listen on {}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

pub(crate) async fn serve(
    path: &Path,
    service: ConnectRpcService,
    scope: &Scope,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    let at = |source| (path.to_owned(), source);
    if let Err(source) = std::fs::remove_file(path)
        && source.kind() != io::ErrorKind::NotFound
    {
        let (path, source) = at(source);
        return Err(ServeError::Replace { path, source });
    }
    let listener =
        bind(path).map_err(at).map_err(|(path, source)| ServeError::Bind { path, source })?;
    ready();
    loop {
        let stream = tokio::select! {
            () = scope.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of descriptors, or a peer that left: neither is worth the sandboxes.
                    tracing::warn!(error = %e, "a node connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let service = TowerToHyperService::new(service.clone());
        scope.spawn("node rpc connection", OnError::Log, async move {
            let builder = Builder::new(TokioExecutor::new());
            let served = builder.serve_connection(TokioIo::new(stream), service).await;
            // A peer that hangs up is no event; its calls were already answered or dropped.
            if let Err(e) = served {
                tracing::debug!(error = %e, "node rpc connection ended");
            }
            Ok::<(), std::convert::Infallible>(())
        });
    }
    if let Err(e) = std::fs::remove_file(path) {
        tracing::debug!(error = %e, "node socket was already gone");
    }
    Ok(())
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
