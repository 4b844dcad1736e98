//! An HTTP client with a key.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

#[derive(Clone)]
pub(crate) struct Client {
    inner: legacy::Client<HttpConnector, Full<Bytes>>,
    base: String,
    pub(crate) key: String,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {:?}", self.text))
    }

    /// The sandbox a create answered with.
    #[track_caller]
    pub(crate) fn sandbox_id(&self) -> String {
        assert_eq!(self.status, 201, "{}", self.text);
        self.json()["sandboxID"].as_str().expect("an id").to_owned()
    }

    /// Checks status and `error_code`, and whether another try is asked for and after how long.
    #[track_caller]
    pub(crate) fn assert_refused(&self, status: u16, code: &str, retry: (&str, Option<&str>)) {
        assert_eq!(self.status, status, "{}", self.text);
        assert_eq!(self.json()["error_code"], code, "{}", self.text);
        let header = |name| self.headers.get(name).map(|v| v.to_str().expect("text"));
        assert_eq!((header("should-retry"), header("retry-after")), (Some(retry.0), retry.1));
    }

    /// Checks status, `code` and `message` of an error body.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, message: &str) {
        assert_eq!(self.status, status, "{}", self.text);
        assert_eq!(self.headers["content-type"], "application/json");
        let body = self.json();
        assert_eq!(body["code"], status);
        let found = body["message"].as_str().expect("a message");
        assert!(found.contains(message), "{found:?} lacks {message:?}");
    }
}

impl Client {
    pub(crate) fn new(address: SocketAddr, key: &str) -> Client {
        Client::with(address, key, false)
    }

    /// A client that speaks HTTP/2 without asking.
    pub(crate) fn h2c(address: SocketAddr, key: &str) -> Client {
        Client::with(address, key, true)
    }

    fn with(address: SocketAddr, key: &str, h2: bool) -> Client {
        let inner = legacy::Client::builder(TokioExecutor::new()).http2_only(h2).build_http();
        Client { inner, base: format!("http://{address}"), key: key.to_owned() }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.send(Method::POST, path, body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, "").await
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: &str) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("X-API-KEY", &self.key)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
            .expect("a request");
        self.raw(request).await
    }

    /// Sends a create under an idempotency key.
    pub(crate) async fn create_keyed(&self, path: &str, key: &str, body: &str) -> Answer {
        let request = Request::post(format!("{}{path}", self.base))
            .header("X-API-KEY", &self.key)
            .header("content-type", "application/json")
            .header("idempotency-key", key)
            .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
            .expect("a request");
        self.raw(request).await
    }

    /// A request with these headers and no key.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        self.raw(request.body(body).expect("a request")).await
    }

    pub(crate) async fn raw(&self, request: Request<Full<Bytes>>) -> Answer {
        let response = self.inner.request(request).await.expect("an answer");
        let (parts, body) = response.into_parts();
        let body = body.collect().await.expect("its body").to_bytes();
        Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            text: String::from_utf8(body.to_vec()).expect("text"),
        }
    }
}
