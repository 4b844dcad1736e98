//! What the proxy itself answers. Every status and text is the contract's (section 3.5); the
//! SDKs look for `was not found` and `port is not open` in them.

use belljar_domain::SandboxId;
use bytes::Bytes;
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;

use crate::routing::Misdirected;
use crate::wake::Asleep;

/// An answer about a named sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    NotFound,
    PortClosed {
        port: u64,
    },
    /// The service took the connection and then closed it, or spoke no HTTP.
    Broken {
        port: u64,
    },
    TooManyConnections {
        limit: usize,
    },
    InternalRoute,
    /// It is paused, and was not resumed for this request.
    Asleep(Asleep),
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(rename = "sandboxId")]
    sandbox_id: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u64>,
    #[serde(rename = "connectionLimit", skip_serializing_if = "Option::is_none")]
    connection_limit: Option<usize>,
    code: u16,
}

impl Failure {
    fn status(self) -> StatusCode {
        match self {
            Failure::NotFound
            | Failure::PortClosed { .. }
            | Failure::Broken { .. }
            | Failure::Asleep(Asleep::NotFound) => StatusCode::BAD_GATEWAY,
            Failure::TooManyConnections { .. } | Failure::Asleep(Asleep::AtLimit { .. }) => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Failure::Asleep(Asleep::NotPermitted) => StatusCode::FORBIDDEN,
            Failure::Asleep(Asleep::Changing) => StatusCode::CONFLICT,
            Failure::Asleep(Asleep::Unavailable) => StatusCode::SERVICE_UNAVAILABLE,
            Failure::InternalRoute => StatusCode::NOT_FOUND,
        }
    }

    fn message(self) -> String {
        match self {
            Failure::NotFound | Failure::Asleep(Asleep::NotFound) => {
                "The sandbox was not found".to_owned()
            }
            Failure::Asleep(Asleep::NotPermitted) => "This sandbox can't be resumed with the \
                                                      credentials provided. Check your access \
                                                      token and try again."
                .to_owned(),
            Failure::Asleep(Asleep::Changing) => {
                "The sandbox is still transitioning. Try again in a moment.".to_owned()
            }
            Failure::Asleep(Asleep::AtLimit { limit }) => format!(
                "The sandbox is paused, and its team has reached the maximum number of concurrent \
                 E2B sandboxes ({limit})"
            ),
            Failure::Asleep(Asleep::Unavailable) => {
                "The sandbox could not be resumed. Try again in a moment.".to_owned()
            }
            Failure::PortClosed { .. } => "The sandbox is running but port is not open".to_owned(),
            Failure::Broken { .. } => {
                "The service in the sandbox closed the connection without an answer".to_owned()
            }
            Failure::TooManyConnections { limit } => {
                format!("The sandbox has too many concurrent incoming connections (limit: {limit})")
            }
            Failure::InternalRoute => "This endpoint is reserved for the E2B control plane and \
                                       is not reachable through the sandbox URL"
                .to_owned(),
        }
    }

    /// The answer: a page for a person who follows a link, else JSON.
    pub(crate) fn answer(self, id: &SandboxId, to_person: bool) -> Response<Full<Bytes>> {
        let message = self.message();
        let port = match self {
            Failure::PortClosed { port } | Failure::Broken { port } => Some(port),
            _ => None,
        };
        if to_person {
            let page = page(id, &message, port);
            return respond(self.status(), "text/html; charset=utf-8", page);
        }
        let connection_limit = match self {
            Failure::TooManyConnections { limit } => Some(limit),
            _ => None,
        };
        let body = Body {
            sandbox_id: id.as_str(),
            message: &message,
            port,
            connection_limit,
            code: self.status().as_u16(),
        };
        let text = serde_json::to_string(&body).expect("strings and numbers always serialise");
        respond(self.status(), "application/json", text)
    }
}

impl Misdirected {
    pub(crate) fn answer(self) -> Response<Full<Bytes>> {
        let (status, text) = match self {
            Misdirected::InvalidHost => (StatusCode::BAD_REQUEST, "Invalid host"),
            Misdirected::InvalidSandboxId => (StatusCode::BAD_REQUEST, "Invalid sandbox ID"),
            Misdirected::MissingHeader => (StatusCode::BAD_REQUEST, "missing header"),
            Misdirected::InvalidPort => {
                (StatusCode::INTERNAL_SERVER_ERROR, "Unexpected error when routing request")
            }
        };
        respond(status, "text/plain; charset=utf-8", text.to_owned())
    }
}

/// This is a gateway to sandboxes, not a forward proxy.
pub(crate) fn connect_refused() -> Response<Full<Bytes>> {
    let text = "CONNECT is not supported".to_owned();
    respond(StatusCode::METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", text)
}

/// Whether a person follows a link with a browser. What the browser says it is doing counts
/// first; scripts in a page accept HTML too.
pub(crate) fn is_navigation(parts: &Parts) -> bool {
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return false;
    }
    if let Some(mode) = parts.headers.get("sec-fetch-mode") {
        return mode.as_bytes() == b"navigate";
    }
    parts.headers.get_all(ACCEPT).iter().any(|value| {
        value.to_str().is_ok_and(|text| text.to_ascii_lowercase().contains("text/html"))
    })
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    // The sandbox may be there a moment later.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Nothing in the page comes from the request but an id of `[a-z0-9]` and a number, so there is
/// nothing to escape.
fn page(id: &SandboxId, message: &str, port: Option<u64>) -> String {
    let port = port.map_or(String::new(), |port| format!("<p>Port: <code>{port}</code></p>\n"));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{message}</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:15vh auto;\
         padding:0 1em}}</style></head>\n<body>\n<h1>{message}</h1>\n\
         <p>Sandbox: <code>{id}</code></p>\n{port}</body>\n</html>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn asks(method: Method, headers: &[(&str, &str)]) -> bool {
        let mut request = Request::builder().method(method);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        is_navigation(&request.body(()).expect("a request").into_parts().0)
    }

    #[test]
    fn only_navigation_gets_a_page() {
        let html = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
        assert!(asks(Method::GET, &[html]));
        assert!(asks(Method::GET, &[html, ("sec-fetch-mode", "navigate")]));
        assert!(!asks(Method::GET, &[html, ("sec-fetch-mode", "cors")]));
        assert!(!asks(Method::POST, &[html]));
        assert!(!asks(Method::GET, &[("accept", "*/*")]));
        assert!(!asks(Method::GET, &[("user-agent", "Mozilla/5.0")]));
    }
}
