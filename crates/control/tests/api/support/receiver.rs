//! A team's own server, which takes deliveries or misbehaves as it is told.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use belljar_daemon::{OnError, Scope};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, Request, Response, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

use super::PATIENCE;

/// What a path does with what it gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Manner {
    Status(u16),
    Redirect(String),
    /// Never answers.
    Hang,
    /// Answers 200 and never stops talking.
    Flood,
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().expect("text")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }
}

#[derive(Default)]
struct State {
    received: Mutex<Vec<Received>>,
    manners: Mutex<HashMap<String, Manner>>,
}

pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    scope: Scope,
}

impl Receiver {
    /// Takes everything with 200 until told otherwise.
    pub(crate) async fn start() -> Receiver {
        let scope = Scope::root("receiver");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::new(State::default());
        let (connections, shared) = (scope.clone(), Arc::clone(&state));
        scope.spawn("accept", OnError::Log, async move {
            loop {
                let (stream, _) = listener.accept().await?;
                let state = Arc::clone(&shared);
                connections.spawn("connection", OnError::Log, async move {
                    let service = service_fn(|request| answer(Arc::clone(&state), request));
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // How the peer left is the test's business, not this connection's.
                    let _end = builder.serve_connection(TokioIo::new(stream), service).await;
                    Ok::<(), Infallible>(())
                });
            }
            #[expect(unreachable_code, reason = "names the type of the error above")]
            Ok::<(), std::io::Error>(())
        });
        Receiver { address, state, scope }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn behave(&self, path: &str, manner: Manner) {
        self.state.manners.lock().expect("no panic holds it").insert(path.to_owned(), manner);
    }

    /// What came to `path`, in order.
    pub(crate) fn received(&self, path: &str) -> Vec<Received> {
        let received = self.state.received.lock().expect("no panic holds it");
        received.iter().filter(|request| request.path == path).cloned().collect()
    }

    pub(crate) async fn stop(self) {
        assert!(self.scope.close(PATIENCE).await, "the receiver did not stop");
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let path = parts.uri.path().to_owned();
    let manner = state.manners.lock().expect("no panic holds it").get(&path).cloned();
    let received = Received { path, headers: parts.headers, body };
    state.received.lock().expect("no panic holds it").push(received);
    let answer = Response::builder();
    let answer = match manner.unwrap_or(Manner::Status(200)) {
        Manner::Status(status) => answer.status(status).body(Full::from("thanks").boxed()),
        Manner::Redirect(to) => {
            answer.status(302).header(header::LOCATION, to).body(Full::default().boxed())
        }
        Manner::Hang => std::future::pending().await,
        Manner::Flood => {
            let block = Bytes::from(vec![b'x'; 64 << 10]);
            let endless = futures::stream::repeat(block).map(|b| Ok(Frame::data(b)));
            answer.status(200).body(BodyExt::boxed(StreamBody::new(endless)))
        }
    };
    Ok(answer.expect("a response"))
}
