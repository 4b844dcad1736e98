//! One request: find its sandbox, pass it on, pass the answer back.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use belljar_daemon::OnError;
use belljar_daemon::downstream::{Downstream, Serving};
use belljar_daemon::drain::{Drained, WhileBusy};
use belljar_domain::SandboxId;
use belljar_wire::guest::MAX_TUNNELS;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;
use tracing::debug;

use crate::answers::{self, Failure};
use crate::catalog::{InFlight, Route, Routes};
use crate::connect::ConnectError;
use crate::headers;
use crate::request_body::{ClientBody, GuestBody};
use crate::routing::{self, Destination, ENVD_PORT, Misdirected};
use crate::tunnel;
use crate::upstream::{self, ExchangeError, Lease, Link, Protocol};
use crate::wake::{Visitor, Wake};

/// The body of an answer: the guest's, streamed, or a text of our own.
pub(crate) type AnswerBody = Either<Relayed, Full<Bytes>>;

/// What every request needs.
pub(crate) struct Gateway {
    pub(crate) routes: Arc<dyn Routes>,
    pub(crate) wake: Option<Arc<dyn Wake>>,
    pub(crate) link: Arc<Link>,
}

/// Answers one request. Dropping it, as happens when the client leaves, closes the connection
/// to the guest.
pub(crate) async fn answer(
    gateway: Arc<Gateway>,
    downstream: Arc<Downstream>,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Infallible> {
    let serving = Arc::new(downstream.begin(request.version()));
    let tasks = gateway.link.scope.clone();
    let request = Drained::of(request, WhileBusy { tasks, serving: Arc::clone(&serving) });
    let started = Instant::now();
    let method = request.method().clone();
    let (sandbox, outcome) = direct(&gateway, &downstream, serving, request).await;
    let response = outcome.unwrap_or_else(|own| own.map(Either::Right));
    // Neither path nor query: both may hold what only the sandbox should know.
    debug!(
        %method,
        status = response.status().as_u16(),
        sandbox = sandbox.as_deref(),
        elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "request"
    );
    Ok(response)
}

type Own = Response<Full<Bytes>>;

/// Finds the destination and forwards; `Err` is an answer of our own.
async fn direct(
    gateway: &Gateway,
    downstream: &Arc<Downstream>,
    serving: Arc<Serving>,
    request: Request<ClientBody>,
) -> (Option<String>, Result<Response<AnswerBody>, Own>) {
    if request.method() == Method::CONNECT {
        return (None, Err(answers::connect_refused()));
    }
    let (parts, body) = request.into_parts();
    let to_person = answers::is_navigation(&parts);
    let (id, port, found) = match routing::destination(&parts) {
        Ok(Destination::Sandbox { id, port }) => {
            let found = match gateway.routes.find(&id) {
                Some(route) => Ok(route),
                None => gateway.wake(&id, port, &parts).await,
            };
            (id, port, found)
        }
        Ok(Destination::Signed(url)) => match gateway.routes.find_signed(&url) {
            Some(route) => (route.id().clone(), u64::from(ENVD_PORT), Ok(route)),
            None => return (None, Err(Misdirected::MissingHeader.answer())),
        },
        Err(misdirected) => return (None, Err(misdirected.answer())),
    };
    let outcome = match found {
        Err(failure) => Err(failure),
        Ok(route) => {
            let visit = Visit { gateway, downstream, route: &route, port, serving };
            visit.forward(parts, body).await
        }
    };
    let answered = outcome.map_err(|failure| failure.answer(&id, to_person));
    (Some(id.to_string()), answered)
}

impl Gateway {
    /// The route to a sandbox that has none, once it is resumed for this request.
    async fn wake(&self, id: &SandboxId, port: u64, parts: &Parts) -> Result<Route, Failure> {
        // Nobody outside may use these, so nobody wakes a sandbox for them.
        if port == u64::from(ENVD_PORT) && routing::is_internal(parts.uri.path()) {
            return Err(Failure::NotFound);
        }
        let wake = self.wake.as_ref().ok_or(Failure::NotFound)?;
        wake.wake(id, Visitor::of(parts, port)).await.map_err(Failure::Asleep)?;
        // It may have gone again.
        self.routes.find(id).ok_or(Failure::NotFound)
    }
}

/// One request on its way to a live sandbox.
struct Visit<'a> {
    gateway: &'a Gateway,
    downstream: &'a Arc<Downstream>,
    route: &'a Route,
    port: u64,
    serving: Arc<Serving>,
}

impl Visit<'_> {
    async fn forward(
        self,
        mut parts: Parts,
        body: ClientBody,
    ) -> Result<Response<AnswerBody>, Failure> {
        if self.port == u64::from(ENVD_PORT) && routing::is_internal(parts.uri.path()) {
            return Err(Failure::InternalRoute);
        }
        let limit = self.gateway.link.config.max_connections_per_sandbox;
        let in_flight = self.route.enter(limit).ok_or(Failure::TooManyConnections { limit })?;
        let closed = Failure::PortClosed { port: self.port };
        let port = u16::try_from(self.port).ok().filter(|port| *port != 0).ok_or(closed)?;
        let upgrade = headers::wanted_upgrade(&parts);
        let client = upgrade.is_some().then(|| parts.extensions.remove::<OnUpgrade>()).flatten();
        let protocol = protocol(&parts);
        let request = guest_request(parts, body, protocol, self.downstream, upgrade);
        let link = &self.gateway.link;
        let exchange = upstream::exchange(link, self.route, port, protocol, request);
        let (response, lease) = tokio::select! {
            biased;
            () = self.route.ended() => return Err(self.explain(None)),
            outcome = exchange => outcome.map_err(|error| self.explain(Some(&error)))?,
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return match client {
                Some(client) => Ok(self.switch(client, response, lease, in_flight)),
                None => Err(Failure::Broken { port: self.port }),
            };
        }
        Ok(self.relay(response, lease, in_flight))
    }

    /// Why there was no response: the sandbox may have gone meanwhile.
    fn explain(&self, error: Option<&ExchangeError>) -> Failure {
        if self.gateway.routes.find(self.route.id()).is_none() {
            return Failure::NotFound;
        }
        let failure = match error {
            Some(ExchangeError::Broken(_)) => Failure::Broken { port: self.port },
            Some(ExchangeError::Connect(ConnectError::TunnelsFull)) => {
                Failure::TooManyConnections { limit: MAX_TUNNELS }
            }
            Some(ExchangeError::Connect(ConnectError::Port(_))) | None => {
                Failure::PortClosed { port: self.port }
            }
        };
        if let Some(error) = error {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            debug!(sandbox = %self.route.id(), port = self.port, %error, cause, "no answer");
        }
        failure
    }

    fn relay(
        self,
        response: Response<Incoming>,
        lease: Lease,
        in_flight: InFlight,
    ) -> Response<AnswerBody> {
        let (mut parts, incoming) = response.into_parts();
        headers::forward_response(&mut parts.headers);
        // What the guest speaks is no business of the client; hyper fits it to the connection.
        parts.version = Version::HTTP_11;
        let body =
            Relayed { incoming, lease: Some(lease), _in_flight: in_flight, _serving: self.serving };
        Response::from_parts(parts, Either::Left(body))
    }

    /// Passes a 101 on and leaves the two connections to a tunnel.
    fn switch(
        self,
        client: OnUpgrade,
        mut response: Response<Incoming>,
        lease: Lease,
        in_flight: InFlight,
    ) -> Response<AnswerBody> {
        let guest = hyper::upgrade::on(&mut response);
        let (mut parts, _no_body) = response.into_parts();
        let protocol = parts.headers.get(UPGRADE).cloned();
        headers::forward_response(&mut parts.headers);
        if let Some(protocol) = protocol {
            headers::set_upgrade(&mut parts.headers, protocol);
        }
        parts.version = Version::HTTP_11;
        let (link, route) = (Arc::clone(&self.gateway.link), self.route.clone());
        let serving = self.serving;
        self.gateway.link.scope.spawn_shielded("tunnel", OnError::Log, async move {
            tunnel::run(&link, &route, client, guest).await;
            drop((lease, in_flight, serving));
            Ok::<(), Infallible>(())
        });
        Response::from_parts(parts, Either::Right(Full::default()))
    }
}

/// HTTP/2 to the guest only for gRPC that came by HTTP/2: it cannot work otherwise, while other
/// services may not know HTTP/2 without TLS.
fn protocol(parts: &Parts) -> Protocol {
    let is_grpc = parts
        .headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
        // gRPC-Web is made for HTTP/1.1, and its name begins the same.
        && !parts.headers[CONTENT_TYPE].as_bytes().starts_with(b"application/grpc-web");
    if parts.version == Version::HTTP_2 && is_grpc { Protocol::Http2 } else { Protocol::Http1 }
}

fn guest_request(
    mut parts: Parts,
    body: ClientBody,
    protocol: Protocol,
    downstream: &Downstream,
    upgrade: Option<HeaderValue>,
) -> Request<GuestBody> {
    let host = routing::host(&parts)
        .and_then(|host| HeaderValue::from_str(host).ok())
        .expect("the request was routed by its host");
    headers::forward_request(&mut parts.headers, &host, downstream.peer.ip(), upgrade);
    parts.uri = guest_uri(&parts.uri, protocol);
    parts.extensions.clear();
    parts.version = match protocol {
        Protocol::Http1 => Version::HTTP_11,
        Protocol::Http2 => {
            // `:authority` says it.
            parts.headers.remove(http::header::HOST);
            Version::HTTP_2
        }
    };
    let body = GuestBody::of(body);
    // hyper sends no body of unknown length with a GET unless told to.
    if protocol == Protocol::Http1
        && !body.is_end_stream()
        && !parts.headers.contains_key(CONTENT_LENGTH)
    {
        parts.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    Request::from_parts(parts, body)
}

/// Path and query; over HTTP/2 also the host, which has no header there.
fn guest_uri(uri: &Uri, protocol: Protocol) -> Uri {
    let path = uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(path);
    if protocol == Protocol::Http2 {
        let localhost = || Authority::from_static("localhost");
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(uri.authority().cloned().unwrap_or_else(localhost));
    }
    Uri::from_parts(parts).expect("a path alone, or one with scheme and host, is a URI")
}

/// The guest's body on its way to the client. When the client leaves, this is dropped and with
/// it the connection to the guest.
pub(crate) struct Relayed {
    incoming: Incoming,
    /// Taken when the body has been read to its end.
    lease: Option<Lease>,
    _in_flight: InFlight,
    _serving: Arc<Serving>,
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        if frame.is_none()
            && let Some(lease) = self.lease.take()
        {
            lease.keep();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        // A body of known length is not polled past its last byte.
        if self.incoming.is_end_stream()
            && let Some(lease) = self.lease.take()
        {
            lease.keep();
        }
    }
}
