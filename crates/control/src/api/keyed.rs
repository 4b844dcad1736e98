//! Creates that may be sent again: the header `Idempotency-Key` and a body to go with it.
//!
//! The body is compared in a form that spacing and the order of fields do not change. Source:
//! contract section 1.2, and section 10 for what is inferred.

use axum::extract::{FromRequest, Request};
use http::{HeaderMap, HeaderName};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::body;
use super::error::ApiError;
use crate::idempotency::Key;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const MAX_CHARACTERS: usize = 255;

/// A JSON body that must be there, and the key it was sent with.
pub(crate) struct Keyed<T> {
    pub(crate) body: T,
    pub(crate) key: Option<Key>,
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Keyed<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let key = key_in(request.headers())?.map(str::to_owned);
        let path = request.uri().path().to_owned();
        let text = body::checked(request).await?.ok_or_else(body::empty)?;
        // From the text: a value no longer shows that a field was there twice.
        let body = body::parse::<Option<T>>(&text)?.ok_or_else(body::empty)?;
        let Some(key) = key else { return Ok(Keyed { body, key: None }) };
        // The versions of a call differ in their defaults, so the same body is not the same request.
        let value: Value = body::parse(&text)?;
        let key = Key::new(&key, format!("{path} {value}").as_bytes());
        Ok(Keyed { body, key: Some(key) })
    }
}

fn key_in(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut all = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = all.next() else { return Ok(None) };
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    match value.to_str() {
        Ok(text)
            if (1..=MAX_CHARACTERS).contains(&text.len())
                && text.bytes().all(allowed)
                && all.next().is_none() =>
        {
            Ok(Some(text))
        }
        _ => Err(ApiError::bad_request(format!(
            "the header 'Idempotency-Key' must be sent once, with 1 to {MAX_CHARACTERS} of a-z, \
             0-9 and -"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn read(values: &[&str]) -> Result<Option<String>, ApiError> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(IDEMPOTENCY_KEY, HeaderValue::from_str(value).expect("a header value"));
        }
        key_in(&headers).map(|key| key.map(str::to_owned))
    }

    #[test]
    fn keys_have_an_alphabet_and_a_length() {
        let longest = "a".repeat(255);
        for key in ["a", "0", "-", "6f2b8a52-9d0f", &longest] {
            assert_eq!(read(&[key]), Ok(Some(key.to_owned())));
        }
        assert_eq!(read(&[]), Ok(None));
        let too_long = "a".repeat(256);
        for keys in [&[""][..], &["A"], &["a b"], &["a_b"], &["a", "a"], &[&too_long]] {
            assert!(read(keys).is_err(), "{keys:?}");
        }
    }
}
