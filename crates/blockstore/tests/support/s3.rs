//! A real S3 server in this process: its protocol, signatures and conditions over a folder.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use belljar_blockstore::blobs::{S3Credentials, S3Options, S3Patience, S3Store};
use belljar_domain::Secret;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder as Connections;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

const KEY_ID: &str = "test-key";
const SECRET: &str = "test-secret";
pub(crate) const BUCKET: &str = "images";

/// The server; it ends when this is dropped.
pub(crate) struct S3Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl S3Server {
    pub(crate) fn start() -> S3Server {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join(BUCKET)).expect("a bucket");
        let (stop, stopped) = oneshot::channel();
        let (say, hear) = mpsc::channel();
        let root = folder.path().to_owned();
        let thread = std::thread::spawn(move || serve(&root, &say, stopped));
        let address = hear.recv_timeout(Duration::from_secs(30)).expect("the server's address");
        S3Server { address, stop: Some(stop), thread: Some(thread), _folder: folder }
    }

    /// A store in a folder of the bucket, with little patience: the server is near.
    pub(crate) fn store(&self, prefix: &str) -> S3Store {
        S3Store::open(&self.options(prefix)).expect("a store")
    }

    pub(crate) fn options(&self, prefix: &str) -> S3Options {
        S3Options {
            bucket: BUCKET.to_owned(),
            prefix: prefix.to_owned(),
            region: Some("us-east-1".to_owned()),
            endpoint: Some(format!("http://{}", self.address)),
            credentials: Some(S3Credentials {
                key_id: KEY_ID.to_owned(),
                secret: Secret::new(SECRET.to_owned()),
                session_token: None,
            }),
            patience: S3Patience {
                connect: Duration::from_secs(2),
                request: Duration::from_secs(30),
                retries_max: 1,
                retry_for: Duration::from_secs(5),
            },
        }
    }
}

fn serve(root: &Path, say: &mpsc::Sender<SocketAddr>, mut stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let files = s3s_fs::FileSystem::new(root).expect("a file system");
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        let service = service.build();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        say.send(listener.local_addr().expect("an address")).expect("somebody waits");
        let mut connections = JoinSet::new();
        loop {
            let socket = tokio::select! {
                _ = &mut stopped => break,
                accepted = listener.accept() => accepted.expect("a connection").0,
            };
            let service = service.clone();
            connections.spawn(async move {
                let server = Connections::new(TokioExecutor::new());
                // A client that hangs up is none of the test's business.
                let _ended = server.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
}

impl Drop for S3Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the S3 server panicked");
        }
    }
}
