//! A real proxy, real guests on loopback addresses, real clients.
#![allow(dead_code, reason = "each test file uses a part")]

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use belljar_domain::{ExecutionId, SandboxId, Secret};
use belljar_proxy::{Config, Deps, MemoryCatalog, Target, Wake, serve};
use belljar_testkit::LogOracle;
use bytes::Bytes;
use futures::channel::mpsc;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

pub(crate) type Body = BoxBody<Bytes, Infallible>;

/// Longer than anything here takes on a busy machine; a test that waits this long has failed.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Fails the test instead of waiting for ever.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    let waited = tokio::time::timeout(SOON, future).await;
    waited.unwrap_or_else(|_| panic!("{what} did not happen within {SOON:?}"))
}

/// A loopback address that no other test of this or another process uses.
pub(crate) fn guest_ip() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, high.max(1), low, NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A port of that address on which nobody listens.
pub(crate) async fn closed_port(ip: Ipv4Addr) -> u16 {
    let taken = TcpListener::bind((ip, 0)).await.expect("bind");
    taken.local_addr().expect("an address").port()
}

/// A proxy that serves on a port of its own.
pub(crate) struct Rig {
    pub(crate) address: SocketAddr,
    pub(crate) catalog: Arc<MemoryCatalog>,
    pub(crate) scope: Scope,
    logs: LogOracle,
}

impl Rig {
    pub(crate) async fn start(config: Config) -> Rig {
        Rig::start_with(config, |_| None).await
    }

    /// One that resumes sandboxes by what `sleeper` makes of the catalog.
    pub(crate) async fn start_waking<W: Wake>(
        config: Config,
        sleeper: impl FnOnce(Arc<MemoryCatalog>) -> Arc<W>,
    ) -> Rig {
        Rig::start_with(config, |catalog| Some(sleeper(catalog) as Arc<dyn Wake>)).await
    }

    async fn start_with(
        config: Config,
        wake: impl FnOnce(Arc<MemoryCatalog>) -> Option<Arc<dyn Wake>>,
    ) -> Rig {
        let logs = LogOracle::install();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
        let address = listener.local_addr().expect("a bound listener has an address");
        let scope = Scope::root("test proxy");
        let catalog = Arc::new(MemoryCatalog::new());
        let deps = Deps { routes: catalog.clone(), wake: wake(catalog.clone()) };
        let serving = serve(config, deps, listener, scope.clone());
        scope.spawn("proxy", OnError::FailScope, serving);
        Rig { address, catalog, scope, logs }
    }

    /// Publishes a sandbox at `ip` with the token `secret`.
    pub(crate) fn publish(&self, ip: Ipv4Addr) -> SandboxId {
        let id = SandboxId::random();
        self.catalog.publish(&id, target(ip, "secret"));
        id
    }

    /// Stops the proxy; everything it started must end, and nothing may have warned.
    pub(crate) async fn stop(self) {
        assert!(self.scope.close(SOON).await, "a task of the proxy did not end");
        self.logs.assert_quiet(&[]);
    }

    /// A request sent as bytes; the whole answer, until the proxy closes.
    pub(crate) async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("send");
        let mut answer = Vec::new();
        soon("the answer", stream.read_to_end(&mut answer)).await.expect("receive");
        String::from_utf8(answer).expect("text")
    }

    pub(crate) async fn http1(&self) -> http1::SendRequest<Body> {
        let stream = TcpStream::connect(self.address).await.expect("connect");
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("handshake");
        self.run(connection);
        sender
    }

    pub(crate) async fn http2(&self) -> http2::SendRequest<Body> {
        let stream = TcpStream::connect(self.address).await.expect("connect");
        let executor = InScope(self.scope.clone());
        let (sender, connection) =
            http2::handshake(executor, TokioIo::new(stream)).await.expect("handshake");
        self.run(connection);
        sender
    }

    fn run(&self, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
        // How a client's connection ends is for the tests to look at, not for the log.
        self.scope.spawn("test client", OnError::Log, async move {
            drop(connection.await);
            Ok::<(), Infallible>(())
        });
    }
}

pub(crate) fn target(ip: Ipv4Addr, token: &str) -> Target {
    Target {
        execution_id: ExecutionId::random(),
        ip: IpAddr::V4(ip),
        envd_access_token: Some(Secret::new(token.to_owned())),
    }
}

/// A service in a sandbox.
pub(crate) struct Guest {
    pub(crate) ip: Ipv4Addr,
    pub(crate) port: u16,
    /// Connections accepted so far.
    pub(crate) accepted: Arc<AtomicUsize>,
    /// Connections that have ended.
    pub(crate) ended: Arc<AtomicUsize>,
}

impl Guest {
    /// Serves `handler` at `address`; port 0 means any.
    pub(crate) async fn start<H, F>(rig: &Rig, ip: Ipv4Addr, port: u16, handler: H) -> Guest
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind((ip, port)).await.expect("bind a guest address");
        let port = listener.local_addr().expect("a bound listener has an address").port();
        let guest = Guest { ip, port, accepted: Arc::default(), ended: Arc::default() };
        let (accepted, ended) = (guest.accepted.clone(), guest.ended.clone());
        let scope = rig.scope.clone();
        rig.scope.spawn("guest", OnError::FailScope, async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::SeqCst);
                let (handler, ended) = (handler.clone(), ended.clone());
                let executor = InScope(scope.clone());
                scope.spawn("guest connection", OnError::Log, async move {
                    let service = service_fn(move |request| {
                        let answer = handler(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let builder = auto::Builder::new(executor);
                    let io = TokioIo::new(stream);
                    drop(builder.serve_connection_with_upgrades(io, service).await);
                    ended.fetch_add(1, Ordering::SeqCst);
                    Ok::<(), Infallible>(())
                });
            }
            Err("the guest's listener broke")
        });
        guest
    }

    /// The host by which this service of `id` is reached.
    pub(crate) fn host(&self, id: &SandboxId) -> String {
        format!("{}-{id}.example.com", self.port)
    }

    pub(crate) async fn all_ended(&self) {
        let all = async {
            while self.ended.load(Ordering::SeqCst) < self.accepted.load(Ordering::SeqCst) {
                tokio::task::yield_now().await;
            }
        };
        soon("the end of the guest's connections", all).await;
    }
}

#[derive(Clone)]
pub(crate) struct InScope(pub(crate) Scope);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for InScope {
    fn execute(&self, task: F) {
        self.0.spawn("stream", OnError::Log, async move {
            task.await;
            Ok::<(), Infallible>(())
        });
    }
}

pub(crate) fn text(text: impl Into<String>) -> Response<Body> {
    Response::new(full(text))
}

pub(crate) fn full(text: impl Into<String>) -> Body {
    Full::new(Bytes::from(text.into())).boxed()
}

pub(crate) fn empty() -> Body {
    Full::new(Bytes::new()).boxed()
}

/// A body that is written piece by piece.
pub(crate) fn channel() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (sender, receiver) = mpsc::channel(1);
    let frames = futures::StreamExt::map(receiver, Ok::<_, Infallible>);
    (sender, BodyExt::boxed(StreamBody::new(frames)))
}

pub(crate) fn data(text: &str) -> Frame<Bytes> {
    Frame::data(Bytes::copy_from_slice(text.as_bytes()))
}

/// The next piece of a body, as text. HTTP/2 may end with an empty one; that is none.
pub(crate) async fn next_data(body: &mut Incoming) -> Option<String> {
    loop {
        let frame = soon("a piece of the body", body.frame()).await?.expect("a good body");
        let data = frame.into_data().expect("data, not trailers");
        if !data.is_empty() {
            return Some(String::from_utf8(data.to_vec()).expect("text"));
        }
    }
}

pub(crate) async fn all_text(response: Response<Incoming>) -> String {
    let body = soon("the whole body", response.into_body().collect()).await.expect("a good body");
    String::from_utf8(body.to_bytes().to_vec()).expect("text")
}

/// Reads a request head as a service without a library does.
pub(crate) async fn read_head(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(())
}

pub(crate) fn get(host: &str, path: &str) -> Request<Body> {
    Request::builder().uri(path).header("host", host).body(empty()).expect("a request")
}
