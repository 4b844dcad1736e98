//! Which sandbox and port does a request mean?
//!
//! Source: `contract/e2b-wire.md` section 3.2 and `infra: packages/shared/pkg/proxy/host.go`.

use std::net::IpAddr;

use belljar_domain::SandboxId;
use http::header::HOST;
use http::request::Parts;

use crate::signature::SignedUrl;

/// The port of the guest daemon.
pub(crate) const ENVD_PORT: u16 = 49983;

const SANDBOX_ID: &str = "e2b-sandbox-id";
const SANDBOX_PORT: &str = "e2b-sandbox-port";
/// The left-most label of the host that all sandboxes of a domain share.
const SHARED_LABEL: &str = "sandbox";

/// What a request asks for.
pub(crate) enum Destination {
    /// A port of a named sandbox.
    Sandbox {
        id: SandboxId,
        /// As sent. Numbers that are no TCP port are ports on which nothing listens.
        port: u64,
    },
    /// The guest daemon of whichever sandbox signed the URL.
    Signed(SignedUrl),
}

/// Why a request leads nowhere. The texts are the contract's (section 3.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Misdirected {
    InvalidHost,
    InvalidSandboxId,
    MissingHeader,
    /// Upstream answers 500 here; clients have seen that for years.
    InvalidPort,
}

/// The host a request was sent to: of the URI if it has one, else the `Host` header.
pub(crate) fn host(parts: &Parts) -> Option<&str> {
    match parts.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => parts.headers.get(HOST)?.to_str().ok(),
    }
}

/// Reads the destination from host and headers.
pub(crate) fn destination(parts: &Parts) -> Result<Destination, Misdirected> {
    let host = without_port(host(parts).ok_or(Misdirected::InvalidHost)?);
    if is_shared(host) { by_headers(parts) } else { by_host(host) }
}

fn by_headers(parts: &Parts) -> Result<Destination, Misdirected> {
    let header = |name| parts.headers.get(name).filter(|value| !value.is_empty());
    let Some(id) = header(SANDBOX_ID) else {
        return SignedUrl::parse(&parts.method, &parts.uri, &parts.headers)
            .map(Destination::Signed)
            .ok_or(Misdirected::MissingHeader);
    };
    let port = header(SANDBOX_PORT).ok_or(Misdirected::MissingHeader)?;
    named(id.to_str().unwrap_or_default(), port.to_str().unwrap_or_default())
}

fn by_host(host: &str) -> Result<Destination, Misdirected> {
    // There is always a domain: a bare `{port}-{id}` is some other machine's name.
    let (label, _domain) = host.split_once('.').ok_or(Misdirected::InvalidHost)?;
    let (port, id) = label.split_once('-').ok_or(Misdirected::InvalidHost)?;
    // Host names have no case; ids are lower case.
    named(&id.to_ascii_lowercase(), port)
}

fn named(id: &str, port: &str) -> Result<Destination, Misdirected> {
    // `parse` alone would take a leading `+`.
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits).ok_or(Misdirected::InvalidPort)?;
    let id = id.parse().map_err(|_| Misdirected::InvalidSandboxId)?;
    Ok(Destination::Sandbox { id, port })
}

/// The host part of `host[:port]`; brackets of an IPv6 address are dropped.
fn without_port(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split_once(']').map_or(rest, |(address, _)| address);
    }
    authority.split_once(':').map_or(authority, |(host, _)| host)
}

fn is_shared(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok()
        || host.split_once('.').is_some_and(|(label, _)| label.eq_ignore_ascii_case(SHARED_LABEL))
}

/// Routes of the guest daemon that only the host may call.
///
/// Source: `contract/e2b-wire.md` section 2.1.
const INTERNAL_PATHS: [&str; 7] =
    ["init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade"];

/// Whether a path is an internal one of the guest daemon, however it is spelled: the guest's
/// router may be laxer about slashes, dots and escapes than a plain comparison.
pub(crate) fn is_internal(path: &str) -> bool {
    let decoded = percent_decoded(path);
    let mut segments: Vec<&str> = Vec::new();
    for segment in decoded.split(['/', '\\']) {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    matches!(segments[..], [only] if INTERNAL_PATHS.iter().any(|p| only.eq_ignore_ascii_case(p)))
}

fn percent_decoded(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = (byte == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        decoded.push(escaped.unwrap_or(byte));
        at += if escaped.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn route(host: &str, headers: &[(&str, &str)]) -> Result<(String, u64), Misdirected> {
        let mut request = Request::builder().uri("/x").header(HOST, host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).expect("a request").into_parts();
        destination(&parts).map(|found| match found {
            Destination::Sandbox { id, port } => (id.to_string(), port),
            Destination::Signed(_) => ("signed".to_owned(), 0),
        })
    }

    #[test]
    fn hosts_name_port_and_sandbox() {
        for host in [
            "8080-iabc.example.com",
            "8080-iabc.localhost:3002",
            "8080-iabc-6532622b.example.com",
            "8080-IABC.Example.com",
        ] {
            assert_eq!(route(host, &[]), Ok(("iabc".to_owned(), 8080)), "{host}");
        }
        // The headers of another sandbox change nothing: the host decides.
        let headers = [(SANDBOX_ID, "iother"), (SANDBOX_PORT, "1")];
        assert_eq!(route("8080-iabc.d", &headers), Ok(("iabc".to_owned(), 8080)));
    }

    #[test]
    fn shared_hosts_are_routed_by_headers() {
        let headers = [("E2b-Sandbox-Id", "iabc-6532622b"), ("E2b-Sandbox-Port", "49983")];
        for host in [
            "localhost",
            "LOCALHOST:3002",
            "127.0.0.1:3002",
            "[::1]:3002",
            "[::1]",
            "sandbox.example.com",
            "sandbox.localhost:3002",
        ] {
            assert_eq!(route(host, &headers), Ok(("iabc".to_owned(), 49983)), "{host}");
            assert_eq!(route(host, &headers[..1]), Err(Misdirected::MissingHeader), "{host}");
            assert_eq!(route(host, &headers[1..]), Err(Misdirected::MissingHeader), "{host}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        use Misdirected::{InvalidHost, InvalidPort, InvalidSandboxId};
        for (host, reason) in [
            ("example.com", InvalidHost),
            ("8080-iabc", InvalidHost),
            ("sandbox", InvalidHost),
            ("", InvalidHost),
            ("http-iabc.d", InvalidPort),
            ("+80-iabc.d", InvalidPort),
            ("-iabc.d", InvalidPort),
            ("99999999999999999999-iabc.d", InvalidPort),
            ("80-.d", InvalidSandboxId),
            ("80-i_abc.d", InvalidSandboxId),
            ("80-iabc@evil.d", InvalidSandboxId),
        ] {
            assert_eq!(route(host, &[]), Err(reason), "{host}");
        }
        for (id, port, reason) in [
            ("../x", "80", InvalidSandboxId),
            ("IABC", "80", InvalidSandboxId),
            ("iabc", "eighty", InvalidPort),
            ("iabc", "-1", InvalidPort),
        ] {
            let headers = [(SANDBOX_ID, id), (SANDBOX_PORT, port)];
            assert_eq!(route("localhost", &headers), Err(reason), "{id} {port}");
        }
        assert_eq!(route("80000-iabc.d", &[]), Ok(("iabc".to_owned(), 80000)));
    }

    #[test]
    fn internal_paths_are_known_in_every_spelling() {
        for path in
            ["/init", "/init/", "//init", "/./init", "/x/../init", "/%69nit", "/INIT", "/fsthaw"]
        {
            assert!(is_internal(path), "{path}");
        }
        for path in ["/", "/health", "/initial", "/files/init", "/%zzinit", "/upgrade/x", "*"] {
            assert!(!is_internal(path), "{path}");
        }
    }
}
