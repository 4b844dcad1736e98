//! Whose file URL is this? Signed URLs that name no sandbox.
//!
//! With `E2B_SANDBOX_URL` set, the SDKs' download and upload URLs are
//! `http://host:port/files?path=…&signature=…` and nothing says which sandbox is meant. Only the
//! token of that sandbox can have made the signature, so the signature is the name.
//!
//! The signature is `v1_` + base64 without padding of
//! SHA-256(`path:operation:user:token[:expiration]`). Source: `contract/e2b-wire.md` sections 2.1
//! and 3.2. Whether it has expired is for the guest daemon to say.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use belljar_domain::Secret;
use http::header::ACCESS_CONTROL_REQUEST_METHOD;
use http::{HeaderMap, Method, Uri};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

const PREFIX: &str = "v1_";
const FILES_PATH: &str = "/files";
/// Longest path a signature is checked for, in bytes: Linux' `PATH_MAX`. Anybody may send one,
/// and each is hashed.
const PATH_MAX_BYTES: usize = 4096;

/// A signed file URL that names no sandbox.
pub struct SignedUrl {
    /// SHA-256 of everything before the token; the same for every candidate.
    prefix: Sha256,
    expiration: Option<String>,
    /// The 32 bytes behind `v1_`.
    digest: [u8; 32],
}

impl SignedUrl {
    /// Reads a request as a signed file URL. `None` when it is none: another path, no signature,
    /// or one of a shape that no token can make.
    pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap) -> Option<SignedUrl> {
        if uri.path() != FILES_PATH {
            return None;
        }
        let operation = operation(method, headers)?;
        let query: Vec<(String, String)> = serde_urlencoded::from_str(uri.query()?).ok()?;
        // The first value of a repeated name counts, as in the guest daemon.
        let value = |name: &str| query.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        let signature = value("signature")?.strip_prefix(PREFIX)?;
        let digest = STANDARD_NO_PAD.decode(signature).ok()?.try_into().ok()?;
        let path = value("path").unwrap_or_default();
        let user = value("username").unwrap_or_default();
        if path.len() > PATH_MAX_BYTES || user.len() > PATH_MAX_BYTES {
            return None;
        }
        let expiration = value("signature_expiration").filter(|text| !text.is_empty());
        if expiration.is_some_and(|text| text.len() > 20) {
            return None;
        }
        let prefix = Sha256::new().chain_update(format!("{path}:{operation}:{user}:"));
        Some(SignedUrl { prefix, expiration: expiration.map(str::to_owned), digest })
    }

    /// Whether `token` made the signature. Takes the same time for every token of one length.
    pub fn is_signed_with(&self, token: &Secret<String>) -> bool {
        let mut hash = self.prefix.clone();
        hash.update(token.expose());
        if let Some(expiration) = &self.expiration {
            hash.update(":");
            hash.update(expiration);
        }
        hash.finalize().as_slice().ct_eq(&self.digest).into()
    }
}

/// A browser asks first whether it may upload; its question carries the same URL.
fn operation(method: &Method, headers: &HeaderMap) -> Option<&'static str> {
    match *method {
        Method::GET | Method::HEAD => Some("read"),
        Method::POST => Some("write"),
        Method::OPTIONS => match headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes() {
            b"GET" | b"HEAD" => Some("read"),
            b"POST" => Some("write"),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: Method, uri: &str) -> Option<SignedUrl> {
        SignedUrl::parse(&method, &uri.parse().expect("a URI"), &HeaderMap::new())
    }

    fn token(text: &str) -> Secret<String> {
        Secret::new(text.to_owned())
    }

    /// Digests by another implementation: `printf '%s' TEXT | sha256sum | xxd -r -p | base64`.
    #[test]
    fn known_signatures_match_their_token_only() {
        let cases = [
            // "/home/user/a b.txt:read:user:secret"
            (Method::GET, "path=%2Fhome%2Fuser%2Fa+b.txt&username=user", READ),
            // "/home/user/a b.txt:write::secret:1900000000"
            (
                Method::POST,
                "path=%2Fhome%2Fuser%2Fa%20b.txt&signature_expiration=1900000000",
                WRITE_EXPIRING,
            ),
        ];
        for (method, query, signature) in cases {
            let signature = signature.replace('+', "%2B").replace('/', "%2F");
            let uri = format!("/files?{query}&signature={signature}");
            let url = parse(method, &uri).expect("a signed URL");
            assert!(url.is_signed_with(&token("secret")), "{uri}");
            assert!(!url.is_signed_with(&token("secreT")), "{uri}");
            assert!(!url.is_signed_with(&token("")), "{uri}");
        }
    }

    const READ: &str = "v1_ae/PFK68iY0J3Y2sR1eBCM5nRuIgB8rBOQabN6OIhEQ";
    const WRITE_EXPIRING: &str = "v1_j2E7MWoblP00Cx/rclA2zQfmLgXL3W8+taADTxvWfQc";

    #[test]
    fn what_no_token_can_have_signed_is_refused() {
        let good = format!("/files?path=a&signature={READ}");
        assert!(parse(Method::GET, &good).is_some());
        for (method, uri) in [
            (Method::DELETE, good.clone()),
            (Method::OPTIONS, good),
            (Method::GET, format!("/file?path=a&signature={READ}")),
            (Method::GET, "/files?path=a".to_owned()),
            (Method::GET, "/files".to_owned()),
            (Method::GET, "/files?path=a&signature=".to_owned()),
            (Method::GET, "/files?path=a&signature=v1_AAAA".to_owned()),
            (Method::GET, "/files?path=a&signature=v2_AAAA".to_owned()),
            (Method::GET, format!("/files?path={}&signature={READ}", "a".repeat(4097))),
        ] {
            assert!(parse(method.clone(), &uri).is_none(), "{method} {uri}");
        }
    }
}
