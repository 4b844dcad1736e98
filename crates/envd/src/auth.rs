//! Who may call, and as which user: the access token, signed URLs, the `Authorization` header.

use std::sync::Arc;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method, StatusCode};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::accounts::{Accounts, User};
use crate::clock;
use crate::http_api::json_error;
use crate::state::{State, TokenCheck};

/// Header that carries the sandbox's access token.
pub const TOKEN_HEADER: &str = "x-access-token";

/// Why a request was refused; the texts are part of the wire.
///
/// Source: `contract/e2b-wire.md` section 2.1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No token, or another one, on a route that cannot be signed.
    #[error(
        "unauthorized access, please provide a valid access token or method signing if supported"
    )]
    Token,
    /// A token was sent along with a signed URL and is another one.
    #[error("access token present in header but does not match")]
    TokenOnSigned,
    /// Neither token nor signature.
    #[error("missing signature query parameter")]
    NoSignature,
    /// The signature is of something else.
    #[error("invalid signature")]
    Signature,
    /// It was right once.
    #[error("signature is already expired")]
    Expired,
    /// The user named does not exist here.
    #[error("invalid username: '{0}'")]
    User(String),
}

/// Lets a request pass when its token is right, the sandbox is open, or the route does its own
/// check: health, files (signatures) and init.
pub async fn require_token(
    axum::extract::State(state): axum::extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    // The host counts a sandbox as ready a moment before its last files are written.
    state.settled().await;
    let own_check = matches!(
        (request.method(), request.uri().path()),
        (&Method::OPTIONS, _)
            | (&Method::GET | &Method::HEAD, "/health")
            | (&Method::GET | &Method::HEAD | &Method::POST, "/files")
            | (&Method::POST, "/init")
    );
    if !own_check {
        match state.check_token(token(request.headers())) {
            TokenCheck::Open | TokenCheck::Right => {}
            TokenCheck::Missing | TokenCheck::Wrong => {
                return json_error(StatusCode::UNAUTHORIZED, &AuthError::Token.to_string());
            }
        }
    }
    next.run(request).await
}

/// The token a request came with.
pub fn token(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes).filter(|token| !token.is_empty())
}

/// What a signed URL permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Download.
    Read,
    /// Upload.
    Write,
}

impl Operation {
    fn as_str(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

/// What of a file request's query is signed.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// `path`, exactly as sent.
    pub path: &'a str,
    /// `username`, empty when absent.
    pub username: &'a str,
    /// `signature`.
    pub signature: Option<&'a str>,
    /// `signature_expiration`, seconds since the Unix epoch.
    pub expiration: Option<i64>,
}

/// Checks the token or the signature of a file request.
///
/// # Errors
/// [`AuthError`] with the text clients compare.
pub fn check_signed(
    state: &State,
    headers: &HeaderMap,
    operation: Operation,
    signed: Signed<'_>,
) -> Result<(), AuthError> {
    match state.check_token(token(headers)) {
        TokenCheck::Open | TokenCheck::Right => return Ok(()),
        TokenCheck::Wrong => return Err(AuthError::TokenOnSigned),
        TokenCheck::Missing => {}
    }
    let Some(secret) = state.access_token() else { return Ok(()) };
    let given = signed.signature.ok_or(AuthError::NoSignature)?;
    let expected = signature(&signed, operation, secret.expose());
    if !bool::from(expected.as_bytes().ct_eq(given.as_bytes())) {
        return Err(AuthError::Signature);
    }
    if signed.expiration.is_some_and(|at| at < clock::unix_seconds()) {
        return Err(AuthError::Expired);
    }
    Ok(())
}

/// The signature of a file request.
///
/// Source: `contract/e2b-wire.md` section 2.1: `v1_` and the unpadded standard base64 of the
/// SHA-256 of `path:operation:user:token`, with `:expiration` when there is one.
pub fn signature(signed: &Signed<'_>, operation: Operation, token: &str) -> String {
    let mut hash = Sha256::new();
    for (index, part) in
        [signed.path, operation.as_str(), signed.username, token].into_iter().enumerate()
    {
        if index > 0 {
            hash.update(b":");
        }
        hash.update(part.as_bytes());
    }
    if let Some(expiration) = signed.expiration {
        hash.update(format!(":{expiration}").as_bytes());
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(hash.finalize()))
}

/// The user a request names in its `Authorization: Basic` header; the password is ignored, the
/// header selects and proves nothing.
pub fn basic_user(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, encoded) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = STANDARD.decode(encoded.trim()).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (user, _) = decoded.split_once(':')?;
    Some(user.to_owned()).filter(|user| !user.is_empty())
}

/// Finds the account of `name`, or of the default user when there is no name.
///
/// # Errors
/// [`AuthError::User`] when the machine has no such account.
pub fn find_user(state: &State, name: Option<&str>) -> Result<User, AuthError> {
    let name = match name {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => state.default_user(),
    };
    Accounts::load().user(&name).ok_or(AuthError::User(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Settings;
    use belljar_domain::Secret;

    fn secured() -> State {
        let token = Some(Secret::new("token".to_owned()));
        State::new(Settings { access_token: token, ..Settings::on_host("root") })
    }

    fn query<'a>(signature: Option<&'a str>, expiration: Option<i64>) -> Signed<'a> {
        Signed { path: "/home/user/a b.txt", username: "user", signature, expiration }
    }

    #[test]
    fn the_signature_is_the_documented_hash() {
        // printf '%s' '/home/user/a b.txt:read:user:token' | openssl dgst -sha256 -binary | base64
        assert_eq!(
            signature(&query(None, None), Operation::Read, "token"),
            "v1_8rGUb+9hyeZdt4AqnXQbDTq40oi9lJNYLxjHxc/vPFM"
        );
        // ... with ':1893456000' behind.
        assert_eq!(
            signature(&query(None, Some(1_893_456_000)), Operation::Read, "token"),
            "v1_Y0zsEZq5HTdQYRCPfrpfgGCV6PieLfAm7rZxldrYnY4"
        );
    }

    #[test]
    fn each_refusal_has_its_text() {
        let (state, none) = (secured(), HeaderMap::new());
        let check = |headers: &HeaderMap, signed| {
            check_signed(&state, headers, Operation::Read, signed).map_err(|e| e.to_string())
        };
        let good = signature(&query(None, None), Operation::Read, "token");
        assert_eq!(check(&none, query(Some(&good), None)), Ok(()));
        assert_eq!(
            check(&none, query(None, None)),
            Err("missing signature query parameter".to_owned())
        );
        assert_eq!(check(&none, query(Some("v1_x"), None)), Err("invalid signature".to_owned()));
        let old = signature(&query(None, Some(1)), Operation::Read, "token");
        assert_eq!(
            check(&none, query(Some(&old), Some(1))),
            Err("signature is already expired".to_owned())
        );
        let write = signature(&query(None, None), Operation::Write, "token");
        assert_eq!(check(&none, query(Some(&write), None)), Err("invalid signature".to_owned()));
        let mut headers = HeaderMap::new();
        headers.insert(TOKEN_HEADER, "wrong".parse().expect("a header"));
        assert_eq!(
            check(&headers, query(Some(&good), None)),
            Err("access token present in header but does not match".to_owned())
        );
        headers.insert(TOKEN_HEADER, "token".parse().expect("a header"));
        assert_eq!(check(&headers, query(None, None)), Ok(()));
    }

    #[test]
    fn the_basic_header_names_a_user() {
        let user = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().expect("a header"));
            basic_user(&headers)
        };
        assert_eq!(user("Basic cm9vdDo="), Some("root".to_owned()));
        assert_eq!(user("basic dXNlcjpwYXNz"), Some("user".to_owned()));
        assert_eq!(user("Basic Og=="), None);
        assert_eq!(user("Bearer cm9vdDo="), None);
        assert_eq!(user("Basic %%%"), None);
    }

    /// Nobody who does not know the token makes a signature, whatever the query looks like.
    #[test]
    fn no_query_is_let_in_by_chance() {
        let state = secured();
        let words = ["&signature=v1_", "&signature_expiration=", "path=", "&username=", "%2B"];
        crate::fuzz::run("query", &words, |input| {
            let text: String = input.iter().map(|byte| char::from(byte & 0x7F)).collect();
            let Ok(uri) = format!("/files?{text}").parse::<http::Uri>() else { return 0 };
            let query = axum::extract::Query::<crate::files::FilesQuery>::try_from_uri(&uri);
            let Ok(axum::extract::Query(query)) = query else { return 1 };
            let refused =
                crate::files::authorise(&state, &HeaderMap::new(), Operation::Read, &query);
            let refusal = refused.expect_err("it was not signed with the token");
            crate::fuzz::outcome(format!("{refusal:?}"))
        });
    }

    #[test]
    fn any_authorization_names_a_user_or_none() {
        crate::fuzz::run("basic", &["Basic ", "dXNlcjo", "=", "Og"], |input| {
            let Ok(value) = http::HeaderValue::from_bytes(input) else { return 0 };
            let user = basic_user(&HeaderMap::from_iter([(AUTHORIZATION, value)]));
            assert!(user.as_ref().is_none_or(|user| !user.is_empty() && !user.contains(':')));
            crate::fuzz::outcome(user)
        });
    }
}
