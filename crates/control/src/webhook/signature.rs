//! How a receiver knows a delivery is ours. Source: contract section 1.7.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use belljar_domain::Secret;
use sha2::{Digest as _, Sha256};

/// Value of the version header that names this scheme.
pub(crate) const VERSION: &str = "v1";

/// base64url without padding of SHA-256 over the secret followed by the body as sent.
pub(crate) fn sign(secret: &Secret<String>, body: &[u8]) -> String {
    let digest = Sha256::new().chain_update(secret.expose()).chain_update(body).finalize();
    URL_SAFE_NO_PAD.encode(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_the_contracts() {
        let secret = Secret::new("0123456789abcdef".to_owned());
        // printf '0123456789abcdef{"a":"ü"}' | openssl dgst -sha256 -binary | basenc --base64url
        assert_eq!(
            sign(&secret, "{\"a\":\"\u{fc}\"}".as_bytes()),
            "G45vZ9T5gCp9LuPBQDSLCpQ6WZUEPTzGoaonr6Q5ciw"
        );
        assert_ne!(sign(&secret, b"{}"), sign(&secret, b"{ }"));
    }
}
