//! Which headers pass, which end at this hop, and which are added?
//!
//! Source: RFC 9110 section 7.6.1 (connection-specific fields) and RFC 9113 section 8.2.2.

use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The protocol a request wants to change to, if it may.
///
/// Not h2c: a tunnel of HTTP/2 would carry requests past the routing rules.
pub(crate) fn wanted_upgrade(parts: &Parts) -> Option<HeaderValue> {
    if parts.version != Version::HTTP_11 || !has_token(&parts.headers, &CONNECTION, "upgrade") {
        return None;
    }
    let protocol = parts.headers.get(UPGRADE)?;
    let text = protocol.to_str().ok()?;
    let is_h2c = text.split(',').any(|name| name.trim().eq_ignore_ascii_case("h2c"));
    (!is_h2c).then(|| protocol.clone())
}

/// Prepares the headers of a request for the guest.
pub(crate) fn forward_request(
    headers: &mut HeaderMap,
    host: &HeaderValue,
    peer: IpAddr,
    upgrade: Option<HeaderValue>,
) {
    let trailers_wanted = has_token(headers, &TE, "trailers");
    // Where both are given the length is a lie (RFC 9112 section 6.3); the body that was read is
    // framed anew.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    end_hop(headers);
    headers.remove(HTTP2_SETTINGS);
    // This hop has said 100 already, by reading the body.
    headers.remove(EXPECT);
    if trailers_wanted {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        set_upgrade(headers, protocol);
    }
    join_cookies(headers);
    headers.insert(HOST, host.clone());
    append_forwarded_for(headers, peer);
    // A TLS terminator in front knows better than this hop.
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    headers.entry(FORWARDED_HOST).or_insert_with(|| host.clone());
}

/// Prepares the headers of a response for the client.
pub(crate) fn forward_response(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    end_hop(headers);
}

/// Puts back what an upgrade needs after [`forward_request`] or [`forward_response`].
pub(crate) fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}

/// `Trailer` stays: without it the trailers it announces would not be sent on.
fn end_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        headers.remove(name);
    }
}

/// HTTP/2 may send a cookie in crumbs; HTTP/1.1 knows one line only. RFC 9113 section 8.2.3.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, cookie);
    }
}

fn append_forwarded_for(headers: &mut HeaderMap, peer: IpAddr) {
    let mut chain: Vec<&str> =
        headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).collect();
    let peer = peer.to_canonical().to_string();
    chain.push(&peer);
    if let Ok(value) = HeaderValue::from_str(&chain.join(", ")) {
        headers.insert(FORWARDED_FOR, value);
    }
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','))
        .map(str::trim)
}

fn has_token(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        parts(pairs).headers
    }

    fn parts(pairs: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder();
        for (name, value) in pairs {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    fn forwarded(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = headers(pairs);
        let host = HeaderValue::from_static("80-i.d");
        forward_request(&mut headers, &host, IpAddr::from([10, 0, 0, 9]), None);
        headers
    }

    #[test]
    fn a_hop_keeps_its_own_headers() {
        let out = forwarded(&[
            ("connection", "close, X-Secret-Hop, host"),
            ("x-secret-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("upgrade", "h2c"),
            ("expect", "100-continue"),
            ("x-kept", "1"),
            ("trailer", "x-sum"),
        ]);
        let mut names: Vec<&str> = out.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        let kept =
            ["host", "te", "trailer", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
        assert_eq!(names, [&kept[..], &["x-kept"]].concat());
        assert_eq!(out[TE], "trailers");
        assert_eq!(out[HOST], "80-i.d");
    }

    #[test]
    fn the_way_of_a_request_is_recorded() {
        let out = forwarded(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-for", "5.6.7.8"),
            ("x-forwarded-proto", "https"),
        ]);
        assert_eq!(out[FORWARDED_FOR], "1.2.3.4, 5.6.7.8, 10.0.0.9");
        assert_eq!(out[FORWARDED_PROTO], "https");
        assert_eq!(out[FORWARDED_HOST], "80-i.d");
    }

    #[test]
    fn cookie_crumbs_become_one_line() {
        let out = forwarded(&[("cookie", "a=1"), ("cookie", "b=2")]);
        assert_eq!(out[COOKIE], "a=1; b=2");
        assert_eq!(out.get_all(COOKIE).iter().count(), 1);
    }

    #[test]
    fn upgrades_need_both_headers_and_are_never_h2c() {
        let wanted = |pairs: &[(&str, &str)]| wanted_upgrade(&parts(pairs)).is_some();
        assert!(wanted(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]));
        assert!(!wanted(&[("connection", "Upgrade"), ("upgrade", "h2c")]));
        assert!(!wanted(&[("connection", "Upgrade"), ("upgrade", "websocket, H2C")]));
        assert!(!wanted(&[("upgrade", "websocket")]));
        assert!(!wanted(&[("connection", "Upgrade")]));
    }
}
