//! Limits on what comes before a body. What is beyond the connection's own limits, several times
//! these, is answered by the HTTP library with a status and no body.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, StatusCode};

use super::error::ApiError;

/// Longest path and query, in bytes. The largest thing in one is a filter by labels.
const MAX_TARGET_BYTES: usize = 16 << 10;
/// Largest headers, in bytes of their names and values, and in number.
const MAX_HEADER_BYTES: usize = 32 << 10;
const MAX_HEADERS: usize = 100;

/// Lets a request through whose head is of reasonable size.
pub(crate) async fn limit(request: Request, next: Next) -> Result<Response, ApiError> {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    if target > MAX_TARGET_BYTES {
        return Err(ApiError::new(
            StatusCode::URI_TOO_LONG,
            format!("the path and the query are longer than {MAX_TARGET_BYTES} bytes"),
        ));
    }
    check(request.headers())?;
    Ok(next.run(request).await)
}

fn check(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused =
        |message| Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message));
    if headers.len() > MAX_HEADERS {
        return refused(format!("there are more than {MAX_HEADERS} headers"));
    }
    let bytes = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        name.as_str().len() + value.as_bytes().len()
    };
    if headers.iter().map(bytes).sum::<usize>() > MAX_HEADER_BYTES {
        return refused(format!("the headers are larger than {MAX_HEADER_BYTES} bytes"));
    }
    Ok(())
}
