//! Request bodies: bounded in size and time, JSON whatever their content type says, and an error
//! that names the field.

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
/// Longest wait for the whole body.
const MAX_TIME: Duration = Duration::from_secs(30);

/// A JSON body that must be there.
pub(crate) struct Json<T>(pub(crate) T);

/// A JSON body; an empty one is `None`.
pub(crate) struct OptionalJson<T>(pub(crate) Option<T>);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let OptionalJson(body) = OptionalJson::from_request(request, state).await?;
        body.map(Json).ok_or_else(|| ApiError::bad_request("the request body is empty"))
    }
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let body = read(&parts.headers, body).await?;
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(OptionalJson(None));
        }
        parse(&body).map(|value| OptionalJson(Some(value)))
    }
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

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        let e = e.into_inner();
        if !e.is_data() {
            ApiError::bad_request(format!("the request body is not valid JSON: {e}"))
        } else if path == "." {
            ApiError::bad_request(format!("the request body is not valid: {e}"))
        } else {
            ApiError::bad_request(format!("the field '{path}' is not valid: {e}"))
        }
    })?;
    json.end()
        .map_err(|e| ApiError::bad_request(format!("the request body is not valid JSON: {e}")))?;
    Ok(value)
}
