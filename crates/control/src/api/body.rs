//! Request bodies: JSON, bounded in size, depth and time, and an error that names the field.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// Largest body read. Metadata and environments are the only large things a client sends here.
const MAX_BYTES: usize = 8 << 20;
/// Arrays and objects within each other. `serde_json` stops there too, but not in fields it skips.
const MAX_DEPTH: usize = 128;
/// Longest wait for the whole body.
const MAX_TIME: Duration = Duration::from_secs(30);

/// A JSON body that must be there.
pub(crate) struct Json<T>(pub(crate) T);

/// A JSON body; an empty one is `None`, and so is `null`.
pub(crate) struct OptionalJson<T>(pub(crate) Option<T>);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let OptionalJson(body) = OptionalJson::from_request(request, state).await?;
        body.map(Json).ok_or_else(empty)
    }
}

pub(crate) fn empty() -> ApiError {
    ApiError::bad_request("the request body is empty")
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        match checked(request).await? {
            Some(body) => parse(&body).map(OptionalJson),
            None => Ok(OptionalJson(None)),
        }
    }
}

/// Reads a body and checks all of it that does not depend on its shape; an empty one is `None`.
pub(crate) async fn checked(request: Request) -> Result<Option<Bytes>, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read(&parts.headers, body).await?;
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    check_type(&parts.headers)?;
    check_is_object(&body)?;
    check_depth(&body)?;
    Ok(Some(body))
}

/// A body that says nothing of its type is believed to be JSON, one that says otherwise is not: a
/// form of another site's page cannot pass for it.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let media = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    let media = media.trim().to_ascii_lowercase();
    let subtype = media.strip_prefix("application/").unwrap_or_default();
    if subtype == "json" || subtype.ends_with("+json") {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "the header Content-Type must be application/json",
    ))
}

/// A list would fill the fields of a shape in their order.
fn check_is_object(body: &[u8]) -> Result<(), ApiError> {
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::bad_request(
            "the request body is not valid: it must be an object, not a list",
        ));
    }
    Ok(())
}

/// Counts brackets outside of strings. What is not JSON is found by whoever parses it.
fn check_depth(body: &[u8]) -> Result<(), ApiError> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(ApiError::bad_request(format!(
                "the request body is nested deeper than {MAX_DEPTH} levels"
            )));
        }
    }
    Ok(())
}

async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    if announced > MAX_BYTES as u64 {
        return Err(too_large());
    }
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        let name: HeaderName = header::CONTENT_ENCODING;
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("request bodies with a {name} are not supported"),
        ));
    }
    match tokio::time::timeout(MAX_TIME, Limited::new(body, MAX_BYTES).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(ApiError::bad_request("the request body broke off")),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the request body did not arrive within {} s", MAX_TIME.as_secs()),
        )),
    }
}

fn too_large() -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the request body is larger than {} MiB", MAX_BYTES >> 20),
    )
}

fn not_valid(e: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let path = e.path().to_string();
    let e = e.into_inner();
    if !e.is_data() {
        ApiError::bad_request(format!("the request body is not valid JSON: {e}"))
    } else if path == "." {
        ApiError::bad_request(format!("the request body is not valid: {e}"))
    } else {
        ApiError::bad_request(format!("the field '{path}' is not valid: {e}"))
    }
}

/// What a checked body spells.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // All of it, because the parser does not look into fields it skips.
    let body = std::str::from_utf8(body)
        .map_err(|e| ApiError::bad_request(format!("the request body is not valid UTF-8: {e}")))?;
    let mut json = serde_json::Deserializer::from_str(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(not_valid)?;
    json.end()
        .map_err(|e| ApiError::bad_request(format!("the request body is not valid JSON: {e}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn depth_is_counted_outside_of_strings() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert_eq!(check_depth(nested(MAX_DEPTH).as_bytes()), Ok(()));
        assert!(check_depth(nested(MAX_DEPTH + 1).as_bytes()).is_err());
        let many = r#"{"a":[1]},"#.repeat(MAX_DEPTH * 2);
        let text = format!(r#"["{}", "\"{}"]"#, nested(999), "[".repeat(999));
        for body in [&many, &text] {
            assert_eq!(check_depth(body.as_bytes()), Ok(()), "{body:.40}");
        }
    }

    #[test]
    fn only_json_passes_for_json() {
        let checked = |media: &'static [u8]| {
            let value = HeaderValue::from_bytes(media).expect("a header value");
            check_type(&HeaderMap::from_iter([(header::CONTENT_TYPE, value)]))
        };
        for media in ["application/json", "Application/JSON; charset=utf-8", "application/a+json"] {
            assert_eq!(checked(media.as_bytes()), Ok(()), "{media}");
        }
        for media in
            ["", "text/plain", "application/x-www-form-urlencoded", "json", "text/json", "\u{fc}"]
        {
            assert!(checked(media.as_bytes()).is_err(), "{media}");
        }
        assert_eq!(check_type(&HeaderMap::new()), Ok(()));
    }
}
